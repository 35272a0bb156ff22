"""What a class can hold: which units it can lose, found out by trying, before any are chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from glob import escape
from itertools import combinations
from typing import NamedTuple, TypeVar

import numpy as np

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan, PlanError
from taylorfx.interop.calls import example_of, interface_of
from taylorfx.interop.like import LikeError, Original, UserModule, resized
from taylorfx.layers.roles import Experts
from taylorfx.network.run import Inputs, bind_inputs
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG, bar
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.order import like_structures
from taylorfx.tree import Params

__all__ = ["constraints_of", "failing", "floors", "held", "holdable", "of_batch", "some_of", "trying"]

T = TypeVar("T")

Scopes = tuple[int, ...]
"""Numbers of scopes."""


class Rule(NamedTuple):
    """Scopes that may lose units in one way.

    Attributes:
        groups: scopes that keep equal numbers.
        multiple: what these numbers are multiples of.
        chunks: how many parts each scope falls into that keep equal numbers.
    """

    groups: tuple[Scopes, ...]
    multiple: int = 1
    chunks: int = 1


def holdable(
    module: UserModule,
    params: Params,
    spec: Spec,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    *,
    unchanged: Sequence[str] = (),
    progress: bool = False,
) -> Constraints:
    """What a module's own class can hold: constraints under which `to_torch` with ``like=module`` takes what is cut.

    ::

        params, spec = tfx.from_torch(module, x)
        constraints = tfx.interop.holdable(module, params, spec)
        plan = tfx.select(scores, coupling, budget=tfx.Flops(0.5), constraints=constraints)
        small = tfx.to_torch(tfx.cut(params, plan), plan.spec, like=module)

    A few units are cut and `to_torch` is tried: of all scopes at once, then of halves of them, until it is known which
    ones the class cannot lose. Scopes of the same structure, as in repeated blocks, are tried together. Where one alone
    fails, equal numbers are tried within a kind of scope and in pairs of kinds (the halves of a ``chunk``, the
    dimensions of keys and of values), then multiples of 2 and more. What fails all the same is protected. At last all
    are cut at once, by a little and by half.

    Args:
        module: the module that was captured; it is left as it is.
        params, spec: its network, before anything is cut.
        example_inputs, example_kwargs, unchanged: as for `to_torch`.
        progress: draw a bar that counts the tries, by rich.

    Returns:
        Constraints on the scopes of this network: ``protect``, ``uniform``, ``multiple`` and ``floor``. Without any,
        the class can lose whatever the network can.

    Raises:
        LikeError: if not even the whole network is the module's.
    """
    original = Original(module, params, spec, example_inputs, example_kwargs, (params, spec))
    return constraints_of(original, params, couple(params, spec), unchanged, progress=progress)


def constraints_of(
    original: Original, params: Params, coupling: Coupling, unchanged: Sequence[str] = (), *, progress: bool = False
) -> Constraints:
    """`holdable` of a module that is compared already."""
    with trying(type(original.module).__name__, progress) as advance:
        trials = _Trials(original, params, coupling, unchanged, advance)
        trials.check({}, {})
        rules = [Rule(tuple((scope,) for scope in kind)) for kind in _kinds(coupling)]
        return held(_allowed(trials, rules), coupling)


@contextmanager
def trying(kind: str, progress: bool) -> Iterator[Callable[[int], None]]:
    """A bar that counts the tries at a class, and lines of the log before and after them."""
    count = 0
    LOG.info("holdable: tries what %s can lose", kind)
    with bar(progress, "holdable", None) as advance:

        def tried(number: int) -> None:
            nonlocal count
            count += number
            advance(number)

        yield tried
    LOG.info("holdable: %s was cut %d times", kind, count)


def held(rules: Sequence[Rule], coupling: Coupling) -> Constraints:
    """What rules allow, as constraints: scopes without a rule are protected.

    Among branches these keep all of their units as long as the branch stays in which they lie: to protect them would
    keep the branch.
    """
    lost = {scope for rule in rules for group in rule.groups for scope in group}
    names, sizes = [escape(name) for name in coupling.scopes], coupling.sizes.tolist()
    rigid = [k for k in range(len(names)) if k not in lost and (sizes[k] > 1 or coupling.branches)]
    least = floors(coupling) | ({k: sizes[k] for k in rigid} if coupling.branches else {})
    return Constraints(
        protect=[] if coupling.branches else [names[k] for k in rigid],
        uniform=[tuple(names[k] for k in group) for rule in rules for group in rule.groups if len(group) > 1],
        multiple={names[k]: x.multiple for x in rules if x.multiple > 1 for group in x.groups for k in group} or 1,
        floor={names[k]: n for k, n in least.items()} or 1,
        chunks={names[k]: x.chunks for x in rules if x.chunks > 1 for group in x.groups for k in group} or 1,
    )


def floors(coupling: Coupling) -> dict[int, int]:
    """By scope of experts, how many a router chooses at every position: with fewer, a class fails."""
    least: dict[int, int] = {}
    for node in coupling.spec:
        experts = node.layer.role(Experts)
        if experts is not None:
            chosen = coupling.bounds[node.name].shape[-2]
            units = coupling.axes[coupling.letters[node.name][experts.letter]]
            for scope in np.unique(coupling.scope[units[units >= 0]]).tolist():
                least[scope] = max(chosen, least.get(scope, 1))
    return least


def of_batch(module: UserModule, params: Params, spec: Spec, inputs: Inputs) -> Original:
    """The module, compared with others on some examples of a batch."""
    return Original(module, params, spec, *some_of(spec, inputs), (params, spec))


def some_of(spec: Spec, inputs: Inputs) -> tuple[tuple[object, ...], dict[str, object]]:
    """The module's own call, with some examples of a batch: its arguments by position and by name."""
    tensors = {name: x[:3] for name, x in bind_inputs(spec, (inputs,)).items()}
    return example_of(interface_of(spec), tensors)


def _kinds(coupling: Coupling) -> list[Scopes]:
    """The scopes of more than one unit, those of one structure and size together."""
    kinds: dict[tuple[int, int], list[int]] = {}
    for scope, (structure, size) in enumerate(
        zip(like_structures(coupling).tolist(), coupling.sizes.tolist(), strict=True)
    ):
        if size > 1:
            kinds.setdefault((structure, size), []).append(scope)
    return [tuple(kind) for kind in kinds.values()]


class _Trials:
    """Tries: cut, and make the class of it."""

    def __init__(
        self, original: Original, params: Params, coupling: Coupling, unchanged: Sequence[str],
        advance: Callable[[int], None],
    ) -> None:  # fmt: skip
        self.advance = advance
        self.original = original
        self.params = params
        self.coupling = coupling
        self.unchanged = unchanged
        self.floors = floors(coupling)
        self._known: dict[tuple[tuple[int, int, int], ...], bool] = {}

    def check(self, amounts: Mapping[int, int], chunks: Mapping[int, int], *, last: bool = False) -> None:
        """Cut the first or the last units of these scopes, of each chunk as many, and make the class of the rest.

        Raises:
            LikeError: if it cannot be.
            PlanError: if a layer would lose all of an axis.
        """
        keep = np.ones(len(self.coupling), bool)
        for scope, count in amounts.items():
            units = np.flatnonzero(self.coupling.scope == scope)
            units, parts = units[np.argsort(self.coupling.index[units])], chunks.get(scope, 1)
            for part in np.split(units, parts):
                keep[part[len(part) - count // parts :] if last else part[: count // parts]] = False
        plan = Plan(self.coupling, keep)
        self.advance(1)
        resized(self.original, cut(self.params, plan), plan.spec, self.unchanged)

    def holds(self, rules: Sequence[Rule], share: float = 0.0) -> bool:
        """The class holds what these rules let leave: this share and one or two more, so that neighbors differ.

        Without a share these are the first units of every scope, with one the last: a slice of channels, or a chunk,
        is not cut alike at both ends.
        """
        amounts: dict[int, int] = {}
        places = [(j + k, rule, group) for j, rule in enumerate(rules) for k, group in enumerate(rule.groups)]
        for place, rule, group in places:
            size, step = min(int(self.coupling.sizes[scope]) for scope in group), rule.multiple * rule.chunks
            count = max(0, int(share * size) // step) + 1 + place % 2
            most = size - max(self.floors.get(scope, 1) for scope in group)
            amounts |= dict.fromkeys(group, min(count, most // step) * step)
        chunks = {scope: rule.chunks for _, rule, group in places for scope in group}
        key = tuple(sorted((scope, count, chunks[scope]) for scope, count in amounts.items()))
        if key not in self._known:
            try:
                self.check(amounts, chunks, last=bool(share))
                self._known[key] = True
            except (LikeError, PlanError):
                self._known[key] = False
        return self._known[key]

    def all_hold(self, rules: Sequence[Rule]) -> bool:
        """By a little, and by half."""
        return self.holds(rules) and self.holds(rules, 0.4)


def _allowed(trials: _Trials, rules: Sequence[Rule]) -> list[Rule]:
    """The rules under which the class holds what leaves, of all kinds of scopes."""
    # What fails alone may hold beside another kind that happens to lose as many.
    alone = [rule for rule in rules if not trials.all_hold([rule])]
    unfit = [*alone, *failing([rule for rule in rules if rule not in alone], trials.all_hold)]
    allowed = [rule for rule in rules if rule not in unfit]
    left: list[Scopes] = []
    for rule in unfit:
        good, bad = _parted(trials, tuple(scope for (scope,) in rule.groups))
        allowed += [Rule(tuple((scope,) for scope in good))] * bool(good)
        left += [bad] * bool(bad)
    for count in (1, 2, 3):
        for several in combinations(left, count):
            found = None if any(kind not in left for kind in several) else _equal(trials, several)
            if found:
                allowed.append(found)
                left = [kind for kind in left if kind not in several]
    allowed += [found for kind in left if (found := _multiples(trials, kind))]
    return _jointly(trials, allowed)


def failing(items: Sequence[T], holds: Callable[[Sequence[T]], bool]) -> list[T]:
    """Those that fail, by halves.

    >>> failing(range(8), lambda some: not {2, 5} & {*some})
    [2, 5]
    """
    if not items or holds(items):
        return []
    if len(items) == 1:
        return [*items]
    middle = len(items) // 2
    return [*failing(items[:middle], holds), *failing(items[middle:], holds)]


def _parted(trials: _Trials, kind: Scopes) -> tuple[Scopes, Scopes]:
    """The scopes of a kind that the class can lose units of, and the others; if both ends fail, all are taken to."""

    def holds(scopes: Sequence[int]) -> bool:
        return trials.all_hold([Rule(tuple((scope,) for scope in scopes))])

    if not holds(kind[:1]) and not holds(kind[-1:]):
        return (), kind
    bad = failing(kind, holds)
    return tuple(scope for scope in kind if scope not in bad), tuple(bad)


def _equal(trials: _Trials, kinds: Sequence[Scopes]) -> Rule | None:
    """Equal numbers in blocks of one scope of each kind, or of two of one kind; otherwise in all of them."""
    sizes = {int(trials.coupling.sizes[scope]) for kind in kinds for scope in kind}
    if len(sizes) > 1 or len({*map(len, kinds)}) > 1:
        return None
    if len(kinds) > 1:
        blocks = [tuple(zip(*kinds, strict=True))]
    else:
        (kind,) = kinds
        blocks = [tuple(zip(kind[::2], kind[1::2], strict=True))] if len(kind) % 2 == 0 else []
    every = tuple(scope for kind in kinds for scope in kind)
    ways = (Rule(groups) for groups in dict.fromkeys([*blocks, (every,)]) if len(every) > 1)
    return next((rule for rule in ways if trials.all_hold([rule])), None)


def _multiples(trials: _Trials, kind: Scopes) -> Rule | None:
    """The least number of which multiples can stay, or of parts that keep as many."""
    size, alone = int(trials.coupling.sizes[kind[0]]), tuple((scope,) for scope in kind)
    numbers = [n for n in range(2, size // 2 + 1) if size % n == 0]
    ways = (rule for n in numbers for rule in (Rule(alone, multiple=n), Rule(alone, chunks=n)))
    return next((rule for rule in ways if trials.all_hold([rule])), None)


def _jointly(trials: _Trials, rules: Sequence[Rule]) -> list[Rule]:
    """The rules that hold together: one that fails beside those before it is left out."""
    if trials.all_hold(rules):
        return [*rules]
    kept: list[Rule] = []
    for rule in rules:
        if trials.all_hold([*kept, rule]):
            kept.append(rule)
    return kept

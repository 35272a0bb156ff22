"""What a class of transformers and its config can hold: which units can leave, before any are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan, PlanError
from taylorfx.interop.huggingface.depth import Stack
from taylorfx.interop.huggingface.fields import ConfigError
from taylorfx.interop.huggingface.making import Source
from taylorfx.interop.trials import Rule, failing, floors, held, trying
from taylorfx.network.spec import Spec
from taylorfx.selection.constraints import Constraints
from taylorfx.tree import Params, map_paths

__all__ = ["holdable"]


def holdable(
    model: Any,
    params: Params,
    spec: Spec,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    *,
    branches: bool = False,
    per_layer: bool = False,
    progress: bool = False,
) -> Constraints:
    """What a model's class and its config can hold: constraints under which `save_pretrained` takes what is cut.

    ::

        constraints = tfx.interop.huggingface.holdable(model, params, spec)
        params, spec = tfx.prune(params, spec, batch, budget=tfx.Flops(0.7), constraints=constraints)

    A config has one number for the width of all MLPs, another for the heads of all layers: their scopes keep equal
    numbers of units (``uniform``), each its own best; those that it has in a list are free. What no field sets is
    protected, as one dimension of one head. Of experts as many stay as a router chooses (``floor``).
    Which fields set which axes is found out by building the class from changed configs, without memory.

    With ``branches`` whole layers may leave, too::

        constraints = tfx.interop.huggingface.holdable(model, params, spec, branches=True)
        params, spec = tfx.prune(..., constraints=constraints, branches=True)

    A config counts whole layers: all branches of one leave together (attention and MLP; in a decoder cross-attention as
    well), and the first layer stays, as a class has one. The layers that stay keep equal numbers of other units. A
    layer that is ``norm(x + f(x))``, as in BERT, leaves a norm behind, and no config has that norm alone: it stays.

    With ``per_layer`` layers may differ: a config says in ``per_layer_config`` what is not alike in all of them. Few
    classes of transformers build their layers by it; for the others `save_pretrained` writes one beside the config::

        constraints = tfx.interop.huggingface.holdable(model, params, spec, per_layer=True)
        params, spec = tfx.prune(..., constraints=constraints)
        tfx.interop.huggingface.save_pretrained(folder, params, spec, like=model, per_layer=True)

    Args:
        model: the model that was captured; it is left as it is.
        params, spec: its network, before anything is cut.
        example_inputs, example_kwargs: what to compare on, as for `taylorfx.to_torch`.
        branches: the constraints are for a coupling with branches, of which those of whole layers may leave.
        per_layer: layers may keep different numbers of units, where a class with ``per_layer_config`` can be built.
        progress: draw a bar that counts the tries, by rich.

    Raises:
        ConfigError: for a module without a config, and a class that cannot be built from its own.
    """
    source = Source(model, params, spec, example_inputs, example_kwargs, (params, spec), per_layer=per_layer)
    with trying(type(model).__name__, progress) as advance:
        trials = _Trials(source, params, couple(params, spec, branches=branches), advance)
        rules = _jointly(trials, [*_rules(trials)])
        return held([*rules, *_layers(trials, rules)], trials.coupling)


TRIED = 12
"""How many amounts of units that leave are tried."""


class _Trials:
    """Tries: cut a few units, and look for a config of what is left."""

    def __init__(self, source: Source, params: Params, coupling: Coupling, advance: Callable[[int], None]) -> None:
        self.source, self.params, self.advance = source, params, advance
        self.blank = map_paths(lambda path, x: x.to("meta"), params)
        """Shapes alone: most trials need no more."""
        self.coupling = coupling
        self.floors = floors(self.coupling)

    def holds(
        self, rules: Sequence[Rule], share: float = 0.0, *, only: int | None = None, proven: bool = False
    ) -> bool:
        """There is a config when these scopes lose a share of their units and one step more.

        Args:
            only: which of the rules loses that share; the others lose one step.
            proven: make the model, too, and compare it at the example.
        """
        shares = [share if only in (None, k) else 0.0 for k in range(len(rules))]
        return self.stands(self._keep(rules, shares), proven=proven)

    def stands(self, keep: Mask, *, proven: bool) -> bool:
        """There is a config when only these units are kept."""
        self.advance(1)
        try:
            plan = Plan(self.coupling, keep)
            if proven:
                self.source.make(cut(self.params, plan), plan.spec, every_call=False)
                return True
            return next(self.source.candidates(cut(self.blank, plan)), None) is not None
        except (ConfigError, PlanError):
            return False

    def proven(self, rules: Sequence[Rule]) -> bool:
        """By a little and by half, at the example."""
        return self.holds(rules, proven=True) and self.holds(rules, 0.4, proven=True)

    def everywhere(self, rules: Sequence[Rule]) -> bool:
        """There is a config for every number of units that these rules let stay, of those that are tried.

        A class may want a width that its heads divide: then one number of heads holds, and the next one does not.
        """
        least = min(int(self.coupling.sizes[rule.groups[0][0]]) // rule.multiple for rule in rules)
        return all(self.holds(rules, k / least) for k in range(min(least, TRIED)))

    def shallower(self, layers: Sequence[_Layer], rules: Sequence[Rule] = ()) -> bool:
        """There is a config without these layers, proven, where others lose one step of what these rules let leave."""
        keep = self._keep(rules, [0.0] * len(rules))
        keep &= ~np.isin(self.coupling.scope, [scope for layer in layers for scope in layer.branches])
        keep = self.coupling.settled(keep)
        left = self.source.left(cut(self.blank, Plan(self.coupling, keep)))
        gone = all(layer.number not in left.get(layer.stack, [layer.number]) for layer in layers)
        return gone and self.stands(keep, proven=True)

    def _keep(self, rules: Sequence[Rule], shares: Sequence[float]) -> Mask:
        keep = np.ones(len(self.coupling), bool)
        for rule, share in zip(rules, shares, strict=True):
            for group in rule.groups:
                size = int(self.coupling.sizes[group[0]])
                most = size - max(self.floors.get(scope, 1) for scope in group)
                count = min(int(share * size) // rule.multiple + 1, most // rule.multiple) * rule.multiple
                for scope in group:
                    units = np.flatnonzero(self.coupling.scope == scope)
                    units = units[np.argsort(self.coupling.index[units])]
                    keep[units[len(units) - count :] if share else units[:count]] = False
        return keep


def _kinds(coupling: Coupling) -> list[tuple[int, ...]]:
    """The scopes of one role and size, in all layers.

    ``layers.0.mlp: hidden`` and ``layers.1.mlp: hidden`` are of one kind; their numbers are left out of the names.
    """
    kinds: dict[tuple[str, int], list[int]] = {}
    for scope, (name, size) in enumerate(zip(coupling.scopes, coupling.sizes.tolist(), strict=True)):
        if size > 1:
            kinds.setdefault((re.sub(r"\d+", "", name), size), []).append(scope)
    return [tuple(kind) for kind in kinds.values()]


def _rules(trials: _Trials) -> Iterator[Rule]:
    """The ways in which kinds of scopes may lose units; those that may lose none are left out."""
    left: list[tuple[int, ...]] = []
    for kind in _kinds(trials.coupling):
        rule = next((x for x in _ways(trials, kind) if trials.everywhere([x]) and trials.proven([x])), None)
        if rule is None:
            left.append(kind)
        else:
            yield rule
    yield from _several(trials, left)  # dimensions of queries and values; heads of encoder and decoder
    for kind in [*left]:
        size = int(trials.coupling.sizes[kind[0]])
        ways = (rule for n in range(2, size // 2 + 1) if size % n == 0 for rule in _ways(trials, kind, n))
        for rule in islice((rule for rule in ways if trials.everywhere([rule]) and trials.proven([rule])), 1):
            yield rule
            left.remove(kind)
    for multiple in (2, 4, 8, 16):  # routed experts, whose products take only some widths, and those for all tokens
        yield from _several(trials, left, multiple)


def _several(trials: _Trials, left: list[tuple[int, ...]], multiple: int = 1) -> Iterator[Rule]:
    """Kinds of scopes of one size that may lose units together; they are taken out of those that are left."""
    sizes = trials.coupling.sizes
    for count in range(2, len(left) + 1):
        alike: dict[int, list[tuple[int, ...]]] = {}
        for kind in left:
            if (size := int(sizes[kind[0]])) % multiple == 0 and size > multiple:
                alike.setdefault(size, []).append(kind)
        kinds = [x for x in alike.values() if count < 4 or count == len(x)]
        for several in (x for each in kinds for x in combinations(each, count)):
            if any(kind not in left for kind in several):
                continue
            rule = Rule((tuple(scope for kind in several for scope in kind),), multiple)
            if trials.everywhere([rule]) and trials.proven([rule]):
                yield rule
                for kind in several:
                    left.remove(kind)


def _ways(trials: _Trials, kind: tuple[int, ...], multiple: int = 1) -> Iterator[Rule]:
    """Every scope of a kind keeps a number of its own, if the first can lose units alone; or all keep one number."""
    if len(kind) == 1 or trials.proven([Rule((kind[:1],), multiple)]):
        yield Rule(tuple((scope,) for scope in kind), multiple)
    yield Rule((kind,), multiple)


class _Layer(NamedTuple):
    """A layer, and the scopes of its branches."""

    stack: Stack
    number: int
    branches: list[int]


def _layers(trials: _Trials, rules: Sequence[Rule]) -> Iterator[Rule]:
    """For every layer that may leave its branches, which leave as one; the first of a stack stays."""
    coupling, presence = trials.coupling, trials.coupling.presence
    for stack in trials.source.stacks if coupling.branches else ():
        layers = [_Layer(stack, k, []) for k in range(stack.size)]
        for branch in coupling.branches:
            paths = presence.needing(presence.parameters, branch.unit)
            numbers = {stack.layer(path) for path in paths if path in trials.source.original.tensors}
            if len(numbers) == 1 and (number := numbers.pop()) is not None:
                layers[number].branches.append(int(coupling.scope[branch.unit]))
        several = layers[1:]
        bad = [*failing(several[::2], trials.shallower), *failing(several[1::2], trials.shallower)]
        good = [layer for layer in several if layer not in bad]
        if good and trials.shallower(good, rules):
            yield from [Rule((tuple(layer.branches),)) for layer in good]


def _jointly(trials: _Trials, rules: Sequence[Rule]) -> list[Rule]:
    """The rules that hold together: one that fails beside one of those before it is left out.

    Narrow ones come first, so that heads stay free where a width would have to be a multiple of their number.
    """
    kept: list[Rule] = []
    for rule in sorted(rules, key=lambda rule: rule.multiple):
        if all(_beside(trials, rule, other) for other in kept) and trials.proven([*kept, rule]):
            kept.append(rule)
    return kept


def _beside(trials: _Trials, one: Rule, other: Rule) -> bool:
    """Two rules hold together, whatever number of units each takes away."""
    return trials.everywhere([one, other]) and all(
        trials.holds([one, other], share, only=k) for share in (0.0, 0.4, 0.7) for k in (0, 1)
    )

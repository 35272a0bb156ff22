"""Constraints: what a selection respects, as a value that is checked against a coupling before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from glob import escape
from numbers import Integral, Real
from typing import NamedTuple, TypedDict, TypeVar

import numpy as np

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.plan import Plan, former_scopes
from taylorfx.network.labels import Labels
from taylorfx.scoring.measurement import one_of
from taylorfx.selection.budget import SelectionError
from taylorfx.selection.globs import Globs, all_match, first_of, globs

__all__ = ["ConstraintOptions", "Constraints", "Rules"]

T = TypeVar("T")
N = TypeVar("N", int, float)
Families = str | Iterable[Globs]
"""Globs, or several in one tuple that say one thing together."""


class ConstraintOptions(TypedDict, total=False):
    """The keywords of `Constraints`, for the type checker."""

    protect: Globs
    floor: int | Mapping[str, int]
    most: float | Mapping[str, float]
    multiple: int | Mapping[str, int]
    uniform: Families
    chunks: int | Mapping[str, int]
    per_layer: bool
    isomorphic: bool
    exact_only: bool


class Rules(NamedTuple):
    """Constraints on one coupling, by the numbers of its scopes."""

    groups: list[list[int]]
    """Scopes that keep the same number of units; most are alone."""
    floors: list[int]
    most: list[float]
    multiples: list[int]
    protected: Mask
    """``(units,)``: those that stay whatever they are worth."""
    chunks: Sequence[int] = ()
    """Into how many parts each scope falls, which keep the same number; none: all are whole."""

    def least(self, scope: int, size: int) -> int:
        """The fewest units that a scope of this size keeps, by its floor and its most.

        >>> Rules([[0]], [2], [0.75], [1], np.zeros(10, bool)).least(0, 10)  # 7 of 10 may leave
        3
        """
        return max(self.floors[scope], math.ceil((1 - self.most[scope]) * size - 1e-9))

    def width(self, group: Sequence[int]) -> int:
        """How many units of each scope of a group leave together, in all bundles but the first."""
        return math.lcm(*[self.multiples[k] for k in group])

    def among(self, coupling: Coupling, keep: Mask) -> Rules:
        """The same where these units are kept: a scope that left with a branch need not keep as many as others."""
        absent = coupling.absent(keep)
        if not absent:
            return self
        there = [[k for k in group if k not in absent] for group in self.groups]
        return self._replace(groups=[group for group in there if group] + [[k] for k in sorted(absent)])

    def parts(self, coupling: Coupling) -> tuple[Labels, Rules]:
        """The number of every unit's part of its scope, ``(units,)``, and the rules of these parts.

        ::

            scope     0 0 0 0 0 0  1 1      scope 0 falls into 2 chunks
            part      0 0 0 1 1 1  2 2      parts 0 and 1 are one group
        """
        if all(count == 1 for count in self.chunks):
            return coupling.scope, self
        order = np.lexsort((coupling.index, coupling.scope))
        rank = np.empty(len(coupling), np.int64)
        rank[order] = np.arange(len(coupling)) - (np.cumsum(coupling.sizes) - coupling.sizes)[coupling.scope[order]]
        counts = np.array(self.chunks)
        first = np.cumsum(counts) - counts
        part = first[coupling.scope] + rank * counts[coupling.scope] // coupling.sizes[coupling.scope]
        owner = np.repeat(np.arange(len(counts)), counts).tolist()
        groups = [[int(first[k]) + i for k in group for i in range(self.chunks[k])] for group in self.groups]
        floors = [-(-self.floors[k] // self.chunks[k]) for k in owner]
        multiples = [self.multiples[k] // math.gcd(self.multiples[k], self.chunks[k]) for k in owner]
        return part, Rules(groups, floors, [self.most[k] for k in owner], multiples, self.protected)

    def broken(self, coupling: Coupling, keep: Mask) -> list[str]:
        """What a choice of units to keep, ``(units,)``, does not respect, in words."""
        keep, carried = coupling.settled(keep), coupling.carried(keep)
        gone = self.protected & ~keep & (coupling.exact | ~carried)
        absent, groups = coupling.absent(keep), self.among(coupling, keep).groups
        problems = [f"{coupling.names[unit]} has to stay" for unit in np.flatnonzero(gone).tolist()]
        kept = np.bincount(coupling.scope[keep], minlength=len(coupling.scopes)).tolist()
        for scope, (name, size, n, multiple) in enumerate(
            zip(coupling.scopes, coupling.sizes.tolist(), kept, self.multiples, strict=True)
        ):
            if scope in absent:
                continue
            least = min(self.least(scope, size), size)
            problems += [f"{name} keeps {n} of {size}, fewer than {least}"] * (n < least)
            problems += [f"{name} keeps {n}, no multiple of {multiple}"] * (n not in (size, n // multiple * multiple))
        for group in groups:
            if len({kept[k] for k in group}) > 1:
                problems.append(f"{', '.join(f'{coupling.scopes[k]} keeps {kept[k]}' for k in group)}, not as many")
        part, _ = self.parts(coupling)
        for scope, name in enumerate(coupling.scopes):
            parts = np.unique(part[coupling.scope == scope])
            counts = [int(keep[part == k].sum()) for k in parts]
            problems += [f"{name} keeps {counts} in its chunks, not as many"] * (len({*counts}) > 1)
        return problems


@dataclass(frozen=True)
class Constraints:
    """What a selection respects, whatever the scores are; `on` says what that is for one network.

    Globs name scopes, as ``print(coupling)`` lists them, or parameters: one matches a scope if it matches its name, or
    the path of a parameter whose layer writes it. ``"*q_proj*"`` stands for the heads and the dimensions of queries. A
    residual stream, to which every block adds, is meant by its name. A glob that matches nothing in this way stands
    for all scopes that shrink a parameter of that name: ``"*norm.weight"`` for the stream.

    A branch is a scope of one unit, which may leave: plain numbers are of channels. It stays if something in it is
    protected. A scope that leaves with its branch keeps none.

    `prune`, `iterate`, `select` and `joint` take one as ``constraints=``, or its attributes as keywords.

    >>> Constraints(protect="stem.*", multiple=8).protect
    ('stem.*',)

    Attributes:
        protect: globs of scopes, or parameters, that lose nothing (``"layer1.*"``).
        floor: the fewest units that a scope keeps; a number, or by glob (the first that matches counts).
        most: the largest share of its units that a scope loses; likewise.
        multiple: scopes keep multiples of this number of units (or all of them); likewise. Units then leave in
            bundles, ordered by their mean score.
        uniform: globs; the scopes that match one (the first that matches counts) keep the same number of units, each
            its own best. They leave in bundles across the scopes, ordered by their mean score.
        chunks: scopes fall into this many parts of equal length, in the order of their units, that keep the same number
            of units (the halves of ``x.chunk(2)``); a number, or by glob.
        per_layer: rank within each scope instead of across the network, so that all lose about the same share.
        isomorphic: rank only within like structures (Fang et al. 2024, "Isomorphic Pruning for Vision Models",
            arXiv 2407.04616): scopes that run along the same axes of the same kinds of layers. Every such class loses
            about the same share, and its scopes compete. With ``per_layer`` each scope is alone.
        exact_only: keep the units whose removal changes a norm's statistics (``coupling.exact``).

    Raises:
        SelectionError: for globs that are no strings.
    """

    protect: Globs = ()
    floor: int | Mapping[str, int] = 1
    most: float | Mapping[str, float] = 1.0
    multiple: int | Mapping[str, int] = 1
    uniform: Families = ()
    chunks: int | Mapping[str, int] = 1
    per_layer: bool = False
    isomorphic: bool = False
    exact_only: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "protect", globs(self.protect, "protect"))
        several = (self.uniform,) if isinstance(self.uniform, str) else self.uniform
        if not isinstance(several, Iterable):
            globs(several, "uniform")
        families = (x if isinstance(x, str) else globs(x, "uniform") for x in several)
        object.__setattr__(self, "uniform", tuple(families))

    @staticmethod
    def of(constraints: Constraints | None, options: Mapping[str, object]) -> Constraints:
        """The constraints, or those of these keywords.

        Raises:
            SelectionError: for both at once, for keywords that no constraint has, and for globs that are no strings.
        """
        return one_of(Constraints, constraints, options, "The constraints", SelectionError)

    def on(self, coupling: Coupling) -> Rules:
        """What they say of this coupling.

        Raises:
            SelectionError: for globs that match nothing and numbers out of range; of every constraint at once.
        """
        problems: list[str] = []

        def checked(rule: Callable[[], T], otherwise: T) -> T:
            try:
                return rule()
            except SelectionError as error:
                problems.append(str(error))
                return otherwise

        groups = checked(partial(_together, coupling, [*map(_family, self.uniform)]), list[list[int]]())
        floors = checked(partial(_by_scope, coupling, self.floor, "floor", 1), list[int]())
        most = checked(partial(_by_scope, coupling, self.most, "most", 1.0), list[float]())
        multiples = checked(partial(_by_scope, coupling, self.multiple, "multiple", 1), list[int]())
        chunks = checked(partial(_by_scope, coupling, self.chunks, "chunks", 1), list[int]())
        uneven = [
            f"{name} of {n}" for name, n, k in zip(coupling.scopes, coupling.sizes, chunks, strict=False) if n % k
        ]
        if uneven:
            problems.append(f"chunks takes scopes that fall into parts of equal length; received {', '.join(uneven)}.")
        protected = checked(partial(_protected, coupling, (*self.protect,)), np.zeros(len(coupling), bool))
        if problems:
            raise SelectionError(" ".join(problems))
        if coupling.branches:
            protected |= coupling.holding(protected)
        held = protected | ~coupling.exact if self.exact_only else protected
        return Rules(groups, floors, most, multiples, held, chunks)

    def broken(self, coupling: Coupling, keep: Mask) -> list[str]:
        """What a choice of units to keep, ``(units,)``, does not respect, in words; `select` breaks none."""
        return self.on(coupling).broken(coupling, keep)

    def lasting(self, coupling: Coupling) -> Constraints:
        """The same by the names of this network's scopes, with ``floor`` and ``most`` as one floor for every scope.

        `carried` takes these from cut to cut: ``most`` would be of what is left, and a glob may match other scopes.
        """
        rules = self.on(coupling)
        floors = [rules.least(k, size) for k, size in enumerate(coupling.sizes.tolist())]
        return self._named(coupling, rules._replace(floors=floors), coupling, coupling.scope)

    def carried(self, plan: Plan, coupling: Coupling) -> Constraints:
        """What these constraints, which are `lasting`, say of the network that a plan leaves.

        They follow the units: scopes may have other names there, and one of which a single unit is left is gone. Where
        one head is left, the dimensions of keys and of values may be one scope: if they had to keep equal numbers, they
        are its chunks from now on. What cannot be said of such a scope leaves it whole.

        Args:
            coupling: of the smaller network.
        """
        rules = self.on(plan.coupling).among(plan.coupling, plan.keep)
        return self._named(plan.coupling, rules, coupling, former_scopes(plan, coupling))

    def _named(self, before: Coupling, rules: Rules, after: Coupling, former: Labels) -> Constraints:
        """The rules of one network by the names of another one's scopes.

        Args:
            former: for every unit of ``after``, its scope in ``before``.
        """
        protected = {*first_of(before, (*self.protect,))}
        families = [group for group in rules.groups if len(group) > 1]
        equal = {scope for group in families for scope in group}
        floor, multiple, chunks = dict[str, int](), dict[str, int](), dict[str, int]()
        held: set[str] = set()
        parts = {escape(name): _parts(after, former, k) for k, name in enumerate(after.scopes)}
        for name, (olds, even) in parts.items():
            numbers = [math.lcm(*(of[k] for k in olds)) for of in (rules.multiples, rules.chunks)]
            floor[name], (multiple[name], chunks[name]) = max((rules.floors[k] for k in olds), default=1), numbers
            free = max(floor[name], *numbers) == 1 and equal.isdisjoint(olds)
            if not protected.isdisjoint(olds) or not (even or free):
                held.add(name)
            elif not free:
                for of in (floor, multiple, chunks):
                    of[name] *= len(olds)
        uniform = []
        for group in families:
            names = [name for name, (olds, _) in parts.items() if not {*group}.isdisjoint(olds)]
            several = {len(parts[name][0]) for name in names}
            if {scope for name in names for scope in parts[name][0]} >= {*group} and len(several) == 1:
                uniform.append(tuple(names))
            else:
                held.update(names)
        chunks |= dict.fromkeys(held, 1)
        floor = {name: least for name, least in floor.items() if least}  # none for a branch that may leave
        kept = tuple(name for name in parts if name in held)
        return replace(
            self, protect=kept, floor=floor, most=1.0, multiple=multiple, uniform=tuple(uniform), chunks=chunks
        )

    def also(self, other: Constraints, coupling: Coupling) -> Constraints:
        """These, and what the other ones protect, keep equal, keep in multiples and keep at least.

        >>> import torch
        >>> from taylorfx import Input, couple, init, serial
        >>> from taylorfx.layers import Linear
        >>> spec = serial(Input((2,)), a=Linear(2, 8), b=Linear(8, 8), c=Linear(8, 3))
        >>> coupling = couple(init(spec, torch.Generator()), spec)
        >>> both = Constraints(multiple=4).also(Constraints(multiple={"b": 6}, uniform=[("a", "b")]), coupling)
        >>> both.multiple, both.uniform
        ({'a': 4, 'b': 12}, (('a', 'b'),))
        """
        one, two = self.on(coupling), other.on(coupling)
        names = [escape(name) for name in coupling.scopes]
        joined = merged([group for rules in (one, two) for group in rules.groups if len(group) > 1])
        multiples = map(math.lcm, one.multiples, two.multiples)
        return replace(
            self,
            protect=(*self.protect, *other.protect),
            floor={name: n for name, n in zip(names, map(max, one.floors, two.floors), strict=True) if n},
            uniform=tuple(tuple(names[k] for k in group) for group in joined),
            multiple=dict(zip(names, multiples, strict=True)),
            chunks=dict(zip(names, map(math.lcm, one.chunks, two.chunks), strict=True)),
        )


def _parts(coupling: Coupling, former: Labels, scope: int) -> tuple[tuple[int, ...], bool]:
    """The former scopes of a scope's units, and whether these are runs of equal length, in the order of the units."""
    units = np.flatnonzero(coupling.scope == scope)
    scopes = former[units[np.argsort(coupling.index[units])]].tolist()
    olds = tuple(dict.fromkeys(scopes))
    even = scopes == [old for old in olds for _ in range(len(scopes) // len(olds))] and -1 not in olds
    return tuple(old for old in olds if old >= 0), even


def merged(groups: Iterable[Sequence[int]]) -> list[list[int]]:
    """Groups of numbers, those that share a number as one.

    >>> merged([[0, 1], [4, 5], [1, 2]])
    [[4, 5], [0, 1, 2]]
    """
    result: list[list[int]] = []
    for group in groups:
        touching = [other for other in result if set(other) & set(group)]
        result = [other for other in result if other not in touching]
        result.append(sorted({*group, *(k for other in touching for k in other)}))
    return result


def _family(family: Globs) -> tuple[str, ...]:
    return (family,) if isinstance(family, str) else (*family,)


def _protected(coupling: Coupling, globs: Sequence[str]) -> Mask:
    all_match(coupling, globs, "protect")
    chosen = np.zeros(len(coupling.scopes), bool)
    chosen[[*first_of(coupling, globs)]] = True
    return chosen[coupling.scope]


def _together(coupling: Coupling, families: Sequence[Sequence[str]]) -> list[list[int]]:
    """The scopes in groups that keep the same number of units; most are alone."""
    family_of = {glob: ", ".join(family) for family in families for glob in family}
    all_match(coupling, [*family_of], "uniform")
    first = first_of(coupling, [*family_of])
    groups: dict[str | int, list[int]] = {}
    for k in range(len(coupling.scopes)):
        groups.setdefault(family_of[first[k]] if k in first else k, []).append(k)
    unequal = [
        f"for {glob!r} {', '.join(f'{coupling.scopes[k]} of {coupling.sizes[k]}' for k in group)}"
        for glob, group in groups.items()
        if len(group) > 1 and len({*coupling.sizes[group].tolist()}) > 1
    ]
    if unequal:
        raise SelectionError(
            f"uniform takes scopes of as many units; received {'; '.join(unequal)}. Give each size a glob of its own."
        )
    return list(groups.values())


def _by_scope(coupling: Coupling, value: N | Mapping[str, N], what: str, default: N) -> list[N]:
    """One number per scope: one for all channels, or by globs, of which the first that matches counts."""
    by_glob: dict[str, N]
    if isinstance(value, Mapping):
        by_glob = dict(value)
        all_match(coupling, globs(by_glob, what), what)
    else:
        by_glob = {"*": value}
    kind, least, largest = (Real, 0, 1.0) if what == "most" else (Integral, 1, math.inf)

    def number(n: object) -> bool:
        return isinstance(n, kind) and not isinstance(n, bool)

    bad = [f"{n!r} for {glob!r}" for glob, n in by_glob.items() if not number(n) or not least <= n <= largest]
    if bad:
        whole = "" if all(map(number, by_glob.values())) else "a number, " if what == "most" else "a whole number, "
        above = " and at most 1" if what == "most" else ""
        raise SelectionError(f"{what} is {whole}at least {least}{above}; received {', '.join(bad)}.")
    first = first_of(coupling, [*by_glob])
    numbers = [by_glob[first[k]] if k in first else default for k in range(len(coupling.scopes))]
    for scope in (int(coupling.scope[branch.unit]) for branch in coupling.branches):
        if not isinstance(value, Mapping) or scope not in first:
            numbers[scope] = 0 if what == "floor" else default
    return numbers

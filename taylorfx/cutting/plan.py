"""A `Plan` decides which units stay. It is a value: nothing is cut yet."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.cost.counts import flops, parameters
from taylorfx.coupling.presence import Branch, Operand
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.network.labels import Labels
from taylorfx.network.spec import Node, Spec
from taylorfx.network.tables import columns
from taylorfx.scoring.gates import Gates, gates

__all__ = ["Indices", "Plan", "PlanError", "former_scopes"]


Indices = tuple[Tensor | None, ...]
"""For every axis of a parameter the indices that stay; none where all of them do."""


class PlanError(ValueError):
    """A plan that does not fit what it is applied to, or that would take all channels of a layer."""


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """Which units stay. It is a value: nothing is cut yet. ``print(plan)`` compares the network before and after.

    Plans are equal if they keep the same units of the same network.

    Attributes:
        coupling: the units of the original network.
        keep: ``(units,)``, true for those that stay; it is copied and cannot be written. What is in a branch that
            leaves does not stay.
        asked: the budget, in words.

    Raises:
        PlanError: for a mask of another length, or if an axis would lose all of its indices.

    >>> from taylorfx import Flops, Input, couple, init, select, serial
    >>> from taylorfx.layers import Linear
    >>> spec = serial(Input((2,)), Linear(2, 4), Linear(4, 3))
    >>> coupling = couple(init(spec, torch.Generator()), spec)
    >>> plan = select(torch.tensor([4.0, 1.0, 2.0, 3.0]), coupling, budget=Flops(0.5))
    >>> plan
    Plan(keeps 2 of 4 units, asked for at most 50.0% of the FLOPs)
    >>> plan.keep
    array([ True, False, False,  True])
    >>> plan.spec["0"].layer
    Linear(in_features=2, out_features=2, bias=True)
    """

    coupling: Coupling
    keep: NDArray[np.bool_]
    asked: str = ""

    def __post_init__(self) -> None:
        keep = np.array(self.keep, bool)
        object.__setattr__(self, "keep", keep)
        if keep.shape != (len(self.coupling),):
            raise PlanError(f"A plan decides on {len(self.coupling)} units; received a mask of shape {keep.shape}.")
        keep &= ~self.coupling.carried(keep)
        keep.flags.writeable = False
        if empty := self.coupling.empty(keep):
            raise PlanError(f"Every layer keeps at least one channel; nothing would stay at {', '.join(empty)}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Plan):
            return NotImplemented
        return self.coupling.spec == other.coupling.spec and bool(np.array_equal(self.keep, other.keep))

    def __hash__(self) -> int:
        return hash((self.coupling.spec, self.keep.tobytes()))

    @property
    def whole(self) -> bool:
        """Whether all units stay."""
        return bool(self.keep.all())

    @property
    def leaving(self) -> Mask:
        """``(units,)``: those that leave by themselves, and not with a branch in which they are."""
        return self.coupling.leaving(self.keep)

    @cached_property
    def gone(self) -> frozenset[str]:
        """The paths of the parameters that leave as a whole, with a branch."""
        presence, holds = self.coupling.presence, self._holds
        return frozenset(path for path, number in presence.parameters.items() if not holds[number])

    @property
    def digest(self) -> str:
        """What tells plans of one network apart, as 12 letters: a digest of which units stay."""
        return hashlib.sha256(self.keep.tobytes()).hexdigest()[:12]

    @cached_property
    def indices(self) -> Mapping[str, Indices]:
        """For every parameter that stays, by path, the indices of each axis that do; none where all of them do."""
        alive, gone = self.alive, self.gone
        kept = {k: torch.from_numpy(np.flatnonzero(alive[k])) for k in self._shorter}
        parameters = self.coupling.parameters.items()
        return {path: tuple([kept.get(k) for k in axes]) for path, axes in parameters if path not in gone}

    @cached_property
    def spec(self) -> Spec:
        """The smaller network."""
        spec, presence, holds = self.coupling.spec, self.coupling.presence, self._holds
        if self.whole:
            return spec
        if not all(holds):
            spec = presence.left(spec, presence.nodes, holds)
        return replace(spec, nodes=tuple(map(self._resize, spec.nodes)))

    @cached_property
    def operands(self) -> Mapping[Operand, Sequence[Branch]]:
        """The branches that stay, by the operands of sums in the smaller network that they are or are part of."""
        operands: dict[Operand, list[Branch]] = {}
        for branch in self.coupling.branches:
            if self.keep[branch.unit]:
                for operand in self.coupling.presence.operands_of(branch, self._holds):
                    operands.setdefault(operand, []).append(branch)
        return operands

    @cached_property
    def gates(self) -> Gates:
        """The same decision as gates, for ``apply(params, spec, x, gates=plan.gates)`` on the original."""
        return gates(self.coupling, torch.from_numpy(self.keep.astype(np.float32)))

    @cached_property
    def alive(self) -> list[NDArray[np.bool_]]:
        """For every axis of the coupling, which of its indices stay."""
        return self.coupling.alive(self.keep)

    @cached_property
    def _holds(self) -> list[bool]:
        """For every condition of the coupling's presence whether it holds."""
        return [bool(n) for n in self.coupling.lengths(self.keep)[len(self.coupling.axes) :]]

    @cached_property
    def _lengths(self) -> list[int]:
        """For every axis of the coupling, how many of its indices stay."""
        lengths: list[int] = self.coupling.counts(self.keep).tolist()
        return lengths

    @cached_property
    def _shorter(self) -> set[int]:
        """The axes of the coupling that lose an index."""
        return {
            k for k, (axis, n) in enumerate(zip(self.coupling.axes, self._lengths, strict=True)) if n < axis.shape[1]
        }

    def _resize(self, node: Node) -> Node:
        """A node with the sizes that stay; the node itself where nothing leaves."""
        bound, letters = self.coupling.bounds[node.name], self.coupling.letters[node.name]
        if self._shorter.isdisjoint(letters.values()):
            return node
        lengths = self._lengths
        layer = node.layer.resize({**bound.sizes, **{x: lengths[k] for x, k in letters.items()}}, *bound.inputs)
        return node if layer is node.layer else Node(node.name, layer, node.inputs, node.params)

    def __repr__(self) -> str:
        asked = f", asked for {self.asked}" if self.asked else ""
        return f"Plan(keeps {int(self.keep.sum()):,} of {len(self.keep):,} units{asked})"

    def __str__(self) -> str:
        coupling = self.coupling
        everything = np.ones(len(coupling), bool)
        kept = np.bincount(coupling.scope[self.keep], minlength=len(coupling.scopes))
        rows = [("", "before", "after", "kept")]
        for name, before, after in zip(coupling.scopes, coupling.sizes.tolist(), kept.tolist(), strict=True):
            rows.append((name, f"{before:,}", f"{after:,}", f"{after / before:.1%}"))
        rows.append(_row("units", len(coupling), int(self.keep.sum())))
        for name, cost in (("parameters", parameters(coupling)), ("FLOPs", flops(coupling))):
            rows.append(_row(name, cost(everything), cost(self.keep)))
        return (f"asked for {self.asked}\n" if self.asked else "") + columns(rows, right=3)


def former_scopes(plan: Plan, coupling: Coupling) -> Labels:
    """``(units,)``: for every unit of the network that a plan leaves, its scope before; -1 where it is of none.

    Scopes may have other names after a cut, and units have other numbers. A unit is known by its positions along the
    axes of parameters and of layers: of the units before that had all of them it is the one that had the fewest. A
    branch is known by the operand that it is in the smaller network.

    ::

        before      a a a b b b c c c       an axis of two factors, of which units b and y leave
                    x y z x y z x y z
        stays       a . a . . . c . c
                    x   z       x   z
        after       0 0 1 1                 0 is a and 1 is c, 2 is x and 3 is z
                    2 3 2 3

    Args:
        coupling: of the smaller network.
    """
    count, axes = len(plan.coupling), [*_axes_of_both(plan, coupling)]
    former = np.full(len(coupling), -1)
    for branch in coupling.branches:
        for before in plan.operands.get(branch.operand, ())[:1]:
            former[branch.unit] = plan.coupling.scope[before.unit]
    if not axes:
        return former
    pairs = [(new, old) for olds, news in axes for old in olds for new in news]
    both = np.concatenate([(new * count + old)[(new >= 0) & (old >= 0)] for new, old in pairs])
    met, times = np.unique(both, return_counts=True)
    new, old = met // max(count, 1), met % max(count, 1)
    places, had = _occurrences([x for _, x in axes], len(coupling)), _occurrences([x for x, _ in axes], count)
    fewest = np.full(len(coupling), np.iinfo(np.int64).max)
    covers = times == places[new]
    np.minimum.at(fewest, new[covers], had[old[covers]])
    same = covers & (had[old] == fewest[new])
    former[new[same]] = plan.coupling.scope[old[same]]
    return former


def _axes_of_both(plan: Plan, coupling: Coupling) -> Iterator[tuple[Labels, Labels]]:
    """The axes of parameters and layers before and after a cut, those before without what leaves."""
    before = plan.coupling
    pairs: dict[tuple[int, int], None] = {}
    for path, axes in coupling.parameters.items():
        pairs |= dict.fromkeys(zip(before.parameters.get(path, ()), axes, strict=False))
    for name, letters in coupling.letters.items():
        others = before.letters.get(name, {})
        pairs |= {(others[letter], k): None for letter, k in letters.items() if letter in others}
    for one, other in pairs:
        old, new = before.axes[one][:, plan.alive[one]], coupling.axes[other]
        if old.shape[1] == new.shape[1]:
            yield old, new


def _occurrences(axes: Sequence[Labels], count: int) -> Labels:
    """How often each of so many units lies along these axes."""
    units = np.concatenate([axis.ravel() for axis in axes])
    return np.bincount(units[units >= 0], minlength=count)


def _row(name: str, before: float, after: float) -> tuple[str, str, str, str]:
    """A row of the table: before, after, and the share that is kept."""
    return name, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}" if before else "-"

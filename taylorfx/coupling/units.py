"""The units of a network, and where they lie: `Coupling`, the value that `couple` returns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from taylorfx.coupling.listing import Row, listed
from taylorfx.coupling.presence import Branch, Presence
from taylorfx.layers import Shape
from taylorfx.layers.axes import Signature, expand
from taylorfx.network.labels import Bound, Labels
from taylorfx.network.spec import Node, Spec

__all__ = ["Coupling", "Mask", "Place"]


Mask = NDArray[np.bool_]
"""One truth value per unit or index: what stays."""


@dataclass(frozen=True)
class Place:
    """Where activations are read or written.

    Attributes:
        node: the name of the node that reads or writes.
        slot: the number of the node's input; -1 for its output; -2 for the state that a recurrent layer reads.
        axis: the axis of that tensor.
        shape: the tensor's shape for one example.
        units: ``(factors, size)``, the units that gate each index of the axis, -1 for none; ``(1, 1)`` where one gates
            the whole tensor, as a branch does.
        example: the axis along which the examples run, and the size of that axis' slower factors; none where the tensor
            is the same for all examples.
    """

    node: str
    slot: int
    axis: int
    shape: Shape
    units: Labels
    example: tuple[int, int] | None

    @property
    def key(self) -> tuple[str, int, int]:
        """Node, slot and axis."""
        return self.node, self.slot, self.axis


@dataclass(frozen=True, eq=False, repr=False)
class Coupling:
    """What a network is made of: its units, and where they lie. ``len(coupling)`` is their number.

    Attributes:
        spec: the network.
        scopes: the name of each scope, a family of units: in a network that is written by hand that of the node that
            writes them first (``conv1``), in a captured one what they are (``layers.3.mlp: hidden``).
        scope: ``(units,)``, the number of each unit's scope.
        index: ``(units,)``, each unit's position where it is first written.
        exact: ``(units,)``, false where a statistic changes when the unit leaves: that of a norm, or of a weight.
        frozen: by scope, why its channels, or some of them, cannot leave.
        origins: by scope, frozen ones as well, the node that writes it first.
        written: by scope, the parameters of all layers that write it; none for a residual stream, to which every block
            adds.
        axes: the different axes, each ``(factors, size)`` unit numbers, -1 for what stays.
        parameters: for every parameter, by path, the number in ``axes`` of each of its axes.
        letters: for every node, the numbers in ``axes`` of the letters of its signature.
        bounds: for every node, its shapes and the sizes of its letters (of one example).
        reads: where layers mix activations.
        writes: where layers create activations.
        mixing: which layers let the examples of a batch influence each other, and how; empty where none does.
        branches: the units that are branches, each the only one of its scope; none unless they were asked for.
    """

    spec: Spec
    scopes: tuple[str, ...]
    scope: Labels
    index: Labels
    exact: Mask
    frozen: Mapping[str, str]
    origins: Mapping[str, str]
    written: Mapping[str, tuple[str, ...]]
    axes: tuple[Labels, ...]
    parameters: Mapping[str, tuple[int, ...]]
    letters: Mapping[str, Mapping[str, int]]
    bounds: Mapping[str, Bound]
    reads: tuple[Place, ...]
    writes: tuple[Place, ...]
    mixing: tuple[str, ...]
    branches: tuple[Branch, ...] = ()

    def __len__(self) -> int:
        return len(self.scope)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The units' names: ``conv1[3]`` is the fourth feature map of ``conv1``."""
        return tuple(f"{self.scopes[s]}[{i}]" for s, i in zip(self.scope.tolist(), self.index.tolist(), strict=True))

    @cached_property
    def sizes(self) -> Labels:
        """The number of units of each scope."""
        return np.bincount(self.scope, minlength=len(self.scopes))

    @cached_property
    def paths(self) -> tuple[tuple[str, ...], ...]:
        """For every scope, the parameters that shrink with it."""
        paths: list[list[str]] = [[] for _ in self.scopes]
        for path, axes in self.parameters.items():
            for scope in sorted(set[int]().union(*(self._along[k] for k in axes))):
                paths[scope].append(path)
        for branch in self.branches:
            paths[self.scope[branch.unit]] += self.presence.needing(self.presence.parameters, branch.unit)
        return tuple(map(tuple, paths))

    def nodes_of(self, branch: Branch) -> list[str]:
        """The names of the nodes that leave with a branch."""
        return self.presence.needing(self.presence.nodes, branch.unit)

    @cached_property
    def _along(self) -> list[Mapping[int, int]]:
        """For every axis, by scope, how many positions have a unit of the scope."""
        scope = np.append(self.scope, -1)  # so that unit -1 is of none
        along: list[Mapping[int, int]] = []
        for axis in self.axes:
            scopes = scope[axis]
            along.append({x: int((scopes == x).any(0).sum()) for x in np.unique(scopes[scopes >= 0]).tolist()})
        return along

    @cached_property
    def _shrinking(self) -> list[int]:
        """For every scope, the number of weights that lie along one of its units.

        weight of 4 x 6, of whose positions 2 and 3 lie along the scope       4 * 6 - 2 * 3 = 18
        """
        shapes, numbers = self.spec.shapes, [0] * len(self.scopes)
        branches = {int(self.scope[branch.unit]) for branch in self.branches}
        for scope, paths in enumerate(self.paths):
            for path in paths:
                others = (
                    [0]
                    if scope in branches
                    else [
                        n - self._along[k].get(scope, 0)
                        for n, k in zip(shapes[path], self.parameters[path], strict=True)
                    ]
                )
                numbers[scope] += math.prod(shapes[path]) - math.prod(others)
        return numbers

    def alive(self, keep: Mask) -> list[Mask]:
        """For every axis, which of its indices stay when these units are kept."""
        stays, (_, starts, place) = self._stays(keep), self._flat
        return [stays[starts[k] : starts[k + 1]] for k in place.tolist()]

    def counts(self, keep: Mask) -> Labels:
        """For every axis, how many of its indices stay when these units are kept."""
        _, starts, place = self._flat
        counts = np.add.reduceat(self._stays(keep), starts[:-1], dtype=np.int32)  # twice as fast as in 64 bits
        return counts[place].astype(np.int64)

    @cached_property
    def presence(self) -> Presence:
        """What is there when branches leave."""
        return Presence.of(self.spec, self.branches)

    def lengths(self, keep: Mask) -> Labels:
        """What costs are functions of: `counts`, and then for every condition of `presence` 1 if it holds, else 0."""
        counts = self.counts(keep)
        return np.append(counts, self.presence.holds(self._gone(keep))).astype(np.int64) if self.branches else counts

    def pivotal(self, keep: Mask) -> Iterator[tuple[int, int]]:
        """Every branch, and every condition that holds with it and not without it, when these units are kept."""
        gone, presence = self._gone(keep), self.presence
        for branch in self.branches:
            unit = branch.unit
            there, away = (presence.holds(one) for one in (gone - {unit}, gone | {unit}))
            yield from ((unit, k) for k, holds in enumerate(there) if holds and not away[k])

    def carried(self, keep: Mask) -> Mask:
        """``(units,)``: those that leave with a branch in which they are, when these units are kept.

        They are on no node any more that is still there.
        """
        if not self.branches or not (gone := self._gone(keep)):
            return np.zeros(len(self), bool)
        inside, along = self._inside
        carried: Mask = inside & ~along[self.presence.holds(gone)].any(0)
        return carried

    def absent(self, keep: Mask) -> set[int]:
        """The scopes of which all units leave with branches, when these units are kept."""
        carried = np.bincount(self.scope[self.carried(keep)], minlength=len(self.scopes))
        return {*np.flatnonzero(carried == self.sizes).tolist()}

    def settled(self, keep: Mask) -> Mask:
        """The units that stay when these are kept: what is in a branch that leaves, leaves with it."""
        return keep & ~self.carried(keep)

    def leaving(self, keep: Mask) -> Mask:
        """The units that leave by themselves when these are kept, and not along with a branch."""
        leaving: Mask = ~keep & ~self.carried(keep)
        return leaving

    def holding(self, units: Mask) -> Mask:
        """``(units,)``: the branches without which, or without which and others, one of these units would leave."""
        inside, along = self._inside
        numbers = np.flatnonzero((along & (inside & units)).any(1)).tolist()
        held = np.zeros(len(self), bool)
        held[[unit for number in numbers for way in self.presence.conditions[number] for unit in way]] = True
        return held

    def empty(self, keep: Mask) -> list[str]:
        """The parameters, or else the nodes, that would lose all indices of an axis, though they are still there."""
        empty = {*np.flatnonzero(self.counts(keep) == 0).tolist()}
        if not empty:
            return []
        presence, holds = self.presence, self.presence.holds(self._gone(keep))
        paths = [path for path, axes in self.parameters.items() if empty & {*axes}]
        names = [name for name, letters in self.letters.items() if empty & {*letters.values()}]
        return presence.there(presence.parameters, paths, holds) or presence.there(presence.nodes, names, holds)

    def _gone(self, keep: Mask) -> frozenset[int]:
        return frozenset(branch.unit for branch in self.branches if not keep[branch.unit])

    @cached_property
    def _inside(self) -> tuple[Mask, Mask]:
        """``(units,)``: those that lie in branches alone, and ``(conditions, units)``: under which conditions."""
        presence = self.presence
        inside, along = np.ones(len(self), bool), np.zeros((len(presence.conditions), len(self)), bool)
        of_axis: dict[int, set[int]] = {}
        for name, letters in self.letters.items():
            for axis in letters.values():
                of_axis.setdefault(axis, set()).add(presence.nodes.get(name, -1))
        held = [(self.axes[axis][self.axes[axis] >= 0], numbers) for axis, numbers in of_axis.items()]
        held += [(np.array([unit]), {presence.sums.get(node, -1)}) for unit, node, _ in self.branches]
        for units, numbers in held:
            inside[units] &= -1 not in numbers
            for number in numbers - {-1}:
                along[number, units] = True
        return inside, along

    def _stays(self, keep: Mask) -> Mask:
        """For every index of the axes end to end whether it stays: whether all its units do."""
        first, *rest = self._flat[0]
        extended = np.append(keep, True)  # so that unit -1 is always kept
        stays = np.asarray(extended[first], bool)
        for units in rest:
            stays[: len(units)] &= extended[units]
        return stays

    @cached_property
    def _flat(self) -> tuple[list[Labels], Labels, Labels]:
        """All axes end to end, those of the most factors first: their units by factor, their ends, their places.

        axes      0: a b      1: c d c d      2: g           axis 1 is the product of two factors
                                 e e f f
        units     c d c d a b g                              the first factors, of axes 1, 0 and 2
                  e e f f                                    the second ones: where there are any, they are in front
        ends      0       4   6 7
        places    1 0 2                                      axis 0 is the second one
        """
        order = np.argsort([-len(axis) for axis in self.axes], kind="stable")
        axes = [self.axes[k] for k in order]
        units = [np.concatenate([axis[k] for axis in axes if len(axis) > k]) for k in range(len(axes[0]))]
        return units, np.cumsum([0, *(axis.shape[1] for axis in axes)]), np.argsort(order)

    def unit_ids(self, path: str, axis: int) -> Labels:
        """The units of every index of an axis of a parameter, ``(factors, size)``; -1 for what stays."""
        return self.axes[self.parameters[path][axis]]

    def signature(self, node: Node) -> Signature | None:
        """A node's signature, with ``...`` expanded for the ranks of its inputs; none where its layer has none."""
        shapes = self.bounds[node.name].inputs
        text = node.layer.signature(*shapes)
        return None if text is None else expand(text, tuple(map(len, shapes)))

    def __repr__(self) -> str:
        return f"Coupling({len(self):,} units in {len(self.scopes):,} scopes, {len(self.frozen):,} frozen)"

    def __str__(self) -> str:
        exact = np.bincount(self.scope[~self.exact], minlength=len(self.scopes)) == 0
        rows = map(Row, self.scopes, self.sizes.tolist(), self._shrinking, exact.tolist())
        return listed([*rows], self.frozen, self.spec)

"""Labels: every axis of every tensor carries one label per index; layers tie, split and move them.

A label names what leaves together. A layer's signature is *bound* to the labeled axes of its inputs: letters that the
inputs share are tied, letters that are new get fresh labels, products are laid out, joined pieces are laid end to end.
Shapes come out of the same pass, so that shape and label can never disagree.

An axis is a tuple of factors, slowest first. Usually there is one; merging ``(c H W)`` yields three. Splitting a plain
axis ``x`` into ``(a b)`` records the equation "``x[i, j]`` leaves if ``a[i]`` or ``b[j]`` leaves", solved in
`taylorfx.coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from taylorfx.layers import Shape
from taylorfx.network.limits import Room

__all__ = [
    "EXAMPLE",
    "Bound",
    "Factor",
    "Labeled",
    "Labels",
    "Site",
    "Ties",
    "examples",
    "is_example",
    "is_labeled",
    "length",
    "rigid",
    "shape_of",
]


Labels = NDArray[np.int64]


EXAMPLE: Labels = np.full(1, -2)
"""Marks the factor that runs over the examples of a batch; told apart by identity."""


class Factor(NamedTuple):
    """A run of positions: how many, and their labels (none where the axis is rigid, -1 where one position is)."""

    size: int
    labels: Labels | None = None


Labeled = tuple[Factor, ...]
"""One axis: its factors, slowest first."""


@lru_cache(maxsize=4096)
def rigid(size: int) -> Labeled:
    """An axis of which nothing may leave."""
    return (Factor(size),)


def length(axis: Labeled) -> int:
    """The number of positions of an axis."""
    size = 1
    for factor in axis:
        size *= factor.size
    return size


def shape_of(axes: Sequence[Labeled]) -> Shape:
    """The sizes of a tensor's axes."""
    return tuple([length(axis) for axis in axes])


def is_example(axis: Labeled) -> bool:
    for factor in axis:  # noqa: SIM110, for every axis of every tensor: a generator takes longer
        if factor.labels is EXAMPLE:
            return True
    return False


def is_labeled(axis: Labeled) -> bool:
    for factor in axis:  # noqa: SIM110
        if factor.labels is not None and factor.labels is not EXAMPLE:
            return True
    return False


def examples(axes: Sequence[Labeled]) -> tuple[int, int] | None:
    """Where the examples run: the axis, and the size of its slower factors."""
    for k, axis in enumerate(axes):
        for j, factor in enumerate(axis):
            if factor.labels is EXAMPLE:
                return k, length(axis[:j])
    return None


class Site(NamedTuple):
    """A place in the network: along ``axis`` of input ``slot`` of a node, or of its output (slot -1)."""

    node: str
    slot: int
    axis: int
    labels: Labeled
    example: tuple[int, int] | None
    """The axis that runs over the examples, and how many positions its slower factors have; none: all share it."""


@dataclass
class Bound:
    """A layer's signature, bound to its tensors."""

    output: tuple[Labeled, ...]
    letters: dict[str, Labeled] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
    reads: list[Site] = field(default_factory=list)
    writes: list[Site] = field(default_factory=list)
    shape: Shape = field(init=False)
    """The sizes of the output's axes."""

    def __post_init__(self) -> None:
        self.shape = shape_of(self.output)


@dataclass
class Ties:
    """What a pass over a network finds out: ties, splits, what must not move, and every error."""

    labeled: bool = True
    count: int = 0
    equal: list[tuple[Labels, Labels]] = field(default_factory=list)
    products: list[tuple[Labels, Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    inexact: list[Labels] = field(default_factory=list)
    origins: list[tuple[int, str]] = field(default_factory=list)
    mixing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    room: Room = field(default_factory=Room)
    parameters: dict[str, tuple[Labeled, ...]] = field(default_factory=dict)

    def fresh(self, size: int, scope: str) -> Labeled:
        """New labels. A single position gets none: a network cannot lose the last of an axis."""
        if size == 1 or not self.labeled:
            return rigid(size)
        self.room.take(size)
        self.origins.append((self.count, scope))
        self.count += size
        return (Factor(size, np.arange(self.count - size, self.count)),)

    def freeze(self, axis: Labeled, reason: str) -> Labeled:
        """Nothing of this axis may leave; returns the axis without labels."""
        if not is_labeled(axis):
            return axis
        for factor in axis:
            if factor.labels is not None and factor.labels is not EXAMPLE:
                self.frozen.append((factor.labels, reason))
        return tuple(f if f.labels is EXAMPLE else Factor(f.size) for f in axis)

    def flat(self, axis: Labeled, scope: str) -> Labels | None:
        """The labels of an axis as one vector, or none if it is rigid."""
        axis = tuple([f for f in axis if f.size > 1 and f.labels is not EXAMPLE])
        if len(axis) == 1:
            return axis[0].labels
        if all(factor.labels is None for factor in axis):
            return None
        (size, head), rest = axis[0], axis[1:]
        size_of_rest, tail = length(rest), self.flat(rest, scope)
        (joint,) = self.fresh(size * size_of_rest, scope)
        if joint.labels is not None:
            self._product(joint.labels, _repeat(head, size_of_rest), _tile(tail, size))
        return joint.labels

    def tie(self, one: Labeled, other: Labeled, where: str) -> Labeled:
        """Two axes of the same length leave together, position by position."""
        if one is other:
            return one
        if is_example(other):
            one, other = other, one
        if [f.size for f in one] == [f.size for f in other]:
            pairs = [(a.labels, b.labels) for a, b in zip(one, other, strict=True) if a.labels is not EXAMPLE]
        else:
            pairs = [(self.flat(one, where), self.flat(other, where))]
        for a, b in pairs:
            if a is not None and b is not None:
                self._equal(a, b, where)
            elif a is not None or b is not None:
                labels = a if a is not None else b
                assert labels is not None
                self.frozen.append((labels, f"tied at {where} to an axis that cannot shrink"))
        return one

    def split(self, axis: Labeled, parts: Sequence[tuple[int, bool]], scope: Sequence[str]) -> list[Labeled]:
        """Lay an axis out as a product; ``parts`` are the sizes and whether each may shrink. Size one: the examples."""
        grouped = _regroup(axis, [size for size, _ in parts])
        if grouped is not None:
            return grouped
        if parts[0][0] == 1:
            rest = tuple(factor for factor in axis if factor.labels is not EXAMPLE)
            return [(Factor(1, EXAMPLE),), *([rest] if len(parts) == 2 else self.split(rest, parts[1:], scope[1:]))]
        flat = self.flat(axis, scope[0])
        if flat is None:
            return [(Factor(1, EXAMPLE),) if size == 1 else rigid(size) for size, _ in parts]
        (size, movable), remaining = parts[0], parts[1:]
        size_of_rest = math.prod(n for n, _ in remaining)
        head = self.fresh(size, scope[0]) if movable else rigid(size)
        tail = self.fresh(size_of_rest, scope[1]) if any(m for _, m in remaining) else rigid(size_of_rest)
        self._product(flat, _repeat(head[0].labels, size_of_rest), _tile(tail[0].labels, size))
        return [head, *([tail] if len(remaining) == 1 else self.split(tail, remaining, scope[1:]))]

    def _equal(self, a: Labels, b: Labels, where: str) -> None:
        if a is b:
            return
        loose = (a < 0) != (b < 0)
        if loose.any():
            self.frozen.append((np.maximum(a, b)[loose], f"tied at {where} to positions that cannot leave"))
        both = (a >= 0) & (b >= 0)
        self.equal.append((a, b) if both.all() else (a[both], b[both]))

    def _product(self, x: Labels, a: Labels | None, b: Labels | None) -> None:
        if a is None and b is None:
            self.frozen.append((x, "an axis is laid out as rigid ones"))
        elif a is None or b is None:
            labels = a if a is not None else b
            assert labels is not None
            self._equal(x, labels, "a product with a rigid axis")
        else:
            keep = (x >= 0) & (a >= 0) & (b >= 0)
            self.products.append((x[keep], a[keep], b[keep]))
            for held in (x < 0, x >= 0):  # a position that cannot leave holds both of its factors, and they hold it
                chosen = ~keep & held
                if chosen.any():
                    self.frozen.append((np.concatenate([x[chosen], a[chosen], b[chosen]]), "tied to a rigid position"))


def _repeat(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.repeat(labels, times)


def _tile(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.tile(labels, times)


def _regroup(axis: Labeled, sizes: Sequence[int]) -> list[Labeled] | None:
    """Deal the factors out to axes of the given sizes, if they divide that way."""
    factors, groups = [f for f in axis if f.size > 1 or f.labels is EXAMPLE], []
    for size in sizes:
        group: list[Factor] = []
        while factors and (length(tuple(group)) < size or (factors[0].labels is EXAMPLE and 1 not in sizes)):
            group.append(factors.pop(0))
        if size == 1 and factors and factors[0].labels is EXAMPLE:
            group.append(factors.pop(0))
        if length(tuple(group)) != size:
            return None
        groups.append(tuple(group) or rigid(size))
    return None if factors else groups

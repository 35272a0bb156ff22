"""Labels: every axis of every tensor carries one label per index; layers tie, split and move them.

Indices with the same label leave together. A layer's signature is *bound* to the labeled axes of its inputs
(`taylorfx.network.bind`): letters that inputs share are tied, and letters that are new get fresh labels. Shapes come
out of the same pass, so that shapes and labels cannot disagree.

An axis is a tuple of factors, the slowest first. Usually there is one. Merging channels and positions gives several:

    conv         (channels 2, rigid 2, rigid 2)              axes: one factor each
    flatten      ((c H W) = 8)                               one axis of three factors
    labels       0 0 0 0 1 1 1 1                             of the channels; rows and columns are rigid

Splitting an axis ``x`` of one factor into ``(a b)`` records the equation "``x[i, j]`` leaves if ``a[i]`` leaves or
``b[j]`` leaves". `taylorfx.coupling` solves these equations.
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
    "STATE",
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
"""One label per position, or another vector of whole numbers; -1 where the position has to stay."""

EXAMPLE: Labels = np.full(1, -2)
"""Marks the factor that runs over the examples of a batch. It is compared by identity."""


class Factor(NamedTuple):
    """A factor of an axis: its size, and the labels of its positions (none where all of them have to stay)."""

    size: int
    labels: Labels | None = None


Labeled = tuple[Factor, ...]
"""One axis: its factors, slowest first."""


@lru_cache(maxsize=4096)
def rigid(size: int) -> Labeled:
    """An axis that keeps its size."""
    return (Factor(size),)


def length(axis: Labeled) -> int:
    """The number of positions of an axis.

    >>> length((Factor(2), Factor(3)))
    6
    """
    size = 1
    for factor in axis:
        size *= factor.size
    return size


def shape_of(axes: Sequence[Labeled]) -> Shape:
    """The sizes of a tensor's axes."""
    return tuple([length(axis) for axis in axes])


def is_example(axis: Labeled) -> bool:
    """Whether an axis runs over the examples, perhaps as one of its factors."""
    for factor in axis:  # noqa: SIM110, for every axis of every tensor: a generator takes longer
        if factor.labels is EXAMPLE:
            return True
    return False


def is_labeled(axis: Labeled) -> bool:
    """Whether an axis has labels."""
    for factor in axis:  # noqa: SIM110
        if factor.labels is not None and factor.labels is not EXAMPLE:
            return True
    return False


def examples(axes: Sequence[Labeled]) -> tuple[int, int] | None:
    """The axis that runs over the examples, and the size of its factors that are slower; none if there is none.

    >>> examples((rigid(4), (Factor(2), Factor(1, EXAMPLE), Factor(3))))
    (1, 2)
    """
    for k, axis in enumerate(axes):
        for j, factor in enumerate(axis):
            if factor.labels is EXAMPLE:
                return k, length(axis[:j])
    return None


STATE = -2
"""The slot of what a recurrent layer reads of its own output at every step, ``(N, size)``."""


class Site(NamedTuple):
    """A place where a layer reads or writes: along ``axis`` of input ``slot`` of a node, or of its output (slot -1).

    A recurrent layer also reads its own state (slot `STATE`).
    """

    node: str
    slot: int
    axis: int
    labels: Labeled
    example: tuple[int, int] | None
    """As `examples` gives it; none where all examples share the tensor."""


@dataclass
class Bound:
    """A node's signature, bound to labels.

    Attributes:
        output: the axes of the output.
        letters: the axis that each letter stands for.
        sizes: the sizes of the letters.
        inputs: the shapes of the inputs.
        reads: where the layer mixes along labels.
        writes: where it creates labels.
        shape: the shape of the output.
        state: of a recurrent layer, the shape of what it reads of its own output at every step.
    """

    output: tuple[Labeled, ...]
    letters: dict[str, Labeled] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
    reads: list[Site] = field(default_factory=list)
    writes: list[Site] = field(default_factory=list)
    shape: Shape = field(init=False)
    state: Shape = ()

    def __post_init__(self) -> None:
        self.shape = shape_of(self.output)


@dataclass
class Ties:
    """What a pass over a network learns about its labels.

    Attributes:
        labeled: whether axes get labels; without them the pass infers shapes alone.
        count: the number of labels so far.
        equal: pairs of vectors: labels at one position leave together.
        products: triples of vectors: the first label leaves if the second leaves or the third leaves.
        frozen: labels that have to stay, and why.
        inexact: labels along which a layer computes statistics.
        origins: by first label, the scopes in which labels are created.
        mixing: which layers let the examples of a batch influence each other, and how.
        errors: everything that does not fit.
        room: what is left of the limits on sizes.
        parameters: the axes of every parameter, by path.
    """

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
        """An axis of new labels. One of a single position gets none: the last position of an axis has to stay."""
        if size == 1 or not self.labeled:
            return rigid(size)
        self.room.take(size)
        self.origins.append((self.count, scope))
        self.count += size
        return (Factor(size, np.arange(self.count - size, self.count)),)

    def freeze(self, axis: Labeled, reason: str) -> Labeled:
        """Keep all positions of an axis; returns the axis without labels."""
        if not is_labeled(axis):
            return axis
        for factor in axis:
            if factor.labels is not None and factor.labels is not EXAMPLE:
                self.frozen.append((factor.labels, reason))
        return tuple(f if f.labels is EXAMPLE else Factor(f.size) for f in axis)

    def flat(self, axis: Labeled, scope: str) -> Labels | None:
        """The labels of an axis as one vector, or none if it is rigid.

        An axis of several factors gets fresh labels, which are the products of theirs:

            factors     h0 h1,  c0 c1 c2
            flat        x0 = h0 c0,  x1 = h0 c1,  x2 = h0 c2,  x3 = h1 c0,  x4 = h1 c1,  x5 = h1 c2
        """
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
        """Two axes of the same length leave together, position by position; returns the one that stands for both.

        Factors of the same sizes are tied one by one. Otherwise the axes are flattened first:

            (2, 3) and (2, 3)      h to h and c to c
            (2, 3) and (6,)        six products h c to six labels
        """
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
        """Split an axis into a product of several.

        Where the axis has factors that divide in this way, these are dealt out, and nothing new is learned. Otherwise
        fresh labels are laid out as a product, the first part at first, and then what remains of the axis:

            axis                        x0 x1 x2 x3 x4 x5
            split into (2, 3)           x0 = a0 b0,  x1 = a0 b1,  x2 = a0 b2,  x3 = a1 b0,  x4 = a1 b1,  x5 = a1 b2

        Args:
            parts: for each part its size, and whether it may shrink. A part of size one is the examples.
            scope: for each part the scope of its labels.

        >>> ties = Ties()
        >>> ties.split(ties.fresh(6, "fc"), [(2, True), (3, True)], ["heads", "dims"])
        [(Factor(size=2, labels=array([6, 7])),), (Factor(size=3, labels=array([ 8,  9, 10])),)]
        >>> for column in ties.products[0]:
        ...     print(column)
        [0 1 2 3 4 5]
        [6 6 6 7 7 7]
        [ 8  9 10  8  9 10]
        """
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
        """Tie labels position by position. A label that is tied to -1 has to stay."""
        if a is b:
            return
        loose = (a < 0) != (b < 0)
        if loose.any():
            self.frozen.append((np.maximum(a, b)[loose], f"tied at {where} to positions that cannot leave"))
        both = (a >= 0) & (b >= 0)
        self.equal.append((a, b) if both.all() else (a[both], b[both]))

    def _product(self, x: Labels, a: Labels | None, b: Labels | None) -> None:
        """Record that ``x[k]`` leaves if ``a[k]`` leaves or ``b[k]`` leaves.

        Where a factor is rigid, ``x`` is tied to the other one. Where a label is -1 the other two have to stay, too:

            x    0  1 -1  3
            a    4  4  5  5        equations 0 = 4 * 6 and 1 = 4 * 7
            b    6  7  6 -1        held: 5 and 6 by the third, 3 and 5 by the fourth position
        """
        if a is None and b is None:
            self.frozen.append((x, "an axis is laid out as rigid ones"))
        elif a is None or b is None:
            labels = a if a is not None else b
            assert labels is not None
            self._equal(x, labels, "a product with a rigid axis")
        else:
            keep = (x >= 0) & (a >= 0) & (b >= 0)
            self.products.append((x[keep], a[keep], b[keep]))
            for held in (x < 0, x >= 0):  # a position that has to stay holds both of its factors, and they hold it
                chosen = ~keep & held
                if chosen.any():
                    self.frozen.append((np.concatenate([x[chosen], a[chosen], b[chosen]]), "tied to a rigid position"))


def _repeat(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.repeat(labels, times)


def _tile(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.tile(labels, times)


def _regroup(axis: Labeled, sizes: Sequence[int]) -> list[Labeled] | None:
    """Deal the factors of an axis out to axes of these sizes, if they divide in this way.

        factors of sizes 2 3 4      into 6 and 4      (2 3) (4)
                                    into 2 and 12     (2) (3 4)
                                    into 4 and 6      none: no factors in this order have the size 4

    >>> _regroup((Factor(2), Factor(3), Factor(4)), [6, 4])
    [(Factor(size=2, labels=None), Factor(size=3, labels=None)), (Factor(size=4, labels=None),)]
    >>> _regroup((Factor(2), Factor(3), Factor(4)), [4, 6]) is None
    True

    The factor of the examples counts as one: it goes to an axis of size one if there is one.
    """
    factors, groups = [f for f in axis if f.size > 1 or f.labels is EXAMPLE], list[Labeled]()
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

"""What is known of numbers that are computed from positions alone, such as masks: at any size, not at an example.

The mask of a causal language model compares two ranges of numbers, of which one runs along the rows ``i`` and one along
the columns ``j``::

    i = arange(t)[:, None], j = arange(t)[None, :]     Whole: the numbers i and j
    j <= i                                             Condition: i - j >= 0
    j > i - 8                                          Condition: j - i + 7 >= 0

`known` follows such computations operator by operator. Where it does not, all that is known of a value is its node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from taylorfx.layers.base import Layer, Shape
from taylorfx.layers.operators import SLOT
from taylorfx.layers.shape import Slice
from taylorfx.layers.sizes import has_sizes
from taylorfx.layers.tensor import Along, Captured, Elementwise, Expand, View

__all__ = ["CAUSAL", "Condition", "Index", "Whole", "constant", "known", "unknown"]


@dataclass(frozen=True)
class Whole:
    """Whole numbers: ``offset`` and, for every axis with a slope, that many times the position along it.

    Attributes:
        slopes: pairs of an axis, counted from the last one, which is -1, and its slope, which is not 0; in order.

    >>> i, j = Whole(((-2, 1),)), Whole(((-1, 1),))
    >>> i.plus(j, -1).at(2, 3)
    tensor([[ 0, -1, -2],
            [ 1,  0, -1]])
    """

    slopes: tuple[tuple[int, int], ...] = ()
    offset: int = 0

    def plus(self, other: Whole, times: int = 1) -> Whole:
        """The sum with so many times other numbers."""
        slopes = dict(self.slopes)
        for axis, slope in other.slopes:
            slopes[axis] = slopes.get(axis, 0) + times * slope
        kept = sorted((axis, slope) for axis, slope in slopes.items() if slope)
        return Whole(tuple(kept), self.offset + times * other.offset)

    def without(self, axis: int) -> Whole:
        """The numbers at position 0 of an axis."""
        return Whole(tuple(pair for pair in self.slopes if pair[0] != axis), self.offset)

    def at(self, *shape: int, device: torch.device | None = None) -> Tensor:
        """The numbers of a tensor of this shape, where axes without a slope have the size 1."""
        total = torch.full([1] * len(shape), self.offset, device=device)
        for axis, slope in self.slopes:
            total = total + slope * torch.arange(shape[axis], device=device).reshape(-1, *[1] * (-axis - 1))
        return total

    @property
    def natural(self) -> bool:
        """None of the numbers is negative, whatever the sizes."""
        return self.offset >= 0 and all(slope > 0 for _, slope in self.slopes)


@dataclass(frozen=True)
class Condition:
    """True where all ``bounds`` are 0 or more and the values of all nodes named ``others`` are true.

    ``others`` alone, of one name, are any values, of which nothing is known.

    >>> Condition((CAUSAL, Whole(offset=3))).both(Condition((CAUSAL,), ("padding",)))
    Condition(bounds=(Whole(slopes=((-2, 1), (-1, -1)), offset=0),), others=('padding',))
    """

    bounds: tuple[Whole, ...] = ()
    others: tuple[str, ...] = ()

    def both(self, other: Condition) -> Condition:
        """True where this and the other condition are."""
        bounds = dict.fromkeys(bound for bound in (*self.bounds, *other.bounds) if not bound.natural)
        if any(not bound.slopes for bound in bounds):  # a negative number
            return NEVER
        return Condition(tuple(bounds), tuple(dict.fromkeys((*self.others, *other.others))))


Index = Whole | Condition
"""What is known of a value."""

CAUSAL = Whole(((-2, 1), (-1, -1)))
"""Not negative where no column comes after its row."""

NEVER = Condition((Whole(offset=-1),))


def unknown(name: str) -> Condition:
    """What is known of the value of a node of which nothing is known."""
    return Condition(others=(name,))


class _UnknownError(Exception):
    """Nothing is known of a value."""


def known(name: str, layer: Layer, inputs: Sequence[Index], shapes: Sequence[Shape]) -> Index:
    """What is known of the value of a node.

    Args:
        name: that of the node.
        inputs: what is known of its inputs.
        shapes: those of its inputs, for one example.

    >>> from taylorfx import layers as L
    >>> later = L.Elementwise("gt.Tensor", (("$", 0), ("$", 1)))
    >>> known("mask", later, [Whole(((-1, 1),)), Whole(((-2, 1),), -8)], [(1, 9), (9, 1)])
    Condition(bounds=(Whole(slopes=((-2, -1), (-1, 1)), offset=7),), others=())
    """
    try:
        if type(layer) is View:
            return _viewed(layer, inputs[0], shapes[0])
        if type(layer) is Expand:
            return inputs[0]  # new axes are the first ones, and those of size 1 have no slope
        if type(layer) is Slice:
            return _sliced(layer, inputs[0], shapes[0])
        own = type(layer) in (Along, Captured, Elementwise)  # a subclass may compute something else
        if own and isinstance(layer, Along | Captured | Elementwise) and layer.op in RULES:
            return RULES[layer.op](_Call(layer.args, layer.kwargs, inputs, shapes))
    except _UnknownError:
        pass
    return unknown(name)


def constant(name: str, value: Tensor) -> Index:
    """What is known of the value of a node that is the same tensor at any size: one number, or nothing."""
    if value.ndim or value.is_floating_point() or value.is_complex():
        return unknown(name)
    number = int(value)
    return Whole(offset=number) if value.dtype != torch.bool else Condition() if number else NEVER


@dataclass(frozen=True)
class _Call:
    """An operator's arguments, as a layer keeps them, and what is known of its inputs."""

    args: tuple[object, ...]
    kwargs: tuple[tuple[str, object], ...]
    inputs: Sequence[Index]
    shapes: Sequence[Shape]

    def index(self, k: int) -> Index:
        """What is known of argument ``k``, a tensor or a number."""
        return self.known(self.args[k])

    def known(self, argument: object) -> Index:
        """What is known of an argument of this template."""
        if isinstance(argument, tuple) and len(argument) == 2 and argument[0] == SLOT:
            return self.inputs[argument[1]]
        if type(argument) is int:  # not a size, which is another one at other shapes
            return Whole(offset=argument)
        raise _UnknownError

    def whole(self, k: int) -> Whole:
        """Argument ``k`` as whole numbers; false is 0."""
        return _whole(self.index(k))

    def shape(self, k: int) -> Shape:
        """The shape of argument ``k``, a tensor."""
        argument = self.args[k]
        if isinstance(argument, tuple) and len(argument) == 2 and argument[0] == SLOT:
            return self.shapes[argument[1]]
        raise _UnknownError


def _whole(index: Index) -> Whole:
    if index == NEVER:
        return Whole()
    if isinstance(index, Whole):
        return index
    raise _UnknownError


def _each(change: Callable[[Whole], Whole], index: Index) -> Index:
    """Numbers at other positions, or conditions on them."""
    if isinstance(index, Whole):
        return change(index)
    if index.others:
        raise _UnknownError
    return Condition().both(Condition(tuple(map(change, index.bounds))))


def _viewed(layer: View, index: Index, shape: Shape) -> Index:
    """Axes of size 1 come and go; those with slopes are longer."""
    before, after = ([k - len(x) for k, n in enumerate(x) if n != 1] for x in (shape, layer.shape))
    if [shape[k] for k in before] != [layer.shape[k] for k in after]:
        raise _UnknownError
    moved = dict(zip(before, after, strict=True))
    return _each(lambda x: Whole(tuple(sorted((moved[axis], n) for axis, n in x.slopes)), x.offset), index)


def _sliced(layer: Slice, index: Index, shape: Shape) -> Index:
    """Positions count from the start; a single one is position 0 of an axis without slope."""
    axis, length = layer.dim - len(shape), layer.stop - layer.start

    def cut(whole: Whole) -> Whole:
        slope = dict(whole.slopes).get(axis, 0)
        if slope and (has_sizes(layer.start) or (length == 1 and has_sizes(length))):
            raise _UnknownError
        moved = whole.plus(Whole(offset=slope * layer.start))
        return moved.without(axis) if length == 1 else moved

    return _each(cut, index)


def _range(call: _Call) -> Index:
    """``arange(stop)`` or ``arange(start, stop)``, of more than one number: one alone may broadcast."""
    start, stop = (Whole(), call.args[0]) if len(call.args) == 1 else (call.whole(0), call.args[1])
    if not isinstance(stop, int) or stop - start.offset < 2 or {name for name, _ in call.kwargs} - {"device"}:
        raise _UnknownError
    return Whole(((-1, 1),), start.offset)


def _sum(sign: int) -> Rule:
    def rule(call: _Call) -> Index:
        if call.kwargs:
            raise _UnknownError
        return call.whole(0).plus(call.whole(1), sign)

    return rule


def _compared(*differences: tuple[int, int]) -> Rule:
    """True where ``sign * (a - b) + more`` is 0 or more, for each pair of a sign and a number."""

    def rule(call: _Call) -> Index:
        difference = call.whole(0).plus(call.whole(1), -1)
        bounds = (Whole(offset=more).plus(difference, sign) for sign, more in differences)
        return Condition().both(Condition(tuple(bounds)))

    return rule


def _unequal(call: _Call) -> Index:
    difference = call.whole(0).plus(call.whole(1), -1)
    if difference.slopes:
        raise _UnknownError
    return Condition() if difference.offset else NEVER


def _both(call: _Call) -> Index:
    one, other = (x if isinstance(x, Condition) else None for x in (call.index(0), call.index(1)))
    if one is None or other is None:
        raise _UnknownError
    return one.both(other)


def _steps(call: _Call) -> Index:
    """``diff(x, 1, dim, prepend)``: the slope, if what is prepended lies one step before."""
    x, axis = call.whole(0), call.args[2] if len(call.args) == 4 else None
    slope = dict(x.slopes).get(-1, 0)
    before = Whole(x.without(-1).slopes, x.offset - slope)
    if axis != -1 or call.args[1] != 1 or call.whole(3) != before:
        raise _UnknownError
    return Whole(offset=slope)


def _accumulated(call: _Call) -> Index:
    if call.whole(0) != Whole():
        raise _UnknownError
    return Whole()


def _picked(call: _Call) -> Index:
    """``x[a, b]`` of one index per axis of ``x``: along axes without slope it does not matter which."""
    x, places = call.whole(0), call.args[1]
    rank = len(call.shape(0))
    if not isinstance(places, tuple) or len(places) != rank or None in places:
        raise _UnknownError
    picked = Whole(offset=x.offset)
    for axis, slope in x.slopes:
        place = _whole(call.known(places[axis]))
        if not place.natural:
            raise _UnknownError  # it would count from the end
        picked = picked.plus(place, slope)
    return picked


Rule = Callable[[_Call], Index]

AT_LEAST, AT_MOST, MORE, LESS = (1, 0), (-1, 0), (1, -1), (-1, -1)

RULES: dict[str, Rule] = {
    "arange.default": _range,
    "arange.start": _range,
    **dict.fromkeys(("add.Tensor", "add.Scalar"), _sum(1)),
    **dict.fromkeys(("sub.Tensor", "sub.Scalar"), _sum(-1)),
    **dict.fromkeys(("ge.Tensor", "ge.Scalar"), _compared(AT_LEAST)),
    **dict.fromkeys(("le.Tensor", "le.Scalar"), _compared(AT_MOST)),
    **dict.fromkeys(("gt.Tensor", "gt.Scalar"), _compared(MORE)),
    **dict.fromkeys(("lt.Tensor", "lt.Scalar"), _compared(LESS)),
    **dict.fromkeys(("eq.Tensor", "eq.Scalar"), _compared(AT_LEAST, AT_MOST)),
    **dict.fromkeys(("ne.Tensor", "ne.Scalar"), _unequal),
    **dict.fromkeys(("__and__.Tensor", "bitwise_and.Tensor"), _both),
    "diff.default": _steps,
    "cumsum.default": _accumulated,
    "index.Tensor": _picked,
}
"""What is known of an operator's value, by its name."""

"""Which axis of what is read runs over the positions of an input: the tokens of a text, the steps of a series.

Sizes of activations are numbers, not expressions of the inputs' sizes. So the network's shapes are inferred twice, once
with one position more or less, and the axis is the one that follows::

    input_ids.1          20       21
    a linear layer       20 32    21 32        axis 0 (without that of the examples)
    a mean over them     32       32           none
    a square of scores   20 20    21 21        two: which of them is meant is not known
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from taylorfx.coupling.units import Place
from taylorfx.layers import Shape, ShapeError
from taylorfx.layers.sizes import axes_of
from taylorfx.network.bind import propagate
from taylorfx.network.labels import STATE, Bound, Ties
from taylorfx.network.spec import Spec

__all__ = ["observed", "position_axes"]


def position_axes(spec: Spec, places: Sequence[Place], axis: str) -> dict[tuple[str, int, int], int]:
    """For every place, by its key, the axis of its ``shape`` that has the positions of an input's axis.

    Args:
        axis: that of the input, by the input's name and its number, ``"input_ids.1"``; axis 0 is that of the examples.

    Raises:
        ValueError: if there is no such axis, if the network takes no other size of it, and if places have no such axis
            or several; all of them are listed.
    """
    sizes = spec.axes()
    if axis not in sizes:
        raise ValueError(
            f"Positions are those of an axis of an input; the network has {', '.join(sizes)}, received {axis!r}."
        )
    size, bounds = _otherwise(spec, axis)
    result: dict[tuple[str, int, int], int] = {}
    wrong: list[str] = []
    for place in places:
        there = _shape_at(bounds[place.node], place)
        pairs = [*zip(place.shape, there, strict=True)] if len(there) == len(place.shape) else []
        axes = [k for k, pair in enumerate(pairs) if pair == (sizes[axis], size) and k != place.axis]
        if len(axes) == 1:
            result[place.key] = axes[0]
        else:
            where = "output" if place.slot == -1 else "state" if place.slot == STATE else f"input {place.slot}"
            kind = spec[place.node].layer.title
            wrong.append(f"{place.node} ({kind}), {where} of shape {place.shape}: {len(axes) or 'none'}")
    if wrong:
        raise ValueError(
            f"Every activation that a gate multiplies has one axis with the positions of {axis}, here {sizes[axis]}; "
            "received some with none or several:\n  "
            + "\n  ".join(wrong)
            + "\nMeasure by example, per_position=None, or only the part of the network that has positions."
        )
    return result


def observed(values: Mapping[str, Any], axis: str | None) -> tuple[int, ...]:
    """How many observations a batch has: ``(N,)`` examples, or ``(N, T)`` positions of an input's axis.

    Args:
        values: the batch's inputs, by their names.

    Raises:
        ValueError: for a batch without that input.
    """
    count = len(next(iter(values.values())))
    if axis is None:
        return (count,)
    name, number = axis.rsplit(".", 1)
    if name not in values:
        raise ValueError(
            f"Positions are those of {axis}; received a batch without {name}, which has {', '.join(values)}."
        )
    return count, values[name].shape[int(number)]


def _shape_at(bound: Bound, place: Place) -> Shape:
    return bound.state if place.slot == STATE else bound.inputs[place.slot] if place.slot >= 0 else bound.shape


def _otherwise(spec: Spec, axis: str) -> tuple[int, Mapping[str, Bound]]:
    """Another size of an input's axis, and the shapes of the network there."""
    sizes = spec.axes()
    name, number = axis.rsplit(".", 1)
    ranges = spec.input_layers[name].ranges
    step = ranges[int(number) - 1][2] if len(ranges) >= int(number) else 1
    reason = ""
    for size in (sizes[axis] + k * step for k in (1, -1, 2, -2)):
        for together in _together(spec, axis) if size > 1 else ():  # one position is repeated to any number
            shapes = _shapes(spec, {**sizes, **dict.fromkeys(together, size)})
            try:
                return size, propagate(spec.at(*shapes), Ties(labeled=False))
            except ShapeError as error:
                reason = reason or str(error)
    raise ValueError(
        f"Positions are told from other axes by how shapes change with {axis}, and the network takes no other size of "
        f"it than {sizes[axis]}: {reason}"
    )


def _together(spec: Spec, axis: str) -> Iterator[set[str]]:
    """Axes of inputs that change their size together: by the conditions of the network, or all of the same size."""
    sizes = spec.axes()
    alike = {other for other, size in sizes.items() if size == sizes[axis]}
    tied = {axis}
    for _ in spec.guards:
        tied |= {x for guard in spec.guards if tied & axes_of(guard) for x in axes_of(guard) & alike}
    yield tied
    if alike != tied:
        yield alike


def _shapes(spec: Spec, sizes: Mapping[str, int]) -> list[Shape]:
    """The shapes of the inputs whose axes have these sizes."""
    declared = ((name, spec.input_layers[name].shape) for name in spec.input_layers)
    return [
        tuple([sizes[f"{name}.{k}"] for k, _ in enumerate(shape, 1)]) if isinstance(shape, tuple) else ()
        for name, shape in declared
    ]

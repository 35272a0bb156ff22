"""The steps of a network inside of a trace of ``torch.compile``, which takes them for constants.

Whatever a trace reads of an object that comes in is checked at every call: some thirty values for every node, which
takes longer than many a node. A spec never changes, so that nothing has to be checked but that it is the same one. What
a function gives that is marked by ``torch.compiler.assume_constant_result`` is not checked. It has to be numbers,
strings and tuples of them; so layers are taken apart before, and put together inside of the trace, where numbers that
follow from the shapes of the inputs get theirs::

    a layer        Crop(2, Size(4, ("//", "x.1", 2)))
    taken apart    "layer", ("Crop", ("start", "stop"), ("tuple", (("plain", 2), ("formula", ("//", "x.1", 2)))))
    for 12 rows    Crop(2, 6)

Importing this module loads torch's compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from taylorfx.layers import LAYERS, Layer, kind, sizes
from taylorfx.network.spec import Node, Spec, Step

__all__ = ["traced_steps"]

PLAIN = (int, float, bool, str, type(None))
"""The types of values that are constants."""


def traced_steps(spec: Spec, axes: sizes.Axes) -> Sequence[Step]:
    """The steps for inputs with axes of these sizes, which may be torch's symbols; nothing is refused.

    Where a layer has a field of another kind, they are the spec's own, and checked.
    """
    program = _program(spec)
    if not program:
        return spec.fitted_anew(axes) if spec.sized else spec.steps
    fields = ("name", "layer", "inputs")
    return [
        Step(_made(Node, fields, (name, _together(axes, *layer), inputs)), leaves, unused)
        for name, layer, inputs, leaves, unused in program
    ]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _program(spec: Spec) -> tuple[Any, ...]:
    """The steps, taken apart; none if a layer cannot be."""
    try:
        return tuple(
            (step.node.name, _apart(step.node.layer), step.node.inputs, step.leaves, step.unused) for step in spec.steps
        )
    except TypeError:
        return ()


def _apart(value: object) -> tuple[str, Any]:
    """What is to be done with a constant to have this value, and the constant.

    >>> _apart((1, "a"))
    ('plain', (1, 'a'))
    >>> _apart((1, sizes.Size(3, "x.1")))
    ('tuple', (('plain', 1), ('formula', 'x.1')))
    """
    if isinstance(value, (sizes.Size, sizes.Ratio)):
        return "formula", value.formula
    if isinstance(value, Layer) and LAYERS[kind(type(value))] is type(value):
        return "layer", (kind(type(value)), tuple(vars(value)), _apart(tuple(vars(value).values())))
    if type(value) is tuple:
        parts = tuple(map(_apart, value))
        return ("plain", value) if all(how == "plain" for how, _ in parts) else ("tuple", parts)
    if type(value) not in PLAIN:
        raise TypeError(f"Constants are numbers, strings and tuples of them; received {value!r}.")
    return "plain", value


def _together(axes: sizes.Axes, how: str, constant: Any) -> Any:
    """The value that `_apart` took apart.

    >>> _together({"x.1": 5}, *_apart((1, sizes.Size(3, "x.1"))))
    (1, 5)
    """
    if how == "formula":
        return sizes.value(constant, axes)
    if how == "tuple":
        return tuple([_together(axes, *part) for part in constant])
    if how == "layer":
        name, fields, values = constant
        return _made(LAYERS[name], fields, _together(axes, *values))
    return constant


def _made(cls: type, fields: Sequence[str], values: Sequence[object]) -> Any:
    """A frozen dataclass with these fields; a trace does not follow its constructor."""
    new: Any = object.__new__(cls)
    new.__dict__.update(dict(zip(fields, values, strict=True)))
    return new

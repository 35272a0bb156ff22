"""Rules from outside: which layer an operator of a captured module becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from torch import Tensor, fx

from taylorfx.interop.capture.arguments import Unmapped, called_with, measured
from taylorfx.interop.capture.convert import RULES, Convert
from taylorfx.layers import Layer, Shape
from taylorfx.layers.operators import admit

__all__ = ["Value", "rule"]


class Value(NamedTuple):
    """A tensor among an operator's arguments: its shape for one example, and the axis of the examples (-1: none)."""

    shape: Shape
    example: int


Rule = TypeVar("Rule", bound=Callable[..., Layer | None])


def rule(operator: str) -> Callable[[Rule], Rule]:
    """Say what `from_torch` makes of an operator, ``"namespace::name"``.

    The function is called with the operator's arguments, a `Value` in the place of every tensor. It returns the layer
    that consumes those tensors in their order (a parameter among them is a tensor like any other), or ``None`` where it
    has no rule: the operator then stays as it was captured, and freezes the units that touch it. A rule holds for the
    whole process, as the operator does. With a rule, files may name the operator, too.

    >>> import taylorfx as tfx
    >>> @tfx.interop.rule("aten::erf")
    ... def erf(x: tfx.interop.Value) -> tfx.Layer:
    ...     return tfx.layers.Elementwise("erf.default", (("$", 0),))

    Raises:
        ValueError: if the name has no namespace.
    """
    if operator.count("::") != 1:
        raise ValueError(f'A rule is for one operator, "namespace::name"; received {operator!r}.')

    def register(function: Rule) -> Rule:
        def convert(c: Convert, node: fx.Node) -> None:
            inputs: list[str] = []

            def value(argument: fx.Node) -> object:
                result: object = argument.meta.get("val")
                if not isinstance(result, Tensor):
                    return result
                inputs.append(c.tensor(argument))
                return Value(*measured(argument))

            args, kwargs = called_with(node, value)
            layer = function(*args, **kwargs)
            if layer is None:
                raise Unmapped
            c.add(node, layer, inputs)

        RULES[operator] = convert
        admit(operator)
        return function

    return register

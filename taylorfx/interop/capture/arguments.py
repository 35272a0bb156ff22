"""What an operator of a captured graph was called with, read as what its converter expects.

An argument that is something else (a number where a tensor is expected, a size that is not known) is `Unmapped`: the
operator then stays as it was captured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, fx
from torch.fx.node import Argument

from taylorfx.internals import pytree
from taylorfx.interop.capture.symbols import Open, OpenRatio
from taylorfx.layers import Shape

__all__ = [
    "Unmapped", "argument", "called_with", "coefficient", "flag", "measured", "nothing", "number", "optional_tensor",
    "tensor_node", "tensor_nodes", "tensors_of", "whole", "wholes", "window",
]  # fmt: skip


class Unmapped(Exception):
    """This use of an operator has no rule; it stays as it was captured."""


def argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    """An operator's argument, by position or name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def called_with(node: fx.Node, value: Callable[[fx.Node], object]) -> tuple[tuple[object, ...], dict[str, object]]:
    """All arguments of an operator, by position and by name, each value of the graph replaced."""
    arguments = fx.map_arg((node.args, dict(node.kwargs)), cast(Callable[[fx.Node], Argument], value))
    plain = pytree.tree_map(_plain, arguments)
    return cast(tuple[tuple[object, ...], dict[str, object]], plain)


def _plain(value: object) -> object:
    """An open size as the example's number."""
    if isinstance(value, Open):
        return int(value)
    return float(value) if isinstance(value, OpenRatio) else value


def nothing(node: fx.Node) -> bool:
    """Whether a tensor has no numbers: what rotary positions leave beside them of a head may be none."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and any(isinstance(n, int) and n == 0 for n in value.shape)


def tensor_node(value: object) -> fx.Node:
    """A value of the graph."""
    if not isinstance(value, fx.Node):
        raise Unmapped
    return value


def optional_tensor(value: object) -> fx.Node | None:
    """A value of the graph, or None."""
    return None if value is None else tensor_node(value)


def tensor_nodes(value: object) -> list[fx.Node]:
    """A list of values of the graph."""
    if not isinstance(value, (list, tuple)):
        raise Unmapped
    return [tensor_node(item) for item in value]


def whole(value: object) -> int:
    """A whole number."""
    if not isinstance(value, int):
        raise Unmapped
    return value


def wholes(value: object) -> tuple[int, ...]:
    """A list of whole numbers."""
    if not isinstance(value, (list, tuple)):
        raise Unmapped
    return tuple(whole(item) for item in value)


def number(value: object) -> float:
    """A whole number or a floating-point number, as it stands."""
    if not isinstance(value, (int, float)):
        raise Unmapped
    return value


def flag(value: object) -> bool:
    """A truth value."""
    if not isinstance(value, bool):
        raise Unmapped
    return value


def window(value: object, rank: int) -> int | tuple[int, ...]:
    """A number for all axes of a window, or one for each of them: torch lets a list of one stand for all."""
    if isinstance(value, int):
        return value
    sizes = wholes(value)
    return sizes * rank if len(sizes) == 1 else sizes


def measured(node: fx.Node) -> tuple[Shape, int]:
    """The shape of a value for one example, and the axis along which examples run (-1: none).

    The number of examples is a symbol: ``(4 * s0, 3)`` has the shape ``(4, 3)`` and axis 0. Other sizes that the inputs
    leave open are the example's, and equal only what they equal at all sizes (`taylorfx.interop.capture.symbols.Open`).
    """
    shape: tuple[Shape, int] | None = node.meta.get("measured")
    if not isinstance(shape, tuple):
        raise Unmapped
    return shape


def named_dtype(tensor: Tensor) -> str | None:
    """Torch's name of a dtype that is not the parameters', which are floating-point numbers."""
    return None if tensor.dtype.is_floating_point else str(tensor.dtype).removeprefix("torch.")


def coefficient(size: fx.Node) -> int:
    """How many positions a size of the graph has for one example: 4 of ``4 * s0``."""
    return measured(size)[0][0]


def tensors_of(node: fx.Node) -> list[fx.Node]:
    """The tensors among an operator's arguments, in their order, as often as they stand there."""
    nodes: list[fx.Node] = []
    fx.map_arg((node.args, dict(node.kwargs)), nodes.append)
    return [n for n in nodes if isinstance(n.meta.get("val"), Tensor)]

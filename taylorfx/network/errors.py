"""Errors of a run, explained: torch names two shapes that do not fit, this module the layer and the rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from torch import Tensor

from taylorfx.layers import ShapeError
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten

__all__ = ["explain"]


def explain(params: Params, spec: Spec, values: Mapping[str, Tensor], node: Node, error: Exception) -> NoReturn:
    """Raise an error that says what is wrong with the inputs, from one that a layer raised.

    The causes are tried in this order: shapes that do not fit, by the signatures of the layers; a layer's own error;
    dtypes or devices that differ; and last, whatever torch raised, with the node's name.

    Args:
        values: the inputs of the network, by the names of its Input nodes.
        node: the one that failed.
        error: what it raised.

    Raises:
        ShapeError: always.
    """
    try:
        propagate(spec.at(*(tuple(values[n.name].shape[1:]) for n in spec.inputs)), Ties(labeled=False))
    except ShapeError as problem:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in values.items())
        raise ShapeError(f"{problem}\n(with inputs of shape {shapes})") from error
    if isinstance(error, ValueError):  # the layer itself says what is wrong
        raise ShapeError(f"{node.name}: {error}") from error
    tensors = {**{f"input {name}": x for name, x in values.items()}, **flatten(params)}
    kinds: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            kinds.setdefault(f"{tensor.dtype} on {tensor.device}", []).append(name)
    if len(kinds) > 1:
        lines = [f"{kind}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for kind, names in kinds.items()]
        raise ShapeError(
            "Inputs and parameters have to agree in dtype and device; received:\n  "
            + "\n  ".join(lines)
            + f"\nfirst noticed at {node.name} ({type(node.layer).__name__}); convert one of them, x.to(...)."
        ) from error
    raise ShapeError(f"{node.name}: {type(node.layer).__name__} failed: {error}") from error

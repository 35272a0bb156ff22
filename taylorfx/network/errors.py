"""What is wrong with inputs, where torch's own error would not say it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from taylorfx.layers import ShapeError
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten

__all__ = ["explain"]


def explain(params: Params, spec: Spec, values: Mapping[str, Any], node: Node, error: Exception) -> None:
    """Say what is wrong with the inputs where torch's own error would not say where."""
    strange = [f"{name} is {type(x).__name__}" for name, x in values.items() if not isinstance(x, Tensor)]
    if strange:
        raise ShapeError(f"A network takes tensors; received: {', '.join(strange)}.") from error
    try:
        propagate(spec.at(*(tuple(values[n.name].shape[1:]) for n in spec.inputs)), Ties(labeled=False))
    except ShapeError as problem:
        found = ", ".join(f"{name} {tuple(x.shape)}" for name, x in values.items())
        raise ShapeError(f"{problem}\n(with inputs of shape {found})") from error
    if isinstance(error, ValueError):  # a layer's own words
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
            + f"\nfirst met at {node.name} ({type(node.layer).__name__}); convert one of them, x.to(...)."
        ) from error
    raise ShapeError(f"{node.name}: {type(node.layer).__name__} failed: {error}") from error

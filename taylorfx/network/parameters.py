"""The parameters of a network: fresh ones, what fits, and which are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taylorfx.network.spec import Spec, SpecError
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["check", "init", "partition"]


def init(
    spec: Spec, generator: torch.Generator, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Fresh parameters, distributed as torch initializes its layers; shared ones are drawn once."""
    leaves: dict[str, Tensor] = {}
    for node in spec.nodes:
        try:
            fresh = node.layer.init(generator)
        except RuntimeError as error:
            raise SpecError(f"{node.name}: {node.layer} cannot be initialized: {error}") from error
        for leaf, tensor in fresh.items():
            if node.path(leaf) not in leaves:
                leaves[node.path(leaf)] = tensor.to(device, dtype if tensor.is_floating_point() else None)
    params = unflatten(leaves)
    check(params, spec)
    return params


def check(params: Params, spec: Spec) -> None:
    """Refuse parameters that do not fit the network.

    Raises:
        SpecError: listing every parameter that is missing, unknown, misshapen or no tensor.
    """
    if not isinstance(params, Mapping) or not isinstance(spec, Spec):
        raise SpecError(
            "Parameters are nested dicts of tensors and come first, then the network, a Spec; "
            f"received {type(params).__name__}, {type(spec).__name__}."
        )
    expected, leaves = spec.shapes, flatten(params)
    errors = [f"{path}: missing, expected {shape}" for path, shape in expected.items() if path not in leaves]
    for path, leaf in leaves.items():
        shape = expected.get(path)
        if shape is None:
            errors.append(f"{path}: the network has no such parameter")
        elif not isinstance(leaf, Tensor):
            errors.append(f"{path}: expected a tensor, received {type(leaf).__name__}")
        elif leaf.shape != shape:
            errors.append(f"{path}: expected {shape}, received {tuple(leaf.shape)}")
    if errors:
        raise SpecError("Parameters have to fit the network; received:\n  " + "\n  ".join(errors))


def partition(params: Params, spec: Spec) -> tuple[dict[str, Any], dict[str, Any]]:
    """Separate what is trained from what is not (running statistics, frozen parameters); `combine` joins them again."""
    buffers = {*(spec.interface.frozen if spec.interface else ())}
    buffers |= {node.path(leaf) for node in spec.nodes for leaf in node.layer.buffers}
    leaves = flatten(params)
    return (
        unflatten((path, leaf) for path, leaf in leaves.items() if path not in buffers),
        unflatten((path, leaf) for path, leaf in leaves.items() if path in buffers),
    )

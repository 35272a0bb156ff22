"""What reads units with weights of its own: linear layers and convolutions, seen as one matrix for every group.

A layer of either kind computes ``windows @ matrix + bias``, row by row: for every example and position of its output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylorfx.cutting.plan import Plan
from taylorfx.layers import BatchNorm1d, BatchNorm2d, BatchNorm3d, Layer, Linear
from taylorfx.layers.base import computes_as
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.folding import TRANSPOSED
from taylorfx.rewrite.folding import WRITERS as CONSUMERS
from taylorfx.tree import Params, flatten, merge, unflatten

__all__ = [
    "CONSUMERS", "NORMS", "as_matrix", "as_rows", "as_weight", "as_windows", "consumers",
    "kept_channels", "lost", "sharing", "shifted",
]  # fmt: skip

NORMS = (BatchNorm1d, BatchNorm2d, BatchNorm3d)


def consumers(spec: Spec) -> list[Node]:
    """The linear layers and convolutions, in order; a subclass that computes something else is neither."""
    return [node for node in spec if computes_as(node.layer, CONSUMERS)]


def sharing(spec: Spec, leaf: str) -> list[list[Node]]:
    """Linear layers and convolutions, in order; those that share this parameter together."""
    groups: dict[str, list[Node]] = {}
    for node in consumers(spec):
        groups.setdefault(node.path(leaf), []).append(node)
    return list(groups.values())


def kept_channels(plan: Plan, node: Node) -> tuple[Tensor, Tensor]:
    """Of the channels that a layer reads and writes, those that stay; groups leave whole and count as read."""
    letters = plan.coupling.letters[node.name]
    reads, writes = (plan.alive[letters[x]] for x in "io")
    if "g" in letters:
        groups = plan.alive[letters["g"]]
        reads, writes = np.tile(reads, len(groups)), np.outer(groups, writes).ravel()
    return torch.from_numpy(reads), torch.from_numpy(writes)


def lost(plan: Plan) -> set[str]:
    """The layers that lose some of what they read."""
    return {node.name for node in consumers(plan.coupling.spec) if not kept_channels(plan, node)[0].all()}


def shifted(params: Params, spec: Spec, names: Sequence[str], shift: Tensor) -> tuple[Params, Spec]:
    """Add ``(channels,)`` to what layers that share their bias give out."""
    nodes, leaves = [spec[name] for name in names], flatten(params)
    if nodes[0].layer.bias:  # type: ignore[attr-defined]
        path = nodes[0].path("bias")
        return merge(params, {path: leaves[path] + shift.to(leaves[path])}), spec
    norms = [_norm(spec, node) for node in nodes]
    if all(norms) and len({*norms}) == len(norms):
        return merge(params, {path: leaves[path] - shift.to(leaves[path]) for path in norms if path}), spec
    biased = {node.name: replace(node, layer=replace(node.layer, bias=True)) for node in nodes}  # type: ignore[call-arg]
    path, weight = nodes[0].path("bias"), leaves[nodes[0].path("weight")]
    return (
        unflatten({**leaves, path: shift.to(weight)}),
        replace(spec, nodes=tuple(biased.get(node.name, node) for node in spec)),
    )


def _norm(spec: Spec, node: Node) -> str | None:
    """The running mean of the batch norm that alone hears a layer, and hears nothing else."""
    hearers = [other for other in spec if node.name in other.inputs]
    if len(hearers) != 1 or node.name in spec.outputs:
        return None
    layer, path = hearers[0].layer, hearers[0].path("running_mean")
    channels = not isinstance(node.layer, Linear)  # a norm takes the last axis of a linear layer for positions
    tracked = channels and computes_as(layer, NORMS) and layer.track_running_stats  # type: ignore[attr-defined]
    return path if tracked and sum(path in map(other.path, other.layer.buffers) for other in spec) == 1 else None


def as_rows(layer: Layer, y: Tensor) -> Tensor:
    """A layer's output as ``(rows, g, o)``: examples and positions, groups, channels of a group."""
    if isinstance(layer, Linear):
        return y.reshape(-1, 1, y.shape[-1])
    apart: Tensor = y.flatten(2).unflatten(1, (layer.groups, -1))  # type: ignore[attr-defined, no-untyped-call]
    return apart.permute(0, 3, 1, 2).flatten(0, 1)


def as_windows(layer: Layer, x: Tensor) -> Tensor:
    """What a layer reads for each row of its output, ``(rows, g, k)``: times `as_matrix` it is the output's `as_rows`.

    A convolution by the identity, every channel alone, unfolds windows of any rank, stride, padding and dilation.
    """
    if isinstance(layer, Linear):
        return as_rows(layer, x)
    kernel: tuple[int, ...] = layer.kernel_size  # type: ignore[attr-defined]
    channels, size = x.shape[1], math.prod(kernel)
    ones = torch.eye(size, dtype=x.dtype, device=x.device).reshape(1, size, 1, *kernel)
    ones = ones.transpose(1, 2) if isinstance(layer, TRANSPOSED) else ones
    weight = ones.expand(channels, *ones.shape[1:]).flatten(0, 1)
    alone: Any = replace(layer, in_channels=channels, out_channels=channels * size, groups=channels, bias=False)  # type: ignore[call-arg]
    return as_rows(layer, alone.apply({"weight": weight}, x))


def as_matrix(layer: Layer, weight: Tensor) -> Tensor:
    """The weight as ``(g, k, o)``."""
    if isinstance(layer, Linear):
        return weight.T[None]
    apart: Tensor = weight.unflatten(0, (layer.groups, -1))  # type: ignore[attr-defined, no-untyped-call]
    if isinstance(layer, TRANSPOSED):  # g i o K
        return apart.flatten(3).transpose(2, 3).flatten(1, 2)
    return apart.flatten(2).mT  # g o (i K)


def as_weight(layer: Layer, matrix: Tensor, like: Tensor) -> Tensor:
    """The reverse of `as_matrix`, in the shape and dtype of ``like``."""
    if isinstance(layer, TRANSPOSED):
        window: int = math.prod(like.shape[2:])
        matrix = matrix.unflatten(1, (-1, window)).transpose(2, 3)  # type: ignore[no-untyped-call]
    else:
        matrix = matrix.mT
    return matrix.reshape(like.shape).to(like)

"""Recalibrate: the running statistics of batch norms, estimated anew."""

from __future__ import annotations

from dataclasses import replace
from typing import overload

import torch
from torch import Tensor

from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.layers.roles import RunningStatistics
from taylorfx.network.run import evaluate
from taylorfx.network.spec import Node, Spec
from taylorfx.repair.batches import Batches, inputs_of
from taylorfx.tree import Params, flatten, merge

__all__ = ["recalibrate"]


@overload
def recalibrate(params: Params, spec: Spec, batches: Batches) -> Params: ...


@overload
def recalibrate(params: Params, spec: Plan, batches: Batches) -> tuple[Params, Spec]: ...


def recalibrate(params: Params, spec: Spec | Plan, batches: Batches) -> Params | tuple[Params, Spec]:
    """The parameters with the running statistics of batch norms estimated anew; nothing else changes.

    One pass in which batch norms run in training mode and all other layers in inference; the statistics are the plain
    averages of those of the batches, as ``torch.nn.BatchNorm2d`` with ``momentum=None`` computes them. Later norms
    consume what the earlier ones compute of the same batch, so take batches as large as in training.

    Args:
        params: those of the network; with a plan the original ones.
        spec: a network, or a plan: cut is then first, as the other repairs do.
        batches: ``(inputs, targets)``, or an iterable of such; the targets are not looked at.

    Returns:
        The network's parameters; with a plan parameters and spec of the smaller network.
    """
    if isinstance(spec, Plan):
        return _recalibrated(cut(params, spec), spec.spec, batches), spec.spec
    return _recalibrated(params, spec, batches)


def _recalibrated(params: Params, spec: Spec, batches: Batches) -> Params:
    roles = ((node, node.layer.role(RunningStatistics)) for node in spec)
    norms = {node.name: replace(node, layer=role.average) for node, role in roles if role is not None}
    leaves = flatten(params)
    fresh = {path: torch.zeros_like(leaves[path]) for node in norms.values() for path in _buffers(node)}

    def tap(name: str, slot: int, x: Tensor) -> Tensor:
        if name not in norms:
            return x
        if slot == 0:
            inputs_by_norm[name] = x
            return x
        node = norms[name]
        current = {leaf: fresh.get(path, leaves[path]) for leaf, path in node.paths.items()}
        value, new = node.layer.train(current, inputs_by_norm.pop(name), generator=None)
        fresh.update({node.path(leaf): tensor for leaf, tensor in new.items()})
        return value

    for inputs in inputs_of(batches):
        inputs_by_norm: dict[str, Tensor] = {}
        evaluate(params, spec, (inputs,), tap=tap)
    return merge(params, fresh)


def _buffers(node: Node) -> list[str]:
    return [node.path(leaf) for leaf in node.layer.buffers]

"""Recalibrate: the running statistics of batch norms, estimated anew."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import overload

import torch
from torch import Tensor

from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import Total, agreed, alone, placed, refuse_alone, sharing, whole
from taylorfx.layers.roles import RunningStatistics
from taylorfx.network.run import Inputs, evaluate
from taylorfx.network.spec import Node, Spec
from taylorfx.repair.batches import Batches, inputs_of, refuse_none, told
from taylorfx.scoring.fingerprint import of_layers, of_params
from taylorfx.tree import Params, flatten, merge

__all__ = ["recalibrate"]


@overload
def recalibrate(params: Params, spec: Spec, batches: Batches, *, total: Total | None = None) -> Params: ...


@overload
def recalibrate(params: Params, spec: Plan, batches: Batches, *, total: Total | None = None) -> tuple[Params, Spec]: ...


def recalibrate(
    params: Params, spec: Spec | Plan, batches: Batches, *, total: Total | None = None
) -> Params | tuple[Params, Spec]:
    """The parameters with the running statistics of batch norms estimated anew; nothing else changes.

    One pass in which batch norms run in training mode and all other layers in inference; the statistics are the plain
    averages of those of the batches, as ``torch.nn.BatchNorm2d`` with ``momentum=None`` computes them. Later norms
    consume what the earlier ones compute of the same batch, so take batches as large as in training.

    Args:
        params: those of the network; with a plan the original ones.
        spec: a network, or a plan: cut is then first, as the other repairs do.
        batches: ``(inputs, targets)``, or an iterable of such; the targets are not looked at.
        total: adds up the statistics of several processes that each have batches of their own (`distributed.total`).

    Returns:
        The network's parameters; with a plan parameters and spec of the smaller network.

    Raises:
        ValueError: for no batches.
    """
    if total is None:
        refuse_alone(params)
    if isinstance(spec, Plan):
        plan = spec
        agreed(total, lambda: told(params, plan), str)
        return _recalibrated(cut(params, plan), plan.spec, batches, total or alone), plan.spec
    agreed(total, lambda: f"{of_params(params)}, {of_layers(spec)}", str)
    return _recalibrated(params, spec, batches, total or alone)


@dataclass(frozen=True)
class Averages:
    """Sums over batches of the statistics of each, by path, and of how many batches they are: additive."""

    count: Mapping[str, int]
    sum: Mapping[str, Tensor]

    def __add__(self, other: Averages) -> Averages:
        count, total = {**self.count}, {**self.sum}
        for path, tensor in other.sum.items():
            count[path] = count.get(path, 0) + other.count[path]
            total[path] = total[path] + tensor if path in total else tensor
        return Averages(count, total)

    def of(self, path: str) -> Tensor:
        """The average over the batches; of integers, which count something, the sum."""
        total = self.sum[path]
        return total / self.count[path] if total.is_floating_point() else total


def _recalibrated(params: Params, spec: Spec, batches: Batches, total: Total) -> Params:
    """Every batch trains norms that have seen nothing before; what they then have is averaged over the batches."""
    roles = ((node, node.layer.role(RunningStatistics)) for node in spec)
    norms = {node.name: replace(node, layer=role.average) for node, role in roles if role is not None}
    if not norms:
        return params
    leaves, own = flatten(params), {path for node in norms.values() for path in node.paths.values()}
    leaves |= {path: whole(leaves[path]) for path in leaves if path in own}
    zeros = {path: torch.zeros_like(leaves[path]) for node in norms.values() for path in _buffers(node)}
    inputs_by_norm: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def tap(name: str, slot: int, x: Tensor) -> Tensor:
        if name not in norms:
            return x
        if slot == 0:
            inputs_by_norm[name] = x
            return x
        node = norms[name]
        current = {leaf: seen.get(path, zeros.get(path, leaves[path])) for leaf, path in node.paths.items()}
        value, new = node.layer.train(current, inputs_by_norm.pop(name), generator=None)
        seen.update({node.path(leaf): tensor for leaf, tensor in new.items()})
        return value

    def of_batch(params: Params, inputs: Inputs) -> Averages:
        seen.clear()
        evaluate(params, spec, (inputs,), tap=tap)
        return Averages(dict.fromkeys(seen, 1), {path: _wide(tensor.detach()) for path, tensor in seen.items()})

    def mine() -> Averages:
        with sharing(params) as gathered:
            return reduce(operator.add, map(partial(of_batch, gathered), inputs_of(batches)), Averages({}, {}))

    sums, before = total(mine), flatten(params)
    refuse_none(sums.sum)
    return merge(params, {path: placed(sums.of(path).to(leaves[path]), before[path]) for path in sums.sum})


def _wide(x: Tensor) -> Tensor:
    """Floating point numbers as they are added up, in single precision or better."""
    return x.to(torch.promote_types(x.dtype, torch.float32)) if x.is_floating_point() else x


def _buffers(node: Node) -> list[str]:
    return [node.path(leaf) for leaf in node.layer.buffers]

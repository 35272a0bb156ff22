"""What repairs ask of a plan: which layers lose some of what they consume, and how their outputs are shifted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from taylorfx.cutting.plan import Plan
from taylorfx.distributed import placed, whole
from taylorfx.layers.roles import Mixing, RunningStatistics
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, merge, unflatten

__all__ = ["kept_channels", "lost", "mixing", "sharing", "shifted", "takes_shift"]


def mixing(spec: Spec) -> Iterator[tuple[Node, Mixing]]:
    """The nodes that are a matrix product of their input with a weight, in order, and how."""
    for node in spec:
        role = node.layer.role(Mixing)
        if role is not None:
            yield node, role


def staying(plan: Plan) -> Iterator[tuple[Node, Mixing]]:
    """The nodes of the original network that mix, but for those that leave with a branch."""
    return ((node, role) for node, role in mixing(plan.coupling.spec) if node.name in plan.spec.by_name)


def sharing(spec: Spec, leaf: str, smaller: Spec | None = None) -> list[list[tuple[Node, Mixing]]]:
    """The nodes that mix, in order; those together that share their parameter ``leaf``: ``"weight"`` or ``"bias"``.

    Args:
        smaller: only those that are in this network, too.
    """
    groups: dict[str, list[tuple[Node, Mixing]]] = {}
    for node, role in mixing(spec):
        if smaller is not None and node.name not in smaller.by_name:
            continue
        groups.setdefault(node.path(role.weight if leaf == "weight" else role.bias), []).append((node, role))
    return list(groups.values())


def kept_channels(plan: Plan, node: Node, role: Mixing) -> tuple[Tensor, Tensor]:
    """Of the channels that a layer consumes and gives out, which stay, as masks.

    Of groups ``(g i)`` each takes part alone: one that leaves as a whole takes its inputs and outputs along, but what
    stays of its inputs does not count as lost::

        groups stay  [1, 0], i stay [1, 0]  ->  inputs  [1, 0, 1, 0]
                             o stay [1, 1]  ->  outputs [1, 1, 0, 0]
    """
    letters = plan.coupling.letters[node.name]
    i, o, g = role.letters
    reads, writes = plan.alive[letters[i]], plan.alive[letters[o]]
    if g is not None:
        groups = plan.alive[letters[g]]
        reads, writes = np.tile(reads, len(groups)), np.outer(groups, writes).ravel()
    return torch.from_numpy(reads), torch.from_numpy(writes)


def lost(plan: Plan) -> set[str]:
    """The nodes that lose some of what they consume, but for those that leave themselves."""
    return {node.name for node, role in staying(plan) if not kept_channels(plan, node, role)[0].all()}


def takes_shift(spec: Spec, names: Sequence[str]) -> bool:
    """Whether layers that share their bias can be shifted without gaining one (`shifted`)."""
    nodes = [(node, role) for node, role in mixing(spec) if node.name in names]
    return nodes[0][1].has_bias or _means(spec, nodes) is not None


def shifted(params: Params, spec: Spec, names: Sequence[str], shift: Tensor) -> tuple[Params, Spec]:
    """Add ``(channels,)`` to the values of layers that share their bias.

    Without a bias, the running mean takes up the shift where a norm by running statistics is all that consumes a value,
    ``(y + shift) - mean = y - (mean - shift)``; elsewhere the layers gain a bias.
    """
    leaves = flatten(params)
    nodes = [(node, role) for node, role in mixing(spec) if node.name in names]
    path, weight = nodes[0][0].path(nodes[0][1].bias), leaves[nodes[0][0].path(nodes[0][1].weight)]
    if nodes[0][1].has_bias:
        return merge(params, {path: _plus(leaves[path], shift)}), spec
    means = _means(spec, nodes)
    if means is not None:
        return merge(params, {mean: _plus(leaves[mean], -shift) for mean in means}), spec
    biased = {node.name: replace(node, layer=role.with_bias()) for node, role in nodes}
    return (
        unflatten({**leaves, path: placed(shift.to(weight.device, weight.dtype), weight)}),
        replace(spec, nodes=tuple(biased.get(node.name, node) for node in spec)),
    )


def _plus(leaf: Tensor, shift: Tensor) -> Tensor:
    vector = whole(leaf)
    return placed(vector + shift.to(vector), leaf)


def _means(spec: Spec, nodes: Sequence[tuple[Node, Mixing]]) -> list[str] | None:
    """The paths of the running means that take up a shift of these layers, or ``None`` if not all have one."""
    means = [_mean(spec, node, role) for node, role in nodes]
    return [x for x in means if x] if all(means) and len({*means}) == len(means) else None


def _mean(spec: Spec, node: Node, role: Mixing) -> str | None:
    """The path of the running mean that is all that is subtracted from a value, and from no other; ``None`` if none."""
    if spec.uses[node.name] != 1 or not spec.consumers[node.name] or role.axis != 1:
        return None  # a norm takes axis 1 for the channels
    norm = spec.consumers[node.name][0]
    statistics = norm.layer.role(RunningStatistics)
    path = None if statistics is None else norm.path(statistics.mean)
    return path if path is not None and len(spec.owners[path]) == 1 else None

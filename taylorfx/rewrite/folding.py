"""Folding: per-channel affine maps move into the convolution or linear layer before them.

In inference a batch norm (or a product or sum with a parameter per channel) is ``s * y + t`` for each channel. Heard
alone by it, at most through a permutation of the axes, a layer ``y = W a + b`` takes it over exactly:
``(s W) a + (s b + t)`` (Jacob et al. 2018, arXiv 1712.05877, eq. 14). What every node reads that survives is what it
read before, and the gates lie at the reads: so no gate derivative moves. That is also why a norm *before* a layer
stays: the layer would read something else.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from taylorfx import layers as L
from taylorfx.layers import Shape
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.parameters import check
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["fold"]

NORMS = (L.BatchNorm1d, L.BatchNorm2d, L.BatchNorm3d, L.InstanceNorm1d, L.InstanceNorm2d, L.InstanceNorm3d)
TRANSPOSED = (L.ConvTranspose1d, L.ConvTranspose2d, L.ConvTranspose3d)
WRITERS = (L.Linear, L.Conv1d, L.Conv2d, L.Conv3d, *TRANSPOSED)


def fold(params: Params, spec: Spec) -> tuple[Params, Spec]:
    """Fold batch norms, and products and sums with a parameter per channel, into the layers that they alone hear.

    The new network computes the same in inference, with fewer operations and less memory. The convolution (dense,
    grouped, depthwise, transposed) or linear layer keeps its name and gains a bias; what was folded is gone. Left
    alone are norms without running statistics, layers that share their parameters or that others hear, and, where
    inputs declare no shape, what cannot be told to run along the channels. A network without anything to fold is
    returned as it is; nothing given is changed. Differentiable.

    For inference only: in training a batch norm normalizes by its batch.

    Raises:
        SpecError: if the parameters do not fit the network.
    """
    check(params, spec)
    folder = _Folder(params, spec)
    for name in [node.name for node in spec.nodes]:
        folder.visit(name)
    return (params, spec) if not folder.moved else folder.result()


@dataclass(frozen=True)
class _Affine:
    """``scale * x + shift``, each a number per channel or one for all; none where it does nothing."""

    scale: Tensor | None = None
    shift: Tensor | None = None


def norm(node: Node, params: Mapping[str, Tensor]) -> _Affine:
    """What a norm by running statistics does to each channel."""
    leaves = {leaf: params[path] for leaf, path in node.paths.items()}
    kind = torch.promote_types(leaves["running_var"].dtype, torch.float32)
    scale = (leaves["running_var"].to(kind) + node.layer.eps).rsqrt()  # type: ignore[attr-defined]
    scale = scale * leaves["weight"] if "weight" in leaves else scale
    shift = -leaves["running_mean"] * scale
    return _Affine(scale, shift + leaves["bias"] if "bias" in leaves else shift)


class _Folder:
    """A network on its way: nodes and leaves as they are by now."""

    def __init__(self, params: Params, spec: Spec) -> None:
        self.spec, self.leaves = spec, flatten(params)
        self.nodes = {node.name: node for node in spec.nodes}
        self.moved: dict[str, str] = {}  # where the value of a folded node is now
        self.heard = Counter([*spec.outputs, *(x for node in spec.nodes for x in node.inputs)])
        self.owners = Counter(path for node in spec.nodes for path in node.paths.values())
        known = all(node.layer.shape is not None for node in spec.inputs if isinstance(node.layer, L.Input))
        bounds = propagate(spec, Ties(labeled=False)) if known else {}
        self.shapes: Mapping[str, Shape] = {name: bound.shape for name, bound in bounds.items()}

    def visit(self, name: str) -> None:
        """Fold this node into the one that it hears, if it can be."""
        node = self.nodes[name]
        node = self.nodes[name] = replace(node, inputs=tuple(self.moved.get(x, x) for x in node.inputs))
        for slot, heard in enumerate(node.inputs):
            writer, axis = self._writer(heard)
            if type(writer.layer) in WRITERS and self.heard[writer.name] == 1 and self._alone(writer):
                affine = self._affine(node, slot, axis)
                if affine is not None:
                    self._absorb(writer, affine)
                    self._drop(node, slot)
                    return

    def result(self) -> tuple[Params, Spec]:
        """The folded network; parameters that no node has any more are left out."""
        outputs = tuple(self.moved.get(x, x) for x in self.spec.outputs)
        spec = replace(self.spec, nodes=tuple(self.nodes.values()), outputs=outputs)
        return unflatten((path, self.leaves[path]) for path in spec.shapes), spec

    def _writer(self, name: str) -> tuple[Node, int]:
        """Who writes a value, perhaps through a permutation, and the axis in it of the writer's channels."""
        node, layer = self.nodes[name], self.nodes[name].layer
        turned = layer.dims if type(layer) is L.Permute and self.heard[name] == 1 else None
        writer = self.nodes[node.inputs[0]] if turned else node
        axis = 1 if type(writer.layer) is not L.Linear else len(self.shapes.get(writer.name, ())) - 1
        return writer, [d % len(turned) for d in turned].index(axis) if turned and axis > 0 else axis

    def _alone(self, writer: Node) -> bool:
        """No other node has this one's weight or bias, or a parameter where its bias would lie."""
        own = set(writer.paths.values())
        return all(self.owners[path] == (path in own) for path in {*own, _biased(writer).path("bias")})

    def _affine(self, node: Node, slot: int, axis: int) -> _Affine | None:
        """What a node does to each channel, along ``axis``, of its input ``slot``, if that is all that it does."""
        layer = node.layer
        if type(layer) in NORMS and layer.track_running_stats and axis == 1:  # type: ignore[attr-defined]
            return norm(node, self.leaves)
        if type(layer) not in (L.Add, L.Multiply) or len(node.inputs) != 2 or not self.shapes:
            return None
        other, shape = self.nodes[node.inputs[1 - slot]], self.shapes[node.inputs[slot]]
        if type(other.layer) not in (L.Parameter, L.Buffer) or other.layer.expand:  # type: ignore[attr-defined]
            return None
        value = self.leaves[other.path("value")]
        padded = (1,) * (len(shape) - value.ndim) + value.shape
        if self.shapes[node.name] != shape or any(n != 1 for k, n in enumerate(padded) if k != axis):
            return None
        return _Affine(shift=value.flatten()) if type(layer) is L.Add else _Affine(scale=value.flatten())

    def _absorb(self, writer: Node, affine: _Affine) -> None:
        layer, path = writer.layer, writer.path("weight")
        weight = self.leaves[path]
        biased = self.nodes[writer.name] = _biased(writer)
        channels = biased.layer.shapes()["bias"]
        bias = self.leaves[writer.path("bias")] if "bias" in writer.paths else weight.new_zeros(channels)
        if affine.scale is not None:
            scale = affine.scale.expand(channels)
            if type(layer) in TRANSPOSED:  # (g i) o K ...: the outputs of a group lie along the second axis
                groups = layer.groups  # type: ignore[attr-defined]
                spread = scale.reshape(groups, -1).repeat_interleave(len(weight) // groups, 0)
            else:
                spread = scale[:, None]
            wide = weight * spread.reshape(*spread.shape, *[1] * (weight.ndim - 2))
            self.leaves[path], bias = wide.to(weight.dtype), bias * scale
        if affine.shift is not None:
            bias = bias + affine.shift
        self.leaves[biased.path("bias")] = bias.to(weight.dtype)
        self.owners[biased.path("bias")] = 1

    def _drop(self, node: Node, slot: int) -> None:
        """The node's value is now that of the node it heard at ``slot``; nodes that nobody hears any more go."""
        writer = node.inputs[slot]
        self.moved[node.name] = writer
        self.heard[writer] = self.heard[node.name]
        del self.nodes[node.name]
        for name in node.inputs[:slot] + node.inputs[slot + 1 :]:
            self.heard[name] -= 1
            if not self.heard[name]:
                del self.nodes[name]


def _biased(node: Node) -> Node:
    return replace(node, layer=replace(node.layer, bias=True))  # type: ignore[call-arg]

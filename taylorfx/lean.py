"""The copy of a network that scoring runs: the same values at the reads, with less time and memory.

Once differentiated by the gates and thrown away, a network need not keep what only other derivatives ask for:

- a norm by running statistics that cannot be folded is a product and a sum per channel, which keep nothing of the
  activations, where torch's keeps its input and goes over it once more for derivatives of weights that nobody wants;
- activations that need only their own result, and sums, are written over an input that is theirs alone;
- attention without a mask is torch's fused one, which keeps no scores and cannot be differentiated twice.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx import layers as L
from taylorfx.fold import NORMS, fold, norm
from taylorfx.layers import Layer, Leaves, Shape
from taylorfx.spec import Node, Spec
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["lean"]


def lean(params: Params, spec: Spec, reads: set[str], *, channels_last: bool = False) -> tuple[Params, Spec]:
    """A network with the same reads and the same derivatives by their gates, up to rounding; for nothing else.

    Args:
        reads: the nodes whose inputs are gated.
        channels_last: lay the weights of convolutions out for images in that memory format, where every pass would
            otherwise copy them.
    """
    params, spec = fold(params, spec)
    leaves = flatten(params)
    heard = Counter([*spec.outputs, *(x for node in spec.nodes for x in node.inputs)])
    nodes: dict[str, Node] = {}
    behind: set[str] = set()  # what depends on a gate: torch.func.vjp lets nothing else be written over
    for node in spec.nodes:
        if node.name in reads or behind.intersection(node.inputs):
            behind.add(node.name)
        if type(node.layer) in NORMS and node.layer.track_running_stats:  # type: ignore[attr-defined]
            node = _scaled(node, leaves)
        elif type(node.layer) in _OVER:
            own = [x for x in node.inputs if x in behind and heard[x] == 1 and _fresh(nodes[x])]
            if own:
                inputs = (own[0], *(x for x in node.inputs if x != own[0]))
                node = replace(node, layer=_Over(node.layer), inputs=inputs)
        elif type(node.layer) is L.ScaledDotProduct and len(node.inputs) == 3 and not node.layer.grouped:
            node = replace(node, layer=_Fused(node.layer))
        nodes[node.name] = node
        if channels_last and isinstance(node.layer, L.Conv2d):
            path = node.path("weight")
            leaves[path] = leaves[path].contiguous(memory_format=torch.channels_last)
    spec = replace(spec, nodes=tuple(nodes.values()))
    return unflatten((path, leaves[path]) for path in spec.shapes), spec


def _scaled(node: Node, leaves: dict[str, Tensor]) -> Node:
    made = Node(node.name, _Scale(node.layer.num_features), node.inputs)  # type: ignore[attr-defined]
    affine = norm(node, leaves)
    if any(path in leaves for path in made.paths.values()):
        return node  # somebody else's
    for leaf, value in (("scale", affine.scale), ("shift", affine.shift)):
        assert value is not None
        leaves[made.path(leaf)] = value
    return made


@dataclass(frozen=True)
class _Scale(Layer):
    """A product and a sum for every channel of ``(N, channels, ...)``."""

    channels: int

    def signature(self, *shapes: Shape) -> str:
        return "B c ..., scale: c, shift: c -> B c ..."

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"channels": "c"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"scale": torch.ones(self.channels), "shift": torch.zeros(self.channels)}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        scale, shift = (params[leaf].reshape(-1, *[1] * (x.ndim - 2)) for leaf in ("scale", "shift"))
        return (x * scale).add_(shift).to(x.dtype)  # the numbers per channel are single precision or better


@dataclass(frozen=True)
class _Over(Layer):
    """A layer whose value is written over its first input."""

    layer: Layer

    def signature(self, *shapes: Shape) -> str | None:
        return self.layer.signature(*shapes)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        value: Tensor = _OVER[type(self.layer)](*inputs)
        return value


@dataclass(frozen=True)
class _Fused(Layer):
    """Scaled dot-product attention, whose scores are not kept."""

    layer: L.ScaledDotProduct

    def signature(self, *shapes: Shape) -> str | None:
        return self.layer.signature(*shapes)

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return self.layer.letters(*shapes)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        q, k, v = inputs
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.layer.causal, scale=self.layer.scale)


def _sum(x: Tensor, *others: Tensor) -> Tensor:
    over = all(other.shape == x.shape and other.dtype == x.dtype for other in others)
    for other in others:
        x = x.add_(other) if over else x + other
    return x


_OVER: dict[type[Layer], Callable[..., Any]] = {
    L.ReLU: F.relu_,
    L.ReLU6: lambda x: F.relu6(x, inplace=True),
    L.Add: _sum,
}
"""What needs nothing but its own result for its derivative."""


def _fresh(node: Node) -> bool:
    """Its value is no view of another, and its derivative does not need it."""
    layer = node.layer.layer if isinstance(node.layer, _Over) else node.layer
    if type(layer) is L.Add:
        return len(node.inputs) > 1
    return type(layer) in (L.Conv2d, L.Conv3d, L.ConvTranspose2d, _Scale)

"""The copy of a network that scoring runs: the same values at the reads, with less time and memory.

Once differentiated by the gates and thrown away, a network need not keep what only other derivatives ask for:

- a norm by running statistics that cannot be folded is a product and a sum per channel, which keep nothing of the
  activations, where torch's keeps its input and goes over it once more for derivatives of weights that nobody wants;
- activations that need only their own result, and sums, are written over an input that is theirs alone;
- positions that nobody hears are not computed (`taylorfx.unheard`);
- slices that take an axis apart are parts of one, whose gradients are written into one tensor;
- attention is torch's fused one, which keeps no scores and cannot be differentiated twice, nor by its mask; but not
  where the mask is added to the scores: the fused derivative can be wrong there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd.function import _SingleLevelFunction
from torch.nn import functional as F

from taylorfx import layers as L
from taylorfx.coupling.units import Coupling
from taylorfx.layers import Layer, Leaves, Shape
from taylorfx.layers.roles import ChannelAffine
from taylorfx.network.build import unused
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.folding import fold
from taylorfx.rewrite.unused import without_unheard
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["lean"]


def lean(
    params: Params, coupling: Coupling, *, channels_last: bool = False, whole: bool = False
) -> tuple[Params, Spec]:
    """A network with the same reads and the same derivatives by their gates, up to rounding; for nothing else.

    Args:
        channels_last: lay the weights of convolutions out for images in that memory format, where every pass would
            otherwise copy them.
        whole: compute all positions that are read, whether or not they are heard.
    """
    reads = {place.node for place in coupling.reads}
    params, spec = fold(params, coupling.spec if whole else without_unheard(coupling))
    leaves = flatten(params)
    heard = Counter([*spec.outputs, *(x for node in spec.nodes for x in node.inputs)])
    taken, cuts = {node.name for node in spec.nodes}, _cuts(spec, heard)
    nodes: dict[str, Node] = {}
    behind: set[str] = set()  # what depends on a gate: torch.func.vjp lets nothing else be written over
    for node in spec.nodes:
        if node.name in reads or behind.intersection(node.inputs):
            behind.add(node.name)
        affine = node.layer.role(ChannelAffine)
        if affine is not None:
            node = _scaled(node, affine, leaves)
        elif type(node.layer) in _OVER:
            own = [x for x in node.inputs if x in behind and heard[x] == 1 and _fresh(nodes[x])]
            if own:
                inputs = (own[0], *(x for x in node.inputs if x != own[0]))
                node = replace(node, layer=Over(node.layer), inputs=inputs)
        elif type(node.layer) is L.Slice and node.inputs[0] in cuts:
            node = _part(node, nodes, taken, cuts[node.inputs[0]])
        elif type(node.layer) is L.ScaledDotProduct and _fusible(node.layer, node.inputs[3:], behind):
            node = replace(node, layer=Fused(node.layer))
        nodes[node.name] = node
        if channels_last and isinstance(node.layer, L.Conv2d):
            path = node.path("weight")
            leaves[path] = leaves[path].contiguous(memory_format=torch.channels_last)
    spec = replace(spec, nodes=tuple(nodes.values()))
    return unflatten((path, leaves[path]) for path in spec.shapes), spec


@dataclass(frozen=True)
class _For(Layer):
    """Stands for a layer, whose axes it has."""

    layer: Layer

    def signature(self, *shapes: Shape) -> str | None:
        return self.layer.signature(*shapes)

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return self.layer.letters(*shapes)


def _scaled(node: Node, affine: ChannelAffine, leaves: dict[str, Tensor]) -> Node:
    scale, shift = affine.numbers({leaf: leaves[path] for leaf, path in node.paths.items()})
    made = Node(node.name, _Scale(len(scale)), node.inputs)
    if any(path in leaves for path in made.paths.values()):
        return node  # somebody else's
    leaves[made.path("scale")], leaves[made.path("shift")] = scale, shift
    return made


def _cuts(spec: Spec, heard: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
    """Where values are cut that are only heard in several slices, which do not overlap, of one axis."""
    found: dict[str, list[L.Slice]] = {}
    for node in spec.nodes:
        if type(node.layer) is L.Slice:
            found.setdefault(node.inputs[0], []).append(node.layer)
    result = {}
    for name, slices in found.items():
        ordered = sorted(slices, key=lambda layer: layer.start)
        apart = all(a.dim == b.dim and a.stop <= b.start for a, b in pairwise(ordered))
        if apart and heard[name] == len(slices) > 1:
            result[name] = tuple(sorted({0, *(x for layer in slices for x in (layer.start, layer.stop))}))
    return result


def _part(node: Node, nodes: dict[str, Node], taken: set[str], cuts: tuple[int, ...]) -> Node:
    """A slice of what is cut once for all slices."""
    layer = node.layer
    assert isinstance(layer, L.Slice)
    name = unused(f"{node.inputs[0]}.parts", taken)
    nodes.setdefault(name, Node(name, Parts(layer.dim, cuts), node.inputs))
    return replace(node, layer=Part(layer, cuts.index(layer.start)), inputs=(name,))


@dataclass(frozen=True)
class Parts(Layer):
    """An axis in parts: their gradients become one tensor, where every slice would fill one of its own with zeros."""

    dim: int
    cuts: tuple[int, ...]

    def signature(self, *shapes: Shape) -> str:
        return "... -> ..."

    def apply(self, params: Leaves, *inputs: Tensor) -> Any:
        (x,) = inputs
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda k: -strides[k])  # in which the gradients become one tensor again
        lengths = [b - a for a, b in pairwise((*self.cuts, x.shape[self.dim]))]
        parts = torch.split(x.permute(order), lengths, order.index(self.dim % x.ndim))
        return [part.permute([order.index(k) for k in range(x.ndim)]) for part in parts]


@dataclass(frozen=True)
class Part(_For):
    """One of the parts."""

    layer: L.Slice
    index: int

    def apply(self, params: Leaves, *inputs: Any) -> Tensor:
        part: Tensor = inputs[0][self.index]
        return part


class Function(_SingleLevelFunction):
    """An autograd function for use right under one ``torch.func.vjp``.

    It is run as it is; of a ``torch.autograd.Function`` torch.func makes a class anew for every call, and lets a second
    one differentiate it, which takes more time than many a layer.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        with enable_single_level_autograd_function():
            return super().apply(*args)  # type: ignore[misc]


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
class Over(_For):
    """A layer whose value is written over its first input."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        value: Tensor = _OVER[type(self.layer)](*inputs)
        return value


def _fusible(layer: L.ScaledDotProduct, mask: tuple[str, ...], behind: set[str]) -> bool:
    """Torch has an operator for all of it, and no gate asks for a derivative by the mask."""
    return not (layer.grouped or behind.intersection(mask) or (layer.causal and mask))


@dataclass(frozen=True)
class Fused(_For):
    """Scaled dot-product attention, whose scores are not kept."""

    layer: L.ScaledDotProduct

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (q, k, v), mask = inputs[:3], inputs[3] if inputs[3:] else None
        if mask is not None and mask.is_floating_point():
            # A row in which the lowest number of the dtype is added everywhere has equal weights. The fused kernel's
            # backward pass takes them for 1 each, as their number is lost in the logarithm of their sum.
            return self.layer.apply(params, *inputs)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.layer.causal, scale=self.layer.scale)


def _sum(x: Tensor, *others: Tensor) -> Tensor:
    over = all(other.shape == x.shape and other.dtype == x.dtype for other in others)
    for other in others:
        x = x.add_(other) if over else x + other
    return x


class _Rectified(Function):
    """``relu`` or ``relu6`` over its input, of which it is a view to autograd: what the input depends on stays its own.

    It keeps what it gives out, which is now in both; torch's ``relu6_`` keeps a copy of what it is given.
    """

    @staticmethod
    def forward(x: Tensor, six: bool) -> Tensor:
        x = F.relu6(x, inplace=True) if six else F.relu_(x)
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.six = inputs[1]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        aten, (value,), (grad,) = torch.ops.aten, ctx.saved_tensors, grads
        if grad is None:  # a tap has multiplied by the derivative
            return None, None
        return aten.hardtanh_backward(grad, value, 0, 6) if ctx.six else aten.threshold_backward(grad, value, 0), None


_OVER: dict[type[Layer], Callable[..., Any]] = {
    L.ReLU: lambda x: _Rectified.apply(x, False),
    L.ReLU6: lambda x: _Rectified.apply(x, True),
    L.Add: _sum,
}
"""What needs nothing but its own result for its derivative."""


def _fresh(node: Node) -> bool:
    """Its value is no view of another, and its derivative does not need it."""
    layer = node.layer.layer if isinstance(node.layer, Over) else node.layer
    if type(layer) is L.Add:
        return len(node.inputs) > 1
    return type(layer) in (L.Conv2d, L.Conv3d, L.ConvTranspose2d, L.ConvTranspose3d, _Scale)

"""A pass: activations and sums are written over an input that nothing else uses.

This spares a tensor for each, and the time to fill it. It is right where the derivative of the layer needs nothing but
the layer's own result, and the derivative of the layer before it does not need what is written over.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx import layers as L
from taylorfx.internals import Function
from taylorfx.layers import Layer, Leaves
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn
from taylorfx.rewrite.scales import Scale

__all__ = ["Over", "written_over"]


@dataclass(frozen=True)
class Over(StandIn):
    """A layer whose value is written over its first input."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        value: Tensor = _OVER[type(self.layer)](*inputs)
        return value


def written_over(draft: Draft) -> Draft:
    """Write activations and sums over an input; of a sum's inputs, the first that may be written over comes first.

        a --> conv --> y --> relu --> z          y and z are one tensor, if relu alone consumes y
        a, b --> add --> c                       a and c are one tensor, if add alone consumes a

    What does not depend on a gate is left as it is: ``torch.func.vjp`` refuses to write over a tensor that it does not
    differentiate with one that it does.
    """
    nodes: dict[str, Node] = {}
    for node in draft.spec.nodes:
        if type(node.layer) in _OVER:
            over = [x for x in node.inputs if x in draft.gated and draft.spec.uses[x] == 1 and _fresh(nodes[x])]
            if over:
                inputs = (over[0], *(x for x in node.inputs if x != over[0]))
                node = replace(node, layer=Over(node.layer), inputs=inputs)
        nodes[node.name] = node
    return draft.rewritten(nodes.values())


def _fresh(node: Node) -> bool:
    """Its value is no view of another, and its derivative does not need it."""
    layer = node.layer.layer if isinstance(node.layer, Over) else node.layer
    if type(layer) is L.Add:
        return len(node.inputs) > 1
    return type(layer) in (L.Conv2d, L.Conv3d, L.ConvTranspose2d, L.ConvTranspose3d, Scale)


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

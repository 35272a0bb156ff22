"""A pass: activations and sums are written over an input that nothing else uses.

This spares a tensor for each, and the time to fill it. It is right where the derivative of the layer needs nothing but
the layer's own result, and the derivative of the layer before it does not need what is written over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from taylorfx.internals import Function
from taylorfx.layers import Layer, Leaves
from taylorfx.layers.roles import Memory, Pointwise, Sum
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Over", "written_over"]


@dataclass(frozen=True)
class Over(StandIn):
    """A layer whose value is written over its first input."""

    @cached_property
    def pointwise(self) -> Pointwise | None:
        """The role by which it does so, if it is not a sum."""
        return self.layer.role(Pointwise)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        if self.pointwise is None:
            return _sum(*inputs)
        value: Tensor = _Pointwise.apply(inputs[0], self.pointwise)
        return value


def written_over(draft: Draft) -> Draft:
    """Write activations and sums over an input; of a sum's inputs, the first that may be written over comes first.

        a --> conv --> y --> relu --> z          y and z are one tensor, if relu alone consumes y
        a, b --> add --> c                       a and c are one tensor, if add alone consumes a

    What does not depend on a gate is left as it is: ``torch.func.vjp`` refuses to write over a tensor that it does not
    differentiate with one that it does. So is a sum with a gate on an operand, which the gate's derivative needs.
    """
    nodes: dict[str, Node] = {}
    gated = {place.node for place in draft.coupling.reads}
    for node in draft.spec.nodes:
        if _overwrites(node.layer) and node.name not in gated:
            over = [x for x in node.inputs if x in draft.gated and draft.spec.uses[x] == 1 and _fresh(nodes[x])]
            if over:
                inputs = (over[0], *(x for x in node.inputs if x != over[0]))
                node = replace(node, layer=Over(node.layer), inputs=inputs)
        nodes[node.name] = node
    return draft.rewritten(nodes.values())


def _overwrites(layer: Layer) -> bool:
    """Its derivative needs nothing but its own result."""
    pointwise = layer.role(Pointwise)
    return layer.role(Sum) is not None or (pointwise is not None and pointwise.overwrite is not None)


def _fresh(node: Node) -> bool:
    """Its value is no view of another, and its derivative does not need it."""
    layer = node.layer.layer if isinstance(node.layer, Over) else node.layer
    if layer.role(Sum) is not None:
        return len(node.inputs) > 1
    memory = layer.role(Memory)
    return memory is not None and memory.new_value


def _sum(x: Tensor, *others: Tensor) -> Tensor:
    over = all(other.shape == x.shape and other.dtype == x.dtype for other in others)
    for other in others:
        x = x.add_(other) if over else x + other
    return x


class _Pointwise(Function):
    """A function of every number alone, over its input. Torch takes the value for a view of the input.

    So only the input itself is new to autograd, not the tensors that it was computed from. What is kept is the value,
    which is in both; torch's own ``relu6_`` keeps a copy of the input.
    """

    @staticmethod
    def forward(x: Tensor, pointwise: Pointwise) -> Tensor:
        assert pointwise.overwrite is not None
        x = pointwise.overwrite(x)
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.slope = inputs[1].slope
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (value,), (grad,) = ctx.saved_tensors, grads
        # There is no gradient where a tap has multiplied by the slope already, see `taylorfx.scoring.tap_plan`.
        return None if grad is None else ctx.slope(value, grad, False), None

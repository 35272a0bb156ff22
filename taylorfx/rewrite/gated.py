"""A pass: the product of an activation and another value, as in gated units, keeps what the activation is made from.

Torch keeps both factors for each other's derivative, and what the activation was computed from for its own. The
activation is made again from that with little work, so that it need not be kept.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from taylorfx.internals import Function, vectorized
from taylorfx.layers import Layer, Leaves
from taylorfx.layers.roles import Memory, Pointwise, Product
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Gated", "gated_products"]


@dataclass(frozen=True)
class Gated(StandIn):
    """The product of an activation of the first input and the second input.

    Attributes:
        over: the gradient by the product may be written over.
    """

    activation: Layer
    over: bool = False

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        gate, x = inputs
        if gate.shape != x.shape or gate.dtype != x.dtype:
            return self.layer.apply({}, self.activation.apply({}, gate), x)
        value: Tensor = _Gated.apply(gate, x, self.activation, self.over)
        return value


def gated_products(draft: Draft) -> Draft:
    """Compute activations where they are multiplied, if nothing else uses them.

    g --> silu --> a                               g, x --> gated --> y
          a, x --> multiply --> y
    """
    gone: set[str] = set()
    nodes: list[Node] = []
    for node in draft.spec.nodes:
        slot = None if node.layer.role(Product) is None else _activated(node, draft)
        if slot is not None:
            activation = draft.spec[node.inputs[slot]]
            gone.add(activation.name)
            inputs = (*activation.inputs, node.inputs[1 - slot])
            layer = Gated(node.layer, activation.layer, _alone(node, draft))
            node = replace(node, layer=layer, inputs=inputs)
        nodes.append(node)
    return draft.rewritten(node for node in nodes if node.name not in gone)


def _activated(node: Node, draft: Draft) -> int | None:
    """Which of two factors is an activation that nothing else uses, both of which depend on a gate."""
    if len(node.inputs) != 2 or not draft.gated.issuperset(node.inputs) or node.paths:
        return None
    for slot, factor in enumerate(draft.spec[x] for x in node.inputs):
        pointwise = factor.layer.role(Pointwise)
        if pointwise is not None and not factor.paths and draft.spec.uses[factor.name] == 1:
            return slot
    return None


def _alone(node: Node, draft: Draft) -> bool:
    """The gradient by a node's value is a new tensor that nothing else uses."""
    consumers = draft.spec.consumers[node.name]
    memory = consumers[0].layer.role(Memory) if draft.spec.uses[node.name] == len(consumers) == 1 else None
    return memory is not None and memory.new_gradient


class _Gated(Function):
    """``activation(g) * x``, of which ``g`` and ``x`` are kept."""

    @staticmethod
    def forward(gate: Tensor, x: Tensor, activation: Layer, over: bool) -> Tensor:
        value = activation.apply({}, gate)
        return value * x if value is gate or vectorized(x) else value.mul_(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        gate, x, ctx.activation, ctx.over = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gate, x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        (gate, x), (grad,), activation = ctx.saved_tensors, grads, ctx.activation
        if grad is None:
            return None, None, None, None
        pointwise, alone = activation.role(Pointwise), not vectorized(grad)
        by_x = activation.apply({}, gate)
        by_x = by_x.mul_(grad) if alone and by_x is not gate else by_x * grad
        product = grad.mul_(x) if alone and ctx.over else grad * x
        return pointwise.slope(gate, product, alone), by_x, None, None

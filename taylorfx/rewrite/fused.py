"""A pass: attention by torch's fused operator, which keeps no scores.

Its derivative cannot be differentiated again, nor taken by the mask; scoring asks for neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers import Leaves
from taylorfx.layers.roles import Attending
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Fused", "fused_attention"]


@dataclass(frozen=True)
class Fused(StandIn):
    """Scaled dot-product attention by one operator, but where its mask is added to the scores."""

    @cached_property
    def attending(self) -> Attending:
        """The role by which it is fused."""
        role = self.layer.role(Attending)
        assert role is not None
        return role

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (q, k, v), mask = inputs[:3], inputs[3] if inputs[3:] else None
        if mask is not None and mask.is_floating_point():
            # A row in which the lowest number of the dtype is added everywhere has equal weights. The fused kernel's
            # backward pass takes them for 1 each, as their number is lost in the logarithm of their sum.
            return self.layer.apply(params, *inputs)
        causal, scale = self.attending.causal, self.attending.scale
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def fused_attention(draft: Draft) -> Draft:
    """Replace scaled dot-product attention by the fused operator where that computes all of it.

    It does not where queries are grouped, where a mask is given beside the causal one, or where the mask depends on a
    gate, whose derivative would be asked for.
    """

    def fused(node: Node) -> Node:
        role, mask = node.layer.role(Attending), node.inputs[3:]
        if role is None or role.grouped or (role.causal and mask) or draft.gated.intersection(mask):
            return node
        return replace(node, layer=Fused(node.layer))

    return draft.rewritten(map(fused, draft.spec.nodes))

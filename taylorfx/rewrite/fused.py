"""A pass: attention by torch's fused operator, which keeps no scores.

Its derivative cannot be differentiated again, nor taken by the mask; scoring asks for neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor
from torch.nn import functional as F

from taylorfx import layers as L
from taylorfx.layers import Leaves
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Fused", "fused_attention"]


@dataclass(frozen=True)
class Fused(StandIn):
    """Scaled dot-product attention by one operator, but where its mask is added to the scores."""

    layer: L.ScaledDotProduct

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (q, k, v), mask = inputs[:3], inputs[3] if inputs[3:] else None
        if mask is not None and mask.is_floating_point():
            # A row in which the lowest number of the dtype is added everywhere has equal weights. The fused kernel's
            # backward pass takes them for 1 each, as their number is lost in the logarithm of their sum.
            return self.layer.apply(params, *inputs)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.layer.causal, scale=self.layer.scale)


def fused_attention(draft: Draft) -> Draft:
    """Replace scaled dot-product attention by the fused operator where that computes all of it.

    It does not where queries are grouped, where a mask is given beside the causal one, or where the mask depends on a
    gate, whose derivative would be asked for.
    """

    def fused(node: Node) -> Node:
        layer, mask = node.layer, node.inputs[3:]
        if type(layer) is not L.ScaledDotProduct or layer.grouped or (layer.causal and mask):
            return node
        return node if draft.gated.intersection(mask) else replace(node, layer=Fused(layer))

    return draft.rewritten(map(fused, draft.spec.nodes))

"""A pass: attention by torch's fused kernel, which keeps no scores, and is told what its mask is.

A captured mask is a tensor. What is known of how it is computed (`taylorfx.layers.indices`) says what part of it is
causal, what follows from positions in another way, and what depends on the inputs:

    j <= i  and  j > i - 8  and  padding[n, j]        causal, a bound, and a node whose value is (N, 1, 1, S)

The kernel skips what a causal mask forbids, bounds are ``(T, S)`` for all examples and heads, and the rest is no larger
than it is. The derivative cannot be differentiated again, nor taken by the mask; scoring asks for neither.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx import layers as L
from taylorfx.internals import Attended, Function, attended, attended_backward, attends, attends_in
from taylorfx.layers import Leaves, Shape
from taylorfx.layers.indices import CAUSAL, Condition, Index, Whole, constant, known, unknown
from taylorfx.layers.roles import Attending, Constant
from taylorfx.rewrite.draft import Draft, StandIn
from taylorfx.rewrite.unused import Only

__all__ = ["Fused", "fused_attention"]


@dataclass(frozen=True)
class Fused(StandIn):
    """Scaled dot-product attention by one operator, but where its mask is added to the scores.

    Attributes:
        causal: a query attends to no later position, whether by its layer or by its mask.
        bounds: a query attends to positions where these numbers, of row and column, are not negative.

    The inputs after queries, keys and values are masks, which all have to hold.
    """

    causal: bool = False
    bounds: tuple[Whole, ...] = ()

    def signature(self, *shapes: Shape) -> str | None:
        patterns = [self.layer.signature(*shapes[:3], *mask) for mask in ([[shape] for shape in shapes[3:]] or [[]])]
        if None in patterns:
            return None
        inputs, output = str(patterns[0]).split(" -> ")
        more = [str(pattern).split(" -> ")[0].split(", ")[3] for pattern in patterns[1:]]
        return f"{', '.join([inputs, *more])} -> {output}"

    @cached_property
    def attending(self) -> Attending:
        """The role by which it is fused."""
        role = self.layer.role(Attending)
        assert role is not None
        return role

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (q, k, v), masks = inputs[:3], inputs[3:]
        if any(mask.is_floating_point() for mask in masks):
            # A row in which the lowest number of the dtype is added everywhere has equal weights. The fused kernel's
            # backward pass takes them for 1 each, as their number is lost in the logarithm of their sum.
            return self.layer.apply(params, *inputs)
        causal, scale = self.causal, self.attending.scale
        if attends(q, k, v):
            value: Tensor = _Attention.apply(q, k, v, causal, scale, self.bounds, *masks)[0]
            return value
        if causal and (masks or self.bounds):
            mask, causal = _allowed((q.shape[-2], k.shape[-2]), (CAUSAL, *self.bounds), masks, q.device), False
        else:
            mask = _allowed((q.shape[-2], k.shape[-2]), self.bounds, masks, q.device)
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale)


def _allowed(
    shape: tuple[int, int], bounds: Sequence[Whole], masks: Sequence[Tensor], device: torch.device
) -> Tensor | None:
    """Where a query may attend: booleans that broadcast against scores whose last axes have this shape."""
    positions = [bound.at(*shape, device=device) >= 0 for bound in bounds]
    both = [*masks, *positions]
    return reduce(torch.logical_and, both) if both else None


class _Attention(Function):
    """Attention on the CPU. It keeps masks as they are, where torch's operator keeps one number per score.

    Half precision without instructions of its own is computed in single precision: torch's kernels are up to ten times
    slower there.
    """

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, bounds: tuple[Whole, ...], *masks: Tensor
    ) -> tuple[Tensor, Tensor]:
        dtype = _working(q)
        mask = _added(q, k, bounds, masks)
        value, logsumexp = attended(q.to(dtype), k.to(dtype), v.to(dtype), mask, causal=causal, scale=scale)
        return value.to(q.dtype), logsumexp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        q, k, v, ctx.causal, ctx.scale, ctx.bounds, *masks = inputs
        ctx.save_for_backward(q, k, v, *output, *masks)
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        q, k, v, value, logsumexp, *masks = ctx.saved_tensors
        nothing = (None,) * (3 + len(masks))
        if grads[0] is None:
            return None, None, None, *nothing
        dtype, mask = _working(q), _added(q, k, ctx.bounds, masks)
        gradient, result = grads[0].to(dtype), Attended(value.to(dtype), logsumexp)
        q, k, v = (x.to(dtype) for x in (q, k, v))
        by = attended_backward(gradient, q, k, v, result, mask, causal=ctx.causal, scale=ctx.scale)
        return *(x.to(grads[0].dtype) for x in by), *nothing


def _working(q: Tensor) -> torch.dtype:
    """The dtype in which attention is computed."""
    return q.dtype if attends_in(q.dtype) else torch.float32


def _added(q: Tensor, k: Tensor, bounds: Sequence[Whole], masks: Sequence[Tensor]) -> Tensor | None:
    """What is added to the scores: 0 where a query may attend, minus infinity elsewhere."""
    allowed = _allowed((q.shape[-2], k.shape[-2]), bounds, masks, q.device)
    if allowed is None:
        return None
    allowed = allowed.reshape((1,) * (4 - allowed.ndim) + allowed.shape)
    return torch.zeros(allowed.shape, dtype=_working(q), device=q.device).masked_fill_(~allowed, -math.inf)


def fused_attention(draft: Draft) -> Draft:
    """Replace scaled dot-product attention by the fused operator where that computes all of it.

    It does not where queries are grouped, or where the mask depends on a gate, whose derivative would be asked for.
    Nodes whose values only masks needed are left out.
    """
    facts, nodes = _facts(draft), []
    for node in draft.spec.nodes:
        role, masks = node.layer.role(Attending), node.inputs[3:]
        if role is not None and not role.grouped and not draft.gated.intersection(masks):
            allowed = reduce(Condition.both, (_condition(facts[mask], mask) for mask in masks), Condition())
            bounds = tuple(bound for bound in allowed.bounds if bound != CAUSAL)
            causal = role.causal or CAUSAL in allowed.bounds
            node = replace(node, layer=Fused(node.layer, causal, bounds), inputs=(*node.inputs[:3], *allowed.others))
        nodes.append(node)
    return _without_idle(draft.rewritten(nodes), facts)


def _facts(draft: Draft) -> dict[str, Index]:
    """What is known of the values that masks are computed from."""
    masks = [node.inputs[3:] for node in draft.spec.nodes if node.layer.role(Attending) is not None]
    before, facts = draft.spec.upstream(chain.from_iterable(masks)), dict[str, Index]()
    shapes = {name: bound.shape for name, bound in draft.coupling.bounds.items()}
    for node in (node for node in draft.spec.nodes if node.name in before):
        layer, constants = node.layer, node.layer.role(Constant)
        if isinstance(layer, Only):  # a slice of the first pass
            shapes[node.name] = layer.kept(shapes[node.inputs[0]])
            layer = L.Slice(layer.dim, layer.start, layer.stop)
        if constants is None:
            inputs = [facts[x] for x in node.inputs], [shapes[x] for x in node.inputs]
            facts[node.name] = known(node.name, layer, *inputs)
        else:
            facts[node.name] = constant(node.name, draft.leaves[node.path(constants.parameter)])
    return facts


def _condition(index: Index, name: str) -> Condition:
    return index if isinstance(index, Condition) else unknown(name)


def _without_idle(draft: Draft, candidates: Collection[str]) -> Draft:
    """The network without those of these nodes whose values nothing uses any more."""
    spec = draft.spec
    rest = [node.name for node in spec.nodes if node.name not in candidates or node.name in spec.input_layers]
    used = spec.upstream([*rest, *spec.outputs])
    return draft.rewritten(node for node in spec.nodes if node.name in used)

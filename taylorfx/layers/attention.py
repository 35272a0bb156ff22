"""Scaled dot-product attention with several heads: self, cross, grouped-query, causal, masked."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import wrapped
from taylorfx.layers.activation import Dropout
from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, names
from taylorfx.layers.roles import Attending, Role

__all__ = ["Attention", "ScaledDotProduct"]


@dataclass(frozen=True)
class Attention(Layer):
    """``softmax(q k^T scale + mask) v`` for every head (Vaswani et al. 2017, arXiv 1706.03762, eq. 1).

    The inputs, in this order::

        query   (N, T, num_heads * head_dim)
        key     (N, S, num_kv_heads * head_dim)
        value   (N, S, num_kv_heads * v_head_dim)
        mask    (N, S) or (N, 1 or num_heads, T or 1, S), optional: booleans (true: attend), or added to the scores

    The output is ``(N, T, num_heads * v_head_dim)``. A query that may attend to no position gets zeros, as in torch's
    fused attention.

    With grouped queries (Ainslie et al. 2023, arXiv 2305.13245) each of the ``h`` key heads serves ``r`` query heads.
    What may leave is a key head with its query heads (``h``), one query head of every group (``r``), a dimension of
    queries and keys (``k``), or a dimension of values (``v``). ``scale`` is by default ``head_dim ** -0.5``, and stays
    so when dimensions leave.
    """

    num_heads: int
    head_dim: int
    num_kv_heads: int | None = None
    v_head_dim: int | None = None
    causal: bool = False
    scale: float | None = None

    multiplies: ClassVar[tuple[str, ...]] = ("h r k T S", "h r v T S")

    def __post_init__(self) -> None:
        defaults = {"num_kv_heads": self.num_heads, "v_head_dim": self.head_dim, "scale": 1 / math.sqrt(self.head_dim)}
        for field, value in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        if self.num_heads % (self.num_kv_heads or 1):
            raise ShapeError(f"The number of query heads is a multiple of the number of key heads; received {self}.")

    @property
    def separate(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.causal else ("T",)

    def signature(self, *shapes: Shape) -> str:
        mask = ""
        if len(shapes) == 4 and len(shapes[3]) == 2:
            mask = ", B S"
        elif len(shapes) == 4:
            mask = f", B {'1' if shapes[3][1] == 1 else '(h r)'} {'1' if shapes[3][2] == 1 else 'T'} S"
        return f"B T (h r k), B S (h k), B S (h v){mask} -> B T (h r v)"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_heads": "(h r)", "head_dim": "k", "num_kv_heads": "h", "v_head_dim": "v"}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        q, k, v = inputs[:3]
        heads, scale = self.num_kv_heads or self.num_heads, self.scale or 0.0
        q = torch.unflatten(q, -1, (heads, self.num_heads // heads, self.head_dim))  # (N, T, h, r, k)
        k = torch.unflatten(k, -1, (heads, self.head_dim))  # (N, S, h, k)
        v = torch.unflatten(v, -1, (heads, self.v_head_dim or self.head_dim))  # (N, S, h, v)
        scores = torch.einsum("nthrk,nshk->nhrts", q, k) * scale
        if self.causal:
            past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~past, -math.inf)
        if len(inputs) == 4:
            mask = inputs[3]
            if mask.ndim == 2:
                mask = mask[:, None, None, None, :]
            else:
                mask = torch.unflatten(mask, 1, (1, 1) if mask.shape[1] == 1 else (heads, self.num_heads // heads))
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = attention_weights(scores) if len(inputs) == 4 else torch.softmax(scores, -1)
        return torch.einsum("nhrts,nshv->nthrv", weights, v).flatten(2)


@dataclass(frozen=True)
class ScaledDotProduct(Layer):
    """``torch.nn.functional.scaled_dot_product_attention`` of query, key and value.

    These are ``(N, h, T, k)``, ``(N, h, S, k)`` and ``(N, h, S, v)``, and an optional fourth input is the mask. A query
    that may attend to no position gets zeros. ``scale`` stays the same when dimensions leave. With ``grouped``, every
    key head serves several query heads. In training, weights drop out with probability ``dropout``.
    """

    scale: float
    causal: bool = False
    grouped: bool = False
    dropout: float = 0.0

    multiplies: ClassVar[tuple[str, ...]] = ("x0 x1 x2 x3 h r T S k", "x0 x1 x2 x3 h r T S v")

    @property
    def separate(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.causal else ("T",)

    def signature(self, *shapes: Shape) -> str | None:
        q, k, _, *mask = shapes
        lead = names(len(q) - 3)
        heads = "(h r)" if self.grouped else "h"
        text = f"{' '.join(lead)} {heads} T k, {' '.join(lead)} h S k, {' '.join(lead)} h S v"
        if mask:
            letters = [*lead, heads, "T", "S"]
            wide = [*q[:-1], k[-2]]
            offset = len(letters) - len(mask[0])
            text += ", " + " ".join(
                "1" if n == 1 != wide[offset + j] else letters[offset + j] for j, n in enumerate(mask[0])
            )
        return f"{text} -> {' '.join(lead)} {heads} T v"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {"h": shapes[1][-3]} if shapes else {}

    def roles(self) -> tuple[Role, ...]:
        return (Attending(self.scale, self.causal, self.grouped),)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (q, k, v), mask = inputs[:3], inputs[3] if len(inputs) == 4 else None
        # torch.func may ask for derivatives that the operator does not have, or may not know it.
        if (self.causal and mask is not None) or (not torch.compiler.is_compiling() and any(map(wrapped, inputs))):
            return self._by_parts(inputs)
        return F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, scale=self.scale, enable_gqa=self.grouped
        )

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.dropout:
            return self.apply(params, *inputs), {}
        drop = Dropout(self.dropout)
        return self._by_parts(inputs, lambda weights: drop.train({}, weights, generator=generator)[0]), {}

    def _by_parts(self, inputs: tuple[Tensor, ...], drop: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        q, k, v, *mask = inputs
        if self.grouped:
            q, k, v = torch.unflatten(q, -3, (k.shape[-3], -1)), k.unsqueeze(-3), v.unsqueeze(-3)
        scores = q @ k.transpose(-1, -2) * self.scale
        if self.causal:
            past = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~past, -math.inf)
        for bias in mask:
            if self.grouped and bias.ndim > 2:  # (..., h r, T, S) as (..., h, r, T, S), like the scores
                groups = (1, 1) if bias.shape[-3] == 1 else (scores.shape[-4], -1)
                bias = torch.unflatten(bias, -3, groups)
            scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
        result = drop(attention_weights(scores) if mask else torch.softmax(scores, -1)) @ v
        return result.flatten(-4, -3) if self.grouped else result


def attention_weights(scores: Tensor) -> Tensor:
    """The softmax of scores over the last axis. Rows in which everything is masked give zeros, with derivative zero.

    The softmax of a row of minus infinities is NaN, and so is its derivative, even if it is multiplied by zero later.
    Such a row is therefore replaced before the softmax and again after it.

    >>> attention_weights(torch.tensor([[0.0, -math.inf], [-math.inf, -math.inf]]))
    tensor([[1., 0.],
            [0., 0.]])
    """
    nowhere = scores.detach().amax(-1, keepdim=True) == -math.inf
    return torch.softmax(scores.masked_fill(nowhere, 0.0), -1).masked_fill(nowhere, 0.0)

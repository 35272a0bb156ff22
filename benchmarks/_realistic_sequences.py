"""Transformers as people build them, narrow but whole: for speech with lengths, from sound to text, and for text."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def split(x: Tensor, heads: int) -> Tensor:
    """``(N, T, heads d)`` to ``(N, heads, T, d)``."""
    n, t, width = x.shape
    return x.view(n, t, heads, width // heads).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """``(N, heads, T, d)`` to ``(N, T, heads d)``."""
    n, heads, t, d = x.shape
    return x.transpose(1, 2).reshape(n, t, heads * d)


def waves(positions: Tensor, width: int) -> Tensor:
    """Sinusoidal encodings of positions, ``(T, width)``."""
    rates = torch.exp(torch.arange(0, width, 2, dtype=positions.dtype) * -(math.log(10000.0) / width))
    angles = positions[:, None] * rates
    return torch.stack((angles.sin(), angles.cos()), -1).flatten(1)


# A Conformer (Gulati et al. 2020, arXiv 2005.08100).


class FeedForward(nn.Sequential):
    """A layer norm, and two linear layers with SiLU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.SiLU(), nn.Dropout(0.1), nn.Linear(hidden, width)
        )


class RelativeAttention(nn.Module):
    """Attention with relative positions and the shift of Transformer-XL (Dai et al. 2019, arXiv 1901.02860)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))
        self.position = nn.Linear(width, width, bias=False)
        self.u, self.w = (nn.Parameter(torch.randn(heads, width // heads) * 0.1) for _ in range(2))

    @staticmethod
    def shift(x: Tensor) -> Tensor:
        """From scores by distance, ``(N, heads, T, 2 T - 1)``, those of every query's keys, ``(N, heads, T, T)``."""
        n, heads, t, distances = x.shape
        x = torch.cat((x.new_zeros(n, heads, t, 1), x), -1)
        return x.view(n, heads, distances + 1, t)[:, :, 1:].view(n, heads, t, distances)[..., : distances // 2 + 1]

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        x = self.norm(x)
        q, k, v = (split(layer(x), self.heads) for layer in (self.q, self.k, self.v))
        p = split(self.position(positions)[None], self.heads)
        content = (q + self.u[:, None]) @ k.transpose(-2, -1)
        placed = self.shift((q + self.w[:, None]) @ p.transpose(-2, -1))
        scores = ((content + placed) * self.scale).masked_fill(hidden[:, None, None], -1e9)
        y: Tensor = self.out(joined(scores.softmax(-1) @ v))
        return y


class Convolution(nn.Module):
    """A pointwise convolution with a gated linear unit, a depthwise one, batch norm, SiLU, and a pointwise one."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.norm, self.first = nn.LayerNorm(width), nn.Conv1d(width, 2 * width, 1)
        self.depthwise = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.batch_norm, self.last = nn.BatchNorm1d(width), nn.Conv1d(width, width, 1)

    def forward(self, x: Tensor, hidden: Tensor) -> Tensor:
        x = F.glu(self.first(self.norm(x).transpose(1, 2)), 1).masked_fill(hidden[:, None], 0.0)
        x = self.last(F.silu(self.batch_norm(self.depthwise(x))))
        return x.transpose(1, 2)


class ConformerBlock(nn.Module):
    """Half a feed-forward step, attention, a convolution, and the other half."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.before, self.after = FeedForward(width, 2 * width), FeedForward(width, 2 * width)
        self.attention, self.convolution = RelativeAttention(width, heads), Convolution(width, 5)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, positions: Tensor, hidden: Tensor) -> Tensor:
        x = x + 0.5 * self.before(x)
        x = x + self.attention(x, positions, hidden)
        x = x + self.convolution(x, hidden)
        y: Tensor = self.norm(x + 0.5 * self.after(x))
        return y


class Conformer(nn.Module):
    """An encoder of speech: two strided convolutions, blocks, and the logits of symbols; with the new lengths."""

    def __init__(self, mels: int = 12, width: int = 16, heads: int = 2, symbols: int = 9) -> None:
        super().__init__()
        self.subsample = nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU(), nn.Conv2d(6, 6, 3, 2), nn.ReLU())
        self.project = nn.Linear(6 * (((mels - 1) // 2 - 1) // 2), width)
        self.blocks = nn.ModuleList(ConformerBlock(width, heads) for _ in range(2))
        self.head = nn.Linear(width, symbols)
        self.width = width

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = self.subsample(frames.unsqueeze(1))
        n, channels, t, height = x.shape
        x = self.project(x.transpose(1, 2).reshape(n, t, channels * height))
        lengths = ((lengths - 1) // 2 - 1) // 2
        hidden = torch.arange(t, device=x.device)[None] >= lengths[:, None]
        positions = waves(torch.arange(t - 1, -t, -1, dtype=x.dtype, device=x.device), self.width)
        for block in self.blocks:
            x = block(x, positions, hidden)
        return self.head(x), lengths


# An encoder and a decoder as in Whisper (Radford et al. 2022, arXiv 2212.04356).


class Attention(nn.Module):
    """Attention to oneself or to others, with a mask that is added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, others: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        others = x if others is None else others
        t, scale = x.shape[1], (x.shape[-1] // self.heads) ** -0.25
        q, k, v = (
            split(layer(y), self.heads) for layer, y in ((self.query, x), (self.key, others), (self.value, others))
        )
        scores = (q * scale) @ (k * scale).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask[:t, :t]
        y: Tensor = self.out(joined(scores.softmax(-1) @ v))
        return y


class Block(nn.Module):
    """Attention, in a decoder also to the encoder's outputs, and a feed-forward step."""

    def __init__(self, width: int, heads: int, cross: bool) -> None:
        super().__init__()
        self.attn, self.attn_ln = Attention(width, heads), nn.LayerNorm(width)
        self.cross = Attention(width, heads) if cross else None
        self.cross_ln = nn.LayerNorm(width) if cross else None
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.mlp_ln = nn.LayerNorm(width)

    def forward(self, x: Tensor, others: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.attn_ln(x), mask=mask)
        if self.cross is not None and self.cross_ln is not None:
            x = x + self.cross(self.cross_ln(x), others)
        y: Tensor = x + self.mlp(self.mlp_ln(x))
        return y


class EncoderDecoder(nn.Module):
    """From a mel spectrogram ``(N, mels, T)`` and the text so far ``(N, L)`` to logits; the embedding is tied."""

    def __init__(self, mels: int = 10, width: int = 16, heads: int = 2, words: int = 40, longest: int = 32) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv1d(mels, width, 3, padding=1), nn.Conv1d(width, width, 3, 2, 1)
        self.positions = nn.Buffer(waves(torch.arange(float(longest)), width))
        self.encoder = nn.ModuleList(Block(width, heads, cross=False) for _ in range(2))
        self.encoder_ln, self.decoder_ln = nn.LayerNorm(width), nn.LayerNorm(width)
        self.embedding, self.places = nn.Embedding(words, width), nn.Parameter(0.1 * torch.randn(longest, width))
        self.decoder = nn.ModuleList(Block(width, heads, cross=True) for _ in range(2))
        self.mask = nn.Buffer(torch.full((longest, longest), -math.inf).triu_(1), persistent=False)

    def forward(self, mel: Tensor, ids: Tensor) -> Tensor:
        x = F.gelu(self.conv2(F.gelu(self.conv1(mel)))).permute(0, 2, 1)
        x = x + self.positions[: x.shape[1]]
        for block in self.encoder:
            x = block(x)
        x = self.encoder_ln(x)
        y = self.embedding(ids) + self.places[: ids.shape[-1]]
        for block in self.decoder:
            y = block(y, x, self.mask)
        logits: Tensor = self.decoder_ln(y) @ self.embedding.weight.transpose(0, 1)
        return logits


# A causal language model as in Llama.


class GroupedAttention(nn.Module):
    """Attention with rotary positions, in which two query heads share a key and a value head."""

    def __init__(self, width: int, heads: int, pairs: int) -> None:
        super().__init__()
        d = width // heads
        self.heads, self.pairs, self.d = heads, pairs, d
        self.q_proj, self.o_proj = nn.Linear(width, heads * d, bias=False), nn.Linear(heads * d, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, pairs * d, bias=False) for _ in range(2))

    @staticmethod
    def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        n, t, _ = x.shape
        q = self.rotated(split(self.q_proj(x), self.heads), cos, sin)
        k = self.rotated(split(self.k_proj(x), self.pairs), cos, sin)
        v = split(self.v_proj(x), self.pairs)
        shape, times = (n, self.heads, t, self.d), self.heads // self.pairs
        k, v = (part[:, :, None].expand(n, self.pairs, times, t, self.d).reshape(shape) for part in (k, v))
        y: Tensor = self.o_proj(joined(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))
        return y


class Layer(nn.Module):
    """Attention and a gated feed-forward step, each behind a norm."""

    def __init__(self, width: int, heads: int, pairs: int) -> None:
        super().__init__()
        self.self_attn = GroupedAttention(width, heads, pairs)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.gate_proj, self.up_proj = (nn.Linear(width, 24, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(24, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        y = self.post_attention_layernorm(x)
        z: Tensor = x + self.down_proj(F.silu(self.gate_proj(y)) * self.up_proj(y))
        return z


class CausalModel(nn.Module):
    """Logits of the next word; positions count what a mask does not hide, so that texts can be padded on the left."""

    def __init__(self, words: int = 40, width: int = 16, heads: int = 4, pairs: int = 2) -> None:
        super().__init__()
        self.embed_tokens, self.lm_head = nn.Embedding(words, width), nn.Linear(width, words, bias=False)
        self.layers = nn.ModuleList(Layer(width, heads, pairs) for _ in range(2))
        self.norm = nn.RMSNorm(width)
        d = width // heads
        self.rates = nn.Buffer(10000.0 ** (-torch.arange(0, d, 2) / d), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        n, t = ids.shape
        positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
        angles = positions[:, :, None].to(x.dtype) * self.rates
        angles = torch.cat((angles, angles), -1)
        lowest = torch.finfo(x.dtype).min
        causal = torch.full((t, t), lowest, dtype=x.dtype, device=x.device).triu(1)
        hidden = causal[None, None].expand(n, 1, t, t).masked_fill(mask[:, None, None] == 0, lowest)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), hidden)
        y: Tensor = self.lm_head(self.norm(x))
        return y

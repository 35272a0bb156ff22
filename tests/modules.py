"""Small modules as people write them, each one construct in its natural habitat.

The table says how many units the capture has to find: what is right for the construct, or none where it has to freeze.
"""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import taylorfx as tfx


def net(
    forward: Callable[[Any, Tensor], Tensor], units: int, *, x: tuple[int, ...] = (2, 4, 4), **parts: nn.Module | Tensor
) -> tuple[nn.Module, tuple[int, ...], int]:
    """A module from its parts and a forward function ``(self, x) -> output``."""
    module = nn.Module()
    for name, part in parts.items():
        if isinstance(part, nn.Parameter):
            module.register_parameter(name, part)
        elif isinstance(part, torch.Tensor):
            module.register_buffer(name, part)
        else:
            module.add_module(name, part)
    kind = type("Net", (nn.Module,), {"forward": forward})
    module.__class__ = kind
    return module, x, units


def conv(i: int = 2, o: int = 4, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def head(features: int = 64) -> nn.Linear:
    return nn.Linear(features, 2)


def P(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))


def flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def heads_by_hand(m: Any, x: Tensor) -> Any:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 2, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
    weights = (q @ k.transpose(-2, -1) / 3**0.5).softmax(-1)
    return m.head((weights @ v).transpose(1, 2).reshape(n, t * 6))


def positions_by_head(m: Any, x: Tensor) -> Any:
    """Heads in the axis of the examples, as in DeBERTa."""
    n, t, _ = x.shape
    q = m.q(x).view(n, t, 2, 3).transpose(1, 2).reshape(n * 2, t, 3)
    table = m.table.permute(1, 2, 0).repeat(q.shape[0] // 2, 1, 1)
    return m.head((q @ table).view(n, -1))


def turned(m: Any, x: Tensor) -> Any:
    """Rotary positions by complex numbers, as in Llama 4: heads may leave, pairs may not."""
    n, t, _ = x.shape
    q = torch.view_as_complex(m.q(x).view(n, t, 2, 2, 2))
    y = torch.view_as_real(q * torch.polar(torch.ones_like(m.angles), m.angles))
    return m.head(y.flatten(1))


def fused_qkv(m: Any, x: Tensor) -> Any:
    n, t, _ = x.shape
    q, k, v = m.qkv(x).reshape(n, t, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return m.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, -1))


def grouped_queries(m: Any, x: Tensor) -> Any:
    n, t, _ = x.shape
    q = m.q(x).view(n, t, 4, 2).transpose(1, 2)
    k, v = (layer(x).view(n, t, 2, 2).transpose(1, 2).repeat_interleave(2, dim=1) for layer in (m.k, m.v))
    return m.head(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(1))


def channel_shuffle(m: Any, x: Tensor) -> Any:
    x = m.a(x)
    n, c, h, w = x.shape
    return m.head(flat(m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))))


def positions(m: Any, x: Tensor) -> Any:
    return m.head(flat(m.fc(x) + m.table[: x.shape[1]]))


def class_token(m: Any, x: Tensor) -> Any:
    x = torch.cat([m.token.expand(x.shape[0], -1, -1), m.fc(x)], 1)
    return m.head(x[:, 0])


def standardized(m: Any, x: Tensor) -> Any:
    w = m.weight - m.weight.mean((1, 2, 3), keepdim=True)
    return m.head(flat(F.conv2d(x, w / (w.std((1, 2, 3), keepdim=True) + 1e-5), padding=1).relu()))


def depth(m: Any, x: Tensor) -> Any:
    """Torchvision's stochastic depth, in the mode that drops whole examples."""
    if not m.training:
        return x
    return x * torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype).bernoulli_(0.7).div_(0.7)


def kept(m: Any, x: Tensor) -> Any:
    """The same of the whole batch at once, written on its input."""
    if m.training:
        x.mul_(torch.empty((1, 1, 1, 1), dtype=x.dtype).bernoulli_(0.7).div_(0.7))
    return x


def dropping_attention(m: Any, x: Tensor) -> Any:
    n, t, _ = x.shape
    q, k, v = (layer(x).view(n, t, 2, 3).transpose(1, 2) for layer in (m.q, m.k, m.v))
    p = 0.4 if m.training else 0.0
    return m.head(F.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(1))


def written_in_place(m: Any, x: Tensor) -> Any:
    y, z = m.a(x).clone(), m.b(m.a(x))
    y[:, :2] = z[:, :2].relu()
    return m.head(flat(y))


def experts(m: Any, x: Tensor) -> Any:
    """Weights of every example's own, with the examples as groups."""
    n = x.shape[0]
    w = (m.r(x.mean((2, 3))).softmax(1) @ m.w).view(-1, 4, 3, 3)
    y = F.conv2d(m.a(x).reshape(1, -1, 4, 4), w, padding=1, groups=n).view(n, 4, 4, 4)
    return m.head(y.mean((2, 3)))


def mixture(m: Any, x: Tensor, *, late: bool = False, ordered: bool = True) -> Any:
    """Of four experts two for every token, with a matrix for each of them; the softmax before the choice or after it."""
    n, t, _ = x.shape
    rows = m.fc(x).flatten(0, 1)
    logits = m.router(rows)
    weights, chosen = (logits if late else logits.softmax(-1)).topk(2, sorted=ordered)
    weights = weights.softmax(-1) if late else weights
    ids = chosen.view(-1)
    y = torch.bmm(m.up[ids], rows.repeat_interleave(2, 0).unsqueeze(-1)).squeeze(-1).relu()
    y = torch.bmm(m.down[ids], y.unsqueeze(-1)).squeeze(-1) * weights.reshape(-1, 1)
    return m.head(y.view(n, t, 2, -1).sum(2).flatten(1))


def looked_up(m: Any, x: Tensor) -> Any:
    """The numbers that a router gives are those of rows of a table."""
    y = m.fc(x)
    weights, chosen = m.router(y).softmax(-1).topk(2)
    return m.head((m.table[chosen] * weights.unsqueeze(-1)).sum(1))


MODULES = {
    "functional": net(lambda m, x: m.head(flat(F.relu(F.max_pool2d(m.a(x), 2)))), 4, a=conv(), head=head(16)),
    "in place": net(lambda m, x: m.head(flat(m.a(x).add_(1).relu_().mul_(2))), 4, a=conv(), head=head()),
    "in place before a shortcut": net(lambda m, x: (lambda y: m.head(flat(m.b(F.relu_(y)) + y)))(m.a(x)), 4, a=conv(), b=conv(4), head=head()),
    "reused": net(lambda m, x: m.head(flat(m.b(m.b(m.a(x)).relu()))), 4, a=conv(), b=conv(4), head=head()),
    "residual projection": net(lambda m, x: m.head(flat(m.b(m.a(x).relu()) + m.s(x))), 8, a=conv(), b=conv(4), s=conv(2, 4, 1), head=head()),
    "nested concatenation": net(lambda m, x: (lambda y: m.head(flat(torch.cat([y, torch.cat([m.b(y), m.c(y)], 1)], 1))))(m.a(x)), 9, a=conv(), b=conv(4, 2), c=conv(4, 3), head=head(144)),
    "chunk and recombine": net(lambda m, x: m.head(flat(torch.cat(m.a(x).chunk(2, 1)[::-1], 1))), 4, a=conv(), head=head()),
    "split unequally": net(lambda m, x: (lambda a, b: m.head(flat(torch.cat([m.b(a), b], 1))))(*m.a(x).split([2, 4], 1)), 9, a=conv(2, 6), b=conv(2, 3), head=head(112)),
    "gated linear unit": net(lambda m, x: (lambda a, b: m.head(flat(a * b.sigmoid())))(*m.a(x).chunk(2, 1)), 4, a=conv(2, 8), head=head()),
    "glu": net(lambda m, x: m.head(F.glu(m.a(x), -1)), 3, x=(5,), a=nn.Linear(5, 6), head=head(3)),
    "expand": net(lambda m, x: m.head(flat(m.a(x) * m.b(x.mean((2, 3)))[:, :, None, None].expand(-1, -1, 4, 4))), 4, a=conv(), b=nn.Linear(2, 4), head=head()),
    "stack and sum": net(lambda m, x: m.head(flat(torch.stack([m.a(x), m.b(x)], 1).sum(1))), 4, a=conv(), b=conv(), head=head()),
    "einsum": net(lambda m, x: m.head(flat(torch.einsum("nchw,dc->ndhw", m.a(x), m.w))), 7, a=conv(), w=P(3, 4), head=head(48)),
    "outer product": net(lambda m, x: m.head(flat(m.a(x)[:, :, None] * m.b(x)[:, None, :])), 7, x=(5,), a=nn.Linear(5, 3), b=nn.Linear(5, 4), head=head(12)),
    "one map broadcast": net(lambda m, x: m.head(flat(m.a(x) * m.b(x).sigmoid())), 4, a=conv(), b=conv(2, 1), head=head()),
    "sliced channels": net(lambda m, x: (lambda y: m.head(flat(y[:, 1:] + y[:, :-1])))(m.a(x)), 0, a=conv(), head=head(48)),
    "channel shuffle": net(channel_shuffle, 6, a=conv(2, 4), b=conv(4, 4, groups=2), head=head()),
    "pixel shuffle": net(lambda m, x: m.head(flat(F.pixel_shuffle(m.a(x), 2))), 3, a=conv(2, 12), head=head(192)),
    "pixel unshuffle": net(lambda m, x: m.head(flat(F.pixel_unshuffle(m.a(x), 2))), 3, a=conv(2, 3), head=head(48)),
    "transposed": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 7, a=conv(), b=nn.ConvTranspose2d(4, 3, 2, 2), head=head(192)),
    "grouped, unequal multipliers": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 7, a=conv(), b=conv(4, 6, groups=2), head=head(96)),
    "depthwise": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, a=conv(), b=conv(4, 4, groups=4), head=head()),
    "padded shortcut": net(lambda m, x: (lambda y: m.head(flat(m.b(y) + F.pad(y, (0, 0, 0, 0, 1, 1)))))(m.a(x)), 0, a=conv(), b=conv(4, 6), head=head(96)),
    "tied weights": net(lambda m, x: m.head(flat(F.linear(m.a(x).relu(), m.a.weight.t()))), 5, x=(3,), a=nn.Linear(3, 5, bias=False), head=head(3)),
    "weight standardization": net(standardized, 4, weight=P(4, 2, 3, 3), head=head()),
    "weight norm": net(lambda m, x: m.head(flat(m.a(x).relu())), 4, a=nn.utils.parametrizations.weight_norm(conv()), head=head()),
    "layer scale": net(lambda m, x: m.head(flat(m.a(x) + m.gamma[:, None, None] * m.b(m.a(x)))), 4, a=conv(), b=conv(4), gamma=P(4), head=head()),
    "squeeze and excitation": net(lambda m, x: (lambda y: m.head(flat(y * m.c(F.relu(m.b(y.mean((2, 3), keepdim=True)))).sigmoid())))(m.a(x)), 7, a=conv(), b=conv(4, 3, 1), c=conv(3, 4, 1), head=head()),
    "spatial attention": net(lambda m, x: (lambda y: m.head(flat(y * m.b(torch.cat([y.mean(1, True), y.amax(1, True)], 1)).sigmoid())))(m.a(x)), 4, a=conv(), b=conv(2, 1), head=head()),
    "group norm": net(lambda m, x: m.head(flat(m.b(m.a(x)).relu())), 4, a=conv(), b=nn.GroupNorm(2, 4), head=head()),
    "layer norm, channels last": net(lambda m, x: m.head(flat(m.b(m.a(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2))), 4, a=conv(), b=nn.LayerNorm(4), head=head()),
    "channels-last flatten": net(lambda m, x: m.head(flat(m.a(x).permute(0, 2, 3, 1))), 4, a=conv(), head=head()),
    "several maps flattened": net(lambda m, x: m.head(torch.cat([flat(m.a(x)), flat(m.b(x))], 1)), 7, a=conv(), b=conv(2, 3), head=head(112)),
    "global response norm": net(lambda m, x: (lambda y: m.head(flat(y * (y.norm(dim=(2, 3), keepdim=True) / y.norm(dim=(2, 3), keepdim=True).mean(1, True)))))(m.a(x)), 4, a=conv(), head=head()),
    "channel softmax": net(lambda m, x: m.head(flat(m.a(x).softmax(1))), 0, a=conv(), head=head()),
    "local response norm": net(lambda m, x: m.head(flat(F.local_response_norm(m.a(x), 3))), 0, a=conv(), head=head()),
    "lstm": net(lambda m, x: m.head(m.b(m.a(x))[0][:, -1]), 9, x=(3, 4), a=nn.Linear(4, 5), b=nn.LSTM(5, 4, batch_first=True), head=head(4)),
    "positional table": net(positions, 5, x=(3, 4), fc=nn.Linear(4, 5), table=P(6, 5), head=head(15)),
    "learned token": net(class_token, 5, x=(3, 4), fc=nn.Linear(4, 5), token=P(1, 1, 5), head=head(5)),
    "buffer with channels": net(lambda m, x: m.head(flat((m.a(x) - m.mean[None, :, None, None]) * m.scale)), 4, a=conv(), mean=torch.arange(4.0), scale=torch.tensor(2.0), head=head()),
    "scalar parameter": net(lambda m, x: m.head(flat(m.a(x) * m.s.exp())), 4, a=conv(), s=P(), head=head()),
    "attention by hand": net(heads_by_hand, 8, x=(3, 4), q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), head=head(18)),
    "fused qkv": net(fused_qkv, 5, x=(3, 4), qkv=nn.Linear(4, 18), head=head(18)),
    "grouped queries": net(grouped_queries, 8, x=(3, 4), q=nn.Linear(4, 8), k=nn.Linear(4, 4), v=nn.Linear(4, 4), head=head(24)),
    "upsampled": net(lambda m, x: m.head(flat(F.interpolate(m.a(x), scale_factor=2, mode="bilinear"))), 4, a=conv(), head=head(256)),
    "rolled in space": net(lambda m, x: m.head(flat(torch.roll(m.a(x), (1, 1), (2, 3)))), 4, a=conv(), head=head()),
    "rolled channels": net(lambda m, x: m.head(flat(torch.roll(m.a(x), 1, 1))), 0, a=conv(), head=head()),
    "cumulative": net(lambda m, x: m.head(flat(m.a(x).cumsum(1))), 0, a=conv(), head=head()),
    "where": net(lambda m, x: m.head(flat(torch.where(m.a(x) > 0, m.a(x), m.b(x)))), 4, a=conv(), b=conv(), head=head()),
    "clamped": net(lambda m, x: m.head(flat(m.a(x).clamp(-1, 1).abs().sqrt())), 4, a=conv(), head=head()),
    "weight norm, twice": net(lambda m, x: m.head(flat(m.b(m.a(x).relu()))), 7, a=nn.utils.parametrizations.weight_norm(conv()), b=nn.utils.parametrizations.weight_norm(conv(4, 3)), head=head(48)),
    "spectral norm": net(lambda m, x: m.head(flat(m.b(m.a(x).relu()))), 7, a=conv(), b=nn.utils.parametrizations.spectral_norm(conv(4, 3)), head=head(48)),
    "grouped, standardized": net(lambda m, x: m.head(flat(F.conv2d(m.a(x), m.w - m.w.mean((1, 2, 3), True), m.bias, padding=1, groups=2))), 7, a=conv(), w=P(6, 2, 3, 3), bias=P(6), head=head(96)),
    "gru": net(lambda m, x: m.head(m.b(m.a(x))[0].flatten(1)), 9, x=(3, 4), a=nn.Linear(4, 5), b=nn.GRU(5, 4, 2, batch_first=True, bidirectional=True), head=head(24)),
    "rnn, time first": net(lambda m, x: m.head(m.b(m.a(x).transpose(0, 1))[0][-1]), 9, x=(3, 4), a=nn.Linear(4, 5), b=nn.RNN(5, 4, nonlinearity="relu", bias=False), head=head(4)),
    "last state": net(lambda m, x: m.head(m.b(m.a(x))[1][0][-1]), 9, x=(3, 4), a=nn.Linear(4, 5), b=nn.LSTM(5, 4, batch_first=True), head=head(4)),
    "repeated channels": net(lambda m, x: m.head(flat(m.a(x).repeat(1, 2, 1, 1))), 6, a=conv(), head=head(128)),
    "tiled": net(lambda m, x: m.head(flat(m.a(x).tile(2, 1, 1))), 6, a=conv(), head=head(128)),
    "interleaved channels": net(lambda m, x: m.head(flat(m.a(x).repeat_interleave(3, 1))), 7, a=conv(), head=head(192)),
    "tensordot": net(lambda m, x: m.head(flat(torch.tensordot(m.a(x), m.w, ([1], [0])))), 7, a=conv(), w=P(4, 3), head=head(48)),
    "vector": net(lambda m, x: m.head(m.a(x) @ m.w), 5, x=(3, 4), a=nn.Linear(4, 5), w=P(5), head=head(3)),
    "layer norm by hand": net(lambda m, x: (lambda y: m.head(flat((y - y.mean(1, True)) / (y.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt())))(m.a(x)), 4, a=conv(), head=head()),
    "rms norm by hand": net(lambda m, x: (lambda y: m.head(flat(y * y.pow(2).mean(-1, True).rsqrt() * m.g)))(m.a(x)), 5, x=(3, 4), a=nn.Linear(4, 5), g=P(5), head=head(15)),
    "state of zeros": net(lambda m, x: m.head(m.a(x) + m.b(x.new_zeros(x.shape[0], 4))), 9, x=(4,), a=nn.Linear(4, 5), b=nn.Linear(4, 5), head=head(5)),
    "grid": net(lambda m, x: m.head(flat(m.a(x) + torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij")[0].type_as(x))), 4, a=conv(), head=head()),
    "best of the channels": net(lambda m, x: m.head(flat(m.a(x).topk(2, 1)[0])), 0, a=conv(), head=head(32)),
    "best in space": net(lambda m, x: m.head(flat(m.a(x).flatten(2).topk(2, 2)[0])), 4, a=conv(), head=head(8)),
    "looked up by example": net(lambda m, x: m.head((m.a(x) + m.a(x)[torch.arange(x.shape[0])[:, None], torch.tensor([2, 1, 0])]).flatten(1)), 0, x=(3, 4), a=nn.Linear(4, 5), head=head(15)),
    "one row of each example": net(lambda m, x: m.head(m.norm(m.a(x))[torch.arange(len(x)), x[..., 0].argmax(-1)]), 5, x=(3, 4), a=nn.Linear(4, 5), norm=nn.Tanh(), head=head(5)),
    "positions for every example": net(lambda m, x: m.head(flat(m.a(x) + m.table.repeat(x.shape[0], 1, 1))), 5, x=(3, 4), a=nn.Linear(4, 5), table=P(3, 5), head=head(15)),
    "positions for every head of every example": net(positions_by_head, 10, x=(3, 4), q=nn.Linear(4, 6), table=P(5, 2, 3), head=head(30)),
    "rotated as a whole": net(lambda m, x: (lambda y: m.head(flat(torch.cat([y[..., :5] * 2, y[..., 5:]], -1))))(m.a(x)), 5, x=(3, 4), a=nn.Linear(4, 5), head=head(15)),
    "turned as complex numbers": net(turned, 2, x=(3, 4), q=nn.Linear(4, 8), angles=torch.linspace(0.1, 1.0, 6).view(3, 1, 2), head=head(24)),
    "softmax of a dtype": net(lambda m, x: m.head(flat(m.a(x).softmax(1, dtype=torch.float64).to(x.dtype))), 5, x=(3, 4), a=nn.Linear(4, 5), head=head(15)),
    "equations of every example": net(lambda m, x: m.head(flat(torch.linalg.solve_triangular(x @ x.mT, m.a(x), upper=False, unitriangular=True))), 0, x=(3, 4), a=nn.Linear(4, 5), head=head(15)),
    "pooled along one axis": net(lambda m, x: m.head(F.adaptive_avg_pool2d(m.a(x).permute(0, 3, 1, 2), (None, 1)).flatten(1)), 4, a=conv(), head=head(16)),
    "instance norm of sequences": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, x=(2, 6), a=nn.Conv1d(2, 4, 3), b=nn.InstanceNorm1d(4), head=head(16)),
    "instance norm, tracked": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, a=conv(), b=nn.InstanceNorm2d(4, affine=True, track_running_stats=True), head=head()),
    "instance norm of volumes": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, x=(2, 3, 3, 3), a=nn.Conv3d(2, 4, 2), b=nn.InstanceNorm3d(4, affine=True), head=head(32)),
    "batch norm without tracking": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, a=conv(), b=nn.BatchNorm2d(4, track_running_stats=False), head=head()),
    "transposed volumes": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 7, x=(2, 3, 3, 3), a=nn.Conv3d(2, 4, 2), b=nn.ConvTranspose3d(4, 3, 2), head=head(81)),
    "weight norm, transposed": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 7, a=conv(), b=nn.utils.parametrizations.weight_norm(nn.ConvTranspose2d(4, 3, 2, 2)), head=head(192)),
    "weight norm, transposed sequences": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 6, x=(2, 6), a=nn.Conv1d(2, 4, 3), b=nn.utils.parametrizations.weight_norm(nn.ConvTranspose1d(4, 4, 2, 2, groups=2)), head=head(32)),
    "weight norm of the whole": net(lambda m, x: m.head(m.b(m.a(x))), 9, x=(4,), a=nn.Linear(4, 5), b=nn.utils.parametrizations.weight_norm(nn.Linear(5, 4), dim=None), head=head(4)),  # type: ignore[arg-type]
    "spectral norm, transposed": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 7, a=conv(), b=nn.utils.parametrizations.spectral_norm(nn.ConvTranspose2d(4, 3, 2, 2)), head=head(192)),
    "largest of each part": net(lambda m, x: m.head(flat(F.adaptive_max_pool2d(m.a(x), 2))), 4, a=conv(), head=head(16)),
    "pooled and put back": net(lambda m, x: m.head(flat(F.max_unpool2d(*F.max_pool2d(m.a(x), 2, return_indices=True), (2, 2)))), 4, a=conv(), head=head()),
    "pooled sequences with their places": net(lambda m, x: m.head(flat(F.max_pool1d(m.a(x), 2, return_indices=True)[0])), 4, x=(2, 6), a=nn.Conv1d(2, 4, 3), head=head(8)),
    "upsampled to the nearest": net(lambda m, x: m.head(flat(F.interpolate(m.a(x), scale_factor=2, mode="nearest-exact"))), 4, a=conv(), head=head(256)),
    "downsampled smoothly": net(lambda m, x: m.head(flat(F.interpolate(m.a(x), (2, 2), mode="bilinear", antialias=True))), 4, a=conv(), head=head(16)),
    "hard tanh": net(lambda m, x: m.head(flat(F.logsigmoid(F.hardtanh(m.a(x), -0.5, 0.7)))), 4, a=conv(), head=head()),
    "random slopes": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, a=conv(), b=nn.RReLU(), head=head()),
    "normalized features": net(lambda m, x: m.head(flat(F.normalize(m.a(x), dim=1))), 4, a=conv(), head=head()),
    "similar to itself": net(lambda m, x: m.head(flat(F.cosine_similarity(m.a(x), m.a(x).flip(2), dim=1))), 4, a=conv(), head=head(16)),
    "lstm and its state": net(lambda m, x: (lambda y, state: m.head(torch.cat([m.c(y[:, -1]), state[0][-1], state[1][0]], 1)))(*m.b(m.a(x))), 12, x=(3, 4), a=nn.Linear(4, 5), b=nn.LSTM(5, 3, 2, batch_first=True), c=nn.Linear(3, 4), head=head(10)),
    "gru from a given state": net(lambda m, x: m.head(m.b(m.a(x), m.c(x[:, 0])[None].tanh())[0].flatten(1)), 8, x=(3, 4), a=nn.Linear(4, 5), b=nn.GRU(5, 3, batch_first=True), c=nn.Linear(4, 3), head=head(9)),
    "pooled to its own size": net(lambda m, x: m.head(flat(F.adaptive_avg_pool2d(m.a(x), (4, None)))), 4, a=conv(), head=head()),
    "drops out": net(lambda m, x: m.head(flat(m.d(m.a(x)))), 4, a=conv(), d=nn.Dropout(0.3), head=head()),
    "drops out in place": net(lambda m, x: m.head(flat(m.d(m.a(x)).relu())), 4, a=conv(), d=nn.Dropout(0.3, inplace=True), head=head()),
    "drops maps": net(lambda m, x: m.head(flat(F.dropout2d(m.a(x), 0.4, m.training))), 4, a=conv(), head=head()),
    "drops out and keeps scale": net(lambda m, x: m.head(flat(m.e(m.d(F.selu(m.a(x)))))), 4, a=conv(), d=nn.AlphaDropout(0.3), e=nn.FeatureAlphaDropout(0.3), head=head()),
    "stochastic depth": net(lambda m, x: (lambda y: m.head(flat(y + depth(m, m.b(y).relu()))))(m.a(x)), 4, a=conv(), b=conv(4), head=head()),
    "stochastic depth in place": net(lambda m, x: m.head(flat(kept(m, m.a(x)).relu())), 4, a=conv(), head=head()),
    "attention that drops out": net(dropping_attention, 8, x=(3, 4), q=nn.Linear(4, 6), k=nn.Linear(4, 6), v=nn.Linear(4, 6), head=head(18)),
    "recurrent layers that drop out": net(lambda m, x: m.head(m.b(m.a(x))[0].flatten(1)), 9, x=(3, 4), a=nn.Linear(4, 5), b=nn.GRU(5, 4, 2, batch_first=True, dropout=0.4), head=head(12)),
    "cumulative average": net(lambda m, x: m.head(flat(m.b(m.a(x)))), 4, a=conv(), b=nn.BatchNorm2d(4, momentum=None), head=head()),
    "used twice in training": net(lambda m, x: m.head(flat(m.b(m.c(m.b(m.a(x)))))), 4, a=conv(), b=nn.BatchNorm2d(4), c=conv(4), head=head()),
    "written in place": net(written_in_place, 6, a=conv(), b=conv(4), head=head()),
    "norm of a weight": net(lambda m, x: m.head(F.linear(m.a(x), m.w) / m.w.norm(dim=1)), 8, x=(4,), a=nn.Linear(4, 5), w=P(3, 5), head=head(3)),
    "mixture of experts": net(mixture, 17, x=(3, 4), fc=nn.Linear(4, 5), router=nn.Linear(5, 4), up=P(4, 3, 5), down=P(4, 5, 3), head=nn.Linear(15, 2)),
    "mixture of experts, softmax of the chosen": net(lambda m, x: mixture(m, x, late=True), 17, x=(3, 4), fc=nn.Linear(4, 5), router=nn.Linear(5, 4), up=P(4, 3, 5), down=P(4, 5, 3), head=nn.Linear(15, 2)),
    "mixture of experts, in any order": net(lambda m, x: mixture(m, x, ordered=False), 17, x=(3, 4), fc=nn.Linear(4, 5), router=nn.Linear(5, 4), up=P(4, 3, 5), down=P(4, 5, 3), head=nn.Linear(15, 2)),
    "rows of a table, chosen": net(looked_up, 8, x=(4,), fc=nn.Linear(4, 5), router=nn.Linear(5, 4), table=P(4, 3), head=nn.Linear(3, 2)),
    "shared out among experts": net(experts, 0, a=conv(2, 4), r=nn.Linear(2, 3), w=P(3, 4 * 4 * 9), head=nn.Linear(4, 2)),
}  # fmt: skip


@functools.cache
def captured(name: str) -> tuple[nn.Module, Tensor, tfx.Params, tfx.Spec]:
    """A module in inference mode and double precision, an example of three, and the network: not to be changed."""
    module, shape, _ = MODULES[name]
    module = copy.deepcopy(module).double().eval()
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return module, x, *tfx.from_torch(module, x)

"""Modules whose `forward` computes with the height and the width of its images, as people write them."""

import torch
import torch.nn.functional as F
from modules import net
from torch import nn


def attention(m, x):
    n, _, h, w = x.shape
    q = m.a(x).flatten(2).transpose(1, 2)
    q = q + m.place[: h * w]
    y = F.scaled_dot_product_attention(*(q.view(n, h * w, 2, 4).transpose(1, 2) for _ in range(3)))
    return m.b(y.transpose(1, 2).reshape(n, h * w, 8)).transpose(1, 2).reshape(n, 6, h, w)


def padded(m, x):
    """Padded to windows of three, each normalized, and cropped."""
    h, w = x.shape[-2:]
    y = F.pad(m.a(x), (0, -w % 3, 0, -h % 3))
    y = y.unfold(2, 3, 3).unfold(3, 3, 3)
    y = (y - y.mean((-1, -2), keepdim=True)).permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)
    return m.c(y[..., :h, :w]) / (h * w)


def skipped(m, x):
    y = F.interpolate(m.d(F.max_pool2d(m.a(x), 2)), size=x.shape[2:], mode="bilinear", align_corners=False)
    return m.c(torch.cat([y, m.a(x)], 1)[:, : 8 + 0]) + torch.arange(x.shape[-1]).to(x).reshape(1, 1, 1, -1)


def pooled(m, x):
    y = F.adaptive_avg_pool2d(m.a(x), (2, 2)).flatten(2)
    grid = torch.meshgrid(torch.arange(x.shape[2]), torch.arange(x.shape[3]), indexing="ij")
    return y.mean(-1) * torch.stack(grid).to(x).mean() + torch.full((x.shape[2], 1), 2.0).to(x).sum()


def unshuffled(m, x):
    """Squares of two by two positions become channels."""
    y = m.a(x)
    n, c, h, w = y.shape
    y = F.pad(y, (0, w % 2, 0, h % 2)).reshape(n, c, (h + 1) // 2, 2, (w + 1) // 2, 2)
    return m.c(y.permute(0, 1, 3, 5, 2, 4).reshape(n, 4 * c, (h + 1) // 2, -1))


def anchored(m, x):
    """Every position of smaller and smaller maps, padded as TensorFlow does."""
    found, x = [], m.a(x)
    for layer in m.b:
        pads = [max((-(-n // 2) - 1) * 2 + 3 - n, 0) for n in x.shape[:1:-1]]
        x = F.relu(layer(F.pad(x, [part for p in pads for part in (p // 2, p - p // 2)])))
        found.append(m.d(x).permute(0, 2, 3, 1).reshape(x.shape[0], -1, 4))
    return torch.cat(found, 1)


def halving(times):
    return nn.ModuleList(nn.Conv2d(6 if k else 8, 6, 3, 2) for k in range(times))


def conv8():
    return nn.Conv2d(2, 8, 3, padding=1)


SIZED = {
    "attention": (attention, lambda: {"b": nn.Linear(8, 6), "place": torch.randn(600, 8)}),
    "padded": (padded, lambda: {"c": nn.Conv2d(8, 3, 1)}),
    "skipped": (skipped, lambda: {"d": nn.Conv2d(8, 8, 3, padding=1), "c": nn.Conv2d(8, 4, 1)}),
    "anchored": (anchored, lambda: {"b": halving(1), "d": nn.Conv2d(6, 4, 1)}),
    "pooled": (pooled, dict),
    "unshuffled": (unshuffled, lambda: {"c": nn.Conv2d(32, 4, 1)}),
}
"""How each computes, and what it has besides ``a``, which makes eight maps of an image."""


def sized(name: str, a: nn.Module) -> nn.Module:
    """One of them, whose maps another module makes."""
    forward, parts = SIZED[name]
    return net(forward, 0, a=a, **parts())[0]

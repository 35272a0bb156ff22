"""Two networks of ordinary size, with most of what there is: for what single constructs do not show."""

import shutil
import sysconfig
from pathlib import Path

import taylorfx as tfx
from taylorfx import layers as L

CAN_BUILD = bool(shutil.which("g++")) and (Path(sysconfig.get_path("include")) / "Python.h").exists()
"""Whether there is a compiler, which torch.compile needs."""


def convolutional() -> tfx.Spec:
    """A residual network with norms, a grouped and a depthwise convolution, excitation and a flatten."""
    body = tfx.serial(
        expand=L.Conv2d(6, 8, 1, bias=False),
        norm1=L.BatchNorm2d(8, momentum=None),
        act1=L.SiLU(),
        depthwise=L.Conv2d(8, 8, 3, padding="same", groups=8),
        norm2=L.BatchNorm2d(8),
        act2=L.PReLU(8),
        grouped=L.Conv2d(8, 6, 3, padding=1, groups=2),
        norm3=L.GroupNorm(2, 6),
    )
    return tfx.serial(
        tfx.Input((2, 6, 6)),
        stem=L.Conv2d(2, 6, 3, padding=1),
        norm=L.BatchNorm2d(6),
        act=L.GELU(),
        block=tfx.residual(body),
        shuffle=L.ChannelShuffle(3),
        pool=L.MaxPool2d(3, 2, 1),
        flat=L.Flatten(),
        head=L.Linear(54, 3),
    )


def transformer() -> tfx.Spec:
    """A class token, positions, grouped-query attention and a gated feed-forward block."""
    attend = tfx.multihead_attention(8, 4, num_kv_heads=2, causal=True)
    gated = tfx.Spec(
        (
            tfx.Node("x", tfx.Input()),
            tfx.Node("up", L.Linear(8, 6), ("x",)),
            tfx.Node("gate", L.Linear(8, 6, bias=False), ("x",)),
            tfx.Node("act", L.SiLU(), ("gate",)),
            tfx.Node("product", L.Multiply(), ("up", "act")),
            tfx.Node("down", L.Linear(6, 8), ("product",)),
        )
    )
    embed = tfx.Spec(
        (
            tfx.Node("x", tfx.Input()),
            tfx.Node("token", L.Parameter((1, 8), expand=True), ("x",)),
            tfx.Node("joined", L.Concat(1), ("token", "x")),
            tfx.Node("position", L.Parameter((6, 8))),
            tfx.Node("sum", L.Add(), ("joined", "position")),
        )
    )
    return tfx.serial(
        tfx.Input((5, 8)),
        embed=embed,
        attend=tfx.residual(tfx.serial(norm=L.LayerNorm(8), attend=attend)),
        forward=tfx.residual(tfx.serial(norm=L.RMSNorm(8), gated=gated)),
        last=L.Slice(1, 5, 6),
        flat=L.Flatten(),
        head=L.Linear(8, 3),
    )

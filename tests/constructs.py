"""One small network for every construct that couples channels: the table that pins the laws."""

import taylorfx as tfx
from taylorfx import Input, Node, Spec, concat, inline, residual, serial


def classifier(*parts: tfx.Layer | Spec, channels: int, size: int = 4) -> Spec:
    """A stem that writes four channels, the parts, and a linear layer over all that they give out."""
    stem = tfx.Conv2d(2, 4, 3, padding=1)
    return serial(Input((2, 4, 4)), stem, *parts, tfx.Flatten(), tfx.Linear(channels * size * size, 2))


def excitation() -> Spec:
    gate = serial(tfx.AdaptiveAvgPool2d(1), tfx.Conv2d(4, 3, 1), tfx.ReLU(), tfx.Conv2d(3, 4, 1), tfx.Sigmoid())
    nodes = [Node("x", Input()), *inline(gate, "gate", ("x",))]
    return Spec((*nodes, Node("scale", tfx.Multiply(), ("x", nodes[-1].name))))


def shared() -> Spec:
    conv = tfx.Conv2d(4, 4, 3, padding=1)
    return Spec(
        (
            Node("x", Input()),
            Node("one", conv, ("x",), "tied"),
            Node("act", tfx.ReLU(), ("one",)),
            Node("two", conv, ("act",), "tied"),
        )
    )


def slices() -> Spec:
    return Spec(
        (
            Node("x", Input()),
            Node("a", tfx.Slice(1, 0, 1), ("x",)),
            Node("b", tfx.Slice(1, 1, 4), ("x",)),
            Node("conv", tfx.Conv2d(3, 5, 1), ("b",)),
            Node("joint", tfx.Concat(), ("conv", "a")),
        )
    )


def transformer(heads: int, kv_heads: int, norm: tfx.Layer) -> Spec:
    attention = tfx.multihead_attention(4, heads, num_kv_heads=kv_heads, head_dim=2)
    mlp = serial(tfx.Linear(4, 5), tfx.GELU(), tfx.Linear(5, 4))
    return Spec(
        (
            Node("tokens", Input((3,))),
            Node("embed", tfx.Embedding(5, 4), ("tokens",)),
            Node("position", tfx.Parameter((3, 4), std=0.5)),
            Node("placed", tfx.Add(), ("embed", "position")),
            Node("cls", tfx.Parameter((1, 4), std=0.5, expand=True), ("tokens",)),
            Node("joined", tfx.Concat(), ("cls", "placed")),
            *inline(residual(serial(norm, attention)), "attn", ("joined",)),
            *inline(serial(norm, mlp), "mlp", ("attn.add",)),
            Node("gamma", tfx.Parameter((4,), std=1.0)),
            Node("scaled", tfx.Multiply(), ("mlp.1.2", "gamma")),
            Node("sum", tfx.Add(), ("attn.add", "scaled")),
            Node("first", tfx.Slice(1, 0, 1), ("sum",)),
            Node("flat", tfx.Flatten(), ("first",)),
            Node("head", tfx.Linear(4, 2), ("flat",)),
        )
    )


def cross_attention() -> Spec:
    attention = tfx.multihead_attention(4, 2, kdim=3, vdim=3, cross=True, mask=True)
    return Spec(
        (
            Node("x", Input((3, 4))),
            Node("memory", Input((2, 3))),
            Node("mask", Input((2, 3, 2))),
            *inline(tfx.Linear(4, 4), "query", ("x",)),
            *inline(tfx.Linear(3, 3), "keys", ("memory",)),
            *inline(attention, "attn", ("query", "keys", "keys", "mask")),
            Node("flat", tfx.Flatten(), ("attn.out_proj",)),
            Node("head", tfx.Linear(12, 2), ("flat",)),
        ),
        ("head",),
    )


def read_table() -> Spec:
    """A table that is the same for all examples, mixed before it meets them."""
    return Spec(
        (
            Node("tokens", Input((3,))),
            Node("embed", tfx.Embedding(5, 4), ("tokens",)),
            Node("table", tfx.Parameter((3, 5), std=1.0)),
            Node("project", tfx.Linear(5, 4), ("table",)),
            Node("sum", tfx.Add(), ("embed", "project")),
            Node("flat", tfx.Flatten(), ("sum",)),
            Node("head", tfx.Linear(12, 2), ("flat",)),
        )
    )


BLOCK = residual(serial(conv1=tfx.Conv2d(4, 3, 3, padding=1), act=tfx.ReLU(), conv2=tfx.Conv2d(3, 4, 1)))
SAME = tfx.Conv2d(4, 4, 3, padding=1)

CONSTRUCTS: dict[str, Spec] = {
    "chain": classifier(tfx.BatchNorm2d(4), tfx.ReLU(), tfx.Conv2d(4, 5, 1), channels=5),
    "residual stream": classifier(BLOCK, tfx.ReLU(), BLOCK, tfx.ReLU(), BLOCK, channels=4),
    "projection": classifier(residual(serial(SAME, tfx.BatchNorm2d(4)), tfx.Conv2d(4, 4, 1)), channels=4),
    "dense": classifier(concat(serial(), tfx.Conv2d(4, 2, 1)), concat(serial(), tfx.Conv2d(6, 3, 1)), channels=9),
    "flatten": classifier(tfx.MaxPool2d(2), channels=4, size=2),
    "depthwise": classifier(tfx.Conv2d(4, 8, 3, padding=1, groups=4), tfx.ReLU(), tfx.Conv2d(8, 3, 1), channels=3),
    "grouped": classifier(tfx.Conv2d(4, 6, 3, padding=1, groups=2), tfx.ReLU(), tfx.Conv2d(6, 3, 1), channels=3),
    "grouped in a stream": classifier(residual(tfx.Conv2d(4, 4, 3, padding=1, groups=2)), channels=4),
    "groups without bias": classifier(
        residual(tfx.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)),
        tfx.ReLU(),
        tfx.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        channels=8,
    ),
    "excitation": classifier(excitation(), channels=4),
    "shared": classifier(shared(), channels=4),
    "group norm": classifier(tfx.GroupNorm(2, 4), tfx.ReLU(), channels=4),
    "instance norm": classifier(tfx.InstanceNorm2d(4, affine=True), channels=4),
    "untracked batch norm": classifier(tfx.BatchNorm2d(4, track_running_stats=False, affine=False), channels=4),
    "channel shuffle": classifier(tfx.ChannelShuffle(2), tfx.PReLU(4), channels=4),
    "shuffled groups": classifier(
        tfx.Conv2d(4, 4, 1, groups=2), tfx.ChannelShuffle(2), tfx.Conv2d(4, 4, 1, groups=2), channels=4
    ),
    "pixel shuffle": classifier(tfx.Conv2d(4, 12, 1), tfx.PixelShuffle(2), tfx.AvgPool2d(2), channels=3),
    "transposed": classifier(tfx.ConvTranspose2d(4, 6, 3, padding=1, groups=2), tfx.SiLU(), channels=6),
    "upsample": classifier(tfx.MaxPool2d(2), tfx.Upsample(2), tfx.Tanh(), channels=4),
    "slices": classifier(slices(), channels=6),
    "reshape": classifier(tfx.Reshape((2, 2, 16)), tfx.Permute((0, 2, 1, 3)), tfx.Reshape((4, 4, 4)), channels=4),
    "multi-head": transformer(2, 2, tfx.Identity()),
    "grouped queries": transformer(4, 2, tfx.Identity()),
    "one key head": transformer(2, 1, tfx.RMSNorm(4)),
    "layer norm": transformer(2, 2, tfx.LayerNorm(4)),
    "cross attention": cross_attention(),
    "table": read_table(),
    "one dimension": serial(
        Input((2, 5)), tfx.Conv1d(2, 4, 3), tfx.BatchNorm1d(4), tfx.MaxPool1d(2, 1), tfx.ConvTranspose1d(4, 3, 2),
        tfx.AdaptiveAvgPool1d(2), tfx.Flatten(), tfx.Linear(6, 2),
    ),
    "three dimensions": serial(
        Input((1, 3, 3, 3)), tfx.Conv3d(1, 4, 2), tfx.BatchNorm3d(4), tfx.ELU(), tfx.Conv3d(4, 3, 2), tfx.Flatten(),
        tfx.Linear(3, 2),
    ),
}  # fmt: skip

"""One small network for every construct that couples channels: the table that pins the laws."""

from typing import TypeAlias

import taylorfx as tfx
from taylorfx import Input, Node, Spec, concat, inline, residual, serial
from taylorfx import layers as L


def classifier(*parts: tfx.Layer | Spec, channels: int, size: int = 4) -> Spec:
    """A stem that writes four channels, the parts, and a linear layer over all that they give out."""
    stem = L.Conv2d(2, 4, 3, padding=1)
    return serial(Input((2, 4, 4)), stem, *parts, L.Flatten(), L.Linear(channels * size * size, 2))


def excitation() -> Spec:
    gate = serial(L.AdaptiveAvgPool2d(1), L.Conv2d(4, 3, 1), L.ReLU(), L.Conv2d(3, 4, 1), L.Sigmoid())
    nodes = [Node("x", Input()), *inline(gate, "gate", ("x",))]
    return Spec((*nodes, Node("scale", L.Multiply(), ("x", nodes[-1].name))))


def shared() -> Spec:
    conv = L.Conv2d(4, 4, 3, padding=1)
    return Spec(
        (
            Node("x", Input()),
            Node("one", conv, ("x",), "tied"),
            Node("act", L.ReLU(), ("one",)),
            Node("two", conv, ("act",), "tied"),
        )
    )


def slices() -> Spec:
    return Spec(
        (
            Node("x", Input()),
            Node("a", L.Slice(1, 0, 1), ("x",)),
            Node("b", L.Slice(1, 1, 4), ("x",)),
            Node("conv", L.Conv2d(3, 5, 1), ("b",)),
            Node("joint", L.Concat(), ("conv", "a")),
        )
    )


def transformer(heads: int, kv_heads: int, norm: tfx.Layer) -> Spec:
    attention = tfx.multihead_attention(4, heads, num_kv_heads=kv_heads, head_dim=2)
    mlp = serial(L.Linear(4, 5), L.GELU(), L.Linear(5, 4))
    return Spec(
        (
            Node("tokens", Input((3,))),
            Node("embed", L.Embedding(5, 4), ("tokens",)),
            Node("position", L.Parameter((3, 4), std=0.5)),
            Node("placed", L.Add(), ("embed", "position")),
            Node("cls", L.Parameter((1, 4), std=0.5, expand=True), ("tokens",)),
            Node("joined", L.Concat(), ("cls", "placed")),
            *inline(residual(serial(norm, attention)), "attn", ("joined",)),
            *inline(serial(norm, mlp), "mlp", ("attn.add",)),
            Node("gamma", L.Parameter((4,), std=1.0)),
            Node("scaled", L.Multiply(), ("mlp.1.2", "gamma")),
            Node("sum", L.Add(), ("attn.add", "scaled")),
            Node("first", L.Slice(1, 0, 1), ("sum",)),
            Node("flat", L.Flatten(), ("first",)),
            Node("head", L.Linear(4, 2), ("flat",)),
        )
    )


Operand: TypeAlias = "str | tuple[Operand, ...]"


def parallel(*operands: Operand) -> Spec:
    """A sum of operands, each a tuple of operands that are added, or of one that noise meets; ``x`` is the skip.

    Another letter is an MLP of the normed skip; a capital has a residual branch within it.
    """
    stem, norm = Node("stem", L.Linear(4, 4), ("input",)), Node("norm", L.LayerNorm(4), ("stem",))
    nodes = [Node("input", Input((3, 4))), stem, norm]

    def add(operand: Operand) -> str:
        if operand == "x":
            return "stem"
        if isinstance(operand, str):
            mlp = serial(up=L.Linear(4, 2 + len(nodes) % 2), act=L.Tanh(), down=L.Linear(2 + len(nodes) % 2, 4))
            body = serial(inner=residual(mlp), out=L.Linear(4, 4)) if operand.isupper() else mlp
            nodes.extend(inline(body, operand, ("norm",)))
        else:
            inputs = tuple(map(add, operand))
            kind, layer = ("sum", L.Add()) if len(inputs) == 2 else ("noise", L.Dropout(0.1))
            nodes.append(Node(f"{kind}{len(nodes)}", layer, inputs))
        return nodes[-1].name

    last = add(operands)
    return Spec((*nodes, Node("flat", L.Flatten(), (last,)), Node("head", L.Linear(12, 2), ("flat",))))


def cross_attention() -> Spec:
    attention = tfx.multihead_attention(4, 2, kdim=3, vdim=3, cross=True, mask=True)
    return Spec(
        (
            Node("x", Input((3, 4))),
            Node("memory", Input((2, 3))),
            Node("mask", Input((2, 3, 2))),
            *inline(L.Linear(4, 4), "query", ("x",)),
            *inline(L.Linear(3, 3), "keys", ("memory",)),
            *inline(attention, "attn", ("query", "keys", "keys", "mask")),
            Node("flat", L.Flatten(), ("attn.out_proj",)),
            Node("head", L.Linear(12, 2), ("flat",)),
        ),
        ("head",),
    )


def read_table() -> Spec:
    """A table that is the same for all examples, mixed before it meets them."""
    return Spec(
        (
            Node("tokens", Input((3,))),
            Node("embed", L.Embedding(5, 4), ("tokens",)),
            Node("table", L.Parameter((3, 5), std=1.0)),
            Node("project", L.Linear(5, 4), ("table",)),
            Node("sum", L.Add(), ("embed", "project")),
            Node("flat", L.Flatten(), ("sum",)),
            Node("head", L.Linear(12, 2), ("flat",)),
        )
    )


BLOCK = residual(serial(conv1=L.Conv2d(4, 3, 3, padding=1), act=L.ReLU(), conv2=L.Conv2d(3, 4, 1)))
SAME = L.Conv2d(4, 4, 3, padding=1)

CONSTRUCTS: dict[str, Spec] = {
    "chain": classifier(L.BatchNorm2d(4), L.ReLU(), L.Conv2d(4, 5, 1), channels=5),
    "residual stream": classifier(BLOCK, L.ReLU(), BLOCK, L.ReLU(), BLOCK, channels=4),
    "projection": classifier(residual(serial(SAME, L.BatchNorm2d(4)), L.Conv2d(4, 4, 1)), channels=4),
    "dense": classifier(concat(serial(), L.Conv2d(4, 2, 1)), concat(serial(), L.Conv2d(6, 3, 1)), channels=9),
    "flatten": classifier(L.MaxPool2d(2), channels=4, size=2),
    "depthwise": classifier(L.Conv2d(4, 8, 3, padding=1, groups=4), L.ReLU(), L.Conv2d(8, 3, 1), channels=3),
    "grouped": classifier(L.Conv2d(4, 6, 3, padding=1, groups=2), L.ReLU(), L.Conv2d(6, 3, 1), channels=3),
    "grouped in a stream": classifier(residual(L.Conv2d(4, 4, 3, padding=1, groups=2)), channels=4),
    "groups without bias": classifier(
        residual(L.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)),
        L.ReLU(),
        L.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        channels=8,
    ),
    "excitation": classifier(excitation(), channels=4),
    "shared": classifier(shared(), channels=4),
    "group norm": classifier(L.GroupNorm(2, 4), L.ReLU(), channels=4),
    "instance norm": classifier(L.InstanceNorm2d(4, affine=True), channels=4),
    "untracked batch norm": classifier(L.BatchNorm2d(4, track_running_stats=False, affine=False), channels=4),
    "channel shuffle": classifier(L.ChannelShuffle(2), L.PReLU(4), channels=4),
    "shuffled groups": classifier(
        L.Conv2d(4, 4, 1, groups=2), L.ChannelShuffle(2), L.Conv2d(4, 4, 1, groups=2), channels=4
    ),
    "pixel shuffle": classifier(L.Conv2d(4, 12, 1), L.PixelShuffle(2), L.AvgPool2d(2), channels=3),
    "transposed": classifier(L.ConvTranspose2d(4, 6, 3, padding=1, groups=2), L.SiLU(), channels=6),
    "upsample": classifier(L.MaxPool2d(2), L.Upsample(2), L.Tanh(), channels=4),
    "slices": classifier(slices(), channels=6),
    "reshape": classifier(L.Reshape((2, 2, 16)), L.Permute((0, 2, 1, 3)), L.Reshape((4, 4, 4)), channels=4),
    "multi-head": transformer(2, 2, L.Identity()),
    "grouped queries": transformer(4, 2, L.Identity()),
    "one key head": transformer(2, 1, L.RMSNorm(4)),
    "layer norm": transformer(2, 2, L.LayerNorm(4)),
    "cross attention": cross_attention(),
    "table": read_table(),
    "parallel branches": parallel("x", ("a", "b")),
    "one dimension": serial(
        Input((2, 5)), L.Conv1d(2, 4, 3), L.BatchNorm1d(4), L.MaxPool1d(2, 1), L.ConvTranspose1d(4, 3, 2),
        L.AdaptiveAvgPool1d(2), L.Flatten(), L.Linear(6, 2),
    ),
    "three dimensions": serial(
        Input((1, 3, 3, 3)), L.Conv3d(1, 4, 2), L.BatchNorm3d(4), L.ELU(), L.Conv3d(4, 3, 2), L.Flatten(),
        L.Linear(3, 2),
    ),
}  # fmt: skip

"""Every layer beside its counterpart in torch: the tables that pin what layers compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import random_params

# Written alike for taylorfx and for torch.nn, positional arguments included; then the shapes of the inputs.
TWINS: list[tuple[str, tuple[int, ...]]] = [
    ("Conv1d(4, 6, 3)", (3, 4, 9)),
    ("Conv1d(4, 6, 4, padding='same', dilation=2)", (3, 4, 9)),
    ("Conv1d(4, 4, 3, 2, 1, 2, 4, bias=False)", (3, 4, 9)),
    ("Conv2d(4, 6, 3)", (3, 4, 7, 6)),
    ("Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 2), dilation=(1, 2), groups=2)", (3, 4, 7, 6)),
    ("Conv2d(4, 6, (2, 3), padding='same')", (3, 4, 7, 6)),
    ("Conv2d(4, 6, 3, 2, padding='valid', bias=False)", (3, 4, 7, 6)),
    ("Conv2d(4, 4, 3, padding=1, groups=4)", (3, 4, 7, 6)),
    ("Conv2d(4, 12, 3, padding=1, groups=4)", (3, 4, 7, 6)),
    ("Conv2d(1, 1, 1)", (3, 1, 2, 2)),
    ("Conv3d(4, 6, (3, 2, 1), stride=2, padding=1, groups=2)", (2, 4, 5, 4, 3)),
    ("Conv3d(2, 2, 2, padding='same', groups=2)", (2, 2, 3, 4, 3)),
    ("ConvTranspose1d(4, 6, 3)", (3, 4, 5)),
    ("ConvTranspose1d(4, 6, 3, 3, 1, 2, groups=2, dilation=2)", (3, 4, 5)),
    ("ConvTranspose2d(4, 6, 3, 2, 1, 1)", (3, 4, 5, 4)),
    ("ConvTranspose2d(4, 6, (3, 2), stride=(3, 2), output_padding=(2, 0), groups=2, dilation=(1, 2))", (3, 4, 5, 4)),
    ("ConvTranspose2d(4, 4, 2, groups=4, bias=False)", (3, 4, 5, 4)),
    ("ConvTranspose3d(4, 6, (3, 2, 1), (2, 1, 2), 1, (1, 0, 1), groups=2)", (2, 4, 4, 4, 3)),
    ("Linear(5, 7)", (3, 5)),
    ("Linear(5, 7, False)", (3, 2, 4, 5)),
    ("Embedding(11, 5)", (3, 4)),
    ("Embedding(11, 5, padding_idx=2)", (3, 4)),
    ("BatchNorm1d(4)", (5, 4)),
    ("BatchNorm1d(4, 1e-3, 0.3)", (5, 4, 3)),
    ("BatchNorm1d(4, track_running_stats=False)", (5, 4, 3)),
    ("BatchNorm2d(4)", (3, 4, 3, 2)),
    ("BatchNorm2d(4, affine=False)", (3, 4, 3, 2)),
    ("BatchNorm2d(4, momentum=None)", (3, 4, 3, 2)),
    ("BatchNorm2d(4, momentum=0.0)", (3, 4, 3, 2)),
    ("BatchNorm2d(4, affine=False, track_running_stats=False)", (3, 4, 3, 2)),
    ("BatchNorm3d(4)", (3, 4, 3, 2, 2)),
    ("BatchNorm3d(4, momentum=None, affine=False)", (3, 4, 3, 2, 2)),
    ("InstanceNorm1d(4, track_running_stats=True)", (3, 4, 5)),
    ("InstanceNorm3d(4, affine=True, track_running_stats=True)", (3, 4, 3, 2, 2)),
    ("InstanceNorm2d(4)", (3, 4, 3, 2)),
    ("InstanceNorm2d(4, 1e-3, 0.2, True, True)", (3, 4, 3, 2)),
    ("InstanceNorm2d(4, momentum=None, track_running_stats=True)", (3, 4, 3, 2)),
    ("LayerNorm(5)", (3, 4, 5)),
    ("LayerNorm((4, 5), 1e-3)", (3, 4, 5)),
    ("LayerNorm((4, 4), bias=False)", (3, 2, 4, 4)),
    ("LayerNorm([5], elementwise_affine=False)", (3, 5)),
    ("RMSNorm(5)", (3, 4, 5)),
    ("RMSNorm((4, 5), eps=1e-3)", (3, 4, 5)),
    ("RMSNorm(5, elementwise_affine=False)", (3, 5)),
    ("GroupNorm(2, 6)", (3, 6, 4)),
    ("GroupNorm(6, 6, 1e-3)", (3, 6, 4, 2)),
    ("GroupNorm(1, 6, affine=False)", (3, 6)),
    ("PReLU()", (3, 4, 5)),
    ("PReLU(4)", (3, 4, 5, 2)),
    ("PReLU(4)", (3, 4)),
    *((f"{name}()", (3, 40)) for name in ("Identity", "ReLU", "ReLU6", "GELU", "SiLU", "Mish", "Sigmoid", "Tanh")),
    *((f"{name}()", (3, 40)) for name in ("LeakyReLU", "ELU", "Softplus", "Hardswish", "Hardsigmoid")),
    *((text, (3, 4)) for text in ("LeakyReLU(0.3)", "ELU(0.7)", "Softplus(2.0, 3.0)", "GELU(approximate='tanh')")),
    ("Softmax(1)", (3, 4, 5)),
    ("Softmax(dim=-1)", (3, 4, 5)),
    ("Dropout(0.3)", (3, 4)),
    ("RReLU(0.1, 0.3)", (3, 40)),
    ("MaxPool1d(3)", (3, 4, 10)),
    ("MaxPool1d(3, 2, 1, 2, ceil_mode=True)", (3, 4, 10)),
    ("MaxPool2d(3, 2)", (3, 4, 8, 7)),
    ("MaxPool2d((3, 2), (2, 3), (1, 0), (1, 2))", (3, 4, 8, 7)),
    ("MaxPool2d(2, ceil_mode=True)", (3, 4, 5, 7)),
    ("MaxPool2d(2, 3, 1, ceil_mode=True)", (3, 4, 6, 7)),  # the last window would start in the padding: dropped
    ("AvgPool1d(3, 2, 1, True, False)", (3, 4, 10)),
    ("AvgPool2d(3, 1, 1)", (3, 4, 8, 7)),
    ("AvgPool2d(2, 3, 1, ceil_mode=True)", (3, 4, 6, 7)),
    ("AvgPool2d((3, 2), (2, 1), 1, ceil_mode=True, count_include_pad=False)", (3, 4, 8, 7)),
    ("AdaptiveAvgPool1d(3)", (3, 4, 7)),
    ("AdaptiveAvgPool2d(1)", (3, 4, 7, 5)),
    ("AdaptiveAvgPool2d((3, 2))", (3, 4, 7, 5)),
    ("Upsample(scale_factor=2)", (3, 4, 5)),
    ("Upsample(scale_factor=3, mode='linear')", (3, 4, 5)),
    ("Upsample(scale_factor=2, mode='bilinear', align_corners=True)", (3, 4, 5, 3)),
    ("Flatten()", (3, 4, 5, 2)),
    ("Flatten(2)", (3, 4, 5, 2)),
    ("Flatten(1, -2)", (3, 4, 5, 2)),
    ("ChannelShuffle(3)", (3, 6, 5, 2)),
    ("ChannelShuffle(2)", (3, 6, 5, 2)),
    ("PixelShuffle(2)", (3, 8, 3, 2)),
    ("PixelUnshuffle(2)", (3, 2, 6, 4)),
]

Reference = Callable[..., Tensor]
Leaves = dict[str, Tensor]


@dataclass
class Case:
    """A network of one part, what torch computes for it from its leaves and inputs, and those inputs' shapes."""

    name: str
    part: tfx.Layer | tfx.Spec
    reference: Reference
    shapes: tuple[Any, ...]

    @property
    def spec(self) -> tfx.Spec:
        shapes = [tuple(x.shape) if isinstance(x, Tensor) else x for x in self.shapes]
        nodes = [tfx.Node(f"x{k}", tfx.Input(shape[1:])) for k, shape in enumerate(shapes)]
        inner = tfx.inline(self.part, "layer", tuple(node.name for node in nodes))
        return tfx.Spec((*nodes, *inner), (inner[-1].name,))

    def inputs(self) -> list[Tensor]:
        """Numbers around the layers' kinks; tensors stand for themselves."""
        generator = torch.Generator().manual_seed(1)
        if isinstance(self.part, L.Embedding):
            return [torch.randint(self.part.num_embeddings, shape, generator=generator) for shape in self.shapes]
        return [
            x if isinstance(x, Tensor) else 3 * torch.randn(x, generator=generator, dtype=torch.float64)
            for x in self.shapes
        ]

    def leaves(self) -> Leaves:
        return tfx.tree.flatten(random_params(self.spec, torch.Generator().manual_seed(0)))


def twin(text: str, shape: tuple[int, ...]) -> Case:
    module = eval(text, vars(nn)).double()

    def reference(leaves: Leaves, *inputs: Tensor, training: bool = False) -> Tensor:
        named = {path.removeprefix("layer."): leaf for path, leaf in leaves.items()}
        value: Tensor = functional_call(module.train(training), named, inputs)
        return value

    return Case(text, eval(text, vars(L)), reference, (shape,))


def heads(x: Tensor, count: int) -> Tensor:
    apart: Tensor = x.unflatten(-1, (count, -1))
    return apart.transpose(1, 2)


def sdpa(q: int, kv: int, **options: Any) -> Reference:
    """torch's own attention on grouped queries, written out: every key head repeated for its query heads."""

    def reference(_: Leaves, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        keys, values = (heads(x, kv).repeat_interleave(q // kv, 1) for x in (key, value))
        mask = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
        out = F.scaled_dot_product_attention(heads(query, q), keys, values, attn_mask=mask, **options)
        return out.transpose(1, 2).flatten(2)

    return reference


def multihead(bias: bool = True, kdim: int | None = None, vdim: int | None = None, **options: Any) -> Reference:
    """``torch.nn.MultiheadAttention`` of 8 features and 4 heads with our leaves; masks are true where to attend."""
    module = nn.MultiheadAttention(8, 4, bias=bias, kdim=kdim, vdim=vdim, batch_first=True).double()

    def reference(leaves: Leaves, *inputs: Tensor) -> Tensor:
        query, *rest = inputs
        mask = rest.pop() if len(rest) in (1, 3) else None
        key, value = rest or (query, query)
        weights = [leaves[f"layer.{x}_proj.weight"] for x in "qkv"]
        named = {f"out_proj.{leaf}": leaves[f"layer.out_proj.{leaf}"] for leaf in ("weight", *["bias"] * bias)}
        if kdim or vdim:
            named.update({f"{x}_proj_weight": weight for x, weight in zip("qkv", weights, strict=True)})
        else:
            named["in_proj_weight"] = torch.cat(weights)
        if bias:
            named["in_proj_bias"] = torch.cat([leaves[f"layer.{x}_proj.bias"] for x in "qkv"])
        told = dict(options)
        if mask is not None and mask.ndim == 2:
            told["key_padding_mask"] = ~mask
        elif mask is not None:
            full = mask.expand(len(query), 4, query.shape[1], key.shape[1]).flatten(0, 1)
            told["attn_mask"] = ~full if full.dtype == torch.bool else full
        outputs: tuple[Tensor, None] = functional_call(
            module, named, (query, key, value), {"need_weights": False, **told}
        )
        return outputs[0]

    return reference


def scaled(**options: Any) -> Reference:
    def reference(_: Leaves, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, **options)

    return reference


def graph(inputs: str, out: tfx.Layer, **parameters: tfx.Layer) -> tfx.Spec:
    """A layer that consumes parameters, and the input ``x`` if ``inputs`` names it."""
    leaves = (tfx.Node(name, layer) for name, layer in parameters.items())
    start = [tfx.Node("x", tfx.Input())] if "x" in inputs.split() else []
    return tfx.Spec((*start, *leaves, tfx.Node("out", out, tuple(inputs.split()))), ("out",))


def recurrent(text: str, result: str = "sequence") -> Reference:
    """One result of torch's layer."""
    module = eval(text, vars(nn)).double()

    def reference(leaves: Leaves, x: Tensor, *start: Tensor) -> Tensor:
        state = (start or None) if isinstance(module, nn.LSTM) or not start else start[0]
        named = {path.removeprefix("layer."): leaf for path, leaf in leaves.items()}
        sequence, last = functional_call(module, named, (x, state))
        hidden, cell = last if isinstance(last, tuple) else (last, None)
        results: dict[str, Tensor] = {"sequence": sequence, "hidden": hidden, "cell": cell}
        return results[result]

    return reference


def started(layer: tfx.Layer, count: int, *shape: int) -> tfx.Spec:
    """A recurrent layer that starts from states of its own, given for every example."""
    names = [f"start{k}" for k in range(count)]
    begun = [tfx.Node(f"wide{k}", L.Expand((-1, 1, -1), 1), (name, "x")) for k, name in enumerate(names)]
    states = [tfx.Node(name, L.Parameter(shape)) for name in names]
    inputs = ("x", *(node.name for node in begun))
    return tfx.Spec((tfx.Node("x", tfx.Input()), *states, *begun, tfx.Node("out", layer, inputs)), ("out",))


def begun(text: str, result: str = "sequence") -> Reference:
    """torch's layer from the states of `started`."""

    def reference(leaves: Leaves, x: Tensor) -> Tensor:
        start = [leaf.expand(-1, len(x), -1) for path, leaf in leaves.items() if "start" in path]
        own = {path.replace("layer.out", "layer"): leaf for path, leaf in leaves.items() if "start" not in path}
        return recurrent(text, result)(own, x, *start)

    return reference


def mask(*shape: int) -> Tensor:
    """Boolean, true where to attend; every row attends somewhere."""
    result = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.6
    result[..., 0] = True
    return result


attend = partial(tfx.multihead_attention, 8, 4)
FUTURE = ~torch.ones(5, 5, dtype=torch.bool).tril()
SLOT = (("$", 0), ("$", 1))
X, Y = (3, 5, 8), (3, 7, 8)
GROUPED = (X, (3, 7, 4), (3, 7, 4))
OTHERS: list[tuple[str, Any, Reference, tuple[Any, ...]]] = [
    ("reshape", L.Reshape((2, -1, 3)), lambda _, x: x.reshape(3, 2, 10, 3), ((3, 4, 5, 3),)),
    ("reshape, one axis", L.Reshape(-1), lambda _, x: x.reshape(3, 20), ((3, 4, 5),)),
    ("reshape, torn", L.Reshape((6, 4)), lambda _, x: x.reshape(3, 6, 4), ((3, 4, 6),)),
    *((text, eval(text, vars(L)), recurrent(text), ((3, 5, 4),)) for text in (
        "LSTM(4, 3, 2, False, True, bidirectional=True)", "LSTM(4, 3, batch_first=True)",
        "GRU(4, 3, 2, batch_first=True, bidirectional=True)", "RNN(4, 3, 2, batch_first=True)",
        "RNN(4, 3, 3, batch_first=True, nonlinearity='relu')",
    )),
    ("LSTM, from given states", started(L.LSTM(4, 3, 2, batch_first=True, result="cell"), 2, 2, 1, 3),
     begun("LSTM(4, 3, 2, batch_first=True)", "cell"), ((3, 5, 4),)),
    ("GRU, from given states", started(L.GRU(4, 3, batch_first=True, bidirectional=True), 1, 2, 1, 3),
     begun("GRU(4, 3, batch_first=True, bidirectional=True)"), ((3, 5, 4),)),
    ("weight norm of the whole", graph("w g", w=L.Parameter((4, 3)), g=L.Parameter(()), out=L.WeightNorm(None)),
     lambda p: p["layer.g"] * p["layer.w"] / p["layer.w"].norm(), ()),
    ("spectral norm", graph("w", w=L.Parameter((4, 3, 2)), out=L.SpectralNorm((4, 3, 2), 1)),
     lambda p: p["layer.w"] / (p["layer.out.u"] @ p["layer.w"].transpose(0, 1).flatten(1) @ p["layer.out.v"]), ()),
    ("convolve, transposed", graph("x w b", w=L.Parameter((4, 3, 3, 2)), b=L.Parameter(6),
                                   out=L.ConvolveTransposed((2, 2), (1, 0), (1, 0), (1, 2), 2)),
     lambda p, x: F.conv_transpose2d(x, p["layer.w"], p["layer.b"], 2, (1, 0), (1, 0), 2, (1, 2)), ((3, 4, 5, 4),)),
    ("weight norm", graph("w g", w=L.Parameter((4, 3)), g=L.Parameter((4, 1)), out=L.WeightNorm()),
     lambda p: p["layer.g"] * F.normalize(p["layer.w"], dim=1), ()),
    ("weight norm, last axis", graph("w g", w=L.Parameter((4, 3)), g=L.Parameter((1, 3)), out=L.WeightNorm(1)),
     lambda p: p["layer.g"] * F.normalize(p["layer.w"], dim=0), ()),
    ("convolve", graph("x w", w=L.Parameter((6, 2, 3)), out=L.Convolve((2,), (1,), (2,), 2)),
     lambda p, x: F.conv1d(x, p["layer.w"], None, 2, 1, 2, 2), ((3, 4, 9),)),
    ("convolve, bias", graph("x w b", w=L.Parameter((6, 4, 3, 2)), b=L.Parameter(6),
                             out=L.Convolve((1, 2), (0, 1), (1, 1))),
     lambda p, x: F.conv2d(x, p["layer.w"], p["layer.b"], (1, 2), (0, 1)), ((3, 4, 5, 6),)),
    ("convolve, volumes", graph("x w", w=L.Parameter((2, 2, 1, 2, 2)), out=L.Convolve((1, 1, 1), (1, 1, 1), (1, 1, 1))),
     lambda p, x: F.conv3d(x, p["layer.w"], None, 1, 1), ((3, 2, 3, 4, 2),)),
    ("permute", L.Permute((0, 3, 1, 2)), lambda _, x: x.permute(0, 3, 1, 2), ((3, 4, 5, 2),)),
    ("permute, from the end", L.Permute((0, -1, -2)), lambda _, x: x.transpose(1, 2), ((3, 4, 5),)),
    ("slice", L.Slice(1, 1, 3), lambda _, x: x[:, 1:3], ((3, 4, 5),)),
    ("slice, whole", L.Slice(1, 0, 4), lambda _, x: x, ((3, 4, 5),)),
    ("slice, from the end", L.Slice(-1, 2, 5), lambda _, x: x[..., 2:], ((3, 4, 5),)),
    ("concat", L.Concat(), lambda _, *xs: torch.cat(xs, 1), ((3, 4, 5), (3, 2, 5), (3, 1, 5))),
    ("concat, last", L.Concat(-1), lambda _, *xs: torch.cat(xs, -1), ((3, 4, 5), (3, 4, 2))),
    ("add", L.Add(), lambda _, x, y, z: x + y + z, ((3, 4, 5), (3, 4, 5), (3, 1, 5))),
    ("multiply", L.Multiply(), lambda _, x, y: x * y, ((3, 4, 5, 2), (3, 4, 1, 1))),
    ("multiply, both broadcast", L.Multiply(), lambda _, x, y: x * y, ((3, 4, 1), (3, 1, 5))),
    ("parameter", L.Parameter((4, 5), 1.0, 0.1), lambda leaves: leaves["layer"], ()),
    ("parameter, one axis", L.Parameter(4), lambda leaves: leaves["layer"], ()),
    ("parameter, expanded", L.Parameter((1, 5), expand=True), lambda p, x: p["layer"].expand(3, 1, 5), ((3, 4, 5),)),
    ("parameter, added", graph("p x", p=L.Parameter((4, 5)), out=L.Add()), lambda leaves, x: x + leaves["layer.p"],
     ((3, 4, 5),)),
    ("captured", L.Captured("flip.default", (SLOT[0], (1,)), shape=(1, 4, 5), made=0, given=(0,)),
     lambda _, x: x.flip(1), ((3, 4, 5),)),
    ("elementwise", L.Elementwise("add.Tensor", (SLOT[0], SLOT[1]), (("alpha", 2.0),)), lambda _, x, y: x + 2 * y,
     ((3, 4, 5), (3, 1, 5))),
    ("along", L.Along("cumsum.default", (SLOT[0], -1), dims=(-1,)), lambda _, x: x.cumsum(-1), ((3, 4, 5),)),
    ("maps", L.Maps("adaptive_max_pool2d.default", (SLOT[0], (2, 1)), item=0, space=(2, 1)),
     lambda _, x: F.adaptive_max_pool2d(x, (2, 1)), ((3, 4, 5, 2),)),
    ("buffer", graph("p x", p=L.Buffer((4, 5)), out=L.Multiply()), lambda leaves, x: x * leaves["layer.p"],
     ((3, 4, 5),)),
    ("view", L.View((1, 2, 2, 5)), lambda _, x: x.reshape(3, 2, 2, 5), ((3, 4, 5),)),
    ("view, folded into the batch", L.View((4, 5)), lambda _, x: x.reshape(12, 5), ((3, 4, 5),)),
    ("expand", L.Expand((-1, -1, 6)), lambda _, x: x.expand(3, 4, 6), ((3, 4, 1),)),
    ("expand, for every example", graph("p x", p=L.Parameter((2, 5)), out=L.Expand((1, -1, -1), 0)),
     lambda leaves, x: leaves["layer.p"].expand(3, 2, 5), ((3, 4),)),
    ("gather", graph("p x", p=L.Parameter((7, 5)), out=L.Gather(0)), lambda leaves, x: leaves["layer.p"][x],
     (torch.arange(12).reshape(3, 4) % 7,)),
    ("gather, by example", L.Gather(1, by_example=True), lambda _, x, numbers: x[range(len(x)), numbers],
     ((3, 4, 5), torch.tensor([2, 0, 3]))),
    ("reduce", L.Reduce("mean", (2, -1), True), lambda _, x: x.mean((2, 3), True), ((3, 4, 5, 2),)),
    ("reduce, sum", L.Reduce("sum", (1,)), lambda _, x: x.sum(1), ((3, 4, 5),)),
    ("reduce, largest", L.Reduce("amax", (-1,)), lambda _, x: x.amax(-1), ((3, 4, 5),)),
    ("pad", L.Pad((1, 2, 0, 1), value=0.5), lambda _, x: F.pad(x, (1, 2, 0, 1), value=0.5), ((3, 4, 5),)),
    ("pad, reflected", L.Pad((1, 2), "reflect"), lambda _, x: F.pad(x, (1, 2), "reflect"), ((3, 4, 5),)),
    ("matmul", L.MatMul(), lambda _, x, y: x @ y, ((3, 2, 4, 5), (3, 2, 5, 6))),
    ("einsum", L.Einsum("nthk,nskh->nhts"), lambda _, x, y: x.transpose(1, 2) @ y.permute(0, 3, 2, 1),
     ((3, 4, 2, 5), (3, 6, 5, 2))),
    ("matmul, broadcast", L.MatMul(), lambda _, x, y: x @ y, ((3, 2, 4, 5), (3, 1, 5, 6))),
    ("product", L.ScaledDotProduct(0.3), scaled(), ((3, 2, 5, 4), (3, 2, 7, 4), (3, 2, 7, 3))),
    ("product, mask", L.ScaledDotProduct(0.3), scaled(), (*(3 * [(3, 2, 5, 4)]), mask(3, 1, 5, 5))),
    ("product, grouped", L.ScaledDotProduct(0.3, True, True), scaled(is_causal=True, enable_gqa=True),
     ((3, 4, 5, 2), (3, 2, 7, 2), (3, 2, 7, 2))),
    ("attention", L.Attention(2, 4), sdpa(2, 2), (X, Y, Y)),
    ("attention, wide values", L.Attention(4, 2, 2, 3, scale=0.3), sdpa(4, 2, scale=0.3), (*GROUPED[:2], (3, 7, 6))),
    ("attention, one head", L.Attention(1, 8), sdpa(1, 1), (X, Y, Y, mask(3, 1, 5, 7))),
    ("attention, causal", L.Attention(4, 2, 2, causal=True), sdpa(4, 2, is_causal=True), GROUPED),
    ("attention, key mask", L.Attention(4, 2, 2), sdpa(4, 2), (*GROUPED, mask(3, 7))),
    ("attention, mask per head", L.Attention(4, 2, 2), sdpa(4, 2), (*GROUPED, mask(3, 4, 1, 7))),
    ("attention, added", L.Attention(2, 4), sdpa(2, 2), (X, Y, Y, (3, 2, 5, 7))),
    ("multihead", attend(), multihead(), (X,)),
    ("multihead, no bias", attend(bias=False), multihead(bias=False), (X,)),
    ("multihead, causal", attend(causal=True), multihead(attn_mask=FUTURE), (X,)),
    ("multihead, key mask", attend(mask=True), multihead(), (X, mask(3, 5))),
    ("multihead, mask", attend(mask=True), multihead(), (X, mask(3, 1, 5, 5))),
    ("multihead, mask per head", attend(mask=True), multihead(), (X, mask(3, 4, 5, 5))),
    ("multihead, added", attend(mask=True), multihead(), (X, (3, 1, 5, 5))),
    ("multihead, cross", attend(cross=True), multihead(), (X, Y, Y)),
    ("multihead, cross, own widths", attend(cross=True, kdim=6, vdim=5, mask=True), multihead(kdim=6, vdim=5),
     (X, (3, 7, 6), (3, 7, 5), mask(3, 7))),
]  # fmt: skip
CASES = [*(twin(*row) for row in TWINS), *(Case(*row) for row in OTHERS)]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
every_twin = pytest.mark.parametrize("case", CASES[: len(TWINS)], ids=lambda case: case.name)


def is_trained(path: str) -> bool:
    return path.split(".")[-1] not in ("running_mean", "running_var", "num_batches_tracked")

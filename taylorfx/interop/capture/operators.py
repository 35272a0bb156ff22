"""From ATen operators to layers: one converter per operator, by name."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture import experts, movement, parametric
from taylorfx.interop.capture.arguments import (
    Unmapped,
    argument,
    flag,
    measured,
    named_dtype,
    number,
    optional_tensor,
    tensor_node,
    tensor_nodes,
    whole,
    wholes,
    window,
)
from taylorfx.interop.capture.convert import Convert, Converter
from taylorfx.layers import Layer
from taylorfx.layers.operators import DTYPE, SLOT
from taylorfx.network.spec import Node

__all__ = ["CONVERTERS"]


def _linear(c: Convert, node: fx.Node) -> None:
    x, weight, bias = tensor_node(node.args[0]), tensor_node(node.args[1]), optional_tensor(argument(node, 2, "bias"))
    if weight.name in c.paths and (bias is None or bias.name in c.paths):
        path = c.path(weight)
        shape = tuple(c.tensors[path].shape)
        leaves = {"weight": path} if bias is None else {"weight": path, "bias": c.path(bias)}
        c.add(node, L.Linear(shape[1], shape[0], bias is not None), (c.tensor(x),), leaves=leaves)
        return
    turned = c.add(node, L.Permute((1, 0)), (c.tensor(weight),), tag="_t")
    product = c.add(node, L.MatMul(), (c.tensor(x), turned), tag="_product" if bias is not None else "")
    if bias is not None:
        c.add(node, L.Add(), (product, c.tensor(bias)))


def _embedding(c: Convert, node: fx.Node) -> None:
    path = c.path(node.args[0])
    rows, width = c.tensors[path].shape
    padding = whole(argument(node, 2, "padding_idx", -1))
    layer = L.Embedding(rows, width, None if padding < 0 else padding)
    c.add(node, layer, (c.tensor(tensor_node(node.args[1])),), leaves={"weight": path})


def _prelu(c: Convert, node: fx.Node) -> None:
    path = c.path(node.args[1])
    c.add(node, L.PReLU(c.tensors[path].numel()), (c.tensor(tensor_node(node.args[0])),), leaves={"weight": path})


def _simple(kind: Callable[..., Layer], *fields: tuple[str, object]) -> Converter:
    """An operator whose further arguments are the layer's fields."""

    def convert(c: Convert, node: fx.Node) -> None:
        values = [argument(node, k + 1, name, default) for k, (name, default) in enumerate(fields)]
        if any(isinstance(value, fx.Node) for value in values) or len(node.args) > len(fields) + 1:
            raise Unmapped
        c.add(node, kind(*values), (c.tensor(tensor_node(node.args[0])),))

    return convert


def _hardtanh(c: Convert, node: fx.Node) -> None:
    if (argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)) == (0, 6):
        c.add(node, L.ReLU6(), (c.tensor(tensor_node(node.args[0])),))
    else:
        c.pointwise(node)


def _rrelu(c: Convert, node: fx.Node) -> None:
    if argument(node, 3, "training", False):
        raise Unmapped
    limits = float(number(argument(node, 1, "lower", 1 / 8))), float(number(argument(node, 2, "upper", 1 / 3)))
    c.add(node, L.RReLU(*limits), (c.tensor(tensor_node(node.args[0])),))


def _maps(c: Convert, node: fx.Node) -> None:
    c.maps(node)


def _max_pool2d(c: Convert, node: fx.Node) -> None:
    x, kernel, stride = tensor_node(node.args[0]), window(node.args[1], 2), argument(node, 2, "stride")
    if measured(x)[1] != 0 or len(measured(x)[0]) != 4:
        raise Unmapped
    padding, dilation = window(argument(node, 3, "padding", 0), 2), window(argument(node, 4, "dilation", 1), 2)
    ceil = flag(argument(node, 5, "ceil_mode", False))
    pool = L.MaxPool2d(kernel, window(stride, 2) if stride else None, padding, dilation, ceil_mode=ceil)
    c.add(node, pool, (c.tensor(x),))


def _adaptive(c: Convert, node: fx.Node) -> None:
    """Pooling to the size that is there is nothing, to a size of one along some axes a mean along these."""
    x, size = tensor_node(node.args[0]), wholes(node.args[1])
    if measured(x)[1] != 0 or len(measured(x)[0]) != 4:
        raise Unmapped
    shrunk = {
        k + 2: after for k, (before, after) in enumerate(zip(measured(x)[0][2:], size, strict=True)) if after != before
    }
    if not shrunk:
        c.alias(node)
    elif len(shrunk) < len(size) and set(shrunk.values()) == {1}:
        c.add(node, L.Reduce("mean", tuple(shrunk), keepdim=True), (c.tensor(x),))
    else:
        c.add(node, L.AdaptiveAvgPool2d(size), (c.tensor(x),))


def _softmax(c: Convert, node: fx.Node) -> None:
    x, dtype = tensor_node(node.args[0]), node.meta["val"].dtype
    name = c.tensor(x)
    if x.meta["val"].dtype != dtype:  # computed in it, as of scores in bfloat16
        name = c.add(node, _conversion(dtype), (name,), tag="_scores")
    c.add(node, L.Softmax(whole(node.args[1])), (name,))


def _pair(kind: Callable[..., Layer]) -> Converter:
    """A sum or product of two tensors is the layer; with a number it is any pointwise operator."""

    def convert(c: Convert, node: fx.Node) -> None:
        pair = [x for x in node.args[:2] if isinstance(x, fx.Node)]
        if len(pair) == 2 and not node.kwargs and node.meta["val"].dtype in {x.meta["val"].dtype for x in pair}:
            c.add(node, kind(), [c.tensor(x) for x in pair])
        else:
            c.generic(node)

    return convert


def _reduce(c: Convert, node: fx.Node) -> None:
    x, axes = tensor_node(node.args[0]), argument(node, 1, "dim")
    shape, axis = measured(x)
    dims = tuple(d % len(shape) for d in wholes(axes)) if axes else tuple(range(len(shape)))
    if axis in dims or argument(node, 3, "dtype"):
        raise Unmapped
    op = str(node.target).split(".")[1]
    c.add(node, L.Reduce(op, dims, bool(argument(node, 2, "keepdim", False))), (c.tensor(x),))


def _matmul(c: Convert, node: fx.Node) -> None:
    """A product of matrices; a vector is a matrix of one row or one column, as in ``torch.matmul``."""
    one, other = tensor_node(node.args[0]), tensor_node(node.args[1])
    pair, sides = [c.tensor(one), c.tensor(other)], [measured(one), measured(other)]
    for k, (shape, axis) in enumerate(sides):
        if len(shape) == 1:
            if axis >= 0:
                raise Unmapped
            pair[k] = c.add(node, L.View((shape[0], 1) if k else (1, shape[0]), -1, -1), (pair[k],), tag=f"_{k}")
    vectors = [len(shape) == 1 for shape, _ in sides]
    name = c.add(node, L.MatMul(), pair, tag="_product" if any(vectors) else "")
    if any(vectors):
        shape, axis = measured(node)
        inner = axis if axis < 0 or vectors != [True, False] or axis < len(shape) - 1 else axis + 1
        c.add(node, L.View(shape, inner, axis), (name,))


def _addmm(c: Convert, node: fx.Node) -> None:
    bias, one, other = (tensor_node(x) for x in node.args[:3])
    if node.kwargs or len(node.args) > 3:
        raise Unmapped
    product = c.add(node, L.MatMul(), (c.tensor(one), c.tensor(other)), tag="_product")
    c.add(node, L.Add(), (product, c.tensor(bias)))


def _tensordot(c: Convert, node: fx.Node) -> None:
    one, other = tensor_node(node.args[0]), tensor_node(node.args[1])
    ranks = [len(measured(x)[0]) for x in (one, other)]
    dims = [[d % rank for d in wholes(axes)] for axes, rank in zip(node.args[2:4], ranks, strict=True)]
    first = list("abcdefghijklm"[: ranks[0]])
    second = list("nopqrstuvwxyz"[: ranks[1]])
    for d, e in zip(*dims, strict=True):
        second[e] = first[d]
    output = [x for x in first + second if (x in first) != (x in second)]
    c.add(node, L.Einsum(f"{''.join(first)},{''.join(second)}->{''.join(output)}"), [c.tensor(one), c.tensor(other)])


def _einsum(c: Convert, node: fx.Node) -> None:
    """An einsum whose every letter stands once per operand, and whose output is written out."""
    equation, tensors = node.args[0], tensor_nodes(node.args[1])
    assert isinstance(equation, str)
    parts = equation.replace(" ", "").partition("->")
    if "." in equation or not parts[1] or any(len(set(part)) < len(part) for part in (*parts[0].split(","), parts[2])):
        raise Unmapped
    c.add(node, L.Einsum(equation), [c.tensor(x) for x in tensors])


def _attention(c: Convert, node: fx.Node) -> None:
    q, k, v = (tensor_node(x) for x in node.args[:3])
    mask, causal = optional_tensor(argument(node, 3, "attn_mask")), flag(argument(node, 5, "is_causal", False))
    scale, grouped = argument(node, 6, "scale"), flag(argument(node, 7, "enable_gqa", False))
    shapes = [measured(x)[0] for x in (q, k, v)]
    if len({len(shape) for shape in shapes}) > 1 or len(shapes[0]) < 3:
        raise Unmapped
    grouped = (grouped or shapes[1][-3] == shapes[2][-3] == 1) and shapes[0][-3] != shapes[1][-3]  # 1 is broadcast
    factor = shapes[0][-1] ** -0.5 if scale is None else number(scale)
    layer = L.ScaledDotProduct(factor, causal, grouped, number(argument(node, 4, "dropout_p", 0.0)))
    c.add(node, layer, [c.tensor(x) for x in (q, k, v, mask) if x is not None])


def _cosine_similarity(c: Convert, node: fx.Node) -> None:
    one, other = tensor_node(node.args[0]), tensor_node(node.args[1])
    shape, axis = measured(one)
    dim = whole(argument(node, 2, "dim", 1)) % len(shape)
    if measured(one) != measured(other) or dim == axis:
        raise Unmapped
    c.operator(node, L.Along, dims=(dim,), lengths=(0,))


def _glu(c: Convert, node: fx.Node) -> None:
    x = tensor_node(node.args[0])
    shape, axis = measured(x)
    dim = whole(argument(node, 1, "dim", -1)) % len(shape)
    if dim == axis:
        raise Unmapped
    half, name = shape[dim] // 2, c.tensor(x)
    one = c.add(node, L.Slice(dim, 0, half), (name,), tag="_value")
    other = c.add(node, L.Slice(dim, half, 2 * half), (name,), tag="_gate")
    gate = c.add(node, L.Sigmoid(), (other,), tag="_sigmoid")
    c.add(node, L.Multiply(), (one, gate))


def _pointwise(c: Convert, node: fx.Node) -> None:
    c.pointwise(node)


def _identity(c: Convert, node: fx.Node) -> None:
    source, dtype = tensor_node(node.args[0]), node.meta["val"].dtype
    if source.meta["val"].dtype != dtype:
        _converted(c, node, source, dtype)
    else:
        c.alias(node)


def _converted(c: Convert, node: fx.Node, source: fx.Node, dtype: torch.dtype) -> None:
    c.add(node, _conversion(dtype), (c.tensor(source),))


def _conversion(dtype: torch.dtype) -> L.Elementwise:
    options = (("dtype", (DTYPE, str(dtype).removeprefix("torch."))),)
    return L.Elementwise("_to_copy.default", ((SLOT, 0),), options)


def _copy(c: Convert, node: fx.Node) -> None:
    """A tensor that is written over as a whole is what is written, in the tensor's shape and dtype."""
    value, dtype = tensor_node(node.args[1]), node.meta["val"].dtype
    if value.meta["val"].dtype == dtype:
        movement.expand(c, node, 1)
    elif measured(value) == measured(node):
        _converted(c, node, value, dtype)
    else:
        raise Unmapped


def _complex(c: Convert, node: fx.Node) -> None:
    """Pairs as complex numbers, whatever the layout of memory."""
    x = tensor_node(node.args[0])
    shape, axis = measured(x)
    parts: list[str] = []
    for k in range(2):
        part = c.add(node, L.Slice(len(shape) - 1, k, k + 1), (c.tensor(x),), tag=f"_{k}")
        parts.append(c.add(node, L.View(shape[:-1], axis, axis), (part,), tag=f"_part{k}"))
    c.add(node, L.Elementwise("complex.default", ((SLOT, 0), (SLOT, 1))), parts)


def _real(c: Convert, node: fx.Node) -> None:
    """Complex numbers as pairs, which are a new last axis."""
    x = tensor_node(node.args[0])
    shape, axis = measured(x)
    pair = (L.Elementwise(f"{name}.default", ((SLOT, 0),)) for name in ("real", "imag"))
    parts = [c.add(node, part, (c.tensor(x),), tag=f"_{k}") for k, part in enumerate(pair)]
    view = L.View((*shape, 1), axis, axis)
    c.add(node, L.Concat(len(shape)), [c.add(node, view, (part,), tag="_part") for part in parts])


def _filled(c: Convert, node: fx.Node) -> None:
    """The same number everywhere: one of it, expanded."""
    shape, axis = measured(node)
    kind, value = str(node.target).split(".")[1], node.meta["val"]
    if axis >= 0 and shape[axis] != 1:
        raise Unmapped
    fill: object = {"zeros": 0, "ones": 1}.get(kind.removeprefix("new_"))
    if fill is None:
        fill = argument(node, 2 if kind.startswith("new_") else 1, "fill_value")
    path, one = f"constants.{node.name}", (1,) * len(shape)
    c.tensors[path] = torch.full(one, number(fill), dtype=value.dtype)
    finite = float(number(fill)) if math.isfinite(number(fill)) else 0.0
    c.nodes.append(Node(path, L.Buffer(one, finite, dtype=named_dtype(value))))
    sizes = tuple(-1 if n == 1 and k != axis else n for k, n in enumerate(shape))
    c.add(node, L.Expand(sizes, axis), (path, *([c.known_examples()] if axis >= 0 else [])))


def _dropout(c: Convert, node: fx.Node) -> None:
    x, p, alone, alpha = node.args
    layer = L.Dropout(float(number(p)), None if alone is None else wholes(alone), flag(alpha))
    c.add(node, layer, (c.tensor(tensor_node(x)),))


def _spectral_norm(c: Convert, node: fx.Node) -> None:
    weight, u, v, dim, steps, eps, left = node.args
    x = tensor_node(weight)
    layer = L.SpectralNorm(measured(x)[0], whole(dim), whole(steps), number(eps), flag(left))
    c.add(node, layer, (c.tensor(x),), leaves={"u": c.path(u), "v": c.path(v)})


def _solved(c: Convert, node: fx.Node) -> None:
    """Systems of equations, which are along the last two axes; every example has its own."""
    shape, axis = measured(node)
    if not 0 <= axis < len(shape) - 2:
        raise Unmapped
    c.captured(node, apart=True)


UNTAGGED = (
    "log_sigmoid", "zero", "fill", "zeros_like", "ones_like", "full_like", "where", "__and__", "__or__", "masked_fill",
)  # fmt: skip
"""Pointwise operators that torch does not tag as such."""

ALONG_SECOND = (
    "var", "std", "prod", "logsumexp", "all", "any", "argmax", "argmin", "flip", "cumsum", "log_softmax",
    "_log_softmax",
)  # fmt: skip
"""Operators whose second argument says along which axes they work."""

CONVERTERS: dict[str, Converter] = {
    **dict.fromkeys(
        ("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
        parametric.convolution,
    ),
    "linear": _linear,
    **dict.fromkeys(("batch_norm", "_native_batch_norm_legit_no_training"), parametric.batch_norm),
    "_native_batch_norm_legit": parametric.untracked,
    "instance_norm": parametric.instance_norm,
    "layer_norm": parametric.layer_norm,
    "rms_norm": parametric.rms_norm,
    "group_norm": parametric.group_norm,
    "embedding": _embedding,
    "prelu": _prelu,
    "relu": _simple(L.ReLU),
    "relu6": _simple(L.ReLU6),
    "hardtanh": _hardtanh,
    "rrelu": _rrelu,
    "leaky_relu": _simple(L.LeakyReLU, ("negative_slope", 0.01)),
    "gelu": _simple(L.GELU, ("approximate", "none")),
    "silu": _simple(L.SiLU),
    "mish": _simple(L.Mish),
    "sigmoid": _simple(L.Sigmoid),
    "tanh": _simple(L.Tanh),
    "softplus": _simple(L.Softplus, ("beta", 1.0), ("threshold", 20.0)),
    "hardswish": _simple(L.Hardswish),
    "hardsigmoid": _simple(L.Hardsigmoid),
    "dropout": _dropout,
    "pixel_shuffle": _simple(L.PixelShuffle, ("upscale_factor", 1)),
    "channel_shuffle": _simple(L.ChannelShuffle, ("groups", 1)),
    "max_pool2d": _max_pool2d,
    "adaptive_avg_pool2d": _adaptive,
    **dict.fromkeys(
        ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool3d", "adaptive_avg_pool1d",
         "adaptive_avg_pool3d", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d",
         "upsample_bicubic2d", "upsample_linear1d", "upsample_trilinear3d", "_upsample_nearest_exact1d",
         "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
         "_upsample_lanczos2d_aa", "max_unpool2d", "max_unpool3d"),
        _maps,
    ),
    **dict.fromkeys(("softmax", "_softmax"), experts.either(experts.normalized, _softmax)),
    **dict.fromkeys(
        ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"), movement.view
    ),
    **dict.fromkeys(("permute", "transpose", "t"), movement.permute),
    "expand": movement.expand,
    "copy": _copy,
    "view_as_complex": _complex,
    "view_as_real": _real,
    "arange": movement.arange,
    **dict.fromkeys(("repeat", "tile"), movement.repeat),
    "repeat_interleave": movement.repeat_interleave,
    "slice": movement.slice_axis,
    "select": movement.select,
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "unbind"), movement.parts),
    "cat": movement.cat,
    "stack": movement.stack,
    "add": _pair(L.Add),
    "mul": _pair(L.Multiply),
    **dict.fromkeys(("mean", "sum", "amax", "amin"), _reduce),
    **dict.fromkeys(("matmul", "mm", "mv", "dot", "vdot"), _matmul),
    "bmm": experts.either(experts.product, _matmul),
    "tensordot": _tensordot,
    "_weight_norm": parametric.weight_norm,
    "spectral_norm": _spectral_norm,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), parametric.recurrent),
    **dict.fromkeys(("zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), _filled),
    "addmm": _addmm,
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("constant_pad_nd", "pad"), movement.pad),
    "index": experts.either(experts.either(experts.matrices, experts.biases), movement.index),
    "gather": experts.gathered,
    "topk": experts.top_k,
    "glu": _glu,
    "slice_scatter": movement.slice_scatter,
    "pixel_unshuffle": _simple(L.PixelUnshuffle, ("downscale_factor", 1)),
    **dict.fromkeys(UNTAGGED, _pointwise),
    **dict.fromkeys(ALONG_SECOND, movement.along(1, "dim")),
    "linalg_vector_norm": movement.along(2, "dim"),
    "cosine_similarity": _cosine_similarity,
    "roll": movement.along(2, "dims"),
    "linalg_solve_triangular": _solved,
    **dict.fromkeys(
        ("clone", "contiguous", "alias", "detach", "detach_", "lift_fresh_copy", "_to_copy", "to", "type_as"), _identity
    ),
}  # fmt: skip

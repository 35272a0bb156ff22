"""Operators with weights of their own that mix channels, normalize or remember: convolutions, norms, recurrence."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture.arguments import (
    Unmapped,
    argument,
    flag,
    measured,
    number,
    optional_tensor,
    tensor_node,
    whole,
    wholes,
    window,
)
from taylorfx.interop.capture.convert import Convert
from taylorfx.layers import Layer

__all__ = [
    "batch_norm", "convolution", "group_norm", "instance_norm", "layer_norm", "recurrent", "rms_norm", "untracked",
    "weight_norm",
]  # fmt: skip

_CONV: dict[int, Callable[..., Layer]] = {1: L.Conv1d, 2: L.Conv2d, 3: L.Conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Layer]] = {1: L.ConvTranspose1d, 2: L.ConvTranspose2d, 3: L.ConvTranspose3d}
_BATCH_NORM = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}
_INSTANCE_NORM = {3: L.InstanceNorm1d, 4: L.InstanceNorm2d, 5: L.InstanceNorm3d}
_RECURRENT: dict[str, type[L.LSTM | L.GRU | L.RNN]] = {
    "lstm": L.LSTM, "gru": L.GRU, "rnn_tanh": L.RNN, "rnn_relu": L.RNN,
}  # fmt: skip


def convolution(c: Convert, node: fx.Node) -> None:
    """A convolution is the module's own layer if its weight is the module's own, `Convolve` otherwise."""
    x, weight, bias = (tensor_node(node.args[0]), tensor_node(node.args[1]), optional_tensor(argument(node, 2, "bias")))
    if len(measured(x)[0]) != len(measured(weight)[0]):
        raise Unmapped
    if all(n is None or n.name in c.paths for n in (weight, bias)):
        leaves = {name: c.path(n) for name, n in (("weight", weight), ("bias", bias)) if n is not None}
        c.add(node, _with_weight(node, measured(weight)[0], bias is not None), (c.tensor(x),), leaves=leaves)
    elif measured(weight)[1] >= 0:
        raise Unmapped
    else:
        layer = _of_weight(node, len(measured(weight)[0]) - 2)
        c.add(node, layer, [c.tensor(n) for n in (x, weight, bias) if n is not None])


def _with_weight(node: fx.Node, shape: tuple[int, ...], bias: bool) -> Layer:
    """The convolution that has a weight of this shape."""
    rank, padding = len(shape) - 2, argument(node, 4, "padding", 0)
    windows = {
        "stride": window(argument(node, 3, "stride", 1), rank),
        "padding": padding if isinstance(padding, str) else window(padding, rank),
    }
    if "transpose" in str(node.target):
        windows["output_padding"] = window(argument(node, 5, "output_padding", 0), rank)
        windows["dilation"] = window(argument(node, 7, "dilation", 1), rank)
        groups = whole(argument(node, 6, "groups", 1))
        return _CONV_TRANSPOSE[rank](shape[0], shape[1] * groups, shape[2:], **windows, groups=groups, bias=bias)
    windows["dilation"] = window(argument(node, 5, "dilation", 1), rank)
    groups = whole(argument(node, 6, "groups", 1))
    return _CONV[rank](shape[1] * groups, shape[0], shape[2:], **windows, groups=groups, bias=bias)


def _of_weight(node: fx.Node, rank: int) -> Layer:
    """The convolution that consumes its weight."""

    def each(position: int, name: str, default: int) -> tuple[int, ...]:
        sizes = window(argument(node, position, name, default), rank)
        return (sizes,) * rank if isinstance(sizes, int) else sizes

    stride, padding, groups = each(3, "stride", 1), each(4, "padding", 0), whole(argument(node, 6, "groups", 1))
    if "transpose" in str(node.target):
        extra, dilation = each(5, "output_padding", 0), each(7, "dilation", 1)
        return L.ConvolveTransposed(stride, padding, extra, dilation, groups)
    return L.Convolve(stride, padding, each(5, "dilation", 1), groups)


def weight_norm(c: Convert, node: fx.Node) -> None:
    dim = whole(argument(node, 2, "dim", 0))  # -1 is torch's word for the whole tensor
    c.add(node, L.WeightNorm(None if dim == -1 else dim), [c.tensor(tensor_node(n)) for n in node.args[:2]])


def recurrent(c: Convert, node: fx.Node) -> None:
    """Recurrent layers; each of their results is a layer of its own."""
    x, start, weights, bias, layers, dropout, _, both, batch_first = node.args
    starts = start if isinstance(start, (list, tuple)) else [start]
    kind = str(node.target).split(".")[1]
    zeros = all(str(getattr(n, "target", "")).split(".")[1:2] in (["zeros"], ["new_zeros"]) for n in starts)
    leaves = _recurrent_leaves(c, weights, flag(bias), whole(layers), flag(both))
    rows, width = c.tensors[leaves["weight_ih_l0"]].shape
    layer = _RECURRENT[kind]
    build: Callable[..., Layer] = layer
    if kind.startswith("rnn"):
        build = partial(L.RNN, nonlinearity=kind.removeprefix("rnn_"))
    inputs = [c.tensor(tensor_node(n)) for n in (x, *([] if zeros else starts))]
    for taken in (user for user in node.users if user.target is operator.getitem and user.users):
        result = layer.results[whole(taken.args[1])]
        sizes = width, rows // layer.parts, whole(layers), flag(bias), flag(batch_first), number(dropout), flag(both)
        c.add(taken, build(*sizes, result), inputs, leaves=leaves)


def _recurrent_leaves(c: Convert, weights: object, bias: bool, layers: int, both: bool) -> dict[str, str]:
    """The paths of a recurrent layer's parameters, by torch's names."""
    if not isinstance(weights, (list, tuple)):
        raise Unmapped
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
    suffixes = [f"l{k}{direction}" for k in range(layers) for direction in (("", "_reverse") if both else ("",))]
    if len(weights) != len(names) * len(suffixes):  # a projection has one more weight
        raise Unmapped
    return dict(zip((f"{n}_{s}" for s in suffixes for n in names), map(c.path, weights), strict=True))


def batch_norm(c: Convert, node: fx.Node) -> None:
    x, weight, bias, mean, var, *rest = node.args
    momentum, eps = rest[-3:-1] if str(node.target) == "aten.batch_norm.default" else rest[:2]
    kind = _BATCH_NORM.get(len(measured(tensor_node(x))[0]))
    if kind is None:
        raise Unmapped
    leaves = _affine(c, weight, bias)
    leaves |= _tracked(c, mean, var)
    features = len(c.tensors[leaves["running_mean"]])
    momentum = None if leaves["running_mean"] in c.cumulative else number(momentum)
    c.add(node, kind(features, number(eps), momentum, weight is not None), (c.tensor(tensor_node(x)),), leaves=leaves)


def instance_norm(c: Convert, node: fx.Node) -> None:
    x, weight, bias, mean, var, by_input, rate, eps = node.args[:8]
    shape, axis = measured(tensor_node(x))
    kind = _INSTANCE_NORM.get(len(shape))
    if kind is None or axis != 0 or by_input != (mean is None):
        raise Unmapped
    leaves, momentum = _affine(c, weight, bias), number(rate)
    if not by_input:
        leaves |= _tracked(c, mean, var)
    cumulative = leaves.get("running_mean") in c.cumulative
    layer = kind(shape[1], number(eps), None if cumulative else momentum, weight is not None, not by_input)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)


def _affine(c: Convert, weight: object, bias: object) -> dict[str, str]:
    """The paths of a norm's scale and shift, which it has both or neither."""
    if (weight is None) != (bias is None):
        raise Unmapped
    return {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}


def _tracked(c: Convert, mean: object, var: object) -> dict[str, str]:
    """The paths of running statistics, and of the number of batches beside them."""
    leaves = {"running_mean": c.path(mean), "running_var": c.path(var)}
    home = leaves["running_mean"].rpartition(".")[0]
    leaves["num_batches_tracked"] = f"{home}.num_batches_tracked" if home else "num_batches_tracked"
    c.tensors.setdefault(leaves["num_batches_tracked"], torch.zeros((), dtype=torch.long))
    return leaves


def untracked(c: Convert, node: fx.Node) -> None:
    """Batch norm by the batch's own statistics, in inference too."""
    if str(node.target) != "aten._native_batch_norm_legit.no_stats":
        raise Unmapped
    x, weight, bias, _, momentum, eps = node.args
    shape, axis = measured(tensor_node(x))
    kind = _BATCH_NORM.get(len(shape))
    if kind is None or axis != 0:
        raise Unmapped
    leaves = _affine(c, weight, bias)
    layer = kind(shape[1], number(eps), number(momentum), weight is not None, track_running_stats=False)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)


def layer_norm(c: Convert, node: fx.Node) -> None:
    weight, bias = argument(node, 2, "weight"), argument(node, 3, "bias")
    if weight is None and bias is not None:
        raise Unmapped
    leaves = {name: c.path(value) for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    shape, eps, affine = (
        wholes(argument(node, 1, "normalized_shape")),
        number(argument(node, 4, "eps", 1e-5)),
        bool(leaves),
    )
    layer = L.LayerNorm(shape, eps, affine, bias is not None or not affine)
    c.add(node, layer, (c.tensor(tensor_node(argument(node, 0, "input"))),), leaves=leaves)


def rms_norm(c: Convert, node: fx.Node) -> None:
    weight, eps = argument(node, 2, "weight"), argument(node, 3, "eps")
    leaves = {} if weight is None else {"weight": c.path(weight)}
    layer = L.RMSNorm(wholes(node.args[1]), None if eps is None else number(eps), weight is not None)
    c.add(node, layer, (c.tensor(tensor_node(node.args[0])),), leaves=leaves)


def group_norm(c: Convert, node: fx.Node) -> None:
    x, weight = tensor_node(argument(node, 0, "input")), argument(node, 2, "weight")
    leaves = _affine(c, weight, argument(node, 3, "bias"))
    groups, eps = whole(argument(node, 1, "num_groups")), number(argument(node, 4, "eps", 1e-5))
    c.add(node, L.GroupNorm(groups, measured(x)[0][1], eps, weight is not None), (c.tensor(x),), leaves=leaves)

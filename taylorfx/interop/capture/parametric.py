"""Operators with weights of their own that mix channels, normalize or remember: convolutions, norms, recurrence."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture.convert import Convert, Unmapped, argument, measured, tensor_node
from taylorfx.layers import Layer

__all__ = [
    "batch_norm", "convolution", "group_norm", "instance_norm", "layer_norm", "recurrent", "rms_norm", "untracked",
    "weight_norm",
]  # fmt: skip


def convolution(c: Convert, node: fx.Node) -> None:
    x, bias = tensor_node(node.args[0]), argument(node, 2, "bias")
    shape, examples = measured(tensor_node(node.args[1]))
    rank = len(shape) - 2
    transposed = "transpose" in str(node.target)
    stride, padding = argument(node, 3, "stride", 1), argument(node, 4, "padding", 0)

    def each(value: Any) -> Any:
        return value if isinstance(value, (int, str)) else tuple(value) * (rank if len(value) == 1 else 1)

    if len(measured(x)[0]) != rank + 2:
        raise Unmapped
    weight = tensor_node(node.args[1])
    if not all(n is None or n.name in c.paths for n in (weight, bias)):
        groups, numbers = argument(node, 6, "groups", 1), [stride, padding, argument(node, 5, "dilation", 1)]
        if transposed:
            extra, groups = argument(node, 5, "output_padding", 0), argument(node, 6, "groups", 1)
            numbers = [stride, padding, argument(node, 7, "dilation", 1), extra]
        if examples >= 0 or not isinstance(groups, int) or isinstance(padding, str):
            raise Unmapped
        stride, padding, dilation, *spare = [(n,) * rank if isinstance(n, int) else each(n) for n in numbers]
        made: Layer = L.Convolve(stride, padding, dilation, groups)
        if transposed:
            made = L.ConvolveTransposed(stride, padding, spare[0], dilation, groups)
        c.add(node, made, [c.tensor(n) for n in (x, weight, bias) if n is not None])
        return
    leaves = {name: c.path(n) for name, n in (("weight", weight), ("bias", bias)) if n is not None}
    if transposed:
        kind: Any = {1: L.ConvTranspose1d, 2: L.ConvTranspose2d, 3: L.ConvTranspose3d}[rank]
        extra, groups = argument(node, 5, "output_padding", 0), argument(node, 6, "groups", 1)
        dilation = argument(node, 7, "dilation", 1)
        layer: Layer = kind(
            shape[0], shape[1] * groups, shape[2:], stride=each(stride), padding=each(padding), dilation=each(dilation),
            groups=groups, bias=bias is not None, output_padding=each(extra),
        )  # fmt: skip
    else:
        dilation, groups = argument(node, 5, "dilation", 1), argument(node, 6, "groups", 1)
        forward = {1: L.Conv1d, 2: L.Conv2d, 3: L.Conv3d}[rank]
        layer = forward(shape[1] * groups, shape[0], shape[2:], each(stride), each(padding), each(dilation), groups,
                        bias is not None)  # fmt: skip
    c.add(node, layer, (c.tensor(x),), leaves=leaves)


def weight_norm(c: Convert, node: fx.Node) -> None:
    dim = argument(node, 2, "dim", 0)  # -1 is torch's word for the whole tensor
    c.add(node, L.WeightNorm(None if dim == -1 else dim), [c.tensor(tensor_node(n)) for n in node.args[:2]])


def recurrent(c: Convert, node: fx.Node) -> None:
    """Recurrent layers; each of their results is a layer of its own."""
    arguments: Any = node.args
    x, start, weights, bias, layers, dropout, _, both, batch_first = arguments
    starts = start if isinstance(start, (list, tuple)) else [start]
    kind = str(node.target).split(".")[1]
    zeros = all(str(getattr(n, "target", "")).split(".")[1:2] in (["zeros"], ["new_zeros"]) for n in starts)
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if bias else 2]
    suffixes = [f"l{k}{way}" for k in range(layers) for way in (("", "_reverse") if both else ("",))]
    if len(weights) != len(names) * len(suffixes):  # a projection has one more weight
        raise Unmapped
    leaves = dict(zip((f"{n}_{s}" for s in suffixes for n in names), map(c.path, weights), strict=True))
    rows, width = c.tensors[leaves["weight_ih_l0"]].shape
    form: dict[str, Any] = {"nonlinearity": kind.removeprefix("rnn_")} if kind.startswith("rnn") else {}
    layer: Any = {"lstm": L.LSTM, "gru": L.GRU}.get(kind, L.RNN)
    inputs = [c.tensor(tensor_node(n)) for n in (x, *([] if zeros else starts))]
    for taken in (user for user in node.users if user.target is operator.getitem and user.users):
        index: Any = taken.args[1]
        sizes = width, rows // layer.parts, layers, bias, batch_first, dropout, both
        c.add(taken, layer(*sizes, layer.results[index], **form), inputs, leaves=leaves)


def batch_norm(c: Convert, node: fx.Node) -> None:
    arguments: Any = node.args[:7]
    x, weight, bias, mean, var, momentum, eps = arguments
    rank = len(measured(tensor_node(x))[0])
    kind = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}.get(rank)
    if kind is None or (weight is None) != (bias is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    leaves |= _tracked(c, mean, var)
    features = len(c.tensors[leaves["running_mean"]])
    momentum = None if leaves["running_mean"] in c.cumulative else momentum
    c.add(node, kind(features, eps, momentum, weight is not None), (c.tensor(tensor_node(x)),), leaves=leaves)


def instance_norm(c: Convert, node: fx.Node) -> None:
    arguments: Any = node.args
    x, weight, bias, mean, var, own, momentum, eps = arguments[:8]
    shape, axis = measured(tensor_node(x))
    kind = {3: L.InstanceNorm1d, 4: L.InstanceNorm2d, 5: L.InstanceNorm3d}.get(len(shape))
    if kind is None or axis != 0 or (weight is None) != (bias is None) or own != (mean is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    if not own:
        leaves |= _tracked(c, mean, var)
        momentum = None if leaves["running_mean"] in c.cumulative else momentum
    layer = kind(shape[1], eps, momentum, weight is not None, not own)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)


def _tracked(c: Convert, mean: Any, var: Any) -> dict[str, str]:
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
    arguments: Any = node.args
    x, weight, bias, _, momentum, eps = arguments
    shape, axis = measured(tensor_node(x))
    kind = {2: L.BatchNorm1d, 3: L.BatchNorm1d, 4: L.BatchNorm2d, 5: L.BatchNorm3d}.get(len(shape))
    if kind is None or axis != 0 or (weight is None) != (bias is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    layer = kind(shape[1], eps, momentum, weight is not None, track_running_stats=False)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)


def layer_norm(c: Convert, node: fx.Node) -> None:
    x, shape, weight, bias = (
        argument(node, k, name) for k, name in enumerate(("input", "normalized_shape", "weight", "bias"))
    )
    if weight is None and bias is not None:
        raise Unmapped
    leaves = {name: c.path(value) for name, value in (("weight", weight), ("bias", bias)) if value is not None}
    eps, affine = argument(node, 4, "eps", 1e-5), weight is not None
    layer = L.LayerNorm(tuple(shape), eps, affine, bias is not None or not affine)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)


def rms_norm(c: Convert, node: fx.Node) -> None:
    weight = argument(node, 2, "weight")
    leaves = {} if weight is None else {"weight": c.path(weight)}
    layer = L.RMSNorm(tuple(node.args[1]), argument(node, 3, "eps"), weight is not None)  # type: ignore[arg-type]
    c.add(node, layer, (c.tensor(tensor_node(node.args[0])),), leaves=leaves)


def group_norm(c: Convert, node: fx.Node) -> None:
    x, groups, weight, bias = (argument(node, k, n) for k, n in enumerate(("input", "num_groups", "weight", "bias")))
    if (weight is None) != (bias is None):
        raise Unmapped
    leaves = {} if weight is None else {"weight": c.path(weight), "bias": c.path(bias)}
    layer = L.GroupNorm(groups, measured(tensor_node(x))[0][1], argument(node, 4, "eps", 1e-5), weight is not None)
    c.add(node, layer, (c.tensor(tensor_node(x)),), leaves=leaves)

"""The proofs of roles: every role that a layer states is run and compared with what the role says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers import Layer, axes
from taylorfx.layers.roles import (
    Attending,
    ChannelAffine,
    Constant,
    Experts,
    Joining,
    Memory,
    Mixing,
    Noise,
    Normalizing,
    Pointwise,
    Product,
    Recomputed,
    Role,
    RunningStatistics,
    Slicing,
    Sum,
    Summing,
    Viewing,
)  # fmt: skip

__all__ = ["check_roles"]

Leaves = Mapping[str, Tensor]


def check_roles(layer: Layer, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    """Run every role that a layer states, on these parameters and inputs in double precision.

    Raises:
        AssertionError: saying which role is not true, and of what.
    """
    for kind, check in CHECKS.items():
        role = layer.role(kind)
        if role is not None:
            check(layer, role, leaves, [x.detach() for x in inputs])


def _equal(layer: Layer, role: Role, what: str, computed: Tensor, stated: Tensor) -> None:
    message = f"{layer.title} does not do what its role {type(role).__name__} states; {what}: {{}}".format
    torch.testing.assert_close(computed, stated, rtol=1e-7, atol=1e-9, check_stride=False, msg=message)


def _true(layer: Layer, role: Role, what: str, holds: bool) -> None:
    assert holds, f"{layer.title} does not do what its role {type(role).__name__} states; {what}"


def _random(like: Tensor, count: int | None = None) -> Tensor:
    """Numbers in ``[0.5, 1.5)`` of the dtype of a tensor, and of its shape if no count is given; always the same."""
    generator = torch.Generator().manual_seed(0)
    return 0.5 + torch.rand(like.shape if count is None else (count,), generator=generator, dtype=like.dtype)


def _per_channel(numbers: Tensor, x: Tensor) -> Tensor:
    """``(channels,)`` for tensors ``(N, channels, ...)``."""
    return numbers.reshape(-1, *[1] * (x.ndim - 2))


def _mixing(layer: Layer, role: Mixing, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _true(layer, role, "it has one input", len(inputs) == 1)
    names = {role.weight, role.bias} if role.has_bias else {role.weight}
    _true(layer, role, f"its parameters are {sorted(names)}", leaves.keys() == names)
    (x,), weight = inputs, leaves[role.weight]
    matrix, y = role.matrix(weight), role.rows(layer.apply(leaves, x))
    product = torch.einsum("rgk,gko->rgo", role.windows(x), matrix)
    bias = leaves[role.bias].reshape(role.groups, -1) if role.has_bias else torch.zeros_like(product[0])
    _equal(layer, role, "rows(y) = windows(x) @ matrix(weight) + bias", y, product + bias)
    _equal(layer, role, "as_weight(matrix(weight)) = weight", role.as_weight(matrix, weight), weight)
    _equal(layer, role, "product(weight, x) has no bias", role.rows(role.product(weight, x)), product)
    scale = _random(weight, product[0].numel())
    scaled = role.rows(role.product(role.scaled(weight, scale), x))
    _equal(layer, role, "scaled(weight, scale) scales the outputs", scaled, product * scale.reshape(bias.shape))
    biased = role.with_bias()
    shape = biased.shapes().get(role.bias)
    _true(layer, role, "with_bias() has a bias of one number per channel", shape == scale.shape)
    value = role.rows(biased.apply({role.weight: weight, role.bias: scale}, x))
    _equal(layer, role, "with_bias() adds it", value, product + scale.reshape(bias.shape))


def _channel_affine(layer: Layer, role: ChannelAffine, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,) = inputs
    scale, shift = (_per_channel(numbers, x) for numbers in role.numbers(leaves))
    _equal(layer, role, "y = scale * x + shift", layer.apply(leaves, x), scale * x + shift)


def _normalizing(layer: Layer, role: Normalizing, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,) = inputs

    def value(scale: Tensor) -> Tensor:
        return layer.train({**leaves, role.scale: scale}, x, generator=None)[0]

    scale = leaves[role.scale]
    shift = value(torch.zeros_like(scale))
    normal = value(torch.ones_like(scale)) - shift
    _equal(layer, role, "the scale multiplies", value(scale) - shift, _per_channel(scale, x) * normal)
    mean = normal.movedim(1, 0).flatten(1).mean(1)
    _equal(layer, role, "a channel has the mean 0 in training", mean, torch.zeros_like(mean))


def _running_statistics(layer: Layer, role: RunningStatistics, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,) = inputs
    shift = _random(leaves[role.mean])
    moved = layer.apply({**leaves, role.mean: leaves[role.mean] - shift}, x)
    _equal(layer, role, "the mean is subtracted", moved, layer.apply(leaves, x + _per_channel(shift, x)))
    value = role.average.apply(leaves, x)
    _equal(layer, role, "`average` computes the same in inference", value, layer.apply(leaves, x))
    batches = [x, 2 * x + 1, x.flip(0) - 3]
    current = {**leaves, **{name: torch.zeros_like(leaves[name]) for name in layer.buffers}}
    for batch in batches:
        current.update(role.average.train(current, batch, generator=None)[1])
    channels = [batch.movedim(1, 0).flatten(1) for batch in batches]
    for name, numbers in (
        (role.mean, [rows.mean(1) for rows in channels]),
        (role.variance, [rows.var(1) for rows in channels]),
    ):
        _equal(layer, role, f"{name} is the batches' average", current[name], torch.stack(numbers).mean(0))


def _pointwise(layer: Layer, role: Pointwise, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,), y = inputs, layer.apply(leaves, *inputs)
    order = torch.randperm(x.numel(), generator=torch.Generator().manual_seed(0))
    permuted = layer.apply(leaves, x.flatten()[order].reshape(x.shape))
    _equal(layer, role, "every number alone", permuted, y.flatten()[order].reshape(x.shape))
    variable, gradient = x.clone().requires_grad_(), _random(x)
    (slope,) = torch.autograd.grad(layer.apply(leaves, variable), variable, gradient)
    kept = [x]
    if role.overwrite is not None:
        over = x.clone()
        value = role.overwrite(over)
        _equal(layer, role, "overwrite(x) is the value", value, y)
        _equal(layer, role, "overwrite(x) changes x", over, y)
        kept.append(value)
    for tensor in kept:
        _equal(layer, role, "slope(kept, gradient)", role.slope(tensor, gradient.clone(), False), slope)
        target = gradient.clone()
        role.slope(tensor, target, True)
        _equal(layer, role, "slope(kept, gradient) over the gradient", target, slope)


def _differentiated(layer: Layer, leaves: Leaves, x: Tensor) -> tuple[Tensor, Tensor, list[int]]:
    """A variable, the layer's value of it, and where the tensors lie in memory that torch keeps for the derivative."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    variable = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return variable, layer.apply({name: leaf.detach() for name, leaf in leaves.items()}, variable), kept


def _recomputed(layer: Layer, role: Recomputed, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _true(layer, role, "it has one input", len(inputs) == 1)
    x, _, kept = _differentiated(layer, leaves, inputs[0])
    _true(layer, role, "torch keeps the input", x.untyped_storage().data_ptr() in kept)


def _memory(layer: Layer, role: Memory, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _true(layer, role, "it has one input", len(inputs) == 1)
    x, y, kept = _differentiated(layer, leaves, inputs[0])
    before, after, gradient = x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr(), _random(y)
    (by_input,) = torch.autograd.grad(y, x, gradient, retain_graph=True)
    others = {*kept, before, after, gradient.untyped_storage().data_ptr()}
    _true(layer, role, "the input is not kept", role.keeps_input or before not in kept)
    new = after not in {*kept, before} and not y._is_view()
    _true(layer, role, "the value is new and not kept", new or not role.new_value)
    fresh = by_input.untyped_storage().data_ptr() not in others
    _true(layer, role, "the gradient is new", fresh or not role.new_gradient)


def _viewing(layer: Layer, role: Viewing, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    x = inputs[0].contiguous()
    y = layer.apply(leaves, x)
    same = y.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    _true(layer, role, "a view of its input", same and len(inputs) == 1)
    _equal(layer, role, "all numbers of its input", y.flatten().sort()[0], x.flatten().sort()[0])
    if role.dims is not None:
        _equal(layer, role, "the axes in this order", y, x.permute(role.dims))


def _experts(layer: Layer, role: Experts, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    y, numbers = layer.apply(leaves, *inputs), role.numbers(*inputs)
    text = layer.signature(*(x.shape for x in inputs))
    patterns = axes.parse(text or "").parameters
    _true(layer, role, "a number of an expert for each row", numbers.shape == y.shape[:-1])
    _equal(layer, role, "rows of none", y[numbers < 0], torch.zeros_like(y[numbers < 0]))
    for k in sorted({*numbers[numbers >= 0].tolist()}):
        alone: dict[str, Tensor] = {}
        for leaf, x in leaves.items():
            axis = patterns[leaf].singles.index(role.letter)
            alone[leaf] = torch.zeros_like(x).index_copy(axis, torch.tensor([k]), x.narrow(axis, k, 1))
        mine = numbers == k
        _equal(layer, role, "rows by one expert alone", layer.apply(alone, *inputs)[mine], y[mine])
        if role.slot is not None:
            product = inputs[role.slot][mine] @ role.matrices(leaves[role.weight])[k]
            _equal(layer, role, "y = x @ matrices(weight)[number]", y[mine], product)


def _slicing(layer: Layer, role: Slicing, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,) = inputs
    stated = x.narrow(role.dim, role.start, role.stop - role.start)
    _equal(layer, role, "the positions of the axis", layer.apply(leaves, x), stated)


def _joining(layer: Layer, role: Joining, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _equal(layer, role, "its inputs along the axis", layer.apply(leaves, *inputs), torch.cat([*inputs], role.dim))


def _noise(layer: Layer, role: Noise, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,) = inputs
    _equal(layer, role, "its only input", layer.apply(leaves, x), x)
    zeros, _ = layer.train(leaves, torch.zeros_like(x), generator=torch.Generator(x.device).manual_seed(0))
    _equal(layer, role, "zeros of zeros in training", zeros, torch.zeros_like(x))


def _sum(layer: Layer, role: Sum, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _equal(layer, role, "the sum of its inputs", layer.apply(leaves, *inputs), reduce(torch.add, inputs))


def _summing(layer: Layer, role: Summing, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    (x,), y = inputs, layer.apply(leaves, *inputs)
    _equal(layer, role, "the sum over its axes", y, x.sum(role.dims).reshape(y.shape))


def _product(layer: Layer, role: Product, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _equal(layer, role, "the product of its inputs", layer.apply(leaves, *inputs), reduce(torch.mul, inputs))


def _constant(layer: Layer, role: Constant, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    _equal(layer, role, "the parameter", layer.apply(leaves, *inputs), leaves[role.parameter])


def _attending(layer: Layer, role: Attending, leaves: Leaves, inputs: Sequence[Tensor]) -> None:
    queries, keys, values, *mask = inputs
    allowed = torch.ones(queries.shape[-2], keys.shape[-2], dtype=torch.bool)
    allowed = allowed.tril() if role.causal else allowed
    if mask:
        allowed = mask[0] & allowed if mask[0].dtype == torch.bool else mask[0].masked_fill(~allowed, -torch.inf)
    stated = F.scaled_dot_product_attention(
        queries, keys, values, allowed, scale=role.scale, enable_gqa=role.grouped
    )  # fmt: skip
    _equal(layer, role, "scaled dot-product attention", layer.apply(leaves, *inputs), stated)


CHECKS: Mapping[type[Role], Callable[[Layer, Any, Leaves, Sequence[Tensor]], None]] = {
    Attending: _attending,
    ChannelAffine: _channel_affine,
    Constant: _constant,
    Experts: _experts,
    Joining: _joining,
    Memory: _memory,
    Mixing: _mixing,
    Noise: _noise,
    Normalizing: _normalizing,
    Pointwise: _pointwise,
    Product: _product,
    Recomputed: _recomputed,
    RunningStatistics: _running_statistics,
    Slicing: _slicing,
    Sum: _sum,
    Summing: _summing,
    Viewing: _viewing,
}
"""For every kind of role, the function that raises where a layer does not do what it states."""

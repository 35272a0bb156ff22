"""Convolutions: dense, grouped, depthwise, transposed; and with a weight that is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, as_tuple, positive, uniform

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Convolve",
    "ConvolveTransposed",
]  # fmt: skip

Ints = int | tuple[int, ...]

_SPATIAL = {1: ("H", "K", "P"), 2: ("H W", "K L", "P Q"), 3: ("D H W", "K L M", "P Q R")}


@dataclass(frozen=True)
class _Conv(Layer):
    """What all convolutions share. ``groups`` cuts the channels into groups ``g`` that do not hear each other."""

    in_channels: int
    out_channels: int
    kernel_size: Ints
    stride: Ints = 1
    padding: Ints | str = 0
    dilation: Ints = 1
    groups: int = 1
    bias: bool = True

    rank: ClassVar[int]

    def __post_init__(self) -> None:
        as_tuple(self, self.rank, "kernel_size", "stride", "dilation")
        if not isinstance(self.padding, str):
            as_tuple(self, self.rank, "padding")
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise ShapeError(f"Groups divide the input and the output channels; received {self}.")

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[self.rank]
        bias = ", bias: (g o)" if self.bias else ""
        return f"B (g i) {before}, weight: (g o) i {kernel}{bias} -> B (g o) {after}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        kernel = _SPATIAL[self.rank][1]
        return {"in_channels": "(g i)", "out_channels": "(g o)", "groups": "g", "kernel_size": kernel}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes()
        bound = 1 / math.sqrt(math.prod(shapes["weight"][1:]))
        return {name: uniform(shape, bound, generator) for name, shape in shapes.items()}

    def _bias(self, params: Leaves) -> Tensor | None:
        return params["bias"] if self.bias else None


def _numbers(value: Ints | str) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return value


class _Forward(_Conv):
    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ShapeError(f"Padding is numbers, 'same' or 'valid'; received {self.padding!r}.")
            if self.padding == "same" and set(_numbers(self.stride)) != {1}:
                raise ShapeError(f"Padding 'same' takes a stride of 1, as in torch; received {self}.")

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, _, after = _SPATIAL[self.rank]
        result: dict[str, int] = {}
        for k, (given, made) in enumerate(zip(before.split(), after.split(), strict=True)):
            reach = _numbers(self.dilation)[k] * (_numbers(self.kernel_size)[k] - 1)
            if self.padding == "same":
                result[made] = known[given]
            else:
                padding = 0 if self.padding == "valid" else _numbers(self.padding)[k]
                result[made] = (known[given] + 2 * padding - reach - 1) // _numbers(self.stride)[k] + 1
        return positive(self, result)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...] | str, tuple[int, ...]]:
        padding = self.padding if isinstance(self.padding, str) else _numbers(self.padding)
        return _numbers(self.stride), padding, _numbers(self.dilation)


@dataclass(frozen=True)
class Conv1d(_Forward):
    """``torch.nn.Conv1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K P",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        stride, padding, dilation = self._window()
        return F.conv1d(inputs[0], params["weight"], self._bias(params), stride, padding, dilation, self.groups)


@dataclass(frozen=True)
class Conv2d(_Forward):
    """``torch.nn.Conv2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L P Q",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        stride, padding, dilation = self._window()
        return F.conv2d(inputs[0], params["weight"], self._bias(params), stride, padding, dilation, self.groups)


@dataclass(frozen=True)
class Conv3d(_Forward):
    """``torch.nn.Conv3d``: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``."""

    rank: ClassVar[int] = 3
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M P Q R",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        stride, padding, dilation = self._window()
        return F.conv3d(inputs[0], params["weight"], self._bias(params), stride, padding, dilation, self.groups)


@dataclass(frozen=True)
class _Transposed(_Conv):
    # torch's positional order: what it has after output_padding, and in another order, is keyword-only here.
    output_padding: Ints = 0
    dilation: Ints = field(default=1, kw_only=True)
    groups: int = field(default=1, kw_only=True)
    bias: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        as_tuple(self, self.rank, "padding", "output_padding")
        steps = zip(_numbers(self.output_padding), _numbers(self.stride), _numbers(self.dilation), strict=True)
        if any(extra >= max(stride, dilation) for extra, stride, dilation in steps):
            raise ShapeError(f"The output padding is smaller than stride or dilation; received {self}.")

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[self.rank]
        bias = ", bias: (g o)" if self.bias else ""
        return f"B (g i) {before}, weight: (g i) o {kernel}{bias} -> B (g o) {after}"

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, _, after = _SPATIAL[self.rank]
        result: dict[str, int] = {}
        for k, (given, made) in enumerate(zip(before.split(), after.split(), strict=True)):
            reach = _numbers(self.dilation)[k] * (_numbers(self.kernel_size)[k] - 1)
            spread = (known[given] - 1) * _numbers(self.stride)[k] + _numbers(self.output_padding)[k]
            result[made] = spread - 2 * _numbers(self.padding)[k] + reach + 1
        return positive(self, result)

    def _window(self) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        return _numbers(self.stride), _numbers(self.padding), _numbers(self.output_padding)


@dataclass(frozen=True)
class ConvTranspose1d(_Transposed):
    """``torch.nn.ConvTranspose1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K H",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        bias, dilation = self._bias(params), _numbers(self.dilation)
        return F.conv_transpose1d(inputs[0], params["weight"], bias, *self._window(), self.groups, dilation)


@dataclass(frozen=True)
class ConvTranspose2d(_Transposed):
    """``torch.nn.ConvTranspose2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L H W",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        bias, dilation = self._bias(params), _numbers(self.dilation)
        return F.conv_transpose2d(inputs[0], params["weight"], bias, *self._window(), self.groups, dilation)


@dataclass(frozen=True)
class ConvTranspose3d(_Transposed):
    """``torch.nn.ConvTranspose3d``: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``."""

    rank: ClassVar[int] = 3
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M D H W",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        bias, dilation = self._bias(params), _numbers(self.dilation)
        return F.conv_transpose3d(inputs[0], params["weight"], bias, *self._window(), self.groups, dilation)


@dataclass(frozen=True)
class Convolve(Layer):
    """``torch.nn.functional.conv1d``, ``conv2d``, ``conv3d`` with a weight that is computed: the second input.

    A third input is the bias. The weight is the same for all examples (normalized, standardized, made of others).
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M P Q R",)

    def __str__(self) -> str:
        return repr(self)

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[len(self.stride)]
        bias = ", (g o)" if len(shapes) > 2 else ""
        return f"B (g i) {before}, (g o) i {kernel}{bias} -> B (g o) {after}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"groups": "g"}

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, kernel, after = map(str.split, _SPATIAL[len(self.stride)])
        sizes = ((known[x] + 2 * p - d * (known[k] - 1) - 1) // s + 1 for x, k, s, p, d in zip(
            before, kernel, self.stride, self.padding, self.dilation, strict=True))  # fmt: skip
        return positive(self, dict(zip(after, sizes, strict=True)))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        function: Any = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.stride)]
        bias = inputs[2] if len(inputs) > 2 else None
        made: Tensor = function(*inputs[:2], bias, self.stride, self.padding, self.dilation, self.groups)
        return made


@dataclass(frozen=True)
class ConvolveTransposed(Layer):
    """``torch.nn.functional.conv_transpose1d``, ``2d``, ``3d`` with a weight that is computed: the second input.

    A third input is the bias. The weight is the same for all examples, as in `Convolve`.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1

    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M D H W",)

    def __str__(self) -> str:
        return repr(self)

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[len(self.stride)]
        bias = ", (g o)" if len(shapes) > 2 else ""
        return f"B (g i) {before}, (g i) o {kernel}{bias} -> B (g o) {after}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"groups": "g"}

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, kernel, after = map(str.split, _SPATIAL[len(self.stride)])
        steps = zip(before, kernel, self.stride, self.padding, self.output_padding, self.dilation, strict=True)
        sizes = ((known[x] - 1) * s + extra - 2 * p + d * (known[k] - 1) + 1 for x, k, s, p, extra, d in steps)
        return positive(self, dict(zip(after, sizes, strict=True)))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        function: Any = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[len(self.stride)]
        bias = inputs[2] if len(inputs) > 2 else None
        options = (self.stride, self.padding, self.output_padding, self.groups, self.dilation)
        made: Tensor = function(*inputs[:2], bias, *options)
        return made

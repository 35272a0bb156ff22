"""Convolutions: dense, grouped, depthwise, transposed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, as_tuple, uniform

__all__ = ["Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d"]

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
        as_tuple(self, self.rank, "kernel_size", "stride", "padding", "dilation")
        if self.in_channels % self.groups or self.out_channels % self.groups:
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

    def _numbers(self, field: str) -> tuple[int, ...]:
        value = getattr(self, field)
        assert isinstance(value, tuple)
        return value


class _Forward(_Conv):
    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, _, after = _SPATIAL[self.rank]
        result: dict[str, int] = {}
        for k, (given, made) in enumerate(zip(before.split(), after.split(), strict=True)):
            reach = self._numbers("dilation")[k] * (self._numbers("kernel_size")[k] - 1)
            if self.padding == "same":
                result[made] = known[given]
            else:
                padding = 0 if self.padding == "valid" else self._numbers("padding")[k]
                result[made] = (known[given] + 2 * padding - reach - 1) // self._numbers("stride")[k] + 1
        return result


@dataclass(frozen=True)
class Conv1d(_Forward):
    """``torch.nn.Conv1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K P",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv1d(inputs[0], params["weight"], params["bias"] if self.bias else None, *options)


@dataclass(frozen=True)
class Conv2d(_Forward):
    """``torch.nn.Conv2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L P Q",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv2d(inputs[0], params["weight"], params["bias"] if self.bias else None, *options)


@dataclass(frozen=True)
class Conv3d(_Forward):
    """``torch.nn.Conv3d``: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``."""

    rank: ClassVar[int] = 3
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M P Q R",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (self.stride, self.padding, self.dilation, self.groups)
        return F.conv3d(inputs[0], params["weight"], params["bias"] if self.bias else None, *options)


@dataclass(frozen=True)
class _Transposed(_Conv):
    output_padding: Ints = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        as_tuple(self, self.rank, "output_padding")
        if isinstance(self.padding, str):
            raise ShapeError(f"A transposed convolution takes numbers for padding; received {self.padding!r}.")

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[self.rank]
        bias = ", bias: (g o)" if self.bias else ""
        return f"B (g i) {before}, weight: (g i) o {kernel}{bias} -> B (g o) {after}"

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, _, after = _SPATIAL[self.rank]
        result: dict[str, int] = {}
        for k, (given, made) in enumerate(zip(before.split(), after.split(), strict=True)):
            reach = self._numbers("dilation")[k] * (self._numbers("kernel_size")[k] - 1)
            spread = (known[given] - 1) * self._numbers("stride")[k]
            result[made] = spread - 2 * self._numbers("padding")[k] + reach + self._numbers("output_padding")[k] + 1
        return result


@dataclass(frozen=True)
class ConvTranspose1d(_Transposed):
    """``torch.nn.ConvTranspose1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K H",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        bias = params["bias"] if self.bias else None
        padding, extra = self._numbers("padding"), self._numbers("output_padding")
        return F.conv_transpose1d(
            inputs[0], params["weight"], bias, self.stride, padding, extra, self.groups, self.dilation
        )


@dataclass(frozen=True)
class ConvTranspose2d(_Transposed):
    """``torch.nn.ConvTranspose2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L H W",)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        bias = params["bias"] if self.bias else None
        padding, extra = self._numbers("padding"), self._numbers("output_padding")
        return F.conv_transpose2d(
            inputs[0], params["weight"], bias, self.stride, padding, extra, self.groups, self.dilation
        )

"""Pooling and upsampling, which treat every channel alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, as_tuple, positive

__all__ = [
    "AdaptiveAvgPool1d", "AdaptiveAvgPool2d", "AvgPool1d", "AvgPool2d", "MaxPool1d", "MaxPool2d", "Upsample",
]  # fmt: skip

Ints = int | tuple[int, ...]

_SIGNATURE = {1: "B c H -> B c P", 2: "B c H W -> B c P Q"}


def _tuple(value: Ints | None) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return value


@dataclass(frozen=True)
class _Window(Layer):
    kernel_size: Ints
    stride: Ints | None = None
    padding: Ints = 0
    ceil_mode: bool = False

    rank: ClassVar[int]

    def __post_init__(self) -> None:
        if self.stride is None:
            object.__setattr__(self, "stride", self.kernel_size)
        as_tuple(self, self.rank, "kernel_size", "stride", "padding")
        if any(2 * n > self.spread(k) + 1 for k, n in enumerate(_tuple(self.padding))):
            raise ShapeError(f"Padding is at most half of the window; received {self}.")

    def signature(self, *shapes: Shape) -> str:
        return _SIGNATURE[self.rank]

    def spread(self, k: int) -> int:
        """The distance between the first and the last position of the window along spatial axis ``k``."""
        return _tuple(self.kernel_size)[k] - 1

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        result: dict[str, int] = {}
        for k, (before, after) in enumerate(zip("HW"[: self.rank], "PQ", strict=False)):
            size, stride, padding = known[before], _tuple(self.stride)[k], _tuple(self.padding)[k]
            free = size + 2 * padding - self.spread(k) - 1
            count = (free + (stride - 1 if self.ceil_mode else 0)) // stride + 1
            # In ceil mode torch drops a last window that would start in the padding on the right.
            result[after] = count - (self.ceil_mode and (count - 1) * stride >= size + padding)
        return positive(self, result)


@dataclass(frozen=True)
class _Max(_Window):
    dilation: Ints = 1
    ceil_mode: bool = field(default=False, kw_only=True)  # torch has it after dilation, as the sixth

    def __post_init__(self) -> None:
        as_tuple(self, self.rank, "dilation")
        super().__post_init__()

    def spread(self, k: int) -> int:
        return _tuple(self.dilation)[k] * super().spread(k)


@dataclass(frozen=True)
class MaxPool1d(_Max):
    """``torch.nn.MaxPool1d``: ``(N, C, L)``."""

    rank: ClassVar[int] = 1

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (_tuple(self.kernel_size), _tuple(self.stride), _tuple(self.padding), _tuple(self.dilation))
        return torch.max_pool1d(inputs[0], *options, self.ceil_mode)


@dataclass(frozen=True)
class MaxPool2d(_Max):
    """``torch.nn.MaxPool2d``: ``(N, C, H, W)``."""

    rank: ClassVar[int] = 2

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (_tuple(self.kernel_size), _tuple(self.stride), _tuple(self.padding), _tuple(self.dilation))
        return torch.max_pool2d(inputs[0], *options, self.ceil_mode)


@dataclass(frozen=True)
class AvgPool1d(_Window):
    """``torch.nn.AvgPool1d``: ``(N, C, L)``."""

    count_include_pad: bool = True
    rank: ClassVar[int] = 1

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (_tuple(self.kernel_size), _tuple(self.stride), _tuple(self.padding))
        return F.avg_pool1d(inputs[0], *options, self.ceil_mode, self.count_include_pad)


@dataclass(frozen=True)
class AvgPool2d(_Window):
    """``torch.nn.AvgPool2d``: ``(N, C, H, W)``."""

    count_include_pad: bool = True
    rank: ClassVar[int] = 2

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        options = (_tuple(self.kernel_size), _tuple(self.stride), _tuple(self.padding))
        return F.avg_pool2d(inputs[0], *options, self.ceil_mode, self.count_include_pad)


@dataclass(frozen=True)
class _Adaptive(Layer):
    output_size: Ints

    rank: ClassVar[int]

    def __post_init__(self) -> None:
        as_tuple(self, self.rank, "output_size")

    def signature(self, *shapes: Shape) -> str:
        return _SIGNATURE[self.rank]

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        return dict(zip("PQ", _tuple(self.output_size), strict=False))


@dataclass(frozen=True)
class AdaptiveAvgPool1d(_Adaptive):
    """``torch.nn.AdaptiveAvgPool1d``: ``(N, C, L)`` to ``(N, C, output_size)``."""

    rank: ClassVar[int] = 1

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.adaptive_avg_pool1d(inputs[0], _tuple(self.output_size))


@dataclass(frozen=True)
class AdaptiveAvgPool2d(_Adaptive):
    """``torch.nn.AdaptiveAvgPool2d``: ``(N, C, H, W)`` to ``(N, C, *output_size)``."""

    rank: ClassVar[int] = 2

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        height, width = _tuple(self.output_size)
        return F.adaptive_avg_pool2d(inputs[0], (height, width))


@dataclass(frozen=True)
class Upsample(Layer):
    """``torch.nn.Upsample`` of ``(N, C, L)`` or ``(N, C, H, W)`` by an integer factor, with any of torch's modes."""

    scale_factor: int
    mode: str = "nearest"
    align_corners: bool | None = None

    def __post_init__(self) -> None:
        if self.scale_factor < 1:
            raise ShapeError(f"Upsample takes an integer factor of at least 1; received {self.scale_factor}.")

    def signature(self, *shapes: Shape) -> str:
        if len(shapes[0]) - 2 not in _SIGNATURE:
            raise ShapeError(f"{self} takes (N, C, L) or (N, C, H, W); received an input of {len(shapes[0])} axes.")
        return _SIGNATURE[len(shapes[0]) - 2]

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        return {
            after: known[before] * self.scale_factor
            for before, after in zip("HW", "PQ", strict=True)
            if before in known
        }

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        factor = float(self.scale_factor)
        return F.interpolate(inputs[0], scale_factor=factor, mode=self.mode, align_corners=self.align_corners)

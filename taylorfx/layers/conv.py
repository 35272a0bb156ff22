"""Convolutions: dense, grouped, depthwise, transposed; and with a weight that is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, as_tuple, positive, uniform
from taylorfx.layers.roles import Memory, Mixing, Role

__all__ = [
    "Conv1d", "Conv2d", "Conv3d", "ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Convolve",
    "ConvolveTransposed",
]  # fmt: skip

Ints = int | tuple[int, ...]

_SPATIAL = {1: ("H", "K", "P"), 2: ("H W", "K L", "P Q"), 3: ("D H W", "K L M", "P Q R")}
"""By rank, the letters of positions before, of the window, and of positions after a convolution."""

_FORWARD: Mapping[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d,
}  # fmt: skip


def _forward_sizes(
    layer: Layer, known: Mapping[str, int], stride: Shape, padding: Shape, dilation: Shape
) -> Mapping[str, int]:
    """Positions of a convolution's output along each axis (torch.nn.Conv2d): windows that fit, ``stride`` apart.

    A kernel of 3 at stride 2 on 5 positions, padded by 1: ``(5 + 2 * 1 - 1 * (3 - 1) - 1) // 2 + 1 = 3``.
    """
    before, kernel, after = map(str.split, _SPATIAL[len(stride)])
    steps = zip(before, kernel, stride, padding, dilation, strict=True)
    sizes = ((known[x] + 2 * p - d * (known[k] - 1) - 1) // s + 1 for x, k, s, p, d in steps)
    return positive(layer, dict(zip(after, sizes, strict=True)))


def _transposed_sizes(
    layer: Layer, known: Mapping[str, int], stride: Shape, padding: Shape, extra: Shape, dilation: Shape
) -> Mapping[str, int]:
    """Positions of a transposed convolution's output along each axis (torch.nn.ConvTranspose2d).

    A kernel of 3 at stride 2 on 3 positions, padded by 1: ``(3 - 1) * 2 - 2 * 1 + 1 * (3 - 1) + 1 = 5``.
    """
    before, kernel, after = map(str.split, _SPATIAL[len(stride)])
    steps = zip(before, kernel, stride, padding, extra, dilation, strict=True)
    sizes = ((known[x] - 1) * s + e - 2 * p + d * (known[k] - 1) + 1 for x, k, s, p, e, d in steps)
    return positive(layer, dict(zip(after, sizes, strict=True)))


@dataclass(frozen=True)
class _Conv(Layer):
    """What all convolutions share. ``groups`` cuts the channels into groups ``g`` that are mixed each alone."""

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

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        kernel = _SPATIAL[self.rank][1]
        return {"in_channels": "(g i)", "out_channels": "(g o)", "groups": "g", "kernel_size": kernel}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        shapes = self.shapes()
        bound = 1 / math.sqrt(math.prod(shapes["weight"][1:]))
        return {name: uniform(shape, bound, generator) for name, shape in shapes.items()}

    def _bias(self, params: Leaves) -> Tensor | None:
        return params["bias"] if self.bias else None

    def _unfold(self, x: Tensor) -> Tensor:
        """The windows ``(rows, g, i K ...)`` of an input, for any stride, padding and dilation.

        They are the rows of a convolution that takes every channel alone by the identity: output ``k`` of a channel is
        number ``k`` of its window. With a kernel of 2, ``[1, 2, 3]`` becomes ``[1, 2]`` and ``[2, 3]``.
        """
        window = math.prod(_numbers(self.kernel_size))
        channels = self.in_channels
        alone = replace(self, out_channels=channels * window, groups=channels, bias=False)
        one = torch.eye(window, dtype=x.dtype, device=x.device)
        weight = one.repeat(channels, 1).reshape(alone.shapes()["weight"])
        rows = alone.apply({"weight": weight}, x).movedim(1, -1)  # (N, P, ..., channels * window)
        return rows.reshape(-1, self.groups, channels // self.groups * window)


def _numbers(value: Ints | str) -> tuple[int, ...]:
    assert isinstance(value, tuple)
    return value


@dataclass(frozen=True)
class _Forward(_Conv):
    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.padding, str):
            if self.padding not in ("same", "valid"):
                raise ShapeError(f"Padding is numbers, 'same' or 'valid'; received {self.padding!r}.")
            if self.padding == "same" and set(_numbers(self.stride)) != {1}:
                raise ShapeError(f"Padding 'same' takes a stride of 1, as in torch; received {self}.")

    def signature(self, *shapes: Shape) -> str:
        before, kernel, after = _SPATIAL[self.rank]
        bias = ", bias: (g o)" if self.bias else ""
        return f"B (g i) {before}, weight: (g o) i {kernel}{bias} -> B (g o) {after}"

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        before, _, after = map(str.split, _SPATIAL[self.rank])
        if self.padding == "same":
            return {new: known[old] for old, new in zip(before, after, strict=True)}
        padding = (0,) * self.rank if self.padding == "valid" else _numbers(self.padding)
        return _forward_sizes(self, known, _numbers(self.stride), padding, _numbers(self.dilation))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        window = self.stride, self.padding, self.dilation, self.groups
        return _FORWARD[self.rank](inputs[0], params["weight"], self._bias(params), *window)

    def roles(self) -> tuple[Role, ...]:
        # Torch runs a convolution of rank 1 as one of rank 2, of whose value it gives a view.
        memory = Memory(new_value=self.rank > 1, new_gradient=True, channels_last=self.rank == 2)
        return Mixing(self, unfold=self._unfold), memory


@dataclass(frozen=True)
class Conv1d(_Forward):
    """``torch.nn.Conv1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K P",)
    roles = _Forward.roles


@dataclass(frozen=True)
class Conv2d(_Forward):
    """``torch.nn.Conv2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L P Q",)
    roles = _Forward.roles


@dataclass(frozen=True)
class Conv3d(_Forward):
    """``torch.nn.Conv3d``: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``."""

    rank: ClassVar[int] = 3
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M P Q R",)
    roles = _Forward.roles


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
        return _transposed_sizes(
            self, known, _numbers(self.stride), _numbers(self.padding), _numbers(self.output_padding),
            _numbers(self.dilation),
        )  # fmt: skip

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        window = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return _TRANSPOSED[self.rank](inputs[0], params["weight"], self._bias(params), *window)

    def roles(self) -> tuple[Role, ...]:
        return Mixing(self, unfold=self._unfold), Memory(new_value=self.rank > 1)


@dataclass(frozen=True)
class ConvTranspose1d(_Transposed):
    """``torch.nn.ConvTranspose1d``: ``(N, in_channels, L)`` to ``(N, out_channels, L')``."""

    rank: ClassVar[int] = 1
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K H",)
    roles = _Transposed.roles


@dataclass(frozen=True)
class ConvTranspose2d(_Transposed):
    """``torch.nn.ConvTranspose2d``: ``(N, in_channels, H, W)`` to ``(N, out_channels, H', W')``."""

    rank: ClassVar[int] = 2
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L H W",)
    roles = _Transposed.roles


@dataclass(frozen=True)
class ConvTranspose3d(_Transposed):
    """``torch.nn.ConvTranspose3d``: ``(N, in_channels, D, H, W)`` to ``(N, out_channels, D', H', W')``."""

    rank: ClassVar[int] = 3
    multiplies: ClassVar[tuple[str, ...]] = ("g o i K L M D H W",)
    roles = _Transposed.roles


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
        return _forward_sizes(self, known, self.stride, self.padding, self.dilation)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, weight, bias = (*inputs, None)[:3]
        return _FORWARD[len(self.stride)](x, weight, bias, self.stride, self.padding, self.dilation, self.groups)


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
        return _transposed_sizes(self, known, self.stride, self.padding, self.output_padding, self.dilation)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, weight, bias = (*inputs, None)[:3]
        window = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return _TRANSPOSED[len(self.stride)](x, weight, bias, *window)

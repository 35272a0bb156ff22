"""Normalizations.

Batch and instance norms compute statistics over space (and examples) only. They treat every channel alone, so that
cutting a channel is exact. Layer, RMS and group norms compute statistics over channels. When a channel leaves, they
change the values of all others: such units are inexact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, as_tuple, names
from taylorfx.layers.roles import ChannelAffine, Normalizing, Recomputed, Role, RunningStatistics

__all__ = [
    "BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "InstanceNorm3d",
    "LayerNorm", "RMSNorm", "SpectralNorm", "WeightNorm",
]  # fmt: skip


def _affine(letters: str, affine: bool, bias: bool = True) -> str:
    """The parameters of a norm as a signature lists them."""
    return f"{f', weight: {letters}' if affine else ''}{f', bias: {letters}' if affine and bias else ''}"


def _space(shapes: tuple[Shape, ...]) -> str:
    """The axes after the channels, which are rigid because statistics run over them."""
    return " ".join(f"S{k}" for k in range(len(shapes[0]) - 2)) if shapes else "..."


def _fresh(layer: Layer, generator: torch.Generator) -> dict[str, Tensor]:
    """The parameters and buffers with which a norm starts: weights and variances one, all others zero."""
    ones = ("weight", "running_var")
    return {
        name: torch.zeros((), dtype=torch.long, device=generator.device)
        if name == "num_batches_tracked"
        else torch.full(shape, float(name in ones), device=generator.device)
        for name, shape in layer.shapes().items()
    }


@dataclass(frozen=True)
class _Tracked(Layer):
    """Batch and instance norms: statistics per channel, of which training may keep a running mean."""

    num_features: int
    eps: float = 1e-5
    momentum: float | None = 0.1
    affine: bool = True
    track_running_stats: bool = True

    buffers: ClassVar[tuple[str, ...]] = ("running_mean", "running_var", "num_batches_tracked")
    space: ClassVar[str] = ""
    across: ClassVar[bool] = True
    """Whether statistics run over the examples of a batch, too. Without tracking they do so in inference as well."""

    def signature(self, *shapes: Shape) -> str:
        batch = "B" if self.track_running_stats or not self.across else "N"
        track = ", running_mean: c, running_var: c, num_batches_tracked:" if self.track_running_stats else ""
        space = self.space or _space(shapes)
        return f"{batch} c {space}{_affine('c', self.affine)}{track} -> {batch} c {space}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_features": "c"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return _fresh(self, generator)

    def normalize(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, params: Leaves, fresh: bool, momentum: float
    ) -> Tensor:
        """Normalize by ``mean`` and ``var``; if ``fresh``, by the statistics of ``x``, which then update these two."""
        weight, bias = (params["weight"], params["bias"]) if self.affine else (None, None)
        return F.batch_norm(x, mean, var, weight, bias, fresh, momentum, self.eps)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        if not self.track_running_stats:
            return self.normalize(inputs[0], None, None, params, True, 0.0)
        mean, var = params["running_mean"], params["running_var"]
        return self.normalize(inputs[0], mean, var, params, False, self.momentum or 0.0)

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if not self.track_running_stats:
            return self.apply(params, *inputs), {}
        # As in torch, instance norms do not count batches: without a momentum their statistics stay as they are.
        count = params["num_batches_tracked"] + int(self.across)
        old = [params[name].detach() for name in ("running_mean", "running_var")]
        # The kernel moves copies of the statistics. Under vmap every example has its own, since its zeros are its own.
        zeros = inputs[0].new_zeros(self.num_features, dtype=old[0].dtype)
        if self.momentum is not None or not self.across:
            mean, var = (past + zeros for past in old)
            output = self.normalize(inputs[0], mean, var, params, True, self.momentum or 0.0)
        else:  # averages over all batches, whose share is no number but a tensor
            mean, var = zeros, zeros.clone()
            output = self.normalize(inputs[0], mean, var, params, True, 1.0)
            share = 1 / count.to(mean.dtype)
            mean, var = ((1 - share) * past + share * present for past, present in zip(old, (mean, var), strict=True))
        return output, {"running_mean": mean, "running_var": var, "num_batches_tracked": count}

    def roles(self) -> tuple[Role, ...]:
        return (ChannelAffine(self._numbers),) if self.track_running_stats else ()

    def _numbers(self, params: Leaves) -> tuple[Tensor, Tensor]:
        """Scale and shift: ``weight / sqrt(var + eps)`` and ``bias - mean * scale``, in single precision or better."""
        wide = torch.promote_types(params["running_var"].dtype, torch.float32)
        scale = (params["running_var"].to(wide) + self.eps).rsqrt()
        scale = scale * params["weight"] if self.affine else scale
        shift = -params["running_mean"] * scale
        return scale, shift + params["bias"] if self.affine else shift


@dataclass(frozen=True)
class _Batch(_Tracked):
    """Every channel is normalized over the examples of a batch and their positions."""

    def roles(self) -> tuple[Role, ...]:
        scale = (Normalizing(),) if self.affine else ()
        tracked = (RunningStatistics(replace(self, momentum=None)),) if self.track_running_stats else ()
        return (*super().roles(), *scale, *tracked)


@dataclass(frozen=True)
class BatchNorm1d(_Batch):
    """``torch.nn.BatchNorm1d``: ``(N, num_features)`` or ``(N, num_features, L)``."""


@dataclass(frozen=True)
class BatchNorm2d(_Batch):
    """``torch.nn.BatchNorm2d``: ``(N, num_features, H, W)``."""

    space: ClassVar[str] = "H W"
    roles = _Batch.roles


@dataclass(frozen=True)
class BatchNorm3d(_Batch):
    """``torch.nn.BatchNorm3d``: ``(N, num_features, D, H, W)``."""

    space: ClassVar[str] = "D H W"
    roles = _Batch.roles


@dataclass(frozen=True)
class _Instance(_Tracked):
    """Every map of every example is normalized alone."""

    affine: bool = False
    track_running_stats: bool = False

    across: ClassVar[bool] = False
    roles = _Tracked.roles

    def normalize(
        self, x: Tensor, mean: Tensor | None, var: Tensor | None, params: Leaves, fresh: bool, momentum: float
    ) -> Tensor:
        weight, bias = (params["weight"], params["bias"]) if self.affine else (None, None)
        return F.instance_norm(x, mean, var, weight, bias, fresh, momentum, self.eps)


@dataclass(frozen=True)
class InstanceNorm1d(_Instance):
    """``torch.nn.InstanceNorm1d``: ``(N, num_features, L)``, every map normalized alone."""

    space: ClassVar[str] = "L"
    roles = _Instance.roles


@dataclass(frozen=True)
class InstanceNorm2d(_Instance):
    """``torch.nn.InstanceNorm2d``: ``(N, num_features, H, W)``, every map normalized alone."""

    space: ClassVar[str] = "H W"
    roles = _Instance.roles


@dataclass(frozen=True)
class InstanceNorm3d(_Instance):
    """``torch.nn.InstanceNorm3d``: ``(N, num_features, D, H, W)``, every map normalized alone."""

    space: ClassVar[str] = "D H W"
    roles = _Instance.roles


@dataclass(frozen=True)
class GroupNorm(Layer):
    """``torch.nn.GroupNorm``: ``(N, num_channels, ...)``.

    A whole group may leave exactly. One channel of every group may leave, too, but inexactly.
    """

    num_groups: int
    num_channels: int
    eps: float = 1e-5
    affine: bool = True

    inexact: ClassVar[tuple[str, ...]] = ("c",)

    def signature(self, *shapes: Shape) -> str:
        space = _space(shapes)
        return f"B (g c) {space}{_affine('(g c)', self.affine)} -> B (g c) {space}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_groups": "g", "num_channels": "(g c)"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return _fresh(self, generator)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        weight, bias = (params["weight"], params["bias"]) if self.affine else (None, None)
        return F.group_norm(inputs[0], self.num_groups, weight, bias, self.eps)


@dataclass(frozen=True)
class _Last(Layer):
    """A norm over the last axes."""

    normalized_shape: Shape | int

    def __post_init__(self) -> None:
        as_tuple(self, 1 if isinstance(self.normalized_shape, int) else len(self.normalized_shape), "normalized_shape")

    @property
    def _shape(self) -> list[int]:
        assert isinstance(self.normalized_shape, tuple)
        return list(self.normalized_shape)

    @property
    def inexact(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(names(len(self._shape)))

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"normalized_shape": " ".join(names(len(self._shape)))}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return _fresh(self, generator)


@dataclass(frozen=True)
class LayerNorm(_Last):
    """``torch.nn.LayerNorm``: the last axes, ``(N, ..., *normalized_shape)``."""

    eps: float = 1e-5
    elementwise_affine: bool = True
    bias: bool = True

    def signature(self, *shapes: Shape) -> str:
        last = " ".join(names(len(self._shape)))
        return f"... {last}{_affine(last, self.elementwise_affine, self.bias)} -> ... {last}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        weight = params["weight"] if self.elementwise_affine else None
        bias = params["bias"] if self.elementwise_affine and self.bias else None
        return F.layer_norm(inputs[0], self._shape, weight, bias, self.eps)

    def roles(self) -> tuple[Role, ...]:
        return (Recomputed(),)


@dataclass(frozen=True)
class RMSNorm(_Last):
    """``torch.nn.RMSNorm``: the last axes, ``(N, ..., *normalized_shape)``; no mean, no bias."""

    eps: float | None = None
    elementwise_affine: bool = True

    def signature(self, *shapes: Shape) -> str:
        last = " ".join(names(len(self._shape)))
        return f"... {last}{_affine(last, self.elementwise_affine, False)} -> ... {last}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.rms_norm(inputs[0], self._shape, params["weight"] if self.elementwise_affine else None, self.eps)


@dataclass(frozen=True)
class WeightNorm(Layer):
    """``torch.nn.utils.parametrizations.weight_norm``: the weight ``w = g v / ||v||`` from direction and scale.

    The inputs are the direction ``v`` and the scale ``g``. The norm runs over all axes but ``dim``; without ``dim``,
    over the whole tensor. Salimans & Kingma 2016 (arXiv 1602.07868, eq. 2).
    """

    dim: int | None = 0

    inexact: ClassVar[tuple[str, ...]] = tuple(f"x{k}" for k in range(8))

    def signature(self, *shapes: Shape) -> str:
        direction = names(len(shapes[0]))
        scale = [] if self.dim is None else ["1"] * len(direction)
        if self.dim is not None:
            direction[self.dim] = scale[self.dim] = "o"
        return f"{' '.join(direction)}, {' '.join(scale)} -> {' '.join(direction)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        direction, scale = inputs
        others = [k for k in range(direction.ndim) if self.dim is None or k != self.dim % direction.ndim]
        weight: Tensor = direction * (scale / torch.linalg.vector_norm(direction, dim=others, keepdim=True))
        return weight


@dataclass(frozen=True)
class SpectralNorm(Layer):
    """``torch.nn.utils.parametrizations.spectral_norm``: a weight divided by an estimate of its largest singular value.

    The estimate is ``u' W v``, where ``W`` is the weight as a matrix with the rows ``dim``. Every pass in training
    takes ``n_power_iterations`` steps of ``u = W v / |W v|``, ``v = W' u / |W' u|`` (``left``: in this order, otherwise
    ``v`` first). Miyato et al. 2018 (arXiv 1802.05957, algorithm 1).
    """

    shape: Shape
    dim: int = 0
    n_power_iterations: int = 1
    eps: float = 1e-12
    left: bool = True

    buffers: ClassVar[tuple[str, ...]] = ("u", "v")
    inexact: ClassVar[tuple[str, ...]] = tuple(f"x{k}" for k in range(8))

    def _axes(self) -> tuple[str, str, str]:
        axes = names(len(self.shape))
        rest = [x for k, x in enumerate(axes) if k != self.dim % len(axes)]
        return " ".join(axes), axes[self.dim], f"({' '.join(rest)})"

    def signature(self, *shapes: Shape) -> str:
        axes, out, rest = self._axes()
        return f"{axes}, u: {out}, v: {rest} -> {axes}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"shape": self._axes()[0]}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        drawn = {x: torch.randn(n, generator=generator, device=generator.device) for x, n in self.shapes().items()}
        return {name: F.normalize(x, dim=0, eps=self.eps) for name, x in drawn.items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        matrix = inputs[0].movedim(self.dim, 0).flatten(1)
        return inputs[0] / torch.vdot(params["u"], torch.mv(matrix, params["v"]))

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        matrix = inputs[0].detach().movedim(self.dim, 0).flatten(1)
        moved = {name: params[name].detach() for name in self.buffers}
        steps = {"u": lambda: matrix @ moved["v"], "v": lambda: matrix.mT @ moved["u"]}
        for _ in range(self.n_power_iterations):
            for name in self.buffers if self.left else reversed(self.buffers):
                moved[name] = F.normalize(steps[name](), dim=0, eps=self.eps)
        return self.apply(moved, *inputs), moved

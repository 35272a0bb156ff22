"""Activations. All are elementwise and keep every axis, except `Softmax`, whose axis is rigid."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, names
from taylorfx.layers.roles import Noise, Pointwise, Recomputed, Role

__all__ = [
    "ELU", "GELU", "Dropout", "Hardsigmoid", "Hardswish", "Identity", "LeakyReLU", "Mish", "PReLU",
    "RReLU", "ReLU", "ReLU6", "SiLU", "Sigmoid", "Softmax", "Softplus", "Tanh",
]  # fmt: skip

_SELU = 1.7580993408473766
"""The ``alpha * scale`` of SELU; minus this is its limit at minus infinity."""


def _times(backward: Any, kept: Tensor, gradient: Tensor, over: bool, *options: float, **named: str) -> Tensor:
    """The gradient times the derivative at what is kept, by torch's own operator; with ``over`` in its place."""
    operator, target = (backward.grad_input, {"grad_input": gradient}) if over else (backward, {})
    value: Tensor = operator(gradient, kept, *options, **named, **target)
    return value


@dataclass(frozen=True)
class _Elementwise(Layer):
    def signature(self, *shapes: Shape) -> str:
        return "... -> ..."


@dataclass(frozen=True)
class Identity(_Elementwise):
    """The input itself."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0]


@dataclass(frozen=True)
class ReLU(_Elementwise):
    """``torch.nn.ReLU``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.relu(inputs[0])

    def roles(self) -> tuple[Role, ...]:
        return (Pointwise(self._slope, self._over),)

    def _slope(self, kept: Tensor, gradient: Tensor, over: bool) -> Tensor:
        return _times(torch.ops.aten.threshold_backward, kept, gradient, over, 0)

    def _over(self, x: Tensor) -> Tensor:
        return F.relu(x, inplace=True)


@dataclass(frozen=True)
class ReLU6(_Elementwise):
    """``torch.nn.ReLU6``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.relu6(inputs[0])

    def roles(self) -> tuple[Role, ...]:
        return (Pointwise(self._slope, self._over),)

    def _slope(self, kept: Tensor, gradient: Tensor, over: bool) -> Tensor:
        return _times(torch.ops.aten.hardtanh_backward, kept, gradient, over, 0, 6)

    def _over(self, x: Tensor) -> Tensor:
        return F.relu6(x, inplace=True)


@dataclass(frozen=True)
class LeakyReLU(_Elementwise):
    """``torch.nn.LeakyReLU``."""

    negative_slope: float = 0.01

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.leaky_relu(inputs[0], self.negative_slope)


@dataclass(frozen=True)
class ELU(_Elementwise):
    """``torch.nn.ELU``."""

    alpha: float = 1.0

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.elu(inputs[0], self.alpha)


@dataclass(frozen=True)
class GELU(_Elementwise):
    """``torch.nn.GELU``; ``approximate`` is torch's ``"none"`` or ``"tanh"``."""

    approximate: str = "none"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.gelu(inputs[0], approximate=self.approximate)

    def roles(self) -> tuple[Role, ...]:
        return Pointwise(self._slope), Recomputed()

    def _slope(self, kept: Tensor, gradient: Tensor, over: bool) -> Tensor:
        return _times(torch.ops.aten.gelu_backward, kept, gradient, over, approximate=self.approximate)


@dataclass(frozen=True)
class SiLU(_Elementwise):
    """``torch.nn.SiLU``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.silu(inputs[0])

    def roles(self) -> tuple[Role, ...]:
        return Pointwise(self._slope), Recomputed()

    def _slope(self, kept: Tensor, gradient: Tensor, over: bool) -> Tensor:
        return _times(torch.ops.aten.silu_backward, kept, gradient, over)


@dataclass(frozen=True)
class Mish(_Elementwise):
    """``torch.nn.Mish``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.mish(inputs[0])

    def roles(self) -> tuple[Role, ...]:
        return (Recomputed(),)


@dataclass(frozen=True)
class Sigmoid(_Elementwise):
    """``torch.nn.Sigmoid``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.sigmoid(inputs[0])


@dataclass(frozen=True)
class Tanh(_Elementwise):
    """``torch.nn.Tanh``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.tanh(inputs[0])


@dataclass(frozen=True)
class Softplus(_Elementwise):
    """``torch.nn.Softplus``."""

    beta: float = 1.0
    threshold: float = 20.0

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.softplus(inputs[0], self.beta, self.threshold)

    def roles(self) -> tuple[Role, ...]:
        return (Recomputed(),)


@dataclass(frozen=True)
class Hardswish(_Elementwise):
    """``torch.nn.Hardswish``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.hardswish(inputs[0])

    def roles(self) -> tuple[Role, ...]:
        return (Recomputed(),)


@dataclass(frozen=True)
class Hardsigmoid(_Elementwise):
    """``torch.nn.Hardsigmoid``."""

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.hardsigmoid(inputs[0])


@dataclass(frozen=True)
class Dropout(_Elementwise):
    """``torch.nn.Dropout``. In training it draws from the generator that `taylorfx.train` passes on.

    Attributes:
        p: the probability that a value is dropped.
        alone: the axes along which every position draws its own number; by default all. ``(0, 1)`` gives
            ``torch.nn.Dropout2d``, and ``(0,)`` stochastic depth (Huang et al. 2016, arXiv 1603.09382).
        alpha: keep mean and variance, as ``torch.nn.AlphaDropout`` (Klambauer et al. 2017, arXiv 1706.02515).
    """

    p: float = 0.5
    alone: tuple[int, ...] | None = None
    alpha: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"Dropout takes a probability for p; received {self.p}.")

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0]

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        (x,) = inputs
        if self.p == 0:
            return x, {}
        if self.p == 1:
            return x * 0, {}
        if generator is None:
            raise ValueError("Dropout draws random numbers in training; received no generator. Pass generator=...")
        noise = torch.empty_like(x)
        if self.alone is not None:
            noise = x.new_empty([n if k in self.alone else 1 for k, n in enumerate(x.shape)])
        noise.bernoulli_(1 - self.p, generator=generator)
        if not self.alpha:
            return x * noise.div_(1 - self.p), {}
        scale = ((_SELU**2 * self.p + 1) * (1 - self.p)) ** -0.5
        shift = (noise - 1).mul_(_SELU * scale).add_(_SELU * scale * self.p)
        return x * noise.mul_(scale) + shift, {}

    def roles(self) -> tuple[Role, ...]:
        return () if self.alpha else (Noise(),)


@dataclass(frozen=True)
class RReLU(_Elementwise):
    """``torch.nn.RReLU``: in training every negative value draws its slope from ``[lower, upper)``."""

    lower: float = 1 / 8
    upper: float = 1 / 3

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.leaky_relu(inputs[0], (self.lower + self.upper) / 2)

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if generator is None:
            raise ValueError("RReLU draws random numbers in training; received no generator. Pass generator=...")
        value: Tensor = torch.ops.aten.rrelu(inputs[0], self.lower, self.upper, True, generator)
        return value, {}


@dataclass(frozen=True)
class PReLU(Layer):
    """``torch.nn.PReLU``: one slope for all channels (``num_parameters=1``), or one for each of ``(N, C, ...)``."""

    num_parameters: int = 1
    init_value: float = 0.25

    def signature(self, *shapes: Shape) -> str:
        return "..., weight: 1 -> ..." if self.num_parameters == 1 else "B c ..., weight: c -> B c ..."

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {} if self.num_parameters == 1 else {"num_parameters": "c"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"weight": torch.full((self.num_parameters,), self.init_value, device=generator.device)}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.prelu(inputs[0], params["weight"])


@dataclass(frozen=True)
class Softmax(Layer):
    """``torch.nn.Softmax`` over ``dim``. The axis is rigid, because every position changes the values of all others."""

    dim: int = -1

    def signature(self, *shapes: Shape) -> str:
        letters = names(len(shapes[0]))
        letters[self.dim] = letters[self.dim].upper()
        return f"{' '.join(letters)} -> {' '.join(letters)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.softmax(inputs[0], self.dim)

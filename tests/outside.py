"""A user's module: one of everything that can be added to taylorfx, written with its public names only."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

import taylorfx as tfx


@dataclass(frozen=True)
class GatedLinear(tfx.Layer):
    """A gated linear unit with two weights: ``(x value') * sigmoid(x gate')``."""

    in_features: int
    out_features: int

    multiplies: ClassVar[tuple[str, ...]] = ("... i o", "... i o")

    def signature(self, *shapes: tuple[int, ...]) -> str:
        return "... i, value: o i, gate: o i -> ... o"

    def fields(self, *shapes: tuple[int, ...]) -> Mapping[str, str]:
        return {"in_features": "i", "out_features": "o"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes().items()}

    def apply(self, params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return (x @ params["value"].T) * torch.sigmoid(x @ params["gate"].T)


def optimistic(stats: tfx.Statistics, coupling: tfx.Coupling) -> Tensor:
    """A criterion, ``(units,)``: the mean of ``|g|`` and two standard errors, so that doubt speaks for a unit."""
    mean = stats.sum_abs / stats.n
    variance = (stats.sum_sq / stats.n - mean**2).clamp(min=0)
    return mean + 2 * (variance / stats.n).sqrt()


@torch.library.custom_op("taylorfx_outside::bent_identity", mutates_args=())
def bent_identity(x: Tensor, bend: float) -> Tensor:
    """An operator that taylorfx knows nothing about: ``x + bend (sqrt(x^2 + 1) - 1)``."""
    return x + bend * ((x**2 + 1).sqrt() - 1)


@bent_identity.register_fake
def _(x: Tensor, bend: float) -> Tensor:
    return torch.empty_like(x)


@dataclass(frozen=True)
class BentIdentity(tfx.Layer):
    """What the operator becomes in a captured network: it treats every number alone."""

    bend: float

    def signature(self, *shapes: tuple[int, ...]) -> str:
        return "... -> ..."

    def apply(self, params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        return inputs[0] + self.bend * ((inputs[0] ** 2 + 1).sqrt() - 1)


@tfx.interop.rule("taylorfx_outside::bent_identity")
def of_bent_identity(x: tfx.interop.Value, bend: float) -> tfx.Layer:
    return BentIdentity(bend)


class Bytes(tfx.Budget):
    """A budget: at most this share or number of bytes of trained parameters in half precision."""

    def cost(self, coupling: tfx.Coupling) -> tfx.cost.Cost:
        return 2 * tfx.cost.parameters(coupling)


def shift_outputs(params: tfx.Params, plan: tfx.Plan, batches: tfx.repair.Batches) -> tuple[tfx.Params, tfx.Spec]:
    """A repair: the bias of ``head`` makes up for what the cut takes from the outputs on average."""
    small = tfx.cut(params, plan)
    inputs = [x for x, _ in ([batches] if isinstance(batches, tuple) else batches)]

    def mean(params: tfx.Params, spec: tfx.Spec) -> Tensor:
        return torch.cat([tfx.apply(params, spec, x) for x in inputs]).mean(0)

    leaves = tfx.tree.flatten(small)
    lost = mean(params, plan.coupling.spec) - mean(small, plan.spec)
    return tfx.tree.unflatten({**leaves, "head.bias": leaves["head.bias"] + lost}), plan.spec


def best_half(
    scores: Tensor,
    coupling: tfx.Coupling,
    *,
    budget: Sequence[tfx.Budget],
    constraints: tfx.Constraints,
    per_cost: bool,
) -> tfx.Plan:
    """A selection: every scope keeps the better half of its units, rounded up, whatever the budget."""
    keep = np.zeros(len(coupling), bool)
    for scope, size in enumerate(coupling.sizes.tolist()):
        units = np.flatnonzero(coupling.scope == scope)
        keep[units[np.argsort(-scores.numpy()[units], kind="stable")[: -(-size // 2)]]] = True
    return tfx.Plan(coupling, keep, "the better half of every scope")

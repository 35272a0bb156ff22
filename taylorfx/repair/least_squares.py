"""Reconstruct: let every layer that lost reads compute again what it computed, by least squares, without training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.distributed import Total, agreed, alone, placed, refuse_alone, whole
from taylorfx.distributed import sharing as gathering
from taylorfx.layers.roles import Mixing
from taylorfx.network.run import Inputs, apply, bind_inputs, fitted
from taylorfx.network.spec import Node, Spec
from taylorfx.progress import LOG, bar
from taylorfx.repair.batches import Batches, inputs_of, refuse_none, told
from taylorfx.repair.readers import kept_channels, lost, sharing, shifted, takes_shift
from taylorfx.tree import Params, flatten, merge, restrict, unflatten

__all__ = ["LeastSquares", "reconstruct"]


@dataclass(frozen=True)
class LeastSquares:
    """The sums of a linear regression with intercept, in ``g`` groups: additive, so that it streams and distributes.

    Attributes:
        n: the number of rows.
        x, y: their sums, ``(g, k)`` and ``(g, o)``.
        xx, xy: the sums of their products, ``(g, k, k)`` and ``(g, k, o)``.
    """

    n: int
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor

    @staticmethod
    def of(x: Tensor, y: Tensor) -> LeastSquares:
        """The sums of one batch of rows, ``(rows, g, k)`` and ``(rows, g, o)``, kept in double precision."""
        x, y = x.detach().transpose(0, 1).double(), y.detach().transpose(0, 1).double()
        return LeastSquares(x.shape[1], x.sum(1), y.sum(1), x.mT @ x, x.mT @ y)

    @staticmethod
    def neutral(device: torch.device) -> LeastSquares:
        """The sums of no rows, which change nothing that they are added to, whatever its shapes."""
        return LeastSquares(0, *(torch.zeros((), dtype=torch.double, device=device) for _ in range(4)))

    def __add__(self, other: LeastSquares) -> LeastSquares:
        if not (self.n and other.n):
            return self if self.n else other
        return LeastSquares(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def solve(self, start: Tensor, ridge: float, *, intercept: bool = True) -> tuple[Tensor, Tensor]:
        """The weights ``W`` ``(g, k, o)`` and intercepts ``(g, o)`` of the least ``|y - x W - b|^2``, near ``start``.

        Added is ``ridge`` times the mean variance of ``x`` times ``|W - start|^2``. So a large ridge leaves the weights
        alone and moves the intercept only, which is what `compensate` does.

        Args:
            intercept: otherwise ``b`` is zero, and the second moment of ``x`` stands for its variance.
        """
        x, y = (total / self.n if intercept else torch.zeros_like(total) for total in (self.x, self.y))
        variance = self.xx / self.n
        size = variance.diagonal(dim1=1, dim2=2).mean(1)
        variance.baddbmm_(x[:, :, None], x[:, None], alpha=-1)  # in place, as it is large
        residual = self.xy / self.n - x[:, :, None] * y[:, None] - variance @ start
        spread = variance.diagonal(dim1=1, dim2=2).mean(1)
        least = (1e-12 * size).clamp(min=torch.finfo(size.dtype).tiny)  # or constant inputs are solved for by rounding
        variance.diagonal(dim1=1, dim2=2).add_(torch.maximum(ridge * spread, least)[:, None])
        factor, failed = torch.linalg.cholesky_ex(variance)
        step = torch.linalg.solve(variance, residual) if failed.any() else torch.cholesky_solve(residual, factor)
        weights = start + step
        return weights, y - (x[:, None] @ weights)[:, 0]

    def error(self, weights: Tensor, bias: Tensor) -> float:
        """The mean of ``|y - x W - b|^2`` over these rows, less that of ``|y|^2``."""
        products = (weights * (self.xx @ weights - 2 * self.xy)).sum()
        shifts = (bias * (2 * (self.x[:, None] @ weights)[:, 0] - 2 * self.y + self.n * bias)).sum()
        return float(products + shifts) / self.n


@dataclass(frozen=True)
class Halves:
    """The sums of two halves of the rows, additive like each of them: one is solved for, the other one judges.

    >>> x, y = torch.randn(8, 1, 2), torch.randn(8, 1, 3)
    >>> halves = Halves.of(x, y) + Halves.of(x, y)
    >>> halves.whole.n, halves.solved.n, halves.judging.n
    (16, 8, 8)
    """

    solved: LeastSquares
    judging: LeastSquares

    @staticmethod
    def of(x: Tensor, y: Tensor) -> Halves:
        """The sums of one batch of rows, ``(rows, g, k)`` and ``(rows, g, o)``; examples are next to each other."""
        half = len(x) // 2
        return Halves(LeastSquares.of(x[:half], y[:half]), LeastSquares.of(x[half:], y[half:]))

    def __add__(self, other: Halves) -> Halves:
        return Halves(self.solved + other.solved, self.judging + other.judging)

    @property
    def n(self) -> int:
        """The number of rows."""
        return self.solved.n + self.judging.n

    @property
    def whole(self) -> LeastSquares:
        """The sums of all rows."""
        return self.solved + self.judging

    def ridge(self, start: Tensor, *, intercept: bool) -> float:
        """The ridge with which the solution of one half has the least error on the other half."""
        if not (self.solved.n and self.judging.n):
            return RIDGES[-1]
        errors = {ridge: self.judging.error(*self.solved.solve(start, ridge, intercept=intercept)) for ridge in RIDGES}
        return min(errors, key=errors.__getitem__)


RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Those among which `reconstruct` chooses."""


def reconstruct(
    params: Params,
    plan: Plan,
    batches: Batches,
    *,
    ridge: float | None = None,
    biases: bool = True,
    total: Total | None = None,
    progress: bool = False,
) -> tuple[Params, Spec]:
    """Cut, and choose the kept weights and biases so that every layer again computes what the original layer computed.

    Layer after layer: the targets are the original network's, the inputs those of the smaller network as repaired so
    far, so that each layer also makes up for what the layers before it could not (He et al. 2017, arXiv 1707.06168; a
    convolution reads unfolded windows). The solution is closed (`LeastSquares`), batches are only summed over. Both
    networks run once, side by side, from layer to layer. Held are, for all batches, the activations that layers ahead
    consume, and, one after the other, a batch's windows and a layer's ``(channels * window)^2`` products of inputs in
    double precision.

    Layers that share their weight share the solution (both networks are run anew for them); a weight that an
    `Embedding` uses, too, stays as it is.

    Args:
        params: the original parameters.
        batches: ``(inputs, targets)``, or an iterable of such; the targets are not looked at.
        ridge: how strongly weights are held where they were, in units of the mean variance of what is read; above 0. By
            default chosen for every layer (of 0.001 to 10): half of the rows of each batch are solved for, and the
            ridge with the least error on the others is taken. Few examples, or ones that say little of a layer, then
            leave its weights about where they were.
        biases: let layers gain a bias. Without, a layer that has none, and no batch norm that takes up a shift, is
            solved for its weights alone: a class whose layers have no biases, as a Llama, then holds the result.
        total: adds up the sums of several processes that each have batches of their own (`distributed.total`).
        progress: draw a progress bar over the layers (needs rich).

    Returns:
        Parameters and spec of the smaller network.

    Raises:
        ValueError: for no batches or a ridge that is not above 0.
        ImportError: if a progress bar is asked for without rich.
    """
    if ridge is not None and not ridge > 0:
        raise ValueError(
            f"A ridge is above 0, as dead inputs would leave their weights undetermined; received {ridge}."
        )
    if total is None:
        refuse_alone(params)
    batch_inputs = agreed(total, lambda: [*inputs_of(batches)], lambda _: told(params, plan))
    original, small, spec = plan.coupling.spec, cut(params, plan), plan.spec
    losers = lost(plan) | {branch.node for branch in plan.coupling.branches if not plan.keep[branch.unit]}
    runs = [(_Run(original, inputs), _Run(spec, inputs)) for inputs in batch_inputs]
    shared = [([node.name for node, _ in group], group) for group in sharing(original, "weight", spec)]
    mended = [(names, x) for names, x in shared if _joint(spec, x) and losers & original.upstream(names)]
    with bar(progress, "reconstruct", len(mended)) as advance:
        for names, group in mended:
            sums = (total or alone)(partial(_summed, params, plan, small, spec, group, runs))
            refuse_none(sums.n)
            small, spec = _solved(small, spec, names, sums, ridge, biases or takes_shift(spec, names))
            LOG.info("reconstruct: %s", ", ".join(names))
            advance(1)
    return small, spec


def _summed(
    params: Params,
    plan: Plan,
    small: Params,
    spec: Spec,
    group: Sequence[tuple[Node, Mixing]],
    runs: Sequence[tuple[_Run, _Run]],
) -> Halves:
    """The sums of all batches: what layers of the small network consume, what those of the original give out."""
    original = plan.coupling.spec
    nothing = LeastSquares.neutral(next(iter(flatten(small).values())).device)
    sums = Halves(nothing, nothing)
    with gathering({"before": params, "after": small}) as trees:
        for before, after in runs:
            if len(group) > 1:  # later places consume what is not solved yet, which must not stay
                before, after = _Run(original, before.inputs), _Run(spec, after.inputs)
            for node, role in group:
                x = after.value(trees["after"], spec, spec[node.name].inputs[0])
                y = before.value(trees["before"], original, node.name)
                sums = sums + _rows(plan, spec[node.name], node, role, x, y)
    return sums


def _rows(plan: Plan, small: Node, node: Node, role: Mixing, x: Tensor, y: Tensor) -> Halves:
    """The sums of a batch: windows of what the small layer consumes, rows of what stays of the original's output."""
    smaller = small.layer.role(Mixing)
    assert smaller is not None
    writes, axis = kept_channels(plan, node, role)[1], role.axis
    y = y.movedim(axis, 0)[writes.to(y.device)].movedim(0, axis)
    return Halves.of(smaller.windows(x), smaller.rows(y))


def _solved(
    params: Params, spec: Spec, names: Sequence[str], sums: Halves, ridge: float | None, intercept: bool
) -> tuple[Params, Spec]:
    """The network with the weight and the bias that these nodes share as the regression has them."""
    node, leaves = spec[names[0]], flatten(params)
    role = node.layer.role(Mixing)
    assert role is not None
    path = node.path(role.weight)
    weight = whole(leaves[path].detach())
    start = role.matrix(weight).double()
    chosen = sums.ridge(start, intercept=intercept) if ridge is None else ridge
    matrix, bias = sums.whole.solve(start, chosen, intercept=intercept)
    past = whole(leaves[node.path(role.bias)].detach()) if role.has_bias else 0.0
    params = merge(params, {path: placed(role.as_weight(matrix, weight), leaves[path])})
    if not intercept:
        return params, spec
    return shifted(params, spec, names, bias.flatten() - past)


class _Run:
    """A network on one batch, as far as it has been asked for; what no later node consumes is not kept."""

    def __init__(self, spec: Spec, inputs: Inputs) -> None:
        self.inputs = inputs
        self.values: dict[str, Tensor] = bind_inputs(spec, (inputs,))
        self.done = 0

    def value(self, params: Params, spec: Spec, name: str) -> Tensor:
        """What a node gives out, without derivatives; nodes are asked for in their order."""
        place = [*spec.by_name].index(name) + 1
        if place > self.done:
            names = [node.name for node in spec.nodes[self.done : place]]
            later = {name, *(x for node in spec.nodes[place:] for x in node.inputs)}
            wanted = [x for x in names if x in later]
            part = fitted(spec, self.inputs).part(names, wanted, keys=wanted)
            leaves = restrict(params, part.shapes)
            detached = unflatten((path, leaf.detach()) for path, leaf in flatten(leaves).items())
            new = apply(detached, part, {x: self.values[x] for x in part.input_layers})
            self.values = {x: value for x, value in self.values.items() if x in later} | new
            self.done = place
        return self.values[name]


def _joint(spec: Spec, group: Sequence[tuple[Node, Mixing]]) -> bool:
    """Layers of a group are one layer at several places, and nothing else uses their weight."""
    node, role = group[0]
    used = [owner.name for owner in spec.owners[node.path(role.weight)]]
    kinds = {(type(node.layer), role.has_bias, node.path(role.bias)) for node, role in group}
    return used == [node.name for node, _ in group] and len(kinds) == 1

"""Forecasts: what the loss will do, from derivatives at more than the point where all gates are one.

With ``v`` the units that leave (one at these, zero elsewhere), the gates go from ``1`` to ``1 - v``, and the loss
changes

    to second order by  -g.v + 1/2 v'Hv, with the Hessian itself instead of the Fisher information,
    exactly by          -int_0^1 g(1 - t v).v dt, here by Gauss-Legendre quadrature,

where ``g`` and ``H`` are the gradient and the Hessian of the mean loss by the gates. The loss is that of ``loss``,
``per_example`` and ``split``, or of a ``measurement``, as in `taylorfx.measure`.

Each is there for every unit alone (scores, ``(units,)``, higher means keep, estimates of `Oracle.signed`) and for all
units of a plan together. For units alone they cost more than the oracle itself: they are there to tell where a
criterion errs. For a plan they are cheap: one Hessian-vector product, or one gradient per node. The path integral of a
plan is the integrated gradients of Sundararajan et al. 2017 (arXiv 1703.01365), which share the change out among the
units.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import optree
import torch
from torch import Tensor

from taylorfx.coupling.couple import own
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batch, Batches, Targets, each_batch
from taylorfx.scoring.criterion import Criterion
from taylorfx.scoring.losses import Objective
from taylorfx.scoring.measurement import Measurement, objective_of
from taylorfx.tree import Params
from taylorfx.truth.gated import Network, bend, either, slope
from taylorfx.truth.oracles import alone, observations, ones, parted

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.scoring.measurement import ObjectiveOptions

__all__ = ["exact_second_order", "path_integral", "plan_path_integral", "plan_second_order"]

T = TypeVar("T")


@partial(Criterion, of="network")
def exact_second_order(
    params: Params,
    spec: Spec,
    batches: Batches,
    coupling: Coupling,
    *,
    measurement: Measurement | None = None,
    chunk: int = 8,
    **options: Unpack[ObjectiveOptions],
) -> Tensor:
    """``-E[g_u] + 1/2 E[H_uu]``, ``(units,)``: what `second_order` estimates, with the diagonal of the Hessian itself.

    One Hessian-vector product per unit and batch, ``chunk`` of them side by side: some 3.5 times the oracle's time.
    Piecewise linear layers (ReLU) have no curvature of their own, and where the loss has a kink there is no Hessian.

    Raises:
        ValueError: for no or empty batches, or ones of another network.
    """
    whole, objective = ones(params, coupling), objective_of(measurement, options)

    def score(network: Network, some: list[int]) -> Tensor:
        along = torch.zeros(len(some), len(whole)).to(whole)
        along[range(len(some)), some] = 1
        first, second = _each(lambda v, plain: bend(network, whole, v, objective, plain=plain), along)
        return _own(second / 2 - first, some)

    return _scores(params, spec, batches, coupling, objective, chunk, score)


@partial(Criterion, of="network")
def path_integral(
    params: Params,
    spec: Spec,
    batches: Batches,
    coupling: Coupling,
    *,
    nodes: int = 4,
    measurement: Measurement | None = None,
    chunk: int = 1,
    **options: Unpack[ObjectiveOptions],
) -> Tensor:
    """``-int_0^1 E[g_u] dm_u`` with all other gates at one, ``(units,)``: the oracle, as ``nodes`` grow.

    One gradient per unit, batch and node, some three times the time of the oracle for each node; ``chunk`` units side
    by side. With ``k`` nodes it is exact where the loss is a polynomial in the gate of a degree up to ``2 k``.

    Raises:
        ValueError: for no nodes, no or empty batches, or ones of another network.
    """
    whole, points, weights = ones(params, coupling), *_quadrature(nodes)
    objective = objective_of(measurement, options)

    def score(network: Network, some: list[int]) -> Tensor:
        at = whole.repeat(nodes, len(some), 1)
        at[:, range(len(some)), some] = whole.new_tensor(points)[:, None]
        slopes = _each(lambda v, plain: slope(network, v, objective, plain=plain), at.flatten(0, 1))
        return -whole.new_tensor(weights) @ _own(slopes, some * nodes).reshape(nodes, len(some))

    return _scores(params, spec, batches, coupling, objective, chunk, score)


def plan_second_order(
    params: Params,
    spec: Spec,
    batches: Batches,
    plan: Plan,
    *,
    measurement: Measurement | None = None,
    **options: Unpack[ObjectiveOptions],
) -> Tensor:
    """``-E[g].v + 1/2 v'E[H]v``: the change of the loss under a plan to second order, from one product with ``H``.

    Raises:
        ValueError: for no or empty batches, or ones of another network.
    """
    objective = objective_of(measurement, options)

    def change(network: Network, whole: Tensor, leaving: Tensor) -> Tensor:
        first, second = either(lambda plain: bend(network, whole, leaving, objective, plain=plain))
        return (second / 2 - first) @ leaving

    return _changes(params, spec, batches, plan, objective, change)


def plan_path_integral(
    params: Params,
    spec: Spec,
    batches: Batches,
    plan: Plan,
    *,
    nodes: int = 4,
    measurement: Measurement | None = None,
    **options: Unpack[ObjectiveOptions],
) -> Tensor:
    """``-v int_0^1 E[g(1 - t v)] dt``, ``(units,)``: each unit's share of the change of the loss under a plan.

    Units that stay have none. The shares add up to the change of the loss, as ``nodes`` grow; each costs a gradient.

    Raises:
        ValueError: for no nodes, no or empty batches, or ones of another network.
    """
    points, weights = _quadrature(nodes)
    objective = objective_of(measurement, options)

    def change(network: Network, whole: Tensor, leaving: Tensor) -> Tensor:
        at = [whole - t * leaving for t in points]
        slopes = either(lambda plain: [slope(network, v, objective, plain=plain) for v in at])
        return -leaving * sum(w * slope for w, slope in zip(weights, slopes, strict=True))

    return _changes(params, spec, batches, plan, objective, change)


def _quadrature(nodes: int) -> tuple[list[float], list[float]]:
    """Points between zero and one, and their weights (Gauss-Legendre)."""
    if nodes < 1:
        raise ValueError(f"A path integral has at least one node; received {nodes}.")
    points, weights = np.polynomial.legendre.leggauss(nodes)
    return (points / 2 + 0.5).tolist(), (weights / 2).tolist()


def _own(rows: Tensor, some: list[int]) -> Tensor:
    """Of the row of each unit, its own entry."""
    return rows[range(len(some)), some]


def _scores(
    params: Params,
    spec: Spec,
    batches: Batches,
    coupling: Coupling,
    objective: Objective,
    chunk: int,
    score: Callable[[Network, list[int]], Tensor],
) -> Tensor:
    """The mean over the examples of what some units together score on a part of the network."""
    parts = parted(params, coupling, range(len(coupling)))
    total, count = ones(params, coupling) * 0, 0
    for batch in _singly(params, spec, batches, coupling, objective):
        count += objective.observations(batch[0], spec)
        for some, network in alone(params, batch, coupling, parts, chunk):
            total[some] += score(network, some).detach()
    return total / _some(count)


def _changes(
    params: Params,
    spec: Spec,
    batches: Batches,
    plan: Plan,
    objective: Objective,
    change: Callable[[Network, Tensor, Tensor], Tensor],
) -> Tensor:
    """The mean over the examples of what the plan as a whole changes."""
    whole = ones(params, plan.coupling)
    leaving = torch.from_numpy(plan.leaving).to(whole)
    total, count = torch.zeros(()).to(whole), 0
    for inputs, targets in _singly(params, spec, batches, plan.coupling, objective):
        count += objective.observations(inputs, spec)
        total = total + change((params, spec, inputs, targets, plan.coupling), whole, leaving).detach()
    return total / _some(count)


def _singly(params: Params, spec: Spec, batches: Batches, coupling: Coupling, objective: Objective) -> Iterator[Batch]:
    own(params, spec, coupling)
    for batch in each_batch(batches):
        yield from observations(batch, coupling, objective)


def _each(function: Callable[[Tensor, bool], T], points: Tensor) -> T:
    """The function of every row, which also takes whether the loss is called plainly: side by side, if it is not."""

    def all_of_them(plain: bool) -> T:
        if not plain:
            return torch.func.vmap(lambda v: function(v, False))(points)
        first, *others = (cast("Targets", function(v, True)) for v in points)
        return cast("T", optree.tree_map(lambda *x: torch.stack(x), first, *others))

    return either(all_of_them)


def _some(count: int) -> int:
    if not count:
        raise ValueError("There is nothing to forecast from: received no batch. Was the iterator already used up?")
    return count

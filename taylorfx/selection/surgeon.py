"""Surgeon: choose together with the repair, by what least squares cannot undo.

When the channels ``R`` of a value leave, a repair lets the layers that read it predict them from the channels ``K``
that stay. What they compute then differs by the residuals ``r = a_R - B a_K - c``, and the loss grows by about

    J(R) = 1/2 sum over positions of E[(d_R' r)^2] = 1/2 tr(E[d_R d_R'] Cov(a_R | a_K)),

``d`` the loss's derivatives by the activations: the optimal brain surgeon (Hassibi & Stork 1993) of whole channels,
with the Fisher information for the Hessian, and factored into activations and derivatives (Martens & Grosse 2015,
arXiv 1503.05671). Without ``d`` it is the layer's own error (Frantar & Alistarh 2022, arXiv 2208.11580; Kurtic et al.
2023, arXiv 2302.04089), which cannot be compared from layer to layer; with variances alone it is FLAP (arXiv
2312.11983). With ``P`` the inverse of ``Cov(a_K)``, one more unit ``u`` of those that stay costs

    1/2 tr(D_uu (P_uu)^-1),    D = M' E[d d'] M,    M = [1; B] (what stays now also carries what has left),

so a channel that others predict exactly costs nothing. It is summed over all values that the unit is part of.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling, Mask, Place
from taylorfx.cutting.plan import Plan
from taylorfx.scoring.products import Products, key_of
from taylorfx.selection.budget import Budget, BudgetError, Budgets, SelectionError, pricing
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.corrected import corrected
from taylorfx.selection.joint import between
from taylorfx.selection.select import Asked, first_that_fit

__all__ = ["residual", "surgeon"]

ROUNDS = 16
"""In how many steps `surgeon` reaches the budget."""

RIDGE = 0.01
"""What is added to the variances, in units of their mean: a prediction from few examples is not believed too much."""


def surgeon(
    products: Products,
    coupling: Coupling,
    *,
    budget: Budgets,
    constraints: Constraints | None = None,
    per_cost: bool = True,
) -> Plan:
    """Decide which units stay by what their removal costs after a repair by least squares, `reconstruct`.

    Units leave in rounds; in each, every unit is scored by what it costs beside those that have left. As cut, without
    the repair, the network that stays may be far worse than one that `joint` chooses.

    Args:
        products: the second moments at the reads, of these units.
        budget, constraints, per_cost: as in `joint`.

    Raises:
        SelectionError: for products of other units or of no example; and what `select` raises.
    """
    if products.units != coupling.names or not products.n:
        raise SelectionError(
            f"Products are of the coupling's {len(coupling)} units and of one example at least; received those of "
            f"{len(products.units)} units and {products.n} examples."
        )
    values = _values(products, coupling)

    def choose(budgets: tuple[Budget, ...], rules: Constraints) -> Plan:
        return _in_rounds(values, Asked.of(coupling, budgets, rules), per_cost)

    return corrected(choose, coupling, budget, constraints or Constraints())


def _in_rounds(values: list[_Value], asked: Asked, per_cost: bool) -> Plan:
    prices = pricing(asked.budgets, asked.costs) if per_cost else None
    keep = np.ones(len(asked.coupling), bool)
    totals = [cost(keep) for cost in asked.costs]

    def worth(keep: Mask) -> Tensor:
        scores = _residual(values, keep)
        return scores / prices(keep) if prices else scores

    scores = worth(keep)
    first_that_fit(asked.ranked(scores.numpy()), asked)  # an error names what was asked for
    for step in range(1, ROUNDS + 1) if len(keep) else ():
        scores[torch.from_numpy(~keep)] = scores.min() - 1  # what has left stays away
        try:
            now = between(asked, totals, step / ROUNDS).among(keep)
            keep = asked.plan(first_that_fit(asked.ranked(scores.numpy()), now)).keep
        except BudgetError:  # on the way, where multiples cannot be met exactly
            if step == ROUNDS:
                raise
        scores = worth(keep)
    return asked.plan(asked.spent(keep, asked.ranked(scores.numpy())))


def residual(products: Products, coupling: Coupling, keep: Mask | None = None) -> Tensor:
    """What each unit that stays costs, once the others make up for it as well as they can: ``(units,)``.

    Args:
        keep: which units stay; by default all of them. One that has left costs nothing.
    """
    return _residual(_values(products, coupling), np.ones(len(coupling), bool) if keep is None else keep)


@dataclass(frozen=True, eq=False)
class _Value:
    """One value that layers read, in double precision.

    Attributes:
        units: ``(factors, size)``, as those of a `Place`.
        spread: the covariance of its channels; their second moments, where no repair can put a prediction in their
            place (products of two activations).
        steepness: ``E[d d']``, summed over the positions of an example.
        mends: layers that mix channels read it, and can be repaired.
    """

    units: np.ndarray
    spread: Tensor
    steepness: Tensor
    mends: bool


def _values(products: Products, coupling: Coupling) -> list[_Value]:
    places: dict[str, Place] = {}
    for place in coupling.reads:
        places.setdefault(key_of(coupling.spec, place), place)
    found = []
    for key, sums in products.sums.items():
        mends, count = not key.endswith(", as it is"), sums.count.double()
        mean = sums.a.double().cpu() / count.cpu() * mends
        spread = sums.aa.double().cpu() / count.cpu() - mean[:, None] * mean
        found.append(_Value(places[key].units, spread, sums.dd.double().cpu() / products.n, mends))
    return found


def _residual(values: list[_Value], keep: Mask) -> Tensor:
    total = torch.zeros(len(keep) + 1, dtype=torch.float64)
    for value in values:
        stays = np.append(keep, True)[value.units].all(0)  # unit -1 always does
        units = value.units[:, stays]
        if value.mends:
            precision, steepness = _conditional(value, torch.from_numpy(stays))
        else:
            precision, steepness = 1 / value.spread.diagonal()[torch.from_numpy(stays)].clamp(min=1e-300), None
        for row in units:
            ids, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
            if steepness is None:
                each = value.steepness.diagonal()[torch.from_numpy(stays)] / precision
                total.index_add_(0, torch.from_numpy(row % len(total)), each)
                continue
            single = torch.from_numpy(np.flatnonzero(counts[inverse] == 1))
            each = steepness.diagonal()[single] / precision.diagonal()[single]
            total.index_add_(0, torch.from_numpy(row)[single] % len(total), each)
            for k in np.flatnonzero((counts > 1) & (ids >= 0)):
                mine = torch.from_numpy(np.flatnonzero(inverse == k))
                block = torch.linalg.inv(precision[mine][:, mine])
                total[ids[k]] += (steepness[mine][:, mine] * block).sum()
    return 0.5 * total[:-1]


def _conditional(value: _Value, stays: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse covariance of the channels that stay, and ``E[d d']`` by them where they carry what has left."""
    spread, steepness = value.spread[stays][:, stays], value.steepness[stays][:, stays]
    variance = value.spread.diagonal()
    least = torch.maximum(RIDGE * variance.mean(), torch.tensor(1e-30, dtype=torch.float64))
    precision = torch.linalg.inv(spread + least * torch.eye(len(spread), dtype=torch.float64))
    if not stays.all():
        predicted = value.spread[~stays][:, stays] @ precision  # B
        cross = value.steepness[stays][:, ~stays] @ predicted
        steepness = steepness + cross + cross.mT + predicted.mT @ value.steepness[~stays][:, ~stays] @ predicted
    return precision, steepness

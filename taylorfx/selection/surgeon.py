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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling, Mask, Place
from taylorfx.cutting.plan import Plan
from taylorfx.scoring.products import Products, Sums, key_of
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


def _in_rounds(whole: Sequence[_Value], asked: Asked, per_cost: bool) -> Plan:
    """The plan after all rounds. What stays of the values is updated by what leaves, not solved anew."""
    values = whole
    prices = pricing(asked.budgets, asked.costs) if per_cost else None
    keep = np.ones(len(asked.coupling), bool)
    totals = [cost(keep) for cost in asked.costs]

    def worth(keep: Mask) -> Tensor:
        scores = _residual(values, len(keep))
        return scores / prices(keep) if prices else scores

    scores = worth(keep)
    first_that_fit(asked.ranked(scores.numpy()), asked)  # an error names what was asked for
    for step in range(1, ROUNDS + 1) if len(keep) else ():
        scores[torch.from_numpy(~keep)] = scores.min() - 1  # what has left stays away
        before = keep
        try:
            now = between(asked, totals, step / ROUNDS).among(keep)
            keep = asked.plan(first_that_fit(asked.ranked(scores.numpy()), now)).keep
        except BudgetError:  # on the way, where multiples cannot be met exactly
            if step == ROUNDS:
                raise
        returned = (keep & ~before).any()  # as part of a bundle
        values = [value.among(keep) for value in (whole if returned else values)]
        scores = worth(keep)
    return asked.plan(asked.spent(keep, asked.ranked(scores.numpy())))


def residual(products: Products, coupling: Coupling, keep: Mask | None = None) -> Tensor:
    """What each unit that stays costs, once the others make up for it as well as they can: ``(units,)``.

    Args:
        keep: which units stay; by default all of them. One that has left costs nothing.
    """
    keep = np.ones(len(coupling), bool) if keep is None else keep
    return _residual([value.among(keep) for value in _values(products, coupling)], len(coupling))


@dataclass(frozen=True, eq=False)
class _Value:
    """The channels that stay of one value that layers read, in double precision.

    Attributes:
        units: ``(factors, size)``, as those of a `Place`.
        precision: the inverse of their covariance, ``(size, size)``; of their second moments alone, ``(size,)``, where
            no repair can put a prediction in a channel's place (products of two activations).
        steepness: ``E[d d']``, summed over the positions of an example, where they carry what has left; of the same
            shape.
    """

    units: np.ndarray
    precision: Tensor
    steepness: Tensor

    @staticmethod
    def of(units: np.ndarray, sums: Sums, examples: int, *, mends: bool) -> _Value:
        """All channels. Those that ``mends``, by layers that mix them, can be predicted."""
        count, steepness = sums.count.double().cpu(), sums.dd.double().cpu() / examples
        spread = sums.aa.double().cpu() / count
        if not mends:
            return _Value(units, 1 / spread.diagonal().clamp(min=1e-300), steepness.diagonal())
        mean = sums.a.double().cpu() / count
        spread -= mean[:, None] * mean
        spread.diagonal().add_((RIDGE * spread.diagonal().mean()).clamp(min=1e-30))
        return _Value(units, torch.linalg.inv(spread), steepness)

    def among(self, keep: Mask) -> _Value:
        """Those channels whose units all stay. They predict the others, ``B = -(P_RR)^-1 P_RK``, and carry them."""
        stays = np.append(keep, True)[self.units].all(0)  # unit -1 always does
        if stays.all():
            return self
        kept, gone = torch.from_numpy(stays), torch.from_numpy(~stays)
        units, precision, steepness = self.units[:, stays], self.precision, self.steepness
        if precision.ndim == 1:
            return _Value(units, precision[kept], steepness[kept])
        across = precision[gone][:, kept]
        predicted = -torch.linalg.solve(precision[gone][:, gone], across)
        cross = steepness[kept][:, gone] @ predicted
        carried = cross + cross.mT + predicted.mT @ (steepness[gone][:, gone] @ predicted)
        return _Value(
            units, precision[kept][:, kept] + across.mT @ predicted, steepness[kept][:, kept] + carried
        )  # fmt: skip


def _values(products: Products, coupling: Coupling) -> list[_Value]:
    places: dict[str, Place] = {}
    for place in coupling.reads:
        places.setdefault(key_of(coupling.spec, place), place)
    return [
        _Value.of(places[key].units, sums, products.n, mends=not key.endswith(", as it is"))
        for key, sums in products.sums.items()
    ]


def _residual(values: Sequence[_Value], count: int) -> Tensor:
    """What each of the units costs. A channel of several units costs each of them all of it."""
    total = torch.zeros(count + 1, dtype=torch.float64)  # the last one is for what has no unit, and is dropped
    for value in values:
        precision, steepness = value.precision, value.steepness
        for row in value.units:
            if precision.ndim == 1:
                total.index_add_(0, torch.from_numpy(row % len(total)), steepness / precision)
                continue
            ids, inverse, counts = np.unique(row, return_inverse=True, return_counts=True)
            single = torch.from_numpy(np.flatnonzero(counts[inverse] == 1))
            each = steepness.diagonal()[single] / precision.diagonal()[single]
            total.index_add_(0, torch.from_numpy(row)[single] % len(total), each)
            for k in np.flatnonzero((counts > 1) & (ids >= 0)):
                mine = torch.from_numpy(np.flatnonzero(inverse == k))
                block = torch.linalg.inv(precision[mine][:, mine])
                total[ids[k]] += (steepness[mine][:, mine] * block).sum()
    return 0.5 * total[:-1]

"""Joint selection: who goes together, since units interact.

A score says what the loss does when one unit leaves alone. When a set ``R`` leaves, the loss changes by about

    J(R) = - sum_{u in R} E[g_u] + 1/2 sum_{u, v in R} E[g_u g_v],

the second-order expansion in the gates whose curvature is the Gram matrix of the examples' own derivatives (the Fisher
matrix on gates; Hassibi & Stork 1993 and Theis et al. 2018, arXiv 1801.05787, take it of weights and its diagonal). The
matrix is never formed. With ``s_n = sum_{u in R} g_nu``, what one more unit adds is

    J(R + u) - J(R) = - E[g_u] + E[s g_u] + 1/2 E[g_u^2],

one product of the vector ``s`` with the ``(N, units)`` rows. A branch takes the units in it along: it adds its own
derivative less theirs, of those that have left before. So the cheapest units leave in rounds, each as `select`
has it (budgets, floors, multiples, globs), and at the end units of one scope change places, and branches leave and come
back in pairs, while that lowers ``J``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.plan import Plan
from taylorfx.network.labels import Labels
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection.budget import Budget, BudgetError, Budgets, SelectionError, Units, pricing
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.corrected import corrected
from taylorfx.selection.select import Asked, first_that_fit

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.selection.constraints import ConstraintOptions

__all__ = ["expected_change", "joint"]


def joint(
    stats: Statistics,
    coupling: Coupling,
    *,
    budget: Budgets,
    rounds: int = 64,
    per_cost: bool = True,
    swaps: bool = True,
    cautious: bool = False,
    constraints: Constraints | None = None,
    **options: Unpack[ConstraintOptions],
) -> Plan:
    """Decide which units stay by what their removal costs together.

    Args:
        stats: from ``measure(..., rows=True)``; no more than a few copies of these ``(N, units)`` numbers are held.
        budget: what may remain, one or several; a plain number means `Units`.
        rounds: in how many steps the budget is reached, each with the losses that the units removed so far make; more
            are better and slower. Time is ``rounds * N * units``.
        per_cost: rank by the change of the loss for what leaves with a unit, as in `select`.
        swaps: at the end, let a unit that left and one of its scope that stayed change places, as long as that lowers
            the forecast (of the best few on either side, and a few hundred times for each scope). Branches leave and
            come back by ones and twos, as long as the forecast is lower once what they leave of the budget is spent.
        cautious: do not believe a forecast that the loss falls. Far from the network, units do not cancel each other
            as the expansion says (where the loss does not depend on the scale of a layer, all of it could leave for
            nothing), nor do those help that promise to. So ``-E[g_u]`` counts only where it is a loss, and ``E[s g_u]``
            takes back at most half of ``E[g_u^2] / 2``; no exchanges.
        constraints, options: what has to be respected, as in `select`.

    Raises:
        SelectionError: if the statistics have no rows or are of other units; and what `select` raises.
    """

    def choose(budgets: tuple[Budget, ...], constraints: Constraints) -> Plan:
        asked = Asked.of(coupling, budgets, constraints)
        free = coupling.exact if constraints.exact_only else np.ones(len(coupling), bool)
        rows = _rows(stats, coupling)

        return asked.plan(_together(rows, asked, free, rounds, per_cost, swaps, cautious))

    return corrected(choose, coupling, budget, Constraints.of(constraints, options))


def _together(rows: Tensor, asked: Asked, free: Mask, rounds: int, per_cost: bool, swaps: bool, cautious: bool) -> Mask:
    """`joint`, of rows, for budgets that need no correction: the units that stay.

    Args:
        free: ``(units,)``, those that may change places at the end.
    """
    coupling = asked.coupling
    if rounds < 1:
        raise SelectionError(f"Joint selection takes at least one round; received {rounds}.")
    prices = pricing(asked.budgets, asked.costs) if per_cost else None
    keep = np.ones(len(coupling), bool)
    totals = [cost(keep) for cost in asked.costs]
    whole = rows.mean(0, dtype=torch.float64), 0.5 * rows.square().mean(0, dtype=torch.float64)

    def worth(keep: Mask) -> Tensor:
        """What each unit adds to the loss when it leaves, or takes back when it returns; per price if there are any."""
        cross, mean, half = _added(rows, coupling, keep, whole)
        leaving = torch.from_numpy(coupling.leaving(keep))
        cross = cross - torch.where(leaving, 2 * half, 0.0)  # with those of the others that have left
        mean = mean.clamp(max=0) if cautious else mean
        scores = (torch.maximum(cross, -0.5 * half) if cautious else cross) + half - mean
        return scores / prices(keep) if prices else scores

    first_that_fit(asked.ranked(worth(keep).numpy()), asked)  # an error names what was asked for
    for step in range(1, rounds + 1) if len(coupling) else ():
        scores, carried = worth(keep), coupling.carried(keep)
        lowest = scores.min()
        scores[torch.from_numpy(~keep | carried)] = lowest - 1 - lowest.abs()  # what has left stays away
        try:
            now = between(asked, totals, step / rounds).among(keep)
            stays = first_that_fit(asked.ranked(scores.numpy()), now)
        except BudgetError:  # on the way, where multiples cannot be met exactly
            if step == rounds:
                raise
            continue
        keep = np.where(carried, keep, stays)  # which units would come back with a branch is as it was when it left

    def spent(keep: Mask) -> Mask:
        return asked.spent(keep, asked.ranked(worth(keep).numpy()))

    if swaps and not cautious:
        keep = _exchanged(rows, asked, keep, free, whole)
    keep = spent(keep)
    if swaps and not cautious and coupling.branches and asked.counted:
        keep = _moved(rows, asked, keep, spent)
    return keep


def expected_change(stats: Statistics, plan: Plan) -> Tensor:
    """What `joint` forecasts of the loss when a plan's units leave: ``J(R)``, a number.

    Raises:
        SelectionError: if the statistics have no rows or are of other units.
    """
    rows = _rows(stats, plan.coupling)
    gone = rows[:, torch.from_numpy(plan.leaving).to(rows.device)].sum(1, dtype=torch.float64)
    return 0.5 * gone.square().mean() - gone.mean()


def _rows(stats: Statistics, coupling: Coupling) -> Tensor:
    if stats.units != coupling.names:
        raise SelectionError(f"Statistics are of the coupling's {len(coupling)} units; received some of others.")
    if not stats.n:
        raise SelectionError("Statistics of no batch say nothing about any unit. Was the iterator already used up?")
    if stats.rows is None:
        raise SelectionError("Joint selection needs every example's derivatives: measure(..., rows=True).")
    if not stats.rows.isfinite().all():
        raise SelectionError("Derivatives have to be finite; some are not. Look at the parameters and the data.")
    return stats.rows.to("cpu")


def _added(rows: Tensor, coupling: Coupling, keep: Mask, whole: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """``E[s g_u]`` of every unit, ``s`` the sum over those that have left, and ``E[g_u]`` and ``E[g_u^2] / 2``.

    For a branch ``g_u`` is its own derivative less those of the units in it that have left by themselves; of one that
    has left, of the units that would not come back with it.

    Args:
        keep: of the units in a branch that has left it says which would come back with it.
        whole: the last two where nothing has left.
    """
    leaving = coupling.leaving(keep)
    away = rows @ torch.from_numpy(leaving).to(rows.dtype)
    cross = (away @ rows / len(rows)).to(torch.float64)
    mean, half = (x.clone() for x in whole) if coupling.branches else whole
    for unit in (branch.unit for branch in coupling.branches):
        own = _own(rows, coupling, keep, unit)
        cross[unit] = away @ own / len(rows)
        mean[unit], half[unit] = own.mean(dtype=torch.float64), 0.5 * own.square().mean(dtype=torch.float64)
    return cross, mean, half


def _gone(rows: Tensor, coupling: Coupling, keep: Mask) -> Tensor:
    """``(N,)``, the sum ``s`` over the units that have left."""
    return rows @ torch.from_numpy(coupling.leaving(keep)).to(rows.dtype)


def _own(rows: Tensor, coupling: Coupling, keep: Mask, unit: int) -> Tensor:
    """``(N,)``, a branch's derivative less those of the units in it that have left, or would not come back with it."""
    itself = np.arange(len(keep)) == unit
    inside = np.flatnonzero(coupling.leaving(keep | itself) & coupling.carried(keep & ~itself))
    return rows[:, unit] - rows[:, torch.from_numpy(inside)].sum(1) if len(inside) else rows[:, unit]


def between(asked: Asked, totals: Sequence[float], share: float) -> Asked:
    """The same with the budgets when this share of the way is done."""

    def budget(one: Budget, total: float) -> Budget:
        limit = one.limit(total)
        if isinstance(one, Units):
            return Units(max(1, round(total - share * (total - limit))))
        return replace(one, amount=min(1.0, 1 - share * (1 - limit / total)))

    return asked if share == 1 else replace(asked, budgets=tuple(map(budget, asked.budgets, totals)))


CANDIDATES = 64
"""How many units on either side are looked at for an exchange: those that lower the forecast most by themselves."""

EXCHANGES = 256
"""How often units of one scope change places at most."""


def _exchanged(rows: Tensor, asked: Asked, keep: Mask, free: Mask, whole: tuple[Tensor, Tensor]) -> Mask:
    """The units that stay after exchanges of these free ones, if what is kept then still fits."""
    coupling = asked.coupling
    _, mean, half = _added(rows, coupling, keep, whole)
    gone = _gone(rows, coupling, keep)
    free = free & ~coupling.carried(keep)
    better = _swap(rows, gone, asked.rules.parts(coupling)[0], keep, mean, half, free)
    everything = np.ones(len(coupling), bool)
    fits = all(
        cost(better) <= max(one.limit(cost(everything)), cost(keep))
        for one, cost in zip(asked.budgets, asked.costs, strict=True)
    )
    return better if fits and not coupling.empty(better) else keep


def _swap(rows: Tensor, gone: Tensor, part: Labels, keep: Mask, mean: Tensor, half: Tensor, free: Mask) -> Mask:
    """Exchange units within their scopes, or chunks of them, while that lowers ``J``."""
    keep = keep.copy()
    for number in np.unique(part):
        members = np.flatnonzero((part == number) & free)
        columns = rows[:, torch.from_numpy(members)]
        for _ in range(EXCHANGES):
            cross = (gone @ columns / len(rows)).to(torch.float64)
            leave = half[members] - mean[members] + cross  # what a unit that stays would add
            come = half[members] + mean[members] - cross  # and one that has left would take back
            one, other = _lowest(leave, keep[members]), _lowest(come, ~keep[members])
            if not len(one) or not len(other):
                break
            gram = columns[:, one].T @ columns[:, other] / len(rows)
            change = leave[one][:, None] + come[other] - gram
            best = divmod(int(change.argmin()), len(other))
            if change[best] >= -1e-12:
                break
            out, back = one[best[0]], other[best[1]]
            keep[members[[out, back]]] = False, True
            gone = gone + columns[:, out] - columns[:, back]
    return keep


def _lowest(values: Tensor, among: Mask) -> Tensor:
    """Where the lowest of these values are."""
    places = torch.from_numpy(np.flatnonzero(among))
    return places[values[places].argsort()[:CANDIDATES]]


MOVES = 16
"""How many moves of branches are tried, of those that are allowed: those that lower the forecast most by themselves."""


def _moved(rows: Tensor, asked: Asked, keep: Mask, spent: Callable[[Mask], Mask]) -> Mask:
    """The units that stay after one or two branches at a time have left or come back, while that lowers ``J``.

    Of two branches that cancel each other, each is vital and both are nothing. With ``p_b`` what a branch adds to ``s``
    when it leaves, or takes from it when it comes back, a move of two changes the forecast by

        E[s (p_b + p_c)] - E[p_b + p_c] + 1/2 E[(p_b + p_c)^2].

    Args:
        keep: units for which the budgets are spent.
        spent: spends what a move leaves of the budgets; what counts is the forecast after that.
    """
    coupling = asked.coupling
    units = [branch.unit for branch in coupling.branches if not asked.rules.protected[branch.unit]]

    def forecast(keep: Mask) -> float:
        s = _gone(rows, coupling, keep)
        return float(0.5 * s.square().mean(dtype=torch.float64) - s.mean(dtype=torch.float64))

    def lower(keep: Mask) -> Mask | None:
        """The first move that lowers the forecast."""
        p = torch.stack([_own(rows, coupling, keep, unit) * (1 if keep[unit] else -1) for unit in units], 1)
        gram, alone = p.T @ p / len(p), (_gone(rows, coupling, keep)[:, None] * p - p + 0.5 * p.square()).mean(0)
        change = alone[:, None] + alone + gram
        change.diagonal().copy_(alone)  # of one branch
        tried, now = 0, forecast(keep)
        for place in change.flatten().argsort().tolist():
            one, other = divmod(place, len(units))
            moved = keep.copy()
            moved[[units[one], units[other]]] ^= True
            if one <= other and asked.allows(moved):
                tried += 1
                if forecast(better := spent(moved)) < now - 1e-12:
                    return better
            if tried == MOVES:
                break
        return None

    while units and (better := lower(keep)) is not None:
        keep = better
    return keep

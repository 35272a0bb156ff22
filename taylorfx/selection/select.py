"""Select: who stays, given one score per unit and a budget.

Units leave in the order of their scores, lowest first; among equal scores the one that was written later leaves first.
Constraints (protected scopes, a floor and a most per layer, multiples, uniform scopes) take units out of that order or
bundle them; then the shortest prefix that meets every budget leaves, and of that comes back what still fits, best
first. All of it is a statement about the coupling: nothing is cut.

The prefix is found by bisection. A cost that never grows when a unit leaves (all but the measured ones) has one point
from which on it fits, which bisection finds. A measured cost may go up and down: what is found then is a prefix that
was seen to fit, one step after one that was seen not to; there may be a shorter one, but it is never over the budget.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx.cost.algebra import Cost
from taylorfx.coupling.reasons import held as held_by
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.plan import Plan
from taylorfx.network.labels import Labels
from taylorfx.selection.budget import (
    Budget,
    BudgetError,
    Budgets,
    Flops,
    Latency,
    Remove,
    Units,
    each_budget,
    pricing,
)
from taylorfx.selection.constraints import Constraints, Rules
from taylorfx.selection.corrected import corrected
from taylorfx.selection.order import finite, last_of_axis, like_structures, quantiles, returned, steps, unlike

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.selection.constraints import ConstraintOptions

__all__ = ["Asked", "first_that_fit", "foresee", "select"]


def select(
    scores: torch.Tensor,
    coupling: Coupling,
    *,
    budget: Budgets,
    constraints: Constraints | None = None,
    per_cost: bool = False,
    **options: Unpack[ConstraintOptions],
) -> Plan:
    """Decide which units stay: remove the lowest scores until the budget is met, and spend what is left of it.

    The last unit that leaves is often a large one, after which smaller ones fit again: they come back, best first, in
    the bundles of the constraints. In the end no bundle that has left fits. Budgets of a function of your own
    (`Measured`, or a cost that is no `Cost`) are left with the prefix, since every bundle would have to be measured.
    A branch comes back with those of its units that had not left by themselves.

    Args:
        scores: ``(units,)``, higher means keep.
        budget: what may remain; a plain number means `Units`. Of several, all are met.
        constraints: what has to be respected; by default nothing is but that every layer keeps a unit.
        options: the attributes of `Constraints` as keywords instead: ``protect``, ``floor``, ``most``, ``multiple``,
            ``uniform``, ``per_layer``, ``isomorphic``, ``exact_only``.
        per_cost: rank by score per FLOP, parameter, element at the peak or microsecond that leaves with a unit,
            whichever the budget counts (of several the one that is hardest to meet; `Units` and `Measured` have no
            prices). What a unit saves depends on what else is left; it is read off the plan itself, again and again
            (see `_search`), and of these plans the one that loses the least score is taken.

    Raises:
        BudgetError: if the budget cannot be met; the message names the nearest that can.
        SelectionError: for scores that are not finite, globs that match nothing, keywords that no constraint has, or
            keywords beside ``constraints``.
    """

    def choose(budgets: tuple[Budget, ...], constraints: Constraints) -> Plan:
        asked = Asked.of(coupling, budgets, constraints)
        values = finite(scores, coupling)
        prices = pricing(asked.budgets, asked.costs) if per_cost else None

        def rank(values: NDArray[np.float64]) -> Mask:
            values = asked.ranked(values)
            return asked.spent(first_that_fit(values, asked), values)

        return asked.plan(_search(values, prices, rank, coupling) if prices else rank(values))

    return corrected(choose, coupling, budget, Constraints.of(constraints, options))


@dataclass(frozen=True)
class Asked:
    """What is asked of a choice of units: budgets and constraints, with what they count and say on this coupling."""

    coupling: Coupling
    budgets: tuple[Budget, ...]
    rules: Rules
    classes: Labels | None
    """``(units,)``: the class within which each is ranked; None ranks across the network."""
    costs: Sequence[Callable[[Mask], float]]

    @staticmethod
    def of(coupling: Coupling, budget: Budgets, constraints: Constraints) -> Asked:
        """The same of what `select` takes."""
        budgets, rules = each_budget(budget), constraints.on(coupling)
        alike = constraints.isomorphic and not constraints.per_layer
        scope = coupling.scope
        classes = scope if constraints.per_layer else like_structures(coupling)[scope] if alike else None
        costs = [one.cost(coupling) for one in budgets]
        return Asked(coupling, budgets, rules, classes, costs)

    def ranked(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """The values, or where units are ranked within classes, their quantiles there."""
        return values if self.classes is None else quantiles(values, self.classes)

    def among(self, keep: Mask) -> Asked:
        """The same where no more than these units are left."""
        return replace(self, rules=self.rules.among(self.coupling, keep))

    def plan(self, keep: Mask) -> Plan:
        """The plan that keeps these units."""
        return Plan(self.coupling, keep, " and ".join(map(str, self.budgets)))

    @property
    def counted(self) -> bool:
        """Whether no cost is measured by a function of the user's, which is asked as seldom as possible."""
        both = zip(self.budgets, self.costs, strict=True)
        return all(isinstance(cost, Cost) or isinstance(one, Units) for one, cost in both)

    def allows(self, keep: Mask, *, bundles: bool = False) -> bool:
        """Whether a choice of units to keep meets the budgets, leaves no layer empty, and respects the constraints.

        Args:
            bundles: bundles of a choice that does the last two have come back, so that this one does as well.
        """
        if any(cost(keep) > limit for cost, limit in zip(self.costs, self._limits, strict=True)):
            return False
        return bundles or not (self.coupling.empty(keep) or self.rules.broken(self.coupling, keep))

    def fullness(self, keep: Mask) -> float:
        """What a choice of units costs, as a share of what may remain; of several budgets, of the fullest."""
        both = zip(self.costs, self._limits, strict=True)
        return max(cost(keep) / limit if limit else math.inf for cost, limit in both)

    @cached_property
    def _unlike(self) -> Mask:
        """``(units,)``: those of scopes whose units need not cost the same."""
        mask: Mask = unlike(self.coupling)[self.coupling.scope]
        return mask

    @cached_property
    def _limits(self) -> list[float]:
        everything = np.ones(len(self.coupling), bool)
        return [one.limit(cost(everything)) for one, cost in zip(self.budgets, self.costs, strict=True)]

    def spent(self, keep: Mask, values: NDArray[np.float64]) -> Mask:
        """These units, and of the others what still fits: the highest values first. Only where all costs are counted.

        Args:
            keep: of the units in a branch that has left it says which would come back with it.
        """
        if not self.counted:
            return keep
        branches = [branch.unit for branch in self.coupling.branches]
        while True:
            keep = before = self._evened(keep, values)
            parts = self.among(keep).rules.parts(self.coupling)

            def fits(mask: Mask, before: Mask = before) -> bool:
                return self.allows(mask, bundles=not (mask & ~before)[branches].any())

            keep = returned(keep, self.coupling.leaving(keep), values, parts, fits, self._unlike)
            if not branches or np.array_equal(keep, before):
                return keep  # else units in a branch that is back may come back, too

    def _evened(self, keep: Mask, values: NDArray[np.float64]) -> Mask:
        """The same where as many units of scopes that left with a branch would come back as others of their group keep.

        ::

            group of 3 scopes, the last of which left with its branch     a a a .    b b b .    c c c c
            of that the three of the highest values would come back                             c c . c
        """
        absent, keep = self.coupling.absent(keep), keep.copy()
        part, rules = self.rules.parts(self.coupling)
        for group in rules.groups if absent else ():
            members = [np.flatnonzero(part == k) for k in group]
            left = [int(self.coupling.scope[units[0]]) in absent for units in members]
            counts = [int(keep[units].sum()) for units, gone in zip(members, left, strict=True) if not gone]
            for units in [units for units, gone in zip(members, left, strict=True) if gone and counts]:
                keep[units] = False
                keep[units[values[units].argsort()[::-1][: counts[0]]]] = True
        return keep


def first_that_fit(values: NDArray[np.float64], asked: Asked) -> Mask:
    """The units that the shortest prefix of the order leaves, of those that meet all budgets.

    Args:
        values: ``(units,)``, finite.
    """
    coupling, rules = asked.coupling, asked.rules
    held = rules.protected | last_of_axis(values, coupling)
    while True:
        step, count = steps(values, coupling, held, rules)
        empty = np.flatnonzero(coupling.counts(step >= count) == 0)
        if not len(empty):
            stays: Mask = step >= _shortest(step, count, asked)
            return stays
        for axis in (coupling.axes[k] for k in empty):  # products and slices may need more than a floor per scope
            worth = np.where(axis >= 0, values[axis], np.inf).min(0)
            held[axis[:, worth.argmax()]] = True


def foresee(coupling: Coupling, *, budget: Budgets, constraints: Constraints, per_cost: bool) -> None:
    """Raise, before anything is measured, what `select` would raise whatever the scores are.

    Which units stay can decide what an axis costs that holds a part of a scope, so such an axis counts as one index
    here: a budget that only some scores can meet is left to them. What a function of the user's says is not asked.
    """
    budgets, rules = each_budget(budget), constraints.on(coupling)
    costs = [one.cost(coupling) for one in budgets]
    if per_cost:
        pricing(budgets, costs)
    step, count = steps(np.zeros(len(coupling)), coupling, rules.protected, rules)
    keep = step >= count
    whole = np.array([_whole(coupling, axis) for axis in coupling.axes], bool)
    least = coupling.lengths(keep) if len(coupling.axes) else np.zeros(0, np.int64)
    least[: len(whole)] = np.where(whole, np.maximum(least[: len(whole)], 1), 1)

    def lowest(one: Budget, cost: Callable[[Mask], float]) -> tuple[float, float]:
        if isinstance(one, Latency) and one.whole:
            return 0.0, 0.0
        if isinstance(cost, Cost):
            return cost.of(least), cost.total
        return (cost(keep), float(len(coupling))) if isinstance(one, Units) else (0.0, 0.0)

    bounds = [(one, *lowest(one, cost)) for one, cost in zip(budgets, costs, strict=True)]
    _refuse_too_slow(coupling, budgets, keep)
    if any(low > one.limit(total) for one, low, total in bounds if total):
        select(torch.zeros(len(coupling)), coupling, budget=budgets, constraints=constraints)
    all_stay = [isinstance(one.amount, float) and one.amount == 1 and not isinstance(one, Remove) for one in budgets]
    if not len(coupling) and not all(all_stay[k] for k, one in enumerate(budgets) if isinstance(one, Units)):
        raise BudgetError(
            f"The network has no unit that could leave; the budget is {' and '.join(map(str, budgets))}. "
            f"{held_by(coupling)}".rstrip()
        )


def _refuse_too_slow(coupling: Coupling, budgets: Sequence[Budget], keep: Mask) -> None:
    """Run the smallest network that the constraints allow, and refuse budgets of `Latency` that it does not meet."""
    real = [one for one in budgets if isinstance(one, Latency) and one.whole]
    if not real or coupling.empty(keep):
        return
    compared = [(one, *one.compared(Plan(coupling, keep))) for one in real]
    missed = [
        f"{one}; run whole, the smallest network takes {share:.1%}" for one, most, share in compared if share > most
    ]
    if missed:
        raise BudgetError(
            f"The budget is {', and '.join(missed)}. Loosen floor, most, multiple, uniform or protect, or ask for no "
            "less."
        )


def _whole(coupling: Coupling, axis: Labels) -> bool:
    """How many of its indices stay depends on nothing but how many units of each scope stay.

    Every scope has all its units on it equally often; of an axis with factors, every combination of them is there once.
    """
    sizes = coupling.sizes
    if len(axis) == 1:
        times = np.bincount(axis[axis >= 0], minlength=len(coupling))
        return all(len({*times[coupling.scope == s].tolist()}) == 1 for s in np.unique(coupling.scope[axis[axis >= 0]]))
    scopes = [np.unique(coupling.scope[row]).tolist() if (row >= 0).all() else [] for row in axis]
    if any(len(one) != 1 for one in scopes):
        return False
    full = math.prod(int(sizes[one]) for (one,) in scopes)
    return bool(full == axis.shape[1] == np.unique(axis, axis=1).shape[1])


PRICES = 16
"""How often `_search` reads prices at most."""


def _search(
    values: NDArray[np.float64],
    price: Callable[[Mask], torch.Tensor],
    rank: Callable[[NDArray[np.float64]], Mask],
    coupling: Coupling,
) -> Mask:
    """The units that stay where the least score is lost: by Lagrange multipliers (Everett 1963, doi
    10.1287/opre.11.3.399).

    Where nothing can be gained by exchanging units, those leave whose score is less than some factor times what they
    save, at the plan itself. So the units are ranked by their score per price, the price is what a unit saves (or would
    cost again) at the plan that follows, and so on; a geometric mean keeps prices from swinging. With a branch its own
    score is lost, and not those of the units in it.
    """
    prices = price(np.ones(len(values), bool)).numpy()
    masks = [rank(values)]
    for _ in range(PRICES):
        masks.append(rank(values / prices))
        new = np.sqrt(prices * price(masks[-1]).numpy())
        if np.allclose(new, prices, rtol=1e-3):
            break
        prices = new
    return min(masks, key=lambda keep: float(values[~keep & ~coupling.carried(keep)].sum()))


def _shortest(step: Labels, steps: int, asked: Asked) -> int:
    """The fewest steps after which all budgets hold; for `Units` alone, after which it holds exactly."""

    def after(cost: Callable[[Mask], float]) -> Callable[[int], float]:
        return cache(lambda n: _real(cost(step >= n)))

    budgets, costs = asked.budgets, [after(cost) for cost in asked.costs]
    limits = [budget.limit(cost(0)) for budget, cost in zip(budgets, costs, strict=True)]

    def fits(n: int) -> bool:
        return all(cost(n) <= limit for cost, limit in zip(costs, limits, strict=True))

    low, high = 0, 0 if fits(0) else steps
    if not fits(high):
        missed = [
            f"{budget}, a limit of {_number(limit)} in {_number(cost(0))}; the constraints allow no less than "
            f"{_number(cost(steps), math.ceil)}"
            for budget, cost, limit in zip(budgets, costs, limits, strict=True)
            if cost(steps) > limit
        ]
        frozen = held_by(asked.coupling, "FLOPs" if any(isinstance(one, Flops) for one in budgets) else "parameters")
        nothing = "" if len(asked.coupling) else "The network has no unit that could leave. "
        raise BudgetError(
            f"{nothing}The budget is {', and '.join(missed)}. Loosen floor, most, multiple, uniform or protect, or ask "
            f"for no less. {frozen}".rstrip()
        )
    while low < high:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle + 1
    if len(budgets) == 1 and isinstance(budgets[0], Units) and costs[0](low) != limits[0]:
        near = [costs[0](low)] + [costs[0](low - 1)] * (low > 0)
        raise BudgetError(
            f"The budget is {budgets[0]}, exactly {limits[0]:,.0f} to stay; the constraints allow "
            f"{' or '.join(f'{n:,.0f}' for n in near)} as the nearest."
        )
    return low


def _real(cost: float) -> float:
    if not math.isfinite(cost):
        raise BudgetError(f"A cost is a finite number; received {cost}. Look at the budget's `cost`.")
    return cost


def _number(value: float, whole: Callable[[float], int] = round) -> str:
    """A cost in words: a whole number, unless it is a small one."""
    return f"{whole(value):,}" if value >= 10 or value == int(value) else f"{value:.3g}"

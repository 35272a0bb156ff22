"""One measurement, several budgets: what each would leave."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

from torch import Tensor

from taylorfx.cost.counts import flops, parameters
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.network.tables import columns
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection.budget import Budgets, each_budget
from taylorfx.selection.choice import Choose, check_choice, chosen
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.joint import expected_change, joint
from taylorfx.selection.select import select

__all__ = ["Sweep", "sweep"]


class Sweep(NamedTuple):
    """The plan of each budget, and what it is expected to do to the loss; ``print(sweep)`` is a table.

    Attributes:
        plans: one for each budget, in their order.
        changes: `taylorfx.expected_change` of each plan; none without statistics with rows.
    """

    plans: tuple[Plan, ...]
    changes: tuple[float, ...] | None

    def __str__(self) -> str:
        rows = [("asked for", "units", "parameters", "FLOPs", *["expected change"] * (self.changes is not None))]
        for k, plan in enumerate(self.plans):
            kept = [_share(f(plan.coupling)(plan.keep), f(plan.coupling).total) for f in (parameters, flops)]
            change = [] if self.changes is None else [f"{self.changes[k]:+.4g}"]
            rows.append((plan.asked, _share(plan.keep.sum(), len(plan.keep)), *kept, *change))
        return columns(rows, right=len(rows[0]) - 1)


def sweep(
    worth: Statistics | Tensor,
    coupling: Coupling,
    *,
    budgets: Iterable[Budgets],
    choose: Choose | None = None,
    constraints: Constraints | None = None,
    per_cost: bool = True,
) -> Sweep:
    """Choose for several budgets by what was measured once. Nothing is run, and nothing is cut.

    Args:
        worth: statistics with rows, by which units are chosen together; or scores, ``(units,)``.
        choose: as in `taylorfx.prune`; by default `select` for scores, otherwise `joint`, cautiously.
        constraints, per_cost: as in `select`.

    >>> import torch
    >>> from taylorfx import Flops, Input, couple, init, layers as L, serial
    >>> spec = serial(Input((3,)), a=L.Linear(3, 8), relu=L.ReLU(), b=L.Linear(8, 2))
    >>> coupling = couple(init(spec, torch.Generator()), spec)
    >>> print(sweep(torch.arange(8.0), coupling, budgets=[Flops(0.75), Flops(0.5)]))
    asked for                       units  parameters       FLOPs
    --------------------------  ---------  ----------  ----------
    at most 75.0% of the FLOPs  6 (75.0%)  38 (76.0%)  60 (75.0%)
    at most 50.0% of the FLOPs  4 (50.0%)  26 (52.0%)  40 (50.0%)

    Raises:
        BudgetError: for a budget that cannot be met; and what `select` and `joint` raise.
    """
    scored = not isinstance(worth, Statistics)
    if choose is None:
        choose = select if scored else partial(joint, cautious=True)
    check_choice(choose, scored=scored)
    respected = Constraints() if constraints is None else constraints
    plans = tuple(
        chosen(choose, worth, coupling, budgets=each_budget(budget), constraints=respected, per_cost=per_cost)
        for budget in budgets
    )
    if not isinstance(worth, Statistics) or worth.rows is None:
        return Sweep(plans, None)
    return Sweep(plans, tuple(float(expected_change(worth, plan)) for plan in plans))


def _share(part: float, whole: float) -> str:
    return f"{part:,.0f} ({part / whole:.1%})" if whole else "-"

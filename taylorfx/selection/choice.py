"""The hook ``choose``: what decides which units leave is `joint`, `select`, or a function from outside."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.functions import filled_in, innermost, name_of, unfit
from taylorfx.scoring.products import Products
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection.budget import Budget, BudgetError, SelectionError
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.joint import joint
from taylorfx.selection.select import select
from taylorfx.selection.surgeon import surgeon

__all__ = ["Choose", "check_choice", "chosen"]

Choose = Callable[..., Plan]
"""``choose(worth, coupling, budget=..., constraints=..., per_cost=...)`` gives the `Plan`.

``worth`` are the criterion's scores, ``(units,)``, or without a criterion the `Statistics`, with rows. ``budget`` is a
tuple of budgets, all to be met; keywords that a ``functools.partial`` has filled in stay as they are.
"""

KEYWORDS = ("budget", "constraints", "per_cost")


def check_choice(choose: Choose, *, scored: bool) -> None:
    """Refuse what cannot choose, before anything is measured.

    Args:
        scored: there is a criterion, so that scores are chosen by.

    Raises:
        SelectionError: for what is not called as a `Choose`, `joint` of scores, and `select` without any.
    """
    asked = {name: None for name in KEYWORDS if name not in filled_in(choose)}
    problem = unfit(choose, None, None, **asked) if callable(choose) else "it is not called"
    if problem:
        raise SelectionError(
            "Units are chosen by a function of (scores, coupling, budget=..., constraints=..., per_cost=...), or of "
            f"statistics where there is no criterion: select, joint; received {name_of(choose)}: {problem}."
        )
    if scored and _ours(choose) is joint:
        raise SelectionError("`joint` chooses by statistics; received a criterion beside it. Leave one of them out.")
    if not scored and _ours(choose) is select:
        raise SelectionError("`select` chooses by scores; received no criterion. Give one, or choose by `joint`.")


def chosen(
    choose: Choose,
    worth: Tensor | Statistics | Products,
    coupling: Coupling,
    *,
    budgets: tuple[Budget, ...],
    constraints: Constraints,
    per_cost: bool,
) -> Plan:
    """The plan that is chosen; that of a function from outside is held to the budgets and constraints.

    Raises:
        BudgetError: for a plan that costs more than may remain.
        SelectionError: for what is no plan of these units, and for one that breaks constraints.
    """
    asked = {"budget": budgets, "constraints": constraints, "per_cost": per_cost}
    filled = filled_in(choose)
    plan: object = choose(worth, coupling, **{name: value for name, value in asked.items() if name not in filled})
    if _ours(choose) is None:
        if not isinstance(plan, Plan) or plan.coupling.spec != coupling.spec:
            kind = "one of another network" if isinstance(plan, Plan) else f"a {type(plan).__name__}"
            raise SelectionError(f"What chooses units gives a Plan of the coupling; {name_of(choose)} gave {kind}.")
        if broken := constraints.broken(coupling, plan.keep):
            raise SelectionError(f"A plan respects its constraints; in that of {name_of(choose)} {', '.join(broken)}.")
        _refuse_over(plan, budgets, name_of(choose))
    assert isinstance(plan, Plan)
    return plan


def _refuse_over(plan: Plan, budgets: tuple[Budget, ...], name: str) -> None:
    """Refuse a plan that costs more than may remain."""
    compared = [(budget, *budget.compared(plan)) for budget in budgets]
    over = [
        f"{budget}, a limit of {limit:,.6g}; it costs {value:,.6g}"
        for budget, limit, value in compared
        if value > limit
    ]
    if over:
        raise BudgetError(f"The plan of {name} does not meet {', and '.join(over)}.")


def _ours(choose: Choose) -> Choose | None:
    """`joint`, `select` or `surgeon`, if that is what a ``functools.partial`` calls in the end."""
    return next((one for one in (joint, select, surgeon) if one is innermost(choose)), None)

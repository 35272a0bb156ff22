"""Latency as it is measured: units are chosen by a table of layers, networks run whole, and the limit is corrected.

What layers take alone does not add up to what a network takes: between them lies what the runner does, and what it
fuses. So a budget of `Latency` is a limit on the table that is looked for. Along the plans that lower limits give, the
measured share falls, about in a straight line:

    share   1.0                         o  nothing has left
                             o             the first limit, in proportion: too slow
            asked  - - - x - - - - - -     the second, where the line through both is at what was asked
                       o                   too fast: from now on the limit lies between two that were measured
                    table's microseconds

Nothing but the choice is done again: scores and statistics stay.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from taylorfx.cost.algebra import Cost
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.selection.budget import TOLERANCE, Budget, BudgetError, Budgets, Counted, Latency, each_budget
from taylorfx.selection.constraints import Constraints

__all__ = ["corrected"]

TRIES = 12
"""How many limits are tried at most."""


def corrected(
    choose: Callable[[tuple[Budget, ...], Constraints], Plan],
    coupling: Coupling,
    budget: Budgets,
    constraints: Constraints,
) -> Plan:
    """The plan that is chosen where budgets of `Latency` hold as they are measured, and with their multiples.

    The plan is at most `TOLERANCE` over what was asked, and below by more only where no slower one that fits was found;
    ``plan.asked`` says what was measured.

    Args:
        choose: gives a plan by budgets and constraints that need no correction.

    Raises:
        BudgetError: if no plan is fast enough; the message says how fast the fastest is.
    """
    budgets = each_budget(budget)
    for one in budgets:
        if isinstance(one, Latency) and one.multiples and (free := one.timings.multiple(coupling)):
            constraints = constraints.also(Constraints(multiple=free), coupling)
    searches = [_Search.of(one, coupling) if isinstance(one, Latency) and one.whole else None for one in budgets]
    open_ones = [search for search in searches if search]
    if not open_ones:
        return choose(budgets, constraints)
    seen: dict[Plan, float] = {}
    problem: BudgetError | None = None
    for _ in range(TRIES):
        tables = (search.table if search else one for one, search in zip(budgets, searches, strict=True))
        try:
            plan = choose(tuple(tables), constraints)
        except BudgetError as error:
            problem = error
            for search in open_ones:
                search.loosen()
        else:
            over = [search.note(plan) for search in open_ones]
            seen[plan] = max(over)
            if max(map(abs, over)) <= TOLERANCE:
                break
        if all(search.closed for search in open_ones):
            break
    if not seen and problem:
        raise problem
    best = max((plan for plan, over in seen.items() if over <= TOLERANCE), key=seen.__getitem__, default=None)
    if best is None:
        near = min(seen, key=seen.__getitem__)
        raise BudgetError(
            f"The budget is {' and '.join(map(str, budgets))}; run whole, the fastest network that was found takes "
            f"{', '.join(search.words(near) for search in open_ones)}. Ask for no less, loosen the constraints, or "
            "Latency(..., multiples=False)."
        )
    words = (search.words(best) if search else str(one) for one, search in zip(budgets, searches, strict=True))
    return replace(best, asked=" and ".join(words))


@dataclass(frozen=True)
class _Table(Counted):
    """A share of the layers' time in the table."""

    @property
    def what(self) -> str:
        return "layers' microseconds"


@dataclass
class _Search:
    """The limit on the table of one budget, and what is known of it.

    Attributes:
        limit: what the layers may take in the table, in microseconds.
        above: of plans that were too slow, the layers' microseconds and the measured share.
        below: of those that were fast enough, the limit and the measured share.
        least: the largest limit that no plan meets.
    """

    budget: Latency
    cost: Cost
    asked: float
    limit: float
    above: list[tuple[float, float]]
    below: list[tuple[float, float]] = field(default_factory=list)
    least: float = 0.0

    @staticmethod
    def of(budget: Latency, coupling: Coupling) -> _Search:
        """The start: the limit is in proportion to what was asked."""
        cost, asked = budget.timings.over(coupling), budget.asked(coupling)
        now = budget.timings.share(coupling.spec, budget.original or coupling.spec)
        return _Search(budget, cost, asked, cost.total * min(1.0, asked / now), [(cost.total, max(now, asked))])

    @property
    def table(self) -> Budget:
        """The budget that needs no correction."""
        return _Table(min(1.0, self.limit / self.cost.total), lambda _: self.cost)

    @property
    def closed(self) -> bool:
        """Whether no limit is left between what is too fast, or impossible, and what is too slow."""
        return min(self.above)[0] - max(self.below, default=(self.least, 0.0))[0] < 0.002 * self.cost.total

    def note(self, plan: Plan) -> float:
        """Measure a plan, move the limit, and say how far over what was asked it is, as a share of that."""
        share = self.budget.share(plan)
        if share > self.asked:
            self.above.append((self.cost(plan.keep), share))
        else:
            self.below.append((self.limit, share))
        self.limit = self._next()
        return share / self.asked - 1

    def loosen(self) -> None:
        """No plan meets the limit: the next one is halfway to the lowest that was too slow."""
        self.least = self.limit
        self.limit = (self.least + min(self.above)[0]) / 2

    def _next(self) -> float:
        """Where the line through the two points next to what was asked is at what was asked."""
        high = min(self.above)
        under = [point for point in self.below if point[0] < high[0]]
        low = max(under) if under else sorted(self.above)[1] if len(self.above) > 1 else (0.0, 0.0)
        slope = (high[1] - low[1]) / (high[0] - low[0]) if high[0] != low[0] else 0.0
        if slope <= 0:  # noise
            slope = high[1] / high[0]
        new = high[0] - (high[1] - self.asked) / slope
        least = max(low[0] if under else 0.6 * high[0], self.least)
        margin = 0.1 * (high[0] - least)
        return min(max(new, least + margin), high[0] - margin)

    def words(self, plan: Plan) -> str:
        """What was asked, what the table says and what was measured."""
        table, share = self.cost(plan.keep) / self.cost.total, self.budget.share(plan)
        return f"{self.budget} (measured {share:.1%}; {table:.1%} of the layers' time)"

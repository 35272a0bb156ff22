"""Budgets: what may remain of a network, in units, parameters, FLOPs, memory, time, or whatever a function counts."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from taylorfx.cost.algebra import Cost, CostFunction
from taylorfx.cost.counts import ORDER, flops, memory, parameters
from taylorfx.cost.timings import Timings
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.plan import Plan
from taylorfx.functions import name_of
from taylorfx.network.spec import Spec

__all__ = [
    "TOLERANCE", "Budget", "BudgetError", "Budgets", "Flops", "Latency", "Measured", "Memory", "Parameters", "Remove",
    "SelectionError", "Units", "each_budget", "fixed", "pricing",
]  # fmt: skip


TOLERANCE = 0.03
"""How far the time of a network may be from what `Latency` was asked for, as a share of that."""


class SelectionError(ValueError):
    """Scores or constraints that make no sense; the message lists every offender."""


class BudgetError(SelectionError):
    """A budget that cannot be met; the message names the nearest that can."""


@dataclass(frozen=True)
class Budget(ABC):
    """What may remain: a share of the whole (a float up to 1) or an absolute number (an int).

    `of` makes one of any cost function. A new kind is one subclass: ``cost`` says what to count. A `Cost` has prices,
    too; any other function of the kept units, ``(units,)``, has none, so that ``per_cost=True`` refuses it.
    """

    amount: float | int

    def __post_init__(self) -> None:
        number = isinstance(self.amount, (int, float, np.integer)) and not isinstance(self.amount, bool)
        if not number or not 0 < self.amount <= (1.0 if isinstance(self.amount, float) else math.inf):
            raise BudgetError(
                "A budget says what may remain: a share, a float above 0 and up to 1.0, or a number, an int above 0; "
                f"received {type(self).__name__}({self.amount!r})."
            )

    @staticmethod
    def of(amount: float | int, cost: Callable[[Coupling], Cost]) -> Budget:
        """At most this share or number of what a cost function counts; such a budget has prices.

        >>> import taylorfx as tfx
        >>> print(Budget.of(100_000, 2 * tfx.cost.memory + tfx.cost.parameters))
        100,000 2 * memory + parameters
        """
        return Counted(amount, cost)

    @abstractmethod
    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        """The function that says what the network costs when these units are kept."""

    def limit(self, total: float) -> float:
        """The most that may remain, of a network that costs ``total``."""
        return self.amount * total * (1 + 1e-12) if isinstance(self.amount, float) else self.amount

    def total(self, coupling: Coupling) -> float:
        """What the whole network costs."""
        return self.cost(coupling)(np.ones(len(coupling), bool))

    def compared(self, plan: Plan) -> tuple[float, float]:
        """The most that may remain of the plan's network, and what the plan leaves."""
        return self.limit(self.total(plan.coupling)), self.cost(plan.coupling)(plan.keep)

    def fixed(self, coupling: Coupling) -> Budget:
        """The same for what is left of this network: a share of it as a number."""
        if not isinstance(self.amount, float):
            return self
        return replace(self, amount=max(1, math.floor(self.limit(self.total(coupling)))))

    @property
    def what(self) -> str:
        """What is counted, in words."""
        return type(self).__name__.lower()

    def __str__(self) -> str:
        share = isinstance(self.amount, float)
        return f"at most {self.amount:.1%} of the {self.what}" if share else f"{self.amount:,} {self.what}"


@dataclass(frozen=True)
class Counted(Budget):
    """At most this share or number of what a cost function counts; made by `Budget.of`."""

    function: Callable[[Coupling], Cost]

    @property
    def what(self) -> str:
        return str(self.function) if isinstance(self.function, CostFunction) else name_of(self.function)

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return self.function(coupling)


class Flops(Budget):
    """At most this share or number of floating-point operations for one example."""

    @property
    def what(self) -> str:
        return "FLOPs"

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return flops(coupling)


class Parameters(Budget):
    """At most this share or number of trained parameters."""

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return parameters(coupling)


class Memory(Budget):
    """At most this share or number of elements alive at the peak, while one example is evaluated (`memory`)."""

    @property
    def what(self) -> str:
        return "elements at the peak"

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return memory(coupling)


@dataclass(frozen=True)
class Latency(Budget):
    """At most this share of the time, or number of microseconds, that the network takes on this machine.

    Units are chosen by what a few widths of every layer take (`Timings.over`). Then the network that is left is run
    whole beside the original, by the runner of the timings, and units are chosen again by a corrected limit, until the
    measured share is within 3 % of what was asked, or none of the networks that fit is slower; the plan says what was
    measured. Give budgets the same ``timings``
    to measure each layer and each network once.

    Attributes:
        timings: the batch, the runner, and what was measured. With ``runner=None`` the layers' sum alone counts.
        multiples: layers keep multiples that cost nothing on this machine (`Timings.multiple`), besides those of the
            constraints.
        original: the network whose time the share is of; by default the one that is cut.
    """

    timings: Timings = field(default_factory=Timings)
    multiples: bool = True
    original: Spec | None = None

    @property
    def what(self) -> str:
        return "microseconds"

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return self.timings.over(coupling)

    @property
    def whole(self) -> bool:
        """Whether networks are run whole, so that the limit on what the layers take is corrected."""
        return self.timings.runner is not None

    def total(self, coupling: Coupling) -> float:
        return self.timings.whole(coupling.spec) if self.whole else super().total(coupling)

    def compared(self, plan: Plan) -> tuple[float, float]:
        if not self.whole:
            return super().compared(plan)
        return self.asked(plan.coupling) * (1 + TOLERANCE), self.share(plan)

    def fixed(self, coupling: Coupling) -> Budget:
        """Still a share: the whole network is timed beside the smaller ones, as a machine's pace changes."""
        if not self.whole:
            return super().fixed(coupling)
        return replace(self, original=self.original or coupling.spec) if isinstance(self.amount, float) else self

    def asked(self, coupling: Coupling) -> float:
        """What may remain as a share of the whole network's time."""
        whole = self.original or coupling.spec
        return self.amount if isinstance(self.amount, float) else self.amount / self.timings.whole(whole)

    def share(self, plan: Plan) -> float:
        """What a plan leaves, as it is measured, as a share of the whole network's time."""
        return self.timings.share(plan.spec, self.original or plan.coupling.spec)


@dataclass(frozen=True)
class Measured(Budget):
    """At most this share or number of whatever a function of the cut network's spec says.

    It is called for the whole network, for the smallest one that the constraints allow, and for about as many in
    between as the logarithm of the number of units.
    """

    function: Callable[[Spec], float]

    @property
    def what(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        def cost(keep: Mask) -> float:
            value = float(self.function(Plan(coupling, keep).spec))
            if not math.isfinite(value):
                raise BudgetError(f"A cost is a finite number; received {value} from {self.what}.")
            return value

        return cost


class Units(Budget):
    """Exactly this number of units, or this share of them (rounded down); at most, if it is one of several budgets.

    A branch that leaves takes the units in it along, which count, too.
    """

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return lambda keep: float(coupling.settled(keep).sum())

    def limit(self, total: float) -> float:
        return math.floor(super().limit(total))


class Remove(Units):
    """All but this number of units: ``Remove(1)`` takes one feature map, as Molchanov et al. 2016 did at each step."""

    def limit(self, total: float) -> float:
        return total - math.floor(self.amount * total if isinstance(self.amount, float) else self.amount)

    def fixed(self, coupling: Coupling) -> Budget:
        return self

    def __str__(self) -> str:
        if isinstance(self.amount, float):
            return f"{self.amount:.1%} of the units less"
        return f"{self.amount:,} unit{'s' * (self.amount != 1)} less"


Budgets = Budget | float | int | Sequence[Budget | float | int]
"""What `select` takes: one budget or several; a plain number means `Units`."""


def pricing(budgets: Sequence[Budget], costs: Sequence[Callable[[Mask], float]]) -> Callable[[Mask], Tensor] | None:
    """What leaves with each unit, ``(units,)`` and above 0, as a share of what may remain, where these are kept.

    Of several budgets, which have these costs, the fullest counts by far most. None if none has prices.

    Raises:
        BudgetError: for a budget of a kind of its own whose cost is no `Cost`, and so without prices.
    """
    both = [*zip(budgets, costs, strict=True)]
    unpriced = [one for one, cost in both if not isinstance(cost, Cost) and not isinstance(one, (Units, Measured))]
    if unpriced:
        raise BudgetError(
            "per_cost=True weighs scores by what leaves with a unit, which a `Cost` says (`marginal`); the cost of "
            f"{', '.join(type(one).__name__ for one in unpriced)} is another function. Let its `cost` return a "
            "taylorfx.Cost, or select with per_cost=False."
        )
    priced = [(cost, one.limit(cost.total)) for one, cost in both if isinstance(cost, Cost) and cost.total]
    if not priced:
        return None

    def prices(keep: Mask) -> Tensor:
        full = np.array([cost(keep) / limit for cost, limit in priced])
        weights = (full / full.max()) ** ORDER
        shares = [w / limit * cost.marginal(keep) for w, (cost, limit) in zip(weights.tolist(), priced, strict=True)]
        saved = torch.stack(shares).sum(0)
        return saved.clamp(min=1e-9 * float(saved.max())) if (saved > 0).any() else torch.ones_like(saved)

    return prices


def each_budget(budget: Budgets) -> tuple[Budget, ...]:
    """The budgets, of which there may be one.

    Raises:
        BudgetError: if there is none.
    """
    several = budget if isinstance(budget, Sequence) and not isinstance(budget, str) else [budget]
    if not several:
        raise BudgetError("A budget, or several, say what may remain; received none.")
    return tuple(one if isinstance(one, Budget) else Units(one) for one in several)


def fixed(budget: Budgets, coupling: Coupling) -> tuple[Budget, ...]:
    """The budgets for what is left of a network: their shares are of it. What leaves (`Remove`) stays a share."""
    return tuple(one.fixed(coupling) for one in each_budget(budget))

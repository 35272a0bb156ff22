"""What `prune` and `iterate` do at every step: measure, choose, cut, repair."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.cutting.pruned import Pruned
from taylorfx.distributed import agreed
from taylorfx.functions import innermost
from taylorfx.repair.batches import Batches, Repair
from taylorfx.repair.calls import check_repair, mended
from taylorfx.repair.least_squares import reconstruct
from taylorfx.scoring.criterion import Criterion, Score, as_criterion
from taylorfx.scoring.fingerprint import of_layers, of_params
from taylorfx.scoring.measure import measure
from taylorfx.scoring.measurement import Measurement
from taylorfx.scoring.products import Products, products
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection.budget import Budget, Remove, SelectionError, Units
from taylorfx.selection.choice import Choose, check_choice, chosen
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.joint import joint
from taylorfx.selection.select import foresee, select
from taylorfx.selection.surgeon import surgeon
from taylorfx.tree import Params

__all__ = ["Step"]

LEFT = 0.9
"""What each step of `prune` leaves at least."""

LEFT_SOLVED = 0.6
"""What each step leaves at least that chooses by what the repair after it cannot undo."""


class Step(NamedTuple):
    """What every step does, whatever its network and its budget are.

    Attributes:
        branches: branches are units.
        deep: branches leave by the loss without them; otherwise they are chosen beside the other units.
    """

    batches: Batches
    criterion: Criterion[...] | None
    choose: Choose
    measurement: Measurement
    per_cost: bool
    repair: Repair | None
    branches: bool
    deep: bool
    measuring: Callable[..., Statistics | Products]

    @staticmethod
    def of(
        batches: Batches, criterion: Score | None, choose: Choose | None, measurement: Measurement, per_cost: bool,
        *, cautious: bool, repair: Repair | None, branches: bool,
    ) -> Step:  # fmt: skip
        """A step by what `iterate` takes.

        Raises:
            ValueError: for what is no criterion, no choice or no repair.
        """
        scoring = None if criterion is None else as_criterion(criterion)
        check_repair(repair, batches)
        how = replace(measurement, generator=measurement.generator or torch.Generator().manual_seed(0))
        alone = scoring is None and choose is None  # nothing but the repair says how units are chosen
        if choose is None:
            choose = partial(joint, cautious=cautious) if scoring is None else select
        check_choice(choose, scored=scoring is not None)
        step = Step(batches, scoring, choose, how, per_cost, repair, branches, alone and branches, measure)
        return step.width if alone and not branches else step

    @property
    def width(self) -> Step:
        """The same where all branches stay, and the repair says how units are chosen."""
        how = self.measurement
        solved = innermost(self.repair) is reconstruct and not (how.at_writes or how.training or how.per_position)
        step = self._replace(branches=False, deep=False)
        return step._replace(choose=surgeon, measuring=products) if solved else step

    def goes_deep(self, budgets: Sequence[Budget]) -> bool:
        """Whether branches leave by the loss without them. Units are counted with branches, and chosen beside them."""
        return self.deep and not any(isinstance(one, (Units, Remove)) for one in budgets)

    def taken(
        self, params: Params, coupling: Coupling, budgets: tuple[Budget, ...], constraints: Constraints
    ) -> Pruned:
        """The plan, and what it leaves, repaired; the same in all processes."""
        return self.after(params, lambda: self.plan(params, coupling, budgets, constraints))

    def after(self, params: Params, decide: Callable[[], Plan]) -> Pruned:
        """What the plan that is decided on leaves, repaired; the same in all processes."""
        total = self.measurement.total

        def left() -> Pruned:
            plan = decide()
            return Pruned(*mended(self.repair, self.batches, params, plan, total), (plan,))

        def told(done: Pruned) -> str:
            return f"plan {done.plans[0].digest}, {of_params(done.params)}, {of_layers(done.spec)}"

        return agreed(total, left, told)

    def plan(self, params: Params, coupling: Coupling, budgets: tuple[Budget, ...], constraints: Constraints) -> Plan:
        """Measure and choose."""
        foresee(coupling, budget=budgets, constraints=constraints, per_cost=self.per_cost)
        worth = self.worth(params, coupling)
        return chosen(self.choose, worth, coupling, budgets=budgets, constraints=constraints, per_cost=self.per_cost)

    def worth(self, params: Params, coupling: Coupling) -> Statistics | Products | torch.Tensor:
        """What is chosen by: the criterion's scores; the statistics where there is none, or the products."""
        if self.needs is None:
            assert self.criterion is not None
            return _telling(self.criterion.on(params, coupling.spec, self.batches, coupling, self.measurement))
        stats = self.measuring(params, coupling.spec, self.batches, coupling, measurement=self.needs)
        return stats if self.criterion is None else _telling(self.criterion(stats, coupling))

    @property
    def left(self) -> float:
        """What each step leaves at least, where nobody says how many there are."""
        return LEFT_SOLVED if self.choose is surgeon else LEFT

    @property
    def needs(self) -> Measurement | None:
        """How statistics are measured; none are, where the criterion is of something else."""
        if self.criterion is None:
            return replace(self.measurement, rows=True)
        return self.criterion.measured(self.measurement) if self.criterion.of == "statistics" else None


def _telling(scores: torch.Tensor) -> torch.Tensor:
    """The scores, unless they are zero for all of several units."""
    if isinstance(scores, torch.Tensor) and scores.numel() > 1 and not scores.any():
        raise SelectionError(
            f"Scores are zero for all {scores.numel()} units, so nothing tells them apart. Look at the criterion, the "
            "loss and the parameters."
        )
    return scores

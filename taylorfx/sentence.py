"""The sentence in one word: couple, measure, select, cut; by `prune`, and by `iterate` with training in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.repair.batches import Repair
from taylorfx.scoring.batches import Batch, Split
from taylorfx.scoring.criteria import Criterion, name_of, needs, scores, unfit
from taylorfx.scoring.losses import Loss, cross_entropy
from taylorfx.scoring.measure import measure
from taylorfx.selection.budget import Budget, BudgetError, Budgets, Remove, SelectionError, Units, each_budget
from taylorfx.selection.constraints import Constraints
from taylorfx.selection.joint import joint
from taylorfx.selection.schedule import exponential
from taylorfx.selection.select import foresee, select
from taylorfx.tree import Params

__all__ = ["iterate", "prune"]


def prune(
    params: Params,
    spec: Spec,
    batch: Batch | Iterable[Batch],
    *,
    budget: Budgets,
    criterion: Criterion | None = None,
    loss: Loss = cross_entropy,
    per_example: bool = True,
    split: Split | None = None,
    moments: bool = False,
    protect: str | Sequence[str] = (),
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int | Mapping[str, int] = 1,
    uniform: str | Sequence[str] = (),
    per_layer: bool = False,
    isomorphic: bool = False,
    exact_only: bool = False,
    per_cost: bool = True,
    steps: int | None = None,
    repair: Repair | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Params, Spec]:
    """A smaller network that computes what the units it keeps computed: new parameters and a new spec.

    Args:
        batch: ``(inputs, targets)``, or an iterable of such.
        budget: what may remain: ``Flops(0.5)``, ``Parameters(...)``, ``Units(...)``, ``Remove(1)``;
            or several of them.
        criterion: a function of ``(statistics, coupling)``, or of ``(params, coupling)`` if marked by `of_weights`, or
            of what its `Needs` say: any of ours, or one of your own. What it needs is measured. Without one, units are
            chosen together, by `joint`, cautiously.
        moments: measure activations, too, for a criterion that looks at them without saying so.
        per_cost: weigh scores against what leaves with a unit, where a budget has prices: FLOPs, parameters, memory,
            latency. The loss grows far less that way. A kind of budget of your own has none if its cost is no `Cost`,
            and is then refused.
        steps: in how many cuts of equal ratio the budget is reached, each chosen by what is measured on what the one
            before has left: scores are of small changes. By default so many that each leaves nine tenths; one where an
            exact number of units is asked for (`Units`, `Remove`).
        repair: what makes up for every cut on the same batches: `reconstruct`, `compensate`, `recalibrate`, or a
            function of your own of ``(params, plan, batches)``. None by default, as `reconstruct`, which is best where
            nothing is trained afterwards, takes double precision and memory for the square of what a layer reads (5 GB
            for the first linear layer of VGG16).
        generator: what `random` draws from; by default one of seed 0.

    Budgets, constraints, the criterion and the repair are checked before anything is measured.

    The other arguments are those of `measure` and `select`, and so are the errors; scores that are zero for all units
    are refused. Nothing given is changed. To see what is going to happen, or to cut momentum along, write the sentence
    out.
    """
    constraints: dict[str, Any] = {
        "protect": protect, "floor": floor, "most": most, "multiple": multiple, "uniform": uniform,
        "per_layer": per_layer, "isomorphic": isomorphic, "exact_only": exact_only,
    }  # fmt: skip
    budgets, given = each_budget(budget), Constraints.of(constraints)
    if steps is None and any(isinstance(one, Units) for one in budgets):
        steps = 1
    ways: Iterable[Budgets] = [budgets]
    if steps != 1:
        coupling = couple(params, spec)
        foresee(coupling, budget=budgets, constraints=given, per_cost=per_cost)  # an error names what was asked for
        ways = _ways(budgets, steps, coupling)
    if isinstance(batch, Iterator) and (steps != 1 or repair is not None):
        batch = _Kept(batch)  # every step measures it
    *_, (small, smaller, _) = iterate(
        params, spec, batch, budgets=ways, criterion=criterion, loss=loss, per_example=per_example, split=split,
        moments=moments, per_cost=per_cost, repair=repair, generator=generator, **given.options,
    )  # fmt: skip
    return small, smaller


class _Kept(Iterable[Batch]):
    """The batches of an iterator, taken when they are first asked for and kept for the next time."""

    def __init__(self, batches: Iterator[Batch]) -> None:
        self.batches = batches
        self.kept: list[Batch] | None = None

    def __iter__(self) -> Iterator[Batch]:
        self.kept = [*self.batches] if self.kept is None else self.kept
        return iter(self.kept)


def _ways(budgets: Sequence[Budget], steps: int | None, coupling: Coupling) -> Iterable[tuple[Budget, ...]]:
    """The budgets of every step, in equal ratios down to these."""
    if any(isinstance(one, Remove) for one in budgets):
        raise BudgetError("Steps lead down to what may remain; received a budget of what leaves, Remove.")
    totals = [one.cost(coupling)(np.ones(len(coupling), bool)) for one in budgets]
    if steps is None:
        least = min(one.limit(n) / n if n else 1.0 for one, n in zip(budgets, totals, strict=True))
        steps = max(1, math.ceil(math.log(least) / math.log(LEFT) - 1e-9))
    starts = (None if isinstance(one.amount, float) else round(n) for one, n in zip(budgets, totals, strict=True))
    return zip(*(exponential(one, steps, start=start) for one, start in zip(budgets, starts, strict=True)), strict=True)


LEFT = 0.9
"""What each step of `prune` leaves at least."""


def iterate(
    params: Params,
    spec: Spec,
    batches: Batch | Iterable[Batch],
    *,
    budgets: Iterable[Budgets],
    criterion: Criterion | None = None,
    loss: Loss = cross_entropy,
    per_example: bool = True,
    split: Split | None = None,
    moments: bool = False,
    per_cost: bool = True,
    cautious: bool = True,
    repair: Repair | None = None,
    generator: torch.Generator | None = None,
    **constraints: Any,
) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
    """Prune in steps, with training in between: score and cut for each budget, and hand out what is left.

    Every step gives ``(params, spec, plan)``: the smaller network, and the plan that led to it from the one before, by
    which momentum and averages are cut along. ``send`` takes the parameters back after training; what is not sent back
    goes on as it was handed out. ::

        steps = tfx.iterate(params, spec, batches, budgets=tfx.schedule.cubic(tfx.Flops(0.2), 7))
        for params, spec, plan in steps:
            momentum = tfx.cut(momentum, plan)
            params, momentum = train(params, momentum, spec)
            steps.send(params)

    Args:
        batches: measured again at every step; a list or a loader rather than an iterator, which one step would use up.
        budgets: what may remain after each step; shares are of the network given here, but for `Remove`, which counts
            from step to step.
        cautious: how `joint` chooses where there is no criterion.
        constraints: those of `select`; ``most`` is the largest share of the network given here that a scope loses, and
            what has become too small to lose anything needs no constraint any more.

    The other arguments are those of `prune`, and so are the errors; what is wrong with constraints, the criterion and
    the repair is said at once, what is wrong with a budget before its step measures anything. A bias that a layer gains
    from a repair is not in the plan: the momentum lacks it, and such a step's plan does not compose with the next one.
    """
    given, draw = Constraints.of(constraints), torch.Generator().manual_seed(0) if generator is None else generator
    if criterion is not None:
        needs(criterion)
    _check_repair(repair, batches)
    measured: dict[str, Any] = {"loss": loss, "per_example": per_example, "split": split}
    whole = couple(params, spec)
    given.on(whole)

    def choose(params: Params, spec: Spec, coupling: Coupling, asked: Budgets, rules: Constraints) -> Plan:
        foresee(coupling, budget=asked, constraints=rules, per_cost=per_cost)
        options: dict[str, Any] = {"budget": asked, "per_cost": per_cost, **rules.options}
        if criterion is None:
            stats = measure(params, spec, batches, coupling, moments=moments, rows=True, **measured)
            return joint(stats, coupling, cautious=cautious, **options)
        found = scores(criterion, params, spec, batches, coupling, generator=draw, moments=moments, **measured)
        return select(_telling(found), coupling, **options)

    return _iterated(params, spec, budgets, whole, given, choose, partial(_mended, repair, batches))


def _iterated(
    params: Params,
    spec: Spec,
    budgets: Iterable[Budgets],
    whole: Coupling,
    constraints: Constraints,
    choose: Callable[..., Plan],
    mend: Callable[[Params, Plan], tuple[Params, Spec]],
) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
    lasting = constraints.lasting(whole)
    for k, budget in enumerate(budgets):
        coupling = couple(params, spec) if k else whole
        asked, rules = (_fixed(budget, whole), lasting.standing(coupling)) if k else (each_budget(budget), constraints)
        plan = choose(params, spec, coupling, asked, rules)
        params, spec = mend(params, plan)
        trained = yield params, spec, plan
        if trained is not None:
            params = trained
            yield params, spec, plan  # what `send` returns, so that a `for` loop does not miss the next step


def _check_repair(repair: Any, batches: Any) -> None:
    """Refuse what is no repair, before anything is measured."""
    if repair is None:
        return
    problem = unfit(repair, None, None, None) if callable(repair) else "it is not called"
    if problem:
        raise ValueError(
            "A repair is a function of (params, plan, batches) that gives (params, spec): reconstruct, compensate, "
            f"recalibrate; received {name_of(repair)}: {problem}."
        )
    if isinstance(batches, Iterator):
        raise ValueError(
            "A repair looks at the batches that were measured; received an iterator, which measuring uses up. Give a "
            "list or a loader."
        )


def _mended(repair: Repair | None, batches: Any, params: Params, plan: Plan) -> tuple[Params, Spec]:
    """What is cut, and repaired."""
    if repair is None:
        return cut(params, plan), plan.spec
    found: Any = repair(params, plan, batches)
    if not isinstance(found, tuple) or len(found) != 2 or not isinstance(found[1], Spec):
        raise ValueError(
            f"A repair gives (params, spec) of the smaller network; {name_of(repair)} gave a {type(found).__name__}."
        )
    check(*found)
    return found


def _telling(scores: Any) -> Any:
    """The scores, unless they are zero for all of several units."""
    if isinstance(scores, torch.Tensor) and scores.numel() > 1 and not scores.any():
        raise SelectionError(
            f"Scores are zero for all {scores.numel()} units, so nothing tells them apart. Look at the criterion, the "
            "loss and the parameters."
        )
    return scores


def _fixed(budget: Budgets, coupling: Coupling) -> tuple[Budget, ...]:
    """The budgets as numbers: their shares are of this network."""
    everything = np.ones(len(coupling), bool)

    def number(one: Budget) -> Budget:
        if isinstance(one, Remove) or not isinstance(one.amount, float):
            return one
        return replace(one, amount=max(1, math.floor(one.limit(one.cost(coupling)(everything)))))

    return tuple(map(number, each_budget(budget)))

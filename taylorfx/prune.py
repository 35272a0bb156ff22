"""The sentence in one word: couple, measure, select, cut; by `prune`, and by `iterate` with training in between."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from glob import escape
from typing import Any

import numpy as np
import torch

from taylorfx.budget import Budget, BudgetError, Budgets, Remove, SelectionError, Units, each_budget
from taylorfx.coupling import Coupling, couple
from taylorfx.criteria import Criterion
from taylorfx.gates import measure
from taylorfx.joint import joint
from taylorfx.loss import Batch, Loss, Split, cross_entropy
from taylorfx.plan import Plan, cut
from taylorfx.repair import Repair
from taylorfx.schedule import exponential
from taylorfx.selection import by_scope, select
from taylorfx.spec import Spec
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
) -> tuple[Params, Spec]:
    """A smaller network that computes what the units it keeps computed: new parameters and a new spec.

    Args:
        batch: ``(inputs, targets)``, or an iterable of such.
        budget: what may remain: ``Flops(0.5)``, ``Parameters(...)``, ``Units(...)``, ``Remove(1)``;
            or several of them.
        criterion: a function of ``(statistics, coupling)``, or of ``(params, coupling)`` if marked by `of_weights`.
            Without one, units are chosen together, by `joint`, cautiously.
        per_cost: weigh scores against what leaves with a unit, where a budget has prices: FLOPs, parameters, memory,
            latency. The loss grows far less that way.
        steps: in how many cuts of equal ratio the budget is reached, each chosen by what is measured on what the one
            before has left: scores are of small changes. By default so many that each leaves nine tenths; one where an
            exact number of units is asked for (`Units`, `Remove`).
        repair: what makes up for every cut on the same batches: `reconstruct`, `compensate`. None by default, as
            `reconstruct`, which is best where nothing is trained afterwards, takes double precision and memory for the
            square of what a layer reads (5 GB for the first linear layer of VGG16).

    The other arguments are those of `measure` and `select`, and so are the errors; scores that are zero for all units
    are refused. Nothing given is changed. To see what is going to happen, or to cut momentum along, write the sentence
    out.
    """
    constraints: dict[str, Any] = {
        "protect": protect, "floor": floor, "most": most, "multiple": multiple, "uniform": uniform,
        "per_layer": per_layer, "isomorphic": isomorphic, "exact_only": exact_only,
    }  # fmt: skip
    budgets = each_budget(budget)
    if steps is None and any(isinstance(one, Units) for one in budgets):
        steps = 1
    ways: Iterable[Budgets] = [budgets]
    if steps != 1:
        batch = list(batch) if isinstance(batch, Iterator) else batch  # every step measures it
        coupling = couple(params, spec)
        select(torch.zeros(len(coupling)), coupling, budget=budgets, **constraints)  # an error names what was asked for
        ways = _ways(budgets, steps, coupling)
    *_, (small, smaller, _) = iterate(
        params, spec, batch, budgets=ways, criterion=criterion, loss=loss, per_example=per_example, split=split,
        moments=moments, per_cost=per_cost, repair=repair, **constraints,
    )  # fmt: skip
    return small, smaller


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

    The other arguments are those of `prune`, and so are the errors. A bias that a layer gains from a repair is
    not in the plan: the momentum lacks it, and such a step's plan does not compose with the next one.
    """
    whole: Coupling | None = None
    asked_for: dict[str, Any] = {"loss": loss, "per_example": per_example, "split": split, "moments": moments}
    for budget in budgets:
        coupling = couple(params, spec)
        if whole is None:
            whole, asked, rules = coupling, each_budget(budget), constraints
            lasting = _lasting(constraints, whole)
        else:
            asked, rules = _fixed(budget, whole), _standing(lasting, coupling)
        if getattr(criterion, "of_weights", False):
            plan = select(_telling(criterion(params, coupling)), coupling, budget=asked, per_cost=per_cost, **rules)  # type: ignore
        else:
            stats = measure(params, spec, batches, coupling, rows=criterion is None, **asked_for)
            if criterion is None:
                plan = joint(stats, coupling, budget=asked, per_cost=per_cost, cautious=cautious, **rules)
            else:
                plan = select(_telling(criterion(stats, coupling)), coupling, budget=asked, per_cost=per_cost, **rules)  # type: ignore
        params, spec = (cut(params, plan), plan.spec) if repair is None else repair(params, plan, batches)
        trained = yield params, spec, plan
        if trained is not None:
            params = trained
            yield params, spec, plan  # what `send` returns, so that a `for` loop does not miss the next step


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


def _lasting(constraints: Mapping[str, Any], coupling: Coupling) -> dict[str, Any]:
    """The constraints with ``floor`` and ``most`` as one floor for every scope of this network."""
    floors = by_scope(coupling, constraints.get("floor", 1), "floor", 1)
    shares = by_scope(coupling, constraints.get("most", 1.0), "most", 1.0)
    sizes = zip(coupling.scopes, floors, shares, coupling.sizes.tolist(), strict=True)
    least = {escape(name): max(floor, math.ceil((1 - most) * size - 1e-9)) for name, floor, most, size in sizes}
    return {**constraints, "floor": least, "most": 1.0}


def _standing(constraints: Mapping[str, Any], coupling: Coupling) -> dict[str, Any]:
    """The constraints without the globs that match nothing any more."""

    def stands(glob: str) -> bool:
        return any(fnmatchcase(name, glob) for name in (*coupling.scopes, *coupling.frozen))

    def still(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {glob: number for glob, number in value.items() if stands(glob)}
        if isinstance(value, (str, tuple, list)):
            return tuple(glob for glob in ([value] if isinstance(value, str) else value) if stands(glob))
        return value

    return {key: still(value) for key, value in constraints.items()}

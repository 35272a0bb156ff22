"""The sentence in one word: couple, measure, select, cut; by `prune`, and by `iterate` with training in between."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.cutting.plan import Plan
from taylorfx.cutting.pruned import Interrupted, Pruned
from taylorfx.distributed import Total, agreed, alone
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG
from taylorfx.repair.batches import Batches, Repair
from taylorfx.scoring.batches import Kept, each_batch
from taylorfx.scoring.criterion import Score
from taylorfx.scoring.fingerprint import fingerprint, plain
from taylorfx.scoring.measurement import Measurement, MeasurementOptions, names_of
from taylorfx.selection.budget import Budget, BudgetError, Budgets, Remove, SelectionError, Units, each_budget, fixed
from taylorfx.selection.choice import Choose
from taylorfx.selection.constraints import ConstraintOptions, Constraints
from taylorfx.selection.depth import depths
from taylorfx.selection.schedule import exponential
from taylorfx.selection.select import Asked, foresee
from taylorfx.step import Step
from taylorfx.tree import Params
from taylorfx.truth.losses import each_loss, mean_loss

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from taylorfx.interop.like import Original, UserModule

__all__ = ["Interrupted", "iterate", "prune"]


class Options(ConstraintOptions, MeasurementOptions, total=False):
    """The keywords of `Constraints` and `Measurement`, for the type checker."""


def prune(
    params: Params,
    spec: Spec,
    batch: Batches,
    *,
    budget: Budgets,
    criterion: Score | None = None,
    choose: Choose | None = None,
    constraints: Constraints | None = None,
    measurement: Measurement | None = None,
    per_cost: bool = True,
    steps: int | None = None,
    repair: Repair | None = None,
    like: UserModule | None = None,
    branches: bool = False,
    **options: Unpack[Options],
) -> Pruned:
    """A smaller network that computes what the units it keeps computed: new parameters and a new spec.

    ::

        params, spec = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5), protect="stem.*", loss=loss)

    Args:
        batch: ``(inputs, targets)``, or an iterable of such.
        budget: what may remain: ``Flops(0.5)``, ``Parameters(...)``, ``Units(...)``, ``Remove(1)``;
            or several of them.
        criterion: a function of ``(statistics, coupling)``, or a `Criterion`, which says what else it is a function of:
            any of ours, or one of your own. What it needs is measured. Without one, units are chosen together, by
            `joint`, cautiously; with ``repair=reconstruct`` by what that cannot undo, see
            `taylorfx.selection.surgeon`, from the products of the activations and of the loss's derivatives by them.
        choose: what decides which units leave, a function of ``(scores, coupling, budget=..., constraints=...,
            per_cost=...)`` that gives a `Plan`; without a criterion it gets the statistics, with rows, in place of
            scores. ``budget`` is a tuple, ``constraints`` a `Constraints`; plans that break them are refused.
        constraints: what has to be respected, as in `select`.
        measurement: the loss and how the network is run, as in `measure`; ``generator`` is also what `random` draws
            from, by default one of seed 0. ``around`` belongs to one network, and so not here. With ``per_position``,
            `joint` chooses in any case.
        per_cost: weigh scores against what leaves with a unit, where a budget has prices: FLOPs, parameters, memory,
            latency. The loss grows far less that way. A kind of budget of your own has none if its cost is no `Cost`,
            and is then refused.
        steps: in how many cuts of equal ratio the budget is reached, each chosen by what is measured on what the one
            before has left: scores are of small changes. By default so many that each leaves nine tenths, or six
            where units are chosen by what the repair cannot undo; one where an exact number of units is asked for
            (`Units`, `Remove`).
        repair: what makes up for every cut on the same batches: `reconstruct`, `compensate`, `recalibrate`, or a
            function of your own of ``(params, plan, batches)``. `reconstruct` is best where nothing is trained
            afterwards. It is not the default, as layers gain biases that a class may not have, as it takes double
            precision and memory for two squares of what a layer still reads (or for its rows, if they are few), and as
            what it leaves is no longer the gated network.
        like: the module that was captured. Only what its own class can hold is cut, so that ``to_torch(params, spec,
            like=module)`` gives a smaller one of it: `taylorfx.interop.holdable` finds the constraints on the first
            examples, which join the others.
        branches: residual branches may leave, too, as in `couple`; not with ``like``, but with the constraints of
            `taylorfx.interop.huggingface.holdable`. By default networks with fewer and fewer are compared by their
            losses on ``batch`` (`taylorfx.selection.depth`), six at most; with a criterion, a ``choose`` or a number of
            units, branches are chosen beside the other units.
        options: the attributes of `Constraints` and of `Measurement` as keywords, instead of the values.

    With ``total=taylorfx.distributed.total`` several processes, each with batches of its own, perhaps none, prune as
    one with all of them: what is summed over batches is added up, and every step's plan and parameters are compared.

    Budgets, constraints, the criterion, the choice and the repair are checked before anything is measured. The errors
    are those of `measure` and `select`; scores that are zero for all units are refused. Nothing that is received is
    changed. To see what is going to happen, write the sentence out.

    Returns:
        The pair ``(params, spec)``. As a `Pruned` it also has the ``plan`` that led there, by which momentum is cut and
        optimizers are carried along, and the ``plans`` of its steps.

    Raises:
        Interrupted: at a ``KeyboardInterrupt`` after the first step, with what the last whole step left.
    """
    said = Sentence.of(
        batch, budget=budget, criterion=criterion, choose=choose, constraints=constraints, measurement=measurement,
        per_cost=per_cost, steps=steps, repair=repair, like=like, branches=branches, **options,
    )  # fmt: skip
    return said(params, spec)


class Sentence(NamedTuple):
    """`prune` of a network that is still open: its other arguments, checked as far as they can be without one."""

    budgets: tuple[Budget, ...]
    steps: int | None
    constraints: Constraints
    like: UserModule | None
    step: Step

    @staticmethod
    def of(
        batch: Batches, *, budget: Budgets, criterion: Score | None = None, choose: Choose | None = None,
        constraints: Constraints | None = None, measurement: Measurement | None = None, per_cost: bool = True,
        steps: int | None = None, repair: Repair | None = None, like: UserModule | None = None, branches: bool = False,
        **options: object,
    ) -> Sentence:  # fmt: skip
        """By the arguments of `prune`, which says what is refused."""
        budgets, (respected, how) = each_budget(budget), _values(constraints, measurement, options)
        if steps is None and any(isinstance(one, Units) for one in budgets):
            steps = 1
        if isinstance(batch, Iterator) and (steps != 1 or repair is not None or like is not None):
            batch = Kept(batch)  # every step measures it
        if like is not None and branches:
            raise SelectionError(
                "What a class can hold has all of its branches; received like=... and branches=True. Leave one of them "
                "out. Of a model of transformers whole layers may leave: give constraints=taylorfx.interop.huggingface."
                "holdable(model, params, spec, branches=True) in place of like."
            )
        step = Step.of(batch, criterion, choose, how, per_cost, cautious=True, repair=repair, branches=branches)
        return Sentence(budgets, steps, respected, like, step)

    def __call__(self, params: Params, spec: Spec) -> Pruned:
        """Prune this network."""
        if self.like is None:
            return _pruned(params, spec, self.budgets, self.steps, self.constraints, self.step)
        holding = partial(self._held, self.like, params, spec)
        original, respected = agreed(self.step.measurement.total, holding, lambda held: plain(held[1]))
        pruned = _pruned(params, spec, self.budgets, self.steps, respected, self.step)
        _prove(original, pruned)
        return pruned

    def check(self, params: Params, spec: Spec, pruned: Pruned) -> None:
        """Refuse what was changed after all steps, if the class of the module cannot hold it."""
        if self.like is not None:
            _prove(self._original(self.like, params, spec), pruned)

    def _held(self, like: UserModule, params: Params, spec: Spec) -> tuple[Original, Constraints]:
        """The module that was captured, and the constraints with those that its class needs besides."""
        from taylorfx.interop import trials

        original, coupling = self._original(like, params, spec), couple(params, spec)
        held = trials.constraints_of(original, params, coupling, progress=self.step.measurement.progress)
        return original, self.constraints.also(held, coupling)

    def _original(self, like: UserModule, params: Params, spec: Spec) -> Original:
        """The module that was captured, compared with others on the first examples."""
        from taylorfx.interop import trials  # which imports torch.export, slowly

        first = next(each_batch(self.step.batches), None)
        if first is None:
            raise ValueError("The class is tried on the first examples; received no batch. Give every process some.")
        return trials.of_batch(like, params, spec, first[0])


def _prove(original: Original, pruned: Pruned) -> None:
    """Refuse what the class of the module cannot hold."""
    from taylorfx.interop import like as classes

    classes.resized(original, pruned.params, pruned.spec, ())


def _pruned(
    params: Params, spec: Spec, budgets: tuple[Budget, ...], steps: int | None, constraints: Constraints, step: Step
) -> Pruned:
    """All steps of `prune`."""
    whole = _coupled(params, spec, step)
    if step.goes_deep(budgets):
        return _shallower(params, whole, budgets, steps, constraints, step)
    return _narrower(params, whole, budgets, steps, constraints, step)


def _narrower(
    params: Params,
    whole: Coupling,
    budgets: tuple[Budget, ...],
    steps: int | None,
    constraints: Constraints,
    step: Step,
) -> Pruned:
    """What is left after steps that lead down to the budgets."""
    left = Pruned(params, whole.spec, ())
    try:
        for small, smaller, plan in _iterated(
            params, whole, partial(_ways, budgets, steps, step.left), constraints, step
        ):
            left = Pruned(small, smaller, (*left.plans, plan))
    except KeyboardInterrupt as stop:
        if not left.plans:
            raise
        raise Interrupted(left) from stop
    return left


def _values(
    constraints: Constraints | None, measurement: Measurement | None, options: Mapping[str, object]
) -> tuple[Constraints, Measurement]:
    """Both values, each as it is or made of its keywords.

    Raises:
        SelectionError: for keywords that neither has, for a value beside its keywords, and for globs that are none.
        ValueError: for what a `Measurement` refuses, and for centers, which are of one network only.
    """
    rules, ways = names_of(Constraints), names_of(Measurement)
    if strange := [name for name in options if name not in rules + ways]:
        raise SelectionError(
            f"The constraints are {', '.join(rules)}; the options of a measurement are {', '.join(ways)}; received "
            f"{', '.join(strange)}."
        )
    respected = Constraints.of(constraints, {name: value for name, value in options.items() if name in rules})
    how = Measurement.of(measurement, {name: value for name, value in options.items() if name in ways})
    if how.around:
        raise ValueError(
            "Activations are measured around the means of one network, and steps measure others; received around=... "
            "Write the sentence out: measure, select, cut."
        )
    return respected, how


def _ways(
    budgets: tuple[Budget, ...],
    steps: int | None,
    left: float,
    coupling: Coupling,
    constraints: Constraints,
    per_cost: bool,
) -> Iterable[tuple[Budget, ...]]:
    """The budgets of every step, in equal ratios down to these."""
    if steps == 1:
        return [budgets]
    foresee(coupling, budget=budgets, constraints=constraints, per_cost=per_cost)  # an error names what was asked for
    if any(isinstance(one, Remove) for one in budgets):
        raise BudgetError("Steps lead down to what may remain; received a budget of what leaves, Remove.")
    totals = [one.total(coupling) for one in budgets]
    least = min(one.limit(n) / n if n else 1.0 for one, n in zip(budgets, totals, strict=True))
    if least >= 1:  # there is nothing to save, as where branches have left that save more than was asked
        return [budgets]
    if steps is None:
        steps = max(1, math.ceil(math.log(least) / math.log(left) - 1e-9))
    starts = (None if isinstance(one.amount, float) else round(n) for one, n in zip(budgets, totals, strict=True))
    return zip(*(exponential(one, steps, start=start) for one, start in zip(budgets, starts, strict=True)), strict=True)


def iterate(
    params: Params,
    spec: Spec,
    batches: Batches,
    *,
    budgets: Iterable[Budgets],
    criterion: Score | None = None,
    choose: Choose | None = None,
    constraints: Constraints | None = None,
    measurement: Measurement | None = None,
    per_cost: bool = True,
    cautious: bool = True,
    repair: Repair | None = None,
    branches: bool = False,
    **options: Unpack[Options],
) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
    """Prune in steps, with training in between: score and cut for each budget, and hand out what is left.

    Every step gives ``(params, spec, plan)``: the smaller network, and the plan that led to it from the one before, by
    which momentum and averages are cut along. ``send`` takes the parameters back after training; without it the next
    step goes on with those that were handed out. ::

        steps = tfx.iterate(params, spec, batches, budgets=tfx.schedule.cubic(tfx.Flops(0.2), 7))
        for params, spec, plan in steps:
            momentum = tfx.cut(momentum, plan)
            params, momentum = train(params, momentum, spec)
            steps.send(params)

    Args:
        batches: measured again at every step; a list or a loader rather than an iterator, which one step would use up.
        budgets: what may remain after each step; shares are of the network that comes in, but for `Remove`, which
            counts from step to step.
        cautious: how `joint` chooses by default, where there is no criterion, no ``choose`` and no `reconstruct`.
        branches: as in `prune`; how many leave is decided at every step, for its budget.
        constraints: as in `select`; ``most`` is the largest share of the network that comes in that a scope loses, and
            what has become too small to lose anything needs no constraint any more.

    The other arguments are those of `prune`, and so are the errors; what is wrong with constraints, the criterion, the
    choice and the repair is said at once, what is wrong with a budget before its step measures anything. A bias that a
    layer gains from a repair is not in the plan of that step, and the momentum lacks it; plans compose all the same.
    """
    respected, how = _values(constraints, measurement, options)
    step = Step.of(batches, criterion, choose, how, per_cost, cautious=cautious, repair=repair, branches=branches)
    return _iterated(params, _coupled(params, spec, step), lambda *_: budgets, respected, step)


def _iterated(
    params: Params,
    whole: Coupling,
    ways: Callable[[Coupling, Constraints, bool], Iterable[Budgets]],
    constraints: Constraints,
    step: Step,
) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
    """`iterate`, whose budgets may depend on the network: the first step's coupling is theirs, too."""
    lasting = constraints.lasting(whole)  # which refuses what the network does not have
    return _each(params, ways(whole, constraints, step.per_cost), whole, (constraints, lasting), step)


def _coupled(params: Params, spec: Spec, step: Step) -> Coupling:
    """The coupling of the network, which is the same in all processes."""
    make, tell = partial(couple, params, spec, branches=step.branches), partial(fingerprint, params)
    coupling: Coupling = agreed(step.measurement.total, make, tell)
    return coupling


def _shallower(
    params: Params,
    coupling: Coupling,
    budgets: tuple[Budget, ...],
    steps: int | None,
    constraints: Constraints,
    step: Step,
) -> Pruned:
    """What is left when some branches leave first, and the rest of the budgets is taken from the width.

    Depths are compared by the losses of what is left, on the examples of the step. As a repair has seen them, a deeper
    one counts if it lowers the losses by more than the standard error of the difference; one that raises them by as
    much ends the search.
    """
    foresee(coupling, budget=budgets, constraints=constraints, per_cost=step.per_cost)
    asked, lasting, how = fixed(budgets, coupling), constraints.lasting(coupling), step.measurement
    best: tuple[Pruned, torch.Tensor] | None = None
    problem = BudgetError()

    def narrowed(plan: Plan) -> Pruned:
        """What is left at one depth."""
        first = Pruned(params, coupling.spec, (plan,)) if plan.whole else step.after(params, lambda: plan)
        shallow = couple(*first)
        try:
            left = _narrower(first.params, shallow, asked, steps, lasting.carried(plan, shallow), step.width)
        except Interrupted as stop:
            raise Interrupted(Pruned(*stop.pruned, (plan, *stop.pruned.plans))) from stop
        return Pruned(*left, (plan, *left.plans))

    def without(keep: Mask) -> float:
        return mean_loss(params, coupling, step.batches, how, plan=Plan(coupling, keep))

    for keep in depths(Asked.of(coupling, budgets, constraints), without):
        try:
            left = narrowed(Plan(coupling, keep))
        except BudgetError as error:
            problem = error
            continue
        except KeyboardInterrupt as stop:
            if best is None:
                raise
            raise Interrupted(best[0]) from stop
        losses = each_loss(left.params, couple(*left), step.batches, how)
        change = -math.inf if best is None else _change(losses - best[1], how.total)
        gone = sum(not keep[branch.unit] for branch in coupling.branches)
        LOG.info("without %d branches: loss %.4g", gone, losses.mean())
        if change > 1:
            break
        if change < -1:
            best = left, losses
    if best is None:
        raise problem
    return best[0]


def _change(differences: torch.Tensor, total: Total | None) -> float:
    """The mean of differences of losses, over all processes, in its standard errors; NaN if one is not finite."""
    sums = torch.stack([torch.ones_like(differences), differences, differences.square()]).sum(1)
    count, first, second = (total or alone)(lambda: sums).tolist()
    return math.copysign(math.sqrt(first**2 / max(second - first**2 / count, 1e-300)), first)


def _each(
    params: Params,
    budgets: Iterable[Budgets],
    whole: Coupling,
    constraints: tuple[Constraints, Constraints],
    step: Step,
) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
    """The steps: the first with the constraints as they are, all others with those that last."""
    respected, lasting = constraints
    spec, plan = whole.spec, None
    for k, budget in enumerate(budgets):
        asked = fixed(budget, whole) if k else each_budget(budget)
        coupling = couple(params, spec, branches=step.branches) if k else whole
        if plan is not None:
            respected = lasting = lasting.carried(plan, coupling)
        if step.goes_deep(asked):
            taken = _shallower(params, coupling, asked, 1, respected, step)
        else:
            taken = step.taken(params, coupling, asked, respected)
        (params, spec), plan = taken, taken.plan
        LOG.info("step %d: %r", k + 1, plan)
        trained = yield params, spec, plan
        if trained is not None:
            params = trained
            yield params, spec, plan  # what `send` returns, so that a `for` loop does not miss the next step

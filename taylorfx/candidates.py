"""Several ways to prune one network, compared by what is left of it at the end of the day.

What keeps most as it is cut need not be what is best once it is repaired or trained. So every candidate is pruned,
repaired, trained if there is a function for that, and judged by its loss on examples that none of this has seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, NamedTuple

import torch

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import PlanError
from taylorfx.cutting.pruned import Pruned
from taylorfx.distributed import agreed
from taylorfx.functions import name_of, unfit
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.network.tables import columns
from taylorfx.progress import LOG
from taylorfx.repair import reconstruct
from taylorfx.repair.batches import Batches, Repair
from taylorfx.repair.calls import check_repair, mended
from taylorfx.scoring.batches import Kept
from taylorfx.scoring.criteria import fisher, second_order, weight_l2
from taylorfx.scoring.fingerprint import of_params
from taylorfx.scoring.measure import measure
from taylorfx.scoring.measurement import Measurement
from taylorfx.scoring.statistics import Statistics
from taylorfx.selection.budget import Budgets, SelectionError
from taylorfx.sentence import Sentence
from taylorfx.tree import Params, flatten, unflatten
from taylorfx.truth.losses import mean_loss

__all__ = ["Best", "Candidate", "Tune", "best", "ours"]


Tune = Callable[[Params, Spec], Params]
"""``tune(params, spec)``: the parameters after a short training, of copies that may be written over."""


class Candidate(NamedTuple):
    """How one way to prune has turned out: mean losses on the examples that were held out, none where it has no such.

    Attributes:
        name: of the candidate.
        cut: the loss as cut; of one that repairs between its steps there is none.
        repaired: the loss after the repair.
        tuned: the loss after the training.
        spent: the share of what may remain that does remain; of several budgets, of the fullest.
        seconds: how long all of it took. What is measured for several candidates counts for the first of them.
        problem: why there is no network; empty if there is.
    """

    name: str
    cut: float | None = None
    repaired: float | None = None
    tuned: float | None = None
    spent: float | None = None
    seconds: float = 0.0
    problem: str = ""

    @property
    def loss(self) -> float:
        """What it is judged by: the loss after training, otherwise the lower of those as cut and repaired.

        >>> Candidate("a", cut=0.5, repaired=0.25).loss, Candidate("b", problem="the budget cannot be met").loss
        (0.25, inf)
        """
        if self.problem:
            return math.inf
        if self.tuned is not None:
            return self.tuned
        return min(x for x in (self.cut, self.repaired) if x is not None and math.isfinite(x))


class Best(NamedTuple):
    """The candidate that keeps most, and how all of them did; ``print(best)`` is a table.

    Attributes:
        name: of the winner.
        pruned: what it leaves, as `taylorfx.prune` gives it, repaired and trained.
        candidates: how all of them have turned out, in their order.
        whole: the loss of the network that came in, on the same examples.
    """

    name: str
    pruned: Pruned
    candidates: tuple[Candidate, ...]
    whole: float

    def __str__(self) -> str:
        tuned = any(one.tuned is not None for one in self.candidates)
        rows = [("held-out loss", "as cut", "repaired", *["tuned"] * tuned, "spent", "seconds")]
        rows.append(("(whole network)", _number(self.whole), *[""] * (3 + tuned)))
        for one in self.candidates:
            losses = map(_number, (one.cut, one.repaired, *[one.tuned] * tuned))
            spent = "-" if one.spent is None else f"{one.spent:.1%}"
            rows.append((one.name + " *" * (one.name == self.name), *losses, spent, f"{one.seconds:.1f}"))
        problems = [f"{one.name}: {one.problem}" for one in self.candidates if one.problem]
        return "\n".join([columns(rows, right=len(rows[0]) - 1), "* the lowest loss at the end", *problems])


def best(
    params: Params,
    spec: Spec,
    batches: Batches,
    *,
    budget: Budgets,
    held_out: Batches,
    candidates: Mapping[str, Mapping[str, Any]] | None = None,
    repair: Repair | None = reconstruct,
    tune: Tune | None = None,
    **shared: Any,
) -> Best:
    """Prune in several ways to one budget, and keep what has the lowest loss on other examples when all is done.

    ::

        found = taylorfx.candidates.best(params, spec, batches, budget=tfx.Flops(0.5), held_out=others, loss=loss)
        params, spec = found.pruned
        print(found)

    Args:
        batches: what is measured, and what repairs look at.
        budget: what may remain, of every candidate.
        held_out: ``(inputs, targets)``, or a list or a loader of such, that candidates are judged by and nothing is
            measured on. The loss is that of ``shared``, also where a candidate is chosen by another.
        candidates: a name for each, and the keywords of `taylorfx.prune` that are its own; by default those of `ours`.
        repair: what makes up for what has left, once, at the end, on ``batches``: a function of ``(params, plan,
            batches)``, or none. Candidates with a ``repair`` of their own repair between their steps instead. A
            repair that raises the loss on ``held_out`` is left out.
        tune: ``tune(params, spec)`` gives parameters after a short training, the same for every candidate; candidates
            are then compared by what it leaves.
        shared: the keywords of `taylorfx.prune` for all candidates: the loss, constraints, ``branches``, ``like``.
            Candidates' own come first.

    What several candidates measure in the same way on the network that comes in is measured once; everything else is
    as `taylorfx.prune` does it, bit by bit. Each draws from a copy of ``generator``. A candidate whose budget or
    constraints cannot be met is listed with its problem. With ``total=`` processes decide as one, each with examples
    of its own for ``batches`` and ``held_out``, perhaps none. Of all that are left, the best so far is held.

    With ``like=`` what is repaired is compared with the class again; that of layers without biases is repaired by
    ``repair=functools.partial(tfx.reconstruct, biases=False)``.

    >>> import torch
    >>> from taylorfx import Flops, Input, criteria, init, layers as L, serial
    >>> spec = serial(Input((3,)), a=L.Linear(3, 8), relu=L.ReLU(), b=L.Linear(8, 2))
    >>> generator = torch.Generator().manual_seed(0)
    >>> params, x = init(spec, generator), torch.randn(32, 3, generator=generator)
    >>> y = x.argmax(1) % 2
    >>> ways = {"joint": {}, "magnitude": {"criterion": criteria.weight_l1, "steps": 1}}
    >>> found = best(params, spec, (x[:16], y[:16]), budget=Flops(0.5), held_out=(x[16:], y[16:]), candidates=ways)
    >>> found.name == min(found.candidates, key=lambda one: one.loss).name
    True
    >>> [f"{one.name}: {one.spent:.0%} of the budget" for one in found.candidates]
    ['joint: 100% of the budget', 'magnitude: 100% of the budget']

    Raises:
        SelectionError: for candidates that `taylorfx.prune` would refuse, all at once and before anything is measured;
            and if no candidate leaves a network, with what each of them says.
        ValueError: for iterators and what is measured itself as ``held_out``, for what cannot repair or tune, and what
            `taylorfx.prune` raises besides.
    """
    batches = Kept(batches) if isinstance(batches, Iterator) else batches
    _check(batches, held_out, repair, tune)
    ways = ours(repair, branches=bool(shared.get("branches"))) if candidates is None else candidates
    how = _judge(batches, budget, shared)
    sentences = _sentences(ways, batches, budget, shared)
    return _Task(params, spec, batches, held_out, repair, tune, how).winner(sentences)


def ours(repair: Repair | None = None, *, branches: bool = False) -> dict[str, dict[str, Any]]:
    """The candidates that `best` compares by default.

    Args:
        repair: what repairs at the end; one candidate repairs by it between its steps.
        branches: residual branches may leave, too: of one candidate they stay.

    >>> for name, keywords in ours().items():
    ...     print(name, [*keywords])
    joint []
    fisher ['criterion']
    second order, at once ['criterion', 'steps']
    magnitude, at once ['criterion', 'per_cost', 'steps', 'branches']
    """
    return {
        "joint": {},
        **({} if repair is None else {"repaired on the way": {"repair": repair}}),
        **({"joint, all branches stay": {"branches": False}} if branches else {}),
        "fisher": {"criterion": fisher},
        "second order, at once": {"criterion": second_order, "steps": 1},
        "magnitude, at once": {"criterion": weight_l2, "per_cost": False, "steps": 1, "branches": False},
    }


@dataclass(frozen=True, eq=False)
class _Task:
    """What all candidates have in common."""

    params: Params
    spec: Spec
    batches: Batches
    held_out: Batches
    repair: Repair | None
    tune: Tune | None
    measurement: Measurement

    def winner(self, sentences: Mapping[str, Sentence]) -> Best:
        """Try all of them; the best one so far is kept."""
        whole, winner = self.loss(self.params, self.spec), None
        rows: list[Candidate] = []
        for name, sentence in _once(sentences, self.params).items():
            row, pruned = self.tried(name, sentence)
            if pruned is not None and row.loss < min((one.loss for one in rows), default=math.inf):
                winner = Best(name, pruned, (), whole)
            rows.append(row)
            LOG.info("best: %s: %s", name, row.problem or f"loss {row.loss:.4g}, {row.seconds:.1f} s")
        if winner is None:
            problems = "; ".join(f"{one.name}: {one.problem}" for one in rows)
            raise SelectionError(f"No candidate leaves a network: {problems}")
        return winner._replace(candidates=tuple(rows))

    def tried(self, name: str, sentence: Sentence) -> tuple[Candidate, Pruned | None]:
        """Prune, repair, tune, and judge."""
        start = perf_counter()
        try:
            pruned = sentence(self.params, self.spec)
            losses, left = self.mended(sentence, pruned)
        except (SelectionError, PlanError) as error:
            return Candidate(name, seconds=perf_counter() - start, problem=str(error)), None
        finite = {stage: loss for stage, loss in losses.items() if math.isfinite(loss)}
        if finite:
            pruned = left[min(finite, key=finite.__getitem__)]
            if self.tune is not None:
                pruned = self.tuned(self.tune, pruned)
                losses["tuned"] = self.loss(*pruned)
        problem = "" if finite and math.isfinite(losses.get("tuned", 0.0)) else "its loss on held_out is not finite."
        row = Candidate(name, **losses, spent=_spent(sentence, pruned), seconds=perf_counter() - start, problem=problem)
        return row, None if problem else pruned

    def mended(self, sentence: Sentence, pruned: Pruned) -> tuple[dict[str, float], dict[str, Pruned]]:
        """What is left as cut and repaired, and their losses."""
        left = {"repaired" if sentence.step.repair else "cut": pruned}
        if self.repair is not None and sentence.step.repair is None:
            repaired = mended(self.repair, self.batches, self.params, pruned.plan, self.measurement.total)
            left["repaired"] = Pruned(*repaired, pruned.plans)
            sentence.check(self.params, self.spec, left["repaired"])
        return {stage: self.loss(*network) for stage, network in left.items()}, left

    def tuned(self, tune: Tune, pruned: Pruned) -> Pruned:
        """What the user's training leaves, of a copy."""
        spec, copy = pruned.spec, unflatten({path: x.detach().clone() for path, x in flatten(pruned.params).items()})
        trained = agreed(self.measurement.total, lambda: _checked(tune(copy, spec), spec), of_params)
        return Pruned(trained, spec, pruned.plans)

    def loss(self, params: Params, spec: Spec) -> float:
        """The mean loss of the examples that were held out; NaN if that of any is not finite."""
        return mean_loss(params, couple(params, spec), self.held_out, self.measurement)


def _checked(params: Params, spec: Spec) -> Params:
    """What training gave, if it is the parameters of the network."""
    check(params, spec)
    return params


def _spent(sentence: Sentence, pruned: Pruned) -> float:
    """The share of what may remain that remains; of several budgets, that of the fullest."""
    first, last = pruned.plans[0].coupling, pruned.plans[-1]
    compared = [one.fixed(first).compared(last) for one in sentence.budgets]
    return max(cost / limit if limit else 1.0 for limit, cost in compared)


def _check(batches: Batches, held_out: Batches, repair: Repair | None, tune: Tune | None) -> None:
    """Refuse what would only turn out after the first candidate."""
    if isinstance(held_out, Iterator) or held_out is batches:
        received = "an iterator, which the first would use up" if held_out is not batches else "what is measured"
        raise ValueError(
            f"Every candidate is judged by held_out, examples that nothing is measured on; received {received}. Give a "
            "list or a loader of others."
        )
    check_repair(repair, batches)
    problem = "" if tune is None else unfit(tune, None, None) if callable(tune) else "it is not called"
    if problem:
        raise ValueError(
            f"What tunes is a function of (params, spec) that gives parameters; received {name_of(tune)}: {problem}."
        )


def _judge(batches: Batches, budget: Budgets, shared: Mapping[str, Any]) -> Measurement:
    """The measurement that the shared keywords say, whose loss is everyone's judge."""
    alone = {name: value for name, value in shared.items() if name != "choose"}  # which may need candidates' criteria
    return Sentence.of(batches, budget=budget, **alone).step.measurement


def _sentences(
    ways: Mapping[str, Mapping[str, Any]], batches: Batches, budget: Budgets, shared: Mapping[str, Any]
) -> dict[str, Sentence]:
    """Every candidate with its arguments, each drawing from a generator of its own; all that are refused at once."""
    sentences: dict[str, Sentence] = {}
    refused = [] if ways else ["none"]
    for name, keywords in ways.items():
        try:
            said = Sentence.of(batches, **{**shared, "budget": budget, **_own(keywords)})
            draw = said.step.measurement.generator
            copy = None if draw is None else torch.Generator(draw.device).set_state(draw.get_state())
            how = replace(said.step.measurement, generator=copy)
            sentences[name] = said._replace(step=said.step._replace(measurement=how))
        except (TypeError, ValueError) as error:
            refused.append(f"{name}: {error}")
    if refused:
        raise SelectionError(f"A candidate has keywords of `prune`, all but the budget; received {'; '.join(refused)}")
    return sentences


def _own(keywords: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(keywords, Mapping) or "budget" in keywords:
        raise ValueError(f"{keywords!r:.80}.")
    return keywords


def _once(sentences: Mapping[str, Sentence], params: Params) -> dict[str, Sentence]:
    """The same candidates, which share what they measure on the network that comes in."""
    by_rows = {name: said for name, said in sentences.items() if said.step.measuring is measure}
    once = _Once(params, [need for said in by_rows.values() if (need := said.step.needs) is not None])
    shared = {name: said._replace(step=said.step._replace(measuring=once)) for name, said in by_rows.items()}
    return {**sentences, **shared}


class _Once:
    """`measure`, that remembers the network that all candidates start from, with all that any of them needs.

    In training mode nothing is remembered, as passes draw numbers.
    """

    def __init__(self, params: Params, needs: list[Measurement]) -> None:
        self.params, self.needs = params, needs
        self.known: list[tuple[tuple[str, ...], Measurement, Statistics]] = []

    def __call__(
        self, params: Params, spec: Spec, batches: Batches, coupling: Coupling, *, measurement: Measurement
    ) -> Statistics:
        if params is not self.params or measurement.training:
            return measure(params, spec, batches, coupling, measurement=measurement)
        way = _way(measurement)
        for names, known, stats in self.known:
            if names == coupling.names and known == way:
                return stats
        rows = any(need.rows for need in self.needs if _way(need) == way)
        stats = measure(params, spec, batches, coupling, measurement=replace(measurement, rows=rows))
        self.known.append((coupling.names, way, stats))
        return stats


def _way(measurement: Measurement) -> Measurement:
    """What statistics depend on: rows only join them, and nothing is drawn outside of training."""
    return replace(measurement, rows=False, generator=None, progress=False)


def _number(loss: float | None) -> str:
    return "-" if loss is None else f"{loss:.4g}"

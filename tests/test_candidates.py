"""Candidates are pruned as `prune` does it alone, measured once where they can be, and judged on other examples."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.candidates import best, ours
from taylorfx.testing.laws import assert_trees_equal

SPEC = tfx.serial(
    tfx.Input((4,)),
    a=L.Linear(4, 10),
    act=L.ReLU(),
    block=tfx.residual(tfx.serial(b=L.Linear(10, 8), act=L.ReLU(), c=L.Linear(8, 10))),
    head=L.Linear(10, 3),
)
PARAMS = tfx.init(SPEC, torch.Generator().manual_seed(0))
X = torch.randn(48, 4, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
BATCHES = [(X[:12], Y[:12]), (X[12:24], Y[12:24])]
OTHERS = [(X[24:40], Y[24:40]), (X[40:], Y[40:])]
BUDGET = tfx.Flops(0.6)

WAYS: dict[str, dict[str, Any]] = {
    "joint": {"steps": 2},
    "joint at once": {"steps": 1},
    "repaired on the way": {"steps": 2, "repair": tfx.compensate},
    "fisher": {"criterion": tfx.fisher, "steps": 2},
    "widths": {"branches": False, "steps": 1},
    "activations": {"criterion": tfx.criteria.apoz, "steps": 1},
    "chance": {"criterion": tfx.criteria.random, "steps": 1},
    "chosen by the outputs": {"loss": lambda outputs, _: outputs.square().sum(), "steps": 1},
    "in training": {"criterion": tfx.criteria.Criterion(tfx.taylor, training=True), "steps": 1},
    "in training, squared": {"criterion": tfx.criteria.Criterion(tfx.fisher, training=True), "steps": 1},
}

run = partial(best, PARAMS, SPEC, BATCHES, budget=BUDGET, held_out=OTHERS, candidates=WAYS)
alone = partial(tfx.prune, PARAMS, SPEC, BATCHES, budget=BUDGET)


def loss(params: tfx.Params, spec: tfx.Spec) -> float:
    """The mean cross entropy of the examples that are held out, by torch."""
    return float(F.cross_entropy(tfx.apply(params, spec, X[24:]), Y[24:]))


class Counted(list):
    """Batches that count how often they are gone through."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        return super().__iter__()


def test_the_winner_has_the_lowest_loss_on_what_was_held_out():
    found = run(branches=True, budget=tfx.Flops(0.3))
    losses = [one.loss for one in found.candidates]
    assert [one.name for one in found.candidates] == [*WAYS]
    assert found.name == [*WAYS][losses.index(min(losses))]
    assert_close([loss(*found.pruned), loss(PARAMS, SPEC)], [min(losses), found.whole], rtol=1e-5, atol=0)
    assert len(set(losses)) > 3  # there is something to choose


@pytest.mark.parametrize("repair", [None, tfx.compensate], ids=["as cut", "compensated"])
def test_every_candidate_is_pruned_as_it_is_alone_bit_by_bit(repair: Any):
    """Beside others, with whom it shares what is measured; a generator's numbers are those of one alone."""
    shared = {"loss": F.cross_entropy, "branches": True}
    generator, left = torch.Generator().manual_seed(5), []

    def watch(params: tfx.Params, spec: tfx.Spec) -> tfx.Params:
        left.append(params)
        return params

    found = run(repair=repair, tune=watch, generator=generator, **shared)
    assert generator.get_state().equal(torch.Generator().manual_seed(5).get_state())
    for row, params, way in zip(found.candidates, left, WAYS.values(), strict=True):
        expected = alone(**{**shared, "generator": torch.Generator().manual_seed(5), **way})
        own = "repair" in way
        assert_close(row.repaired if own else row.cut, loss(*expected), rtol=1e-5, atol=0)
        mended = expected
        if repair is not None and not own:
            repaired = repair(PARAMS, expected.plan, BATCHES)
            assert_close(row.repaired, loss(*repaired), rtol=1e-5, atol=0)
            mended = repaired if row.repaired < row.cut else expected
        assert_trees_equal(params, mended[0])
        if found.name == row.name:
            assert found.pruned.plans == expected.plans
            assert_trees_equal(found.pruned.params, mended[0])


def test_what_is_measured_alike_is_measured_once():
    """Here by three; passes in training mode draw numbers, and those are a candidate's own."""
    names = ["fisher", "joint", "joint at once", "activations", "chance", "in training", "in training, squared"]
    ways = {name: WAYS[name] for name in names}
    batches = Counted(BATCHES)
    best(PARAMS, SPEC, batches, budget=BUDGET, held_out=OTHERS, candidates=ways, repair=None)
    several, batches.passes = batches.passes, 0
    for way in ways.values():
        tfx.prune(PARAMS, SPEC, batches, budget=BUDGET, **way)
    assert batches.passes == 8
    assert several == 6  # the first, the second steps of two, one with moments, and two in training


def first_by(factor: float) -> Callable[[tfx.Params, tfx.Spec], tfx.Params]:
    """A training that multiplies the parameters of the first network in place, and leaves all others."""
    factors = iter([factor])

    def train(params: tfx.Params, spec: tfx.Spec) -> tfx.Params:
        by = next(factors, 1)
        for x in tfx.tree.flatten(params).values():
            x.mul_(by)
        return params

    return train


def test_they_are_compared_after_a_short_training_of_copies():
    before = {path: x.clone() for path, x in tfx.tree.flatten(PARAMS).items()}
    ways = {"joint": WAYS["joint"], "fisher": WAYS["fisher"]}
    found = run(tune=first_by(-30), repair=None, candidates=ways)
    joint, fisher = found.candidates
    assert found.name == "fisher"
    assert joint.cut < fisher.cut  # so that without training it is the other one
    assert joint.tuned > joint.cut + 1
    assert fisher.tuned == fisher.cut == fisher.loss
    assert_trees_equal(found.pruned.params, alone(**ways["fisher"]).params)
    assert_trees_equal(tfx.tree.flatten(PARAMS), before)
    assert "tuned" in str(found)


def test_a_repair_that_harms_is_left_out():
    def harm(params: tfx.Params, plan: tfx.Plan, batches: object) -> tuple[tfx.Params, tfx.Spec]:
        return tfx.tree.map_paths(lambda _, x: -30 * x, tfx.cut(params, plan)), plan.spec

    (one,) = (found := run(repair=harm, candidates={"joint": {}})).candidates
    assert one.loss == one.cut < one.repaired
    assert_trees_equal(found.pruned.params, alone().params)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_does_not_win(value: float):
    ways = {"joint": WAYS["joint"], "fisher": WAYS["fisher"]}
    found = run(tune=first_by(value), repair=None, candidates=ways)
    assert found.name == "fisher"
    assert "not finite" in found.candidates[0].problem
    assert found.candidates[0].loss == math.inf


def test_what_cannot_be_met_is_a_row_with_its_reason(caplog: pytest.LogCaptureFixture):
    ways = {"all stay": {"floor": 100}, "joint": {"steps": 1}, "nothing told": {"criterion": flat}}
    with caplog.at_level(logging.INFO, "taylorfx"):
        found = run(candidates=ways)
    assert found.name == "joint"
    assert [bool(one.problem) for one in found.candidates] == [True, False, True]
    table = str(found).splitlines()
    assert table[0].split() == ["held-out", "loss", "as", "cut", "repaired", "spent", "seconds"]
    assert table[2].split()[-1] == f"{found.whole:.4g}"
    assert table[4].startswith("joint * ")
    assert [line.split(":")[0] for line in table[-2:]] == ["all stay", "nothing told"]
    said = [line for line in caplog.messages if line.startswith("best: ")]
    assert [line.split(": ")[1] for line in said] == [*ways]
    with pytest.raises(tfx.SelectionError, match=r"all stay: .*nothing told: Scores are zero") as refused:
        run(candidates={name: way for name, way in ways.items() if name != "joint"})
    assert found.candidates[0].problem in str(refused.value)


def flat(stats: tfx.Statistics, coupling: tfx.Coupling) -> torch.Tensor:
    return torch.zeros(len(coupling))


REFUSED = {
    "another keyword": ({"candidates": {"a": {"strange": 1}, "b": {"criterion": 3}}}, r"a: .*strange.*b: "),
    "another budget": ({"candidates": {"a": {"budget": tfx.Flops(0.5)}}}, "all but the budget; received a: .*Flops"),
    "no keywords": ({"candidates": {"a": tfx.fisher}}, "received a: "),
    "no candidates": ({"candidates": {}}, "received none"),
    "a shared keyword": ({"strange": 1}, "strange"),
    "examples used up": ({"held_out": iter(OTHERS)}, "an iterator"),
    "what is measured": ({"held_out": BATCHES}, "what is measured"),
    "no examples": ({"held_out": []}, "received none"),
    "no repair": ({"repair": lambda params: params}, "A repair is a function"),
    "no training": ({"tune": lambda params: params}, "What tunes is a function"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_before_anything_is_measured(name: str):
    options, match = REFUSED[name]
    batches = Counted(BATCHES)
    options = {key: batches if value is BATCHES else value for key, value in options.items()}
    with pytest.raises(ValueError, match=match):
        best(PARAMS, SPEC, batches, **{"budget": BUDGET, "held_out": OTHERS, **options})
    assert not batches.passes


def test_training_gives_parameters():
    with pytest.raises(tfx.SpecError):
        run(candidates={"joint": {}}, tune=lambda params, spec: None)


def test_batches_of_an_iterator_are_kept_for_all():
    found, expected = (
        best(PARAMS, SPEC, batches, budget=BUDGET, held_out=OTHERS, branches=True)
        for batches in (iter(BATCHES), BATCHES)
    )
    assert [one.loss for one in found.candidates] == [one.loss for one in expected.candidates]
    assert [one.name for one in found.candidates] == [*ours(tfx.reconstruct, branches=True)]
    assert not any(one.problem for one in found.candidates)
    assert len(ours(tfx.reconstruct, branches=True)) == len(ours()) + 2


def test_a_class_holds_what_is_repaired():
    module = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))
    params, spec = tfx.from_torch(module, X[:2])
    run = partial(best, params, spec, BATCHES, budget=BUDGET, held_out=OTHERS, candidates={"joint": {}}, like=module)
    found = run(repair=partial(tfx.reconstruct, biases=False))
    smaller = tfx.to_torch(*found.pruned, like=module)
    assert_close(smaller(X), tfx.apply(*found.pruned, X))
    with pytest.raises(ValueError, match="bias"):
        run()

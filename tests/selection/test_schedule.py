"""Schedules fall from the start to the end, and `iterate` prunes by them with training in between."""

import importlib
import pickle
from functools import reduce
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
import optree
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given, settings

import taylorfx as tfx
from taylorfx.network.parameters import check
from taylorfx.sentence import Interrupted
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network, networks

SCHEDULES = (tfx.schedule.linear, tfx.schedule.cubic, tfx.schedule.exponential)


@pytest.mark.parametrize("schedule", SCHEDULES)
@given(st.floats(0.01, 1.0), st.integers(1, 12))
def test_schedules_fall_and_end_exactly_where_they_should(schedule, end, steps):
    shares = list(schedule(end, steps))
    assert len(shares) == steps
    assert shares[-1] == end
    assert all(before >= after for before, after in pairwise([1.0, *shares]))
    assert shares[0] < 1 or end > 0.99


@given(st.floats(0.1, 0.9), st.floats(0.91, 1.0), st.integers(1, 9))
def test_schedules_are_their_formulas(end, start, steps):
    linear, cubic, exponential = (np.array([*schedule(end, steps, start=start)]) for schedule in SCHEDULES)
    first, last, t = 1 - start, 1 - end, np.arange(1, steps + 1)
    sparsity = last + (first - last) * (1 - t / steps) ** 3  # Zhu & Gupta 2017, eq. 1, with t0 = 0 and one t per step
    np.testing.assert_allclose(1 - cubic, sparsity, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.diff([start, *linear]), (end - start) / steps, rtol=1e-9)
    ratios = exponential / [start, *exponential[:-1]]
    np.testing.assert_allclose(ratios, (end / start) ** (1 / steps), rtol=1e-9)


def test_schedules_are_of_budgets_and_of_numbers_alike():
    assert [*tfx.schedule.linear(tfx.Flops(0.5), 2)] == [tfx.Flops(0.75), tfx.Flops(0.5)]
    assert [*tfx.schedule.linear(tfx.Parameters(400), 3, start=1000)] == [tfx.Parameters(n) for n in (800, 600, 400)]
    assert [*tfx.schedule.cubic(2, 2, start=10)] == [3, 2]
    assert all(isinstance(n, int) for n in tfx.schedule.exponential(3, 4, start=100))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "wrong", [(0.5, 0, {}), (10, 3, {}), (0.5, 2, {"start": 0.4}), (0.5, 2, {"start": 2}), (0.0, 2, {})], ids=str
)
def test_a_schedule_that_does_not_fall_is_refused_at_once(schedule, wrong):
    end, steps, options = wrong
    with pytest.raises(ValueError, match="falls from a start to an end"):
        schedule(end, steps, **options)


@given(networks())
@example(network(CONSTRUCTS["residual stream"]))
@example(network(CONSTRUCTS["multi-head"]))
def test_every_step_keeps_its_share_of_the_original_and_all_steps_are_one_plan(net):
    cost, budgets = tfx.cost.flops(net.coupling), [*tfx.schedule.cubic(tfx.Flops(0.6), 3)]
    plans, sizes = [], []
    try:
        for params, spec, plan in tfx.iterate(net.params, net.spec, net.batch, budgets=budgets):
            check(params, spec)
            assert spec == plan.spec
            plans.append(plan)
            sizes.append(tfx.cost.flops(tfx.couple(params, spec)).total)
    except tfx.BudgetError:
        budgets = budgets[: len(plans)]  # as far as such a small network goes
    assert len(plans) == len(budgets)
    for size, budget in zip(sizes, budgets, strict=True):
        assert size <= budget.amount * cost.total * (1 + 1e-9)
    if plans:
        assert_trees_equal(tfx.cut(net.params, reduce(tfx.compose, plans)), params)


def test_what_is_sent_back_is_what_the_next_step_prunes():
    net = network(CONSTRUCTS["chain"])
    momentum = ones = optree.tree_map(torch.ones_like, net.params)
    steps = tfx.iterate(
        net.params, net.spec, [net.batch], budgets=[tfx.Remove(1)] * 3, criterion=tfx.criteria.weight_l2
    )
    trained, specs = net.params, []
    for params, spec, plan in steps:
        assert_trees_equal(params, tfx.cut(trained, plan))
        momentum = tfx.cut(momentum, plan)
        trained = optree.tree_map(lambda p, m: p + m, params, momentum)
        steps.send(trained)
        specs.append(spec)
    assert [len(tfx.couple(tfx.init(s, torch.Generator()), s)) for s in specs] == [8, 7, 6]
    assert tfx.tree.flatten(momentum).keys() == tfx.tree.flatten(ones).keys()
    check(trained, specs[-1])
    steps = tfx.iterate(net.params, net.spec, net.batch, budgets=[8, 7])
    next(steps)
    steps.send(net.params)
    with pytest.raises(tfx.SpecError):  # what does not fit is refused by the step after
        next(steps)


def test_what_is_not_sent_back_goes_on_as_it_was():
    net = network(CONSTRUCTS["chain"])
    steps = [*tfx.iterate(net.params, net.spec, net.batch, budgets=[0.8, 0.5], repair=tfx.reconstruct, floor=2)]
    first = tfx.prune(net.params, net.spec, net.batch, budget=0.8, repair=tfx.reconstruct, floor=2)
    second = tfx.prune(*first, net.batch, budget=4, repair=tfx.reconstruct, floor=2)
    for (params, spec, plan), expected in zip(steps, (first, second), strict=True):
        assert spec == expected[1] == plan.spec
        assert_trees_equal(params, expected[0])


def test_one_budget_is_pruning_at_once():
    net = network(CONSTRUCTS["flatten"])
    ((params, spec, plan),) = tfx.iterate(net.params, net.spec, net.batch, budgets=[tfx.Flops(0.5)])
    expected = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.5), steps=1)
    assert spec == expected[1]
    assert_trees_equal(params, expected[0])
    assert plan.asked == "at most 50.0% of the FLOPs"


@given(networks())
@example(network(CONSTRUCTS["residual stream"]))
def test_most_is_of_the_whole_however_many_steps(net):
    sizes = dict(zip(net.coupling.scopes, net.coupling.sizes.tolist(), strict=True))
    budgets = [0.8, 0.6, 0.4]
    try:
        for *_, plan in tfx.iterate(net.params, net.spec, net.batch, budgets=budgets, most=0.5):
            kept = plan.coupling.scope[plan.keep]
            for number, name in enumerate(plan.coupling.scopes):
                # Where one head is left, its dimensions go by another name than those of two.
                assert (kept == number).sum() * 2 >= sizes.get(name, 0)
    except tfx.BudgetError:
        pass  # as far as such a small network goes


def test_a_layer_that_can_lose_no_more_needs_no_constraint():
    net = network(CONSTRUCTS["chain"])
    steps = tfx.iterate(
        net.params, net.spec, net.batch, budgets=[6, 4, 2], floor={"0": 1, "3": 1}, most={"0": 1.0}, multiple={"0": 1}
    )
    assert len([*steps]) == 3
    with pytest.raises(tfx.SelectionError, match="match nothing"):
        next(tfx.iterate(net.params, net.spec, net.batch, budgets=[6], most={"other": 0.5}))
    with pytest.raises(tfx.SelectionError, match="match nothing"):
        next(tfx.iterate(net.params, net.spec, net.batch, budgets=[6], protect="other"))


def test_pruning_in_steps_is_iterating():
    net = network(CONSTRUCTS["dense"])
    *_, (params, spec, _) = tfx.iterate(
        net.params, net.spec, net.batch, budgets=tfx.schedule.exponential(tfx.Flops(0.4), 3), criterion=tfx.fisher
    )
    small, smaller = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.4), steps=3, criterion=tfx.fisher)
    assert smaller == spec
    assert_trees_equal(small, params)
    total = tfx.cost.flops(net.coupling).total
    several = tfx.prune(net.params, net.spec, net.batch, budget=(tfx.Flops(total // 2), tfx.Parameters(0.7)), steps=2)
    assert tfx.cost.flops(tfx.couple(*several)).total <= total // 2
    with pytest.raises(tfx.BudgetError, match="what leaves"):
        tfx.prune(net.params, net.spec, net.batch, budget=tfx.Remove(2), steps=2)
    with pytest.raises(ValueError, match="one or more steps"):
        tfx.prune(net.params, net.spec, net.batch, budget=0.5, steps=0)


REPAIRS = (None, tfx.recalibrate, tfx.compensate, tfx.reconstruct)


@settings(max_examples=settings().max_examples // 2)
@given(networks(), st.sampled_from(REPAIRS))
@example(network(CONSTRUCTS["residual stream"]), tfx.compensate)
@example(network(CONSTRUCTS["groups without bias"]), tfx.reconstruct)
def test_pruning_hands_out_its_steps_as_one_plan_whatever_was_repaired_between_them(net, repair):
    """It cuts the original parameters to those of the result; but for biases, which only the repaired network has."""
    try:
        pruned = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.6), steps=2, repair=repair)
    except tfx.BudgetError:  # there are networks of which nothing can leave
        return
    params, spec = pruned
    assert params is pruned.params
    assert spec is pruned.spec
    assert len(pruned.plans) == 2
    one = tfx.tree.flatten(tfx.cut(net.params, pruned.plan))
    steps = tfx.tree.flatten(reduce(tfx.cut, pruned.plans, net.params)) if repair is None else tfx.tree.flatten(params)
    gained = steps.keys() - one.keys()
    assert bool(gained) <= (repair in (tfx.compensate, tfx.reconstruct))
    assert all(path.endswith("bias") for path in gained)
    assert {path: leaf.shape for path, leaf in one.items()} == {path: steps[path].shape for path in one}
    if repair is None:
        assert_trees_equal(params, tfx.tree.unflatten(one))
    if not gained:
        assert pruned.plan.spec == spec
    again = pickle.loads(pickle.dumps(pruned))
    assert again.plan == pruned.plan
    assert_trees_equal(again[0], params)


@pytest.mark.parametrize("whole", [0, 1, 2])
def test_an_interrupted_prune_gives_back_the_steps_until_then(whole):
    net = network(CONSTRUCTS["dense"])
    steps = tfx.iterate(
        net.params, net.spec, net.batch, budgets=tfx.schedule.exponential(tfx.Flops(0.4), 3), criterion=tfx.fisher
    )
    taken = [next(steps) for _ in range(3)]
    calls = []

    def impatient(stats, coupling):
        calls.append(stats)
        if len(calls) > whole:
            raise KeyboardInterrupt
        return tfx.fisher(stats, coupling)

    with pytest.raises(KeyboardInterrupt) as stopped:
        tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.4), steps=3, criterion=impatient)
    assert isinstance(stopped.value, Interrupted) == (whole > 0)
    if whole:
        params, spec, _ = taken[whole - 1]
        assert (stopped.value.spec, stopped.value.steps) == (spec, whole)
        assert_trees_equal(stopped.value.params, params)
        assert_trees_equal(tfx.cut(net.params, stopped.value.plan), params)
        assert stopped.value.pruned.plans == tuple(plan for *_, plan in taken[:whole])


def test_every_step_of_pruning_leaves_nine_tenths_and_counts_of_units_take_one(monkeypatch):
    net, measured = network(CONSTRUCTS["dense"]), []

    def measure(*args, **options):
        measured.append(args)
        return tfx.measure(*args, **options)

    monkeypatch.setattr(importlib.import_module("taylorfx.step"), "measure", measure)
    total = tfx.cost.flops(net.coupling).total
    for share, count in ((0.95, 1), (0.9, 1), (0.81, 2), (0.4, 9)):
        steps = tfx.iterate(net.params, net.spec, net.batch, budgets=tfx.schedule.exponential(tfx.Flops(share), count))
        *_, (_, spec, _) = steps
        for budget in (tfx.Flops(share), tfx.Flops(int(share * total))):
            measured.clear()
            smaller = tfx.prune(net.params, net.spec, iter([net.batch]), budget=budget)[1]
            assert smaller == spec or isinstance(budget.amount, int)  # numbers on the way are rounded
            assert abs(len(measured) - count) <= isinstance(budget.amount, int)
    for budget in (tfx.Units(0.5), tfx.Remove(1)):
        measured.clear()
        tfx.prune(net.params, net.spec, net.batch, budget=budget)
        assert len(measured) == 1
    measured.clear()
    with pytest.raises(tfx.BudgetError, match=r"at most 0\.1% of the FLOPs"):
        tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.001))
    assert not measured, "what cannot be met is said before anything is measured"

"""Joint selection: what leaves together, and what that costs."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import networks

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def statistics(coupling, rows):
    """Statistics that say these derivatives."""
    zero = rows.new_zeros(len(coupling))
    return tfx.Statistics(
        n=len(rows), batches=1, loss=zero.sum(), sum=rows.sum(0), sum_abs=rows.abs().sum(0),
        sum_sq=rows.square().sum(0), sum_abs_mean=zero, sum_batch_abs=zero, sum_batch_sq=zero, rows=rows,
        units=coupling.names,
    )  # fmt: skip


def wide(units=(6, 5)):
    spec = tfx.serial(
        tfx.Input((4,)), a=L.Linear(4, units[0]), s=L.Tanh(), b=L.Linear(*units), r=L.ReLU(),
        c=L.Linear(units[1], 2),
    )  # fmt: skip
    params = tfx.init(spec, torch.Generator().manual_seed(0), dtype=torch.float64)
    return params, spec, tfx.couple(params, spec)


seeds = st.integers(0, 2**16)


@given(seeds, st.integers(1, 9), st.integers(1, 12))
def test_where_no_unit_hears_of_another_it_is_the_ranking_by_second_order(seed, leave, rounds):
    _, _, coupling = wide()
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(len(coupling), generator=generator, dtype=torch.float64)
    stats = statistics(coupling, torch.diag(numbers))
    budget = tfx.Remove(leave)
    one = tfx.joint(stats, coupling, budget=budget, rounds=rounds, swaps=False)
    assert one == tfx.select(tfx.criteria.second_order(stats, coupling), coupling, budget=budget)


@given(seeds, st.integers(1, 9))
def test_swaps_end_where_no_exchange_within_a_scope_lowers_the_forecast(seed, leave):
    _, _, coupling = wide()
    rows = torch.randn(7, len(coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    stats = statistics(coupling, rows)
    greedy = tfx.joint(stats, coupling, budget=tfx.Remove(leave), swaps=False)
    plan = tfx.joint(stats, coupling, budget=tfx.Remove(leave))
    least = tfx.expected_change(stats, plan)
    assert least <= tfx.expected_change(stats, greedy) + 1e-12
    assert (np.bincount(coupling.scope[plan.keep]) == np.bincount(coupling.scope[greedy.keep])).all()
    for out in np.flatnonzero(plan.keep):
        for back in np.flatnonzero(~plan.keep & (coupling.scope == coupling.scope[out])):
            keep = plan.keep.copy()
            keep[[out, back]] = False, True
            assert tfx.expected_change(stats, tfx.Plan(coupling, keep)) >= least - 1e-9


@given(seeds, st.floats(0.2, 0.9))
def test_the_forecast_is_exact_where_the_loss_is_quadratic_and_every_residual_is_one(seed, share):
    spec = tfx.serial(tfx.Input((6,)), up=L.Linear(6, 8, bias=False), down=L.Linear(8, 1, bias=False))
    generator = torch.Generator().manual_seed(seed)
    params = tfx.init(spec, generator, dtype=torch.float64)
    coupling = tfx.couple(params, spec)
    x = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    signs = torch.randint(2, (9, 1), generator=generator) * 2.0 - 1
    y = tfx.apply(params, spec, x) - signs  # the output is off by one, either way

    def loss(outputs, targets):
        return 0.5 * (outputs - targets).square().sum()

    stats = tfx.measure(params, spec, (x, y), coupling, loss=loss, rows=True)
    plan = tfx.joint(stats, coupling, budget=tfx.Units(max(1, int(share * 8))))
    before, after = (loss(tfx.apply(params, spec, x, gates=gates), y) / 9 for gates in (None, plan.gates))
    assert_close(tfx.expected_change(stats, plan), after - before, **CLOSE)


@settings(max_examples=15)
@given(networks(), st.sampled_from([tfx.Flops(0.7), tfx.Parameters(0.7), tfx.Units(0.7), tfx.Remove(1)]))
def test_budgets_hold_on_any_network(net, budget):
    stats = tfx.measure(net.params, net.spec, net.batch, net.coupling, rows=True)
    assert_close(stats.rows.sum(0), stats.sum, rtol=1e-6, atol=1e-9)
    if not len(net.coupling):
        return
    try:
        expected = tfx.select(tfx.criteria.second_order(stats, net.coupling), net.coupling, budget=budget)
    except tfx.BudgetError:
        with pytest.raises(tfx.BudgetError):
            tfx.joint(stats, net.coupling, budget=budget, rounds=5)
        return
    plan = tfx.joint(stats, net.coupling, budget=budget, rounds=5)
    cost = budget.cost(net.coupling)
    limit = budget.limit(cost(np.ones(len(net.coupling), bool)))
    assert cost(plan.keep) <= limit
    assert plan.asked == expected.asked
    for unit in np.flatnonzero(~plan.keep):  # nothing that still fits stays away
        back = plan.keep.copy()
        back[unit] = True
        assert cost(back) > limit


@settings(max_examples=10)
@given(networks())
def test_statistics_with_rows_add_up(net):
    x, y = net.batch
    whole = tfx.measure(net.params, net.spec, net.batch, net.coupling, rows=True)
    halves = [
        tfx.measure(net.params, net.spec, ({k: v[s] for k, v in x.items()}, y[s]), net.coupling, rows=True)
        for s in (slice(0, 1), slice(1, None))
    ]
    assert_close(sum(halves).rows, whole.rows)
    plain = tfx.measure(net.params, net.spec, net.batch, net.coupling)
    with pytest.raises(ValueError, match="with rows"):
        plain + whole


def test_constraints_hold_jointly():
    params, spec, coupling = wide((12, 8))
    x, y = torch.randn(16, 4, dtype=torch.float64), torch.randint(2, (16,))
    stats = tfx.measure(params, spec, (x, y), coupling, rows=True)
    plan = tfx.joint(stats, coupling, budget=tfx.Units(12), multiple=4, floor={"b": 4})
    assert np.bincount(coupling.scope[plan.keep]).tolist() in ([8, 4], [4, 8])
    plan = tfx.joint(stats, coupling, budget=tfx.Units(14), protect="a")
    assert np.bincount(coupling.scope[plan.keep]).tolist() == [12, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda stats, coupling: tfx.joint(stats, coupling, budget=3, rounds=0), "at least one round"),
        (lambda stats, coupling: tfx.joint(stats, coupling, budget=tfx.Units(1)), "The budget is"),
        (lambda stats, coupling: tfx.joint(tfx.measure(*PLAIN), coupling, budget=3), "rows=True"),
        (lambda stats, coupling: tfx.joint(stats, wide((7, 5))[2], budget=3), "received some of others"),
    ],
)
def test_what_makes_no_sense_is_refused(change, message):
    _, _, coupling = wide()
    rows = torch.randn(4, len(coupling))
    with pytest.raises(tfx.SelectionError, match=message):
        change(statistics(coupling, rows), coupling)


PLAIN = (*wide()[:2], (torch.randn(3, 4, dtype=torch.float64), torch.tensor([0, 1, 0])), wide()[2])


@given(seeds, st.integers(1, 9))
def test_a_cautious_choice_where_no_unit_hears_of_another_is_by_fisher_and_what_is_lost(seed, leave):
    _, _, coupling = wide()
    rows = torch.diag(torch.randn(len(coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
    stats = statistics(coupling, rows)
    scores = tfx.fisher(stats, coupling) + (-rows.mean(0)).clamp(min=0)
    plan = tfx.joint(stats, coupling, budget=tfx.Remove(leave), cautious=True)
    assert plan == tfx.select(scores, coupling, budget=tfx.Remove(leave))


def test_caution_leaves_more_of_a_layer_whose_scale_the_loss_does_not_hear():
    """Derivatives of the first layer's units add up to nothing, as they do before a norm: all could leave for free."""
    _, _, coupling = wide((12, 8))
    first, kept = coupling.scope == 0, []
    for seed in range(12):
        rows = torch.randn(64, len(coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        rows[:, first] -= rows[:, first].mean(1, keepdim=True)
        rows[:, ~first] *= 0.8  # a little less by themselves
        stats = statistics(coupling, rows)
        plans = [tfx.joint(stats, coupling, budget=tfx.Units(8), cautious=cautious) for cautious in (False, True)]
        kept.append([plan.keep[first].sum() for plan in plans])
    bold, cautious = np.array(kept).T
    assert (cautious >= bold).all()
    assert cautious.sum() >= bold.sum() + 12, "one unit more in each network"


def test_pruning_without_a_criterion_chooses_jointly():
    params, spec, coupling = wide((12, 8))
    batch = torch.randn(16, 4, dtype=torch.float64), torch.randint(2, (16,))
    stats = tfx.measure(params, spec, batch, coupling, rows=True)
    plan = tfx.joint(stats, coupling, budget=tfx.Flops(0.5), floor=2, cautious=True)
    assert tfx.prune(params, spec, batch, budget=tfx.Flops(0.5), floor=2, steps=1)[1] == plan.spec


def test_a_network_without_units_stays_as_it_is():
    spec = tfx.serial(tfx.Input((4,)), L.Linear(4, 2))
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    assert tfx.prune(params, spec, (torch.randn(3, 4), torch.tensor([0, 1, 0])), budget=tfx.Flops(1.0))[1] == spec

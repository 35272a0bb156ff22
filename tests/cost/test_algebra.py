"""Sums and multiples of costs: their values, their prices, and the budgets of them."""

import pickle
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given, settings

import taylorfx as tfx
from taylorfx.testing.strategies import network, networks, random_plan

SEEDS = st.integers(0, 2**16)
FACTORS = st.tuples(*[st.one_of(st.integers(0, 9), st.floats(0, 1e3))] * 3)


def pinned(law):
    """The law, run on every construct by name besides the random networks."""
    for spec in CONSTRUCTS.values():
        law = example(network(spec), (4, 1, 0.5), 1)(law)
    return given(networks(), FACTORS, SEEDS)(law)


def combined(factors):
    """The same sum as a function of a coupling, with plain functions on the right."""
    a, b, c = factors
    return a * tfx.cost.parameters + tfx.cost.flops * b + c * tfx.cost.memory


@pinned
def test_a_sum_costs_what_its_parts_cost_in_the_network_that_is_cut(net, factors, seed):
    plan = random_plan(net.coupling, torch.Generator().manual_seed(seed))
    small = tfx.couple(tfx.cut(net.params, plan), plan.spec)
    parts = [one(small).total for one in (tfx.cost.parameters, tfx.cost.flops, tfx.cost.memory)]
    trained, _ = tfx.partition(tfx.cut(net.params, plan), plan.spec)
    assert parts[0] == sum(leaf.numel() for leaf in tfx.tree.flatten(trained).values())
    expected = sum(factor * part for factor, part in zip(factors, parts, strict=True))
    assert combined(factors)(net.coupling)(plan.keep) == pytest.approx(expected)
    assert combined(factors)(small).total == pytest.approx(expected)


@pinned
def test_the_price_of_a_sum_is_the_sum_of_prices(net, factors, seed):
    coupling, keep = net.coupling, random_plan(net.coupling, torch.Generator().manual_seed(seed)).keep
    parts = [one(coupling).marginal(keep) for one in (tfx.cost.parameters, tfx.cost.flops, tfx.cost.memory)]
    expected = sum(factor * part for factor, part in zip(factors, parts, strict=True))
    torch.testing.assert_close(combined(factors)(coupling).marginal(keep), expected)


@given(networks(), st.integers(1, 9), SEEDS)
def test_the_price_of_a_sum_is_what_leaves_with_a_unit(net, factor, seed):
    """Where no product has the unit on two of its axes, the costs are linear in the unit."""
    coupling, keep = net.coupling, random_plan(net.coupling, torch.Generator().manual_seed(seed)).keep
    parts = tfx.cost.parameters(coupling), tfx.cost.flops(coupling)
    both = factor * parts[0] + parts[1]
    marginal = both.marginal(keep)
    for unit in np.flatnonzero(keep):
        without = keep & (np.arange(len(keep)) != unit)
        products = [axes for part in parts for axes in part.axes]
        if all(sum(unit in coupling.axes[a] for a in axes if a < len(coupling.axes)) <= 1 for axes in products):
            assert marginal[unit].item() == pytest.approx(both(keep) - both(without))


@settings(max_examples=20)
@given(networks(), st.floats(0.3, 1.0), SEEDS)
def test_a_budget_of_a_cost_is_the_budget_of_its_name_and_multiples_share_it(net, share, seed):
    scores = torch.rand(len(net.coupling), generator=torch.Generator().manual_seed(seed))

    def plan(budget, per_cost):
        try:
            return tfx.select(scores, net.coupling, budget=budget, per_cost=per_cost)
        except tfx.BudgetError:
            return None

    flops = tfx.cost.flops
    for per_cost in (False, True):
        expected = plan(tfx.Flops(share), per_cost)
        for same in (flops, 2 * flops, flops + flops, 0 * tfx.cost.memory + flops):
            assert plan(tfx.Budget.of(share, same), per_cost) == expected


@dataclass(frozen=True, eq=False)
class Steady(tfx.cost.Timings):
    """A machine without noise."""

    def measure(self, layer, shapes):
        return float(len(shapes) + sum(shape[-1] for shape in shapes))


def test_prune_takes_a_budget_of_a_sum_with_prices():
    net, timings = network(CONSTRUCTS["chain"]), Steady()
    cost = 4 * tfx.cost.parameters + tfx.cost.flops + timings.over
    total = cost(net.coupling).total
    assert total == pytest.approx(
        4 * tfx.cost.parameters(net.coupling).total
        + tfx.cost.flops(net.coupling).total
        + timings.over(net.coupling).total
    )
    for budget in (tfx.Budget.of(0.6, cost), tfx.Budget.of(int(0.6 * total), cost)):
        params, spec = tfx.prune(net.params, net.spec, net.batch, budget=budget, steps=2)
        assert cost(tfx.couple(params, spec)).total <= 0.6 * total
    swapped = timings.over + (tfx.cost.flops + 4 * tfx.cost.parameters)
    assert swapped(net.coupling).total == pytest.approx(total)
    assert str(tfx.Budget.of(0.6, cost)) == "at most 60.0% of the 4 * parameters + flops + over"
    assert str(2 * (tfx.cost.flops + tfx.cost.memory)) == "2 * (flops + memory)"


def test_what_cannot_be_added_or_multiplied_is_refused():
    coupling, other = (network(CONSTRUCTS[name]).coupling for name in ("dense", "projection"))
    flops = tfx.cost.flops(coupling)
    assert sum([flops, flops]).total == 2 * flops.total
    assert (2 * (3 * flops + tfx.cost.memory(coupling))).total == 6 * flops.total + 2 * tfx.cost.memory(coupling).total
    assert sum([tfx.cost.flops, tfx.cost.flops])(coupling).total == 2 * flops.total
    with pytest.raises(ValueError, match="Costs add up when they are of one coupling"):
        flops + tfx.cost.flops(other)
    for factor in (-1, float("nan"), float("inf"), True):
        for cost in (flops, tfx.cost.flops):
            with pytest.raises(ValueError, match="a finite number that is not negative"):
                factor * cost
    for cost in (flops, tfx.cost.flops):
        with pytest.raises(TypeError):
            cost + 1
        with pytest.raises(TypeError):
            cost * "2"


def test_a_cost_function_looks_and_is_pickled_as_its_function():
    assert tfx.cost.flops.__name__ == str(tfx.cost.flops) == "flops"
    assert "two per multiply-add" in tfx.cost.flops.__doc__
    assert pickle.loads(pickle.dumps(tfx.cost.flops)) is tfx.cost.flops

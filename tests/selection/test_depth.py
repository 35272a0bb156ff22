"""Branches chosen beside channels: prices, constraints, and what leaves together."""

from functools import partial
from itertools import combinations, pairwise

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS, parallel
from hypothesis import example, given, settings
from test_joint import statistics
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, inline, residual, serial
from taylorfx import layers as L
from taylorfx.selection.depth import depths
from taylorfx.selection.joint import _added
from taylorfx.selection.select import Asked, first_that_fit
from taylorfx.sentence import _change
from taylorfx.testing.strategies import network, random_plan

SEEDS = st.integers(0, 2**16)


def blocks(count: int = 3, width: int = 4, hidden: int = 6) -> tfx.Spec:
    """A stream to which blocks add."""
    body = serial(up=L.Linear(width, hidden), act=L.Tanh(), down=L.Linear(hidden, width))
    named = {f"b{k}": residual(body) for k in range(count)}
    return serial(Input((3,)), stem=L.Linear(3, width), **named, head=L.Linear(width, 2))


def nested() -> tfx.Spec:
    """A branch within another one, twice."""
    inner = serial(up=L.Linear(4, 3), act=L.Tanh(), down=L.Linear(3, 4))
    body = serial(inner=residual(inner), act=L.Tanh(), out=L.Linear(4, 4))
    return serial(Input((4,)), stem=L.Linear(4, 4), a=residual(body), b=residual(body), head=L.Linear(4, 2))


SPECS = {
    "blocks": blocks(), "nested": nested(), "images": CONSTRUCTS["residual stream"],
    "parallel": parallel((("a", "b"), "c"), "x"),
}  # fmt: skip


def coupled(spec, seed=0):
    net = network(spec, seed)
    return net._replace(coupling=tfx.couple(net.params, net.spec, branches=True))


def unit_of(coupling, scope):
    (unit,) = np.flatnonzero(coupling.scope == coupling.scopes.index(scope)).tolist()
    return unit


def rows_of(coupling, seed, count=7):
    return torch.randn(count, len(coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=15)
@given(st.sampled_from([*SPECS]), SEEDS, st.sampled_from([0.3, 0.6]), st.booleans())
def test_a_plan_meets_its_budget_by_the_counts_of_the_cut_network(name, seed, share, per_cost):
    net, budgets = coupled(SPECS[name], seed), [tfx.Flops(share), tfx.Parameters(0.8), tfx.Memory(0.9)]
    coupling = net.coupling
    stats = statistics(coupling, rows_of(coupling, seed))
    plans = [tfx.select(tfx.fisher(stats, coupling), coupling, budget=budgets, per_cost=per_cost)]
    plans += [
        tfx.joint(stats, coupling, budget=budgets, per_cost=per_cost, rounds=6, cautious=x) for x in (True, False)
    ]
    for plan in plans:
        small = tfx.couple(tfx.cut(net.params, plan), plan.spec)
        for cost, limit in ((tfx.cost.flops, share), (tfx.cost.parameters, 0.8), (tfx.cost.memory, 0.9)):
            assert cost(small).total <= limit * cost(coupling).total * (1 + 1e-12)
        assert not tfx.Constraints().broken(coupling, plan.keep)


@settings(max_examples=15)
@given(st.sampled_from([*SPECS]), SEEDS)
def test_what_a_unit_adds_is_the_difference_of_two_forecasts(name, seed):
    coupling = coupled(SPECS[name]).coupling
    rows = rows_of(coupling, seed)
    stats = statistics(coupling, rows)
    plan = random_plan(coupling, torch.Generator().manual_seed(seed), 0.3)
    whole = rows.mean(0), 0.5 * rows.square().mean(0)
    cross, mean, half = _added(rows, coupling, plan.keep, whole)
    for unit in np.flatnonzero(plan.keep).tolist():
        less = plan.keep & (np.arange(len(coupling)) != unit)
        if not coupling.empty(coupling.settled(less)):
            change = tfx.expected_change(stats, tfx.Plan(coupling, less)) - tfx.expected_change(stats, plan)
            assert_close((cross + half - mean)[unit], change)


def test_a_branch_costs_what_it_still_has_and_its_score_counts_once():
    net = coupled(blocks(2))
    coupling = net.coupling
    scores = torch.ones(len(coupling), dtype=torch.float64)
    scores[unit_of(coupling, "b0: branch")] = 3.5  # less than the four of its hidden units that have to leave otherwise
    plan = tfx.select(scores, coupling, budget=tfx.Flops(0.75), per_cost=True, protect=["stem", "b1*"])
    assert [coupling.names[k] for k in np.flatnonzero(plan.leaving)] == ["b0: branch[0]"]
    scores[unit_of(coupling, "b0: branch")] = 20.0
    plan = tfx.select(scores, coupling, budget=tfx.Flops(0.75), per_cost=True, protect=["stem", "b1*"])
    assert {coupling.scopes[k] for k in coupling.scope[~plan.keep]} == {"b0.up"}


# What comes back.

UNEVEN = (2, 9, 4, 6)
"""Hidden units of blocks, so that small branches fit where large ones do not."""


def uneven(*, nested: bool = True) -> tfx.Spec:
    """Blocks of different sizes, the last of them within another branch."""
    bodies = [serial(up=L.Linear(4, n), act=L.Tanh(), down=L.Linear(n, 4)) for n in UNEVEN]
    if nested:
        bodies[3] = serial(inner=residual(bodies[3]), out=L.Linear(4, 4))
    named = {f"b{k}": residual(body) for k, body in enumerate(bodies)}
    return serial(Input((3,)), stem=L.Linear(3, 4), **named, head=L.Linear(4, 2))


def returns(coupling, keep):
    """Every branch that left by itself, and the units in it, ``(units,)`` each."""
    for branch in coupling.branches:
        itself = np.arange(len(coupling)) == branch.unit
        if coupling.leaving(keep)[branch.unit]:
            yield itself, coupling.carried(~itself)


@settings(max_examples=20)
@given(SEEDS, st.floats(0.15, 0.9), st.sampled_from([tfx.Flops, tfx.Parameters, tfx.Memory]), st.booleans())
def test_no_branch_that_left_still_fits(seed, share, kind, per_cost):
    coupling = coupled(uneven()).coupling
    budget, stats = kind(share), statistics(coupling, rows_of(coupling, seed))
    cost, scores = budget.cost(coupling), tfx.fisher(stats, coupling)
    limit = budget.limit(cost.total)
    asked = Asked.of(coupling, budget, tfx.Constraints())
    try:
        prefix = first_that_fit(scores.numpy(), asked)
    except tfx.BudgetError:
        return
    plans = [tfx.select(scores, coupling, budget=budget)]
    for itself, inside in returns(coupling, plans[0].keep):
        assert cost(plans[0].keep | itself | inside & prefix) > limit  # as it was when it left
    plans.append(tfx.select(scores, coupling, budget=budget, per_cost=True))
    plans += [tfx.joint(stats, coupling, budget=budget, per_cost=per_cost, rounds=6, cautious=x) for x in (True, False)]
    for plan in plans:
        assert cost(plan.keep) <= limit
        for itself, inside in returns(coupling, plan.keep):
            assert cost(plan.keep | itself | inside) > limit
        for unit in np.flatnonzero(plan.leaving):
            more = plan.keep | (np.arange(len(coupling)) == unit)
            assert coupling.empty(more) or cost(more) > limit or unit in [x.unit for x in coupling.branches]


def test_the_best_branch_that_fits_comes_back_without_what_left_by_itself():
    coupling = coupled(uneven()).coupling
    scores, cost = torch.full((len(coupling),), 50.0, dtype=torch.float64), tfx.cost.flops(coupling)
    narrow = int(np.flatnonzero(coupling.scope == coupling.scopes.index("b2.up"))[2])
    b0, b2, b1 = (unit_of(coupling, f"{name}: branch") for name in ("b0", "b2", "b1"))
    for score, unit in enumerate((narrow, b0, b2, b1)):  # they leave in this order
        scores[unit] = score

    def leaving(*units):
        """What leaves of a network that has room for what is left without these."""
        limit = tfx.Flops(int(cost(~np.isin(np.arange(len(coupling)), units))))
        return {*np.flatnonzero(tfx.select(scores, coupling, budget=limit).leaving)}

    assert leaving(b0, b1, narrow) == {b0, b1, narrow}  # the second comes back, with three of its four hidden units
    assert leaving(b1, b2) == {b1, b2}  # those do not fit, and the first does


@settings(max_examples=10)
@given(SEEDS, st.floats(0.3, 0.8))
@example(14, 0.3)
@example(53, 0.5857)
def test_branches_come_back_as_wide_as_the_others_of_their_family(seed, share):
    coupling = coupled(blocks(5, hidden=8)).coupling
    stats, budget = statistics(coupling, rows_of(coupling, seed)), tfx.Flops(share)
    rules = tfx.Constraints(uniform="*.up", multiple={"*.up": 2}, floor={"*.up": 2})
    cost = budget.cost(coupling)
    for cautious in (True, False):
        plan = tfx.joint(stats, coupling, budget=budget, rounds=6, constraints=rules, cautious=cautious)
        assert not rules.broken(coupling, plan.keep)
        widths = [plan.keep[coupling.scope == coupling.scopes.index(f"b{k}.up")].sum() for k in range(5)]
        for itself, inside in returns(coupling, plan.keep):
            back = plan.keep | itself | inside & (np.cumsum(inside) <= (max(widths) or 8))
            assert cost(back) > budget.limit(cost.total)


# Constraints.


def choose(coupling, seed, **constraints):
    stats = statistics(coupling, rows_of(coupling, seed))
    plan = tfx.joint(stats, coupling, budget=tfx.Flops(0.5), rounds=8, **constraints)
    assert not tfx.Constraints(**constraints).broken(coupling, plan.keep)
    return plan


@settings(max_examples=10)
@given(SEEDS)
def test_what_is_protected_keeps_the_branch_that_it_is_in(seed):
    coupling = coupled(nested()).coupling
    plan = choose(coupling, seed, protect=["a.inner.up"])
    assert plan.keep[unit_of(coupling, "a: branch")]
    assert plan.keep[unit_of(coupling, "a.inner: branch")]
    assert plan.keep[coupling.scope == coupling.scopes.index("a.inner.up")].all()


@settings(max_examples=10)
@given(SEEDS)
def test_a_plain_floor_is_of_channels_and_one_by_a_glob_keeps_branches(seed):
    coupling = coupled(blocks()).coupling
    lowest = torch.zeros(len(coupling), dtype=torch.float64)
    plan = tfx.select(lowest, coupling, budget=tfx.Units(4), floor=4, multiple=2, most=0.5)
    assert not any(plan.keep[unit_of(coupling, f"b{k}: branch")] for k in range(3))
    plan = choose(coupling, seed, floor={"*: branch": 1}, most={"stem": 0.5})
    assert all(plan.keep[unit_of(coupling, f"b{k}: branch")] for k in range(3))


@settings(max_examples=15)
@given(SEEDS)
def test_uniform_branches_leave_together_and_uniform_widths_hold_for_those_that_stay(seed):
    coupling = coupled(blocks(4)).coupling
    families = [("b0: branch", "b1: branch"), ("b2: branch", "b3: branch"), "*.up"]
    plan = choose(coupling, seed, uniform=families)
    stays = [bool(plan.keep[unit_of(coupling, f"b{k}: branch")]) for k in range(4)]
    assert stays[0] == stays[1]
    assert stays[2] == stays[3]
    widths = {int(plan.keep[coupling.scope == coupling.scopes.index(f"b{k}.up")].sum()) for k in range(4) if stays[k]}
    assert len(widths) <= 1


@settings(max_examples=5)
@given(SEEDS)
def test_constraints_last_from_step_to_step(seed):
    net = coupled(blocks(4), seed)
    uniform = [("b0: branch", "b1: branch"), "*.up"]
    steps = tfx.iterate(
        net.params, net.spec, net.batch, budgets=[tfx.Flops(x) for x in (0.8, 0.6, 0.4)], branches=True,
        uniform=uniform, protect="b3*", multiple={"*.up": 2},
    )  # fmt: skip
    before = tfx.cost.flops(net.coupling).total
    for (params, spec, _), share in zip(steps, (0.8, 0.6, 0.4), strict=True):
        assert tfx.cost.flops(tfx.couple(params, spec)).total <= share * before
        names = {node.name for node in spec}
        assert ("b0.add" in names) == ("b1.add" in names)
        assert spec["b3.up"].layer.out_features == 6
        assert len({node.layer.out_features for node in spec if node.name.endswith(".up")}) == 1


# What leaves together.

ONLY_BRANCHES = {"*.up": 6, "stem": 4}
"""Floors: of units that are not in a branch that leaves, all stay."""


def together(count: int = 3, width: int = 4, hidden: int = 6) -> tfx.Spec:
    """A stream to which blocks add what they have added to each other before."""
    nodes = [Node("input", Input((3,))), Node("stem", L.Linear(3, width), ("input",))]
    for k in range(count):
        body = serial(up=L.Linear(width, hidden), act=L.Tanh(), down=L.Linear(hidden, width))
        nodes += inline(body, f"b{k}", ("stem",))
        if k:
            nodes += [Node(f"sum{k}", L.Add(), (f"sum{k - 1}" if k > 1 else "b0.down", f"b{k}.down"))]
    sums = Node("sum", L.Add(), ("stem", f"sum{count - 1}"))
    return Spec((*nodes, sums, Node("head", L.Linear(width, 2), ("sum",))))


class Trap:
    """Three blocks, ``x + scale * sign(W) tanh(V x)``, and a squared error around what the network gives out.

    Args:
        parts: for each block the block whose ``V`` and ``W`` it has, and its scale.
        spec: how they are added to the stream.
    """

    def __init__(self, *parts, spec=blocks):
        net = coupled(spec(len(parts)))
        leaves, self.spec, self.coupling = tfx.tree.flatten(net.params), net.spec, net.coupling
        for k, (same, scale) in enumerate(parts):
            leaves |= {f"b{k}.up.{x}": leaves[f"b{same}.up.{x}"].clone() for x in ("weight", "bias")}
            leaves[f"b{k}.down.weight"] = scale * leaves[f"b{same}.down.weight"].sign()
            leaves[f"b{k}.down.bias"] = torch.zeros_like(leaves[f"b{k}.down.bias"])
        self.params = tfx.tree.unflatten(leaves)
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(256, 3, generator=generator, dtype=torch.float64)
        y = tfx.apply(self.params, self.spec, self.x)
        self.y = y + 0.5 * torch.randn(y.shape, generator=generator, dtype=torch.float64)
        self.stats = tfx.measure(self.params, self.spec, (self.x, self.y), self.coupling, loss=error, rows=True)

    def without(self, *blocks):
        units = [unit_of(self.coupling, f"b{k}: branch") for k in blocks]
        return tfx.Plan(self.coupling, ~np.isin(np.arange(len(self.coupling)), units))

    def loss(self, plan):
        return float(error(tfx.apply(tfx.cut(self.params, plan), plan.spec, self.x), self.y).mean())

    def true(self, *blocks):
        """How much the loss rises without these blocks."""
        return self.loss(self.without(*blocks)) - self.loss(self.without())

    def forecast(self, *blocks):
        return float(tfx.expected_change(self.stats, self.without(*blocks)))


def error(outputs, targets):
    return (outputs - targets).square().sum(-1)


def test_joint_rows_see_that_two_blocks_cancel_each_other():
    trap = Trap((0, 0.3), (0, -0.29), (2, 0.1))
    assert min(trap.true(0), trap.true(1)) > 0.1 > 20 * abs(trap.true(0, 1))  # each is vital, both are nothing
    assert min(trap.forecast(0), trap.forecast(1)) > 0.05 > 20 * abs(trap.forecast(0, 1))
    alone = tfx.criteria.second_order(trap.stats, trap.coupling)[-3:]
    assert float(alone[:2].sum()) > 0.1  # what scores one by one say of the two


@pytest.mark.parametrize(("spec", "third", "worse"), [(blocks, 0.2, 2), (together, 0.27, 1.4)])
def test_joint_keeps_one_of_two_blocks_that_matter_together(spec, third, worse):
    trap = Trap((0, 0.1), (0, 0.1), (2, third), spec=spec)
    alone = tfx.criteria.second_order(trap.stats, trap.coupling)
    assert alone[-3:-1].max() < alone[-1]  # each of the two is worth less than the third block
    budget = tfx.Flops(0.5)
    one_by_one = tfx.select(alone, trap.coupling, budget=budget, floor=ONLY_BRANCHES)
    both = tfx.joint(trap.stats, trap.coupling, budget=budget, floor=ONLY_BRANCHES)
    assert one_by_one == trap.without(0, 1)
    assert both in (trap.without(0, 2), trap.without(1, 2))  # the two are the same
    assert trap.true(0, 1) > worse * trap.true(0, 2)


def test_joint_lets_two_blocks_that_cancel_each_other_leave_together():
    trap = Trap((0, 0.3), (0, -0.29), (2, 0.3))
    choose = partial(tfx.joint, trap.stats, trap.coupling, budget=tfx.Flops(0.5), floor=ONLY_BRANCHES)
    one_by_one, together = choose(swaps=False), choose()
    assert not one_by_one.keep[unit_of(trap.coupling, "b2: branch")]  # the least of the three, and then a vital one
    assert together == trap.without(0, 1)
    assert trap.loss(together) < trap.loss(one_by_one) - 0.1


@settings(max_examples=20)
@given(SEEDS, st.floats(0.2, 0.9))
@example(5, 0.7)
@example(7, 0.3)
def test_no_move_of_one_or_two_branches_lowers_the_forecast(seed, share):
    coupling = coupled(uneven(nested=False)).coupling
    stats, budget = statistics(coupling, rows_of(coupling, seed, count=3)), tfx.Flops(share)
    plan = tfx.joint(stats, coupling, budget=budget, floor={"*.up": 9, "stem": 4}, rounds=6)
    free = [branch.unit for branch in coupling.branches]
    cost, least = budget.cost(coupling), tfx.expected_change(stats, plan)

    def without(units):
        return coupling.settled(~np.isin(np.arange(len(coupling)), list(units)))

    def fits(units):
        return cost(without(units)) <= budget.limit(cost.total)

    every = [{*units} for n in range(len(free) + 1) for units in combinations(free, n)]
    full = [units for units in every if fits(units) and not any(fits(units - {unit}) for unit in units)]
    gone = {*np.flatnonzero(plan.leaving).tolist()}
    assert gone in full
    for units in full:
        if len(gone ^ units) <= 2:
            assert tfx.expected_change(stats, tfx.Plan(coupling, without(units))) >= least - 1e-9


# The sentence.


def loss_of(params, spec, batch):
    return float(torch.nn.functional.cross_entropy(tfx.apply(params, spec, batch[0]), batch[1]))


@settings(max_examples=10)
@given(st.sampled_from([*SPECS]), SEEDS, st.sampled_from([0.35, 0.6, 0.8]), st.sampled_from([None, tfx.reconstruct]))
def test_with_branches_no_less_is_left_than_without(name, seed, share, repair):
    """The network with all its branches is one of those that are compared, by their losses."""
    net = coupled(SPECS[name], seed)
    prune = partial(tfx.prune, net.params, net.spec, net.batch, budget=tfx.Flops(share), repair=repair, steps=2)
    deep = prune(branches=True)
    assert deep.plan.spec == deep.spec or repair  # which may add biases
    cost = tfx.cost.flops(net.coupling)
    assert cost(deep.plan.keep) <= share * cost.total
    try:
        wide = prune()
    except tfx.BudgetError:
        return
    assert loss_of(*deep, net.batch) <= loss_of(*wide, net.batch) + 1e-9


@settings(max_examples=15)
@given(SEEDS, st.floats(0.2, 0.9), st.lists(st.integers(0, 9), min_size=4, max_size=4))
def test_branches_leave_in_the_order_of_what_is_lost_for_what_is_saved(seed, share, losses):
    net = coupled(blocks(4), seed)
    coupling = net.coupling
    units = [unit_of(coupling, f"b{k}: branch") for k in range(4)]

    def loss(keep):
        return 1 + sum(x for x, unit in zip(losses, units, strict=True) if not keep[unit])

    asked = Asked.of(coupling, tfx.Flops(share), tfx.Constraints())
    found = depths(asked, loss)
    assert found[0].all()
    gone = [{k for k, unit in enumerate(units) if not keep[unit]} for keep in found]
    for keep, some in zip(found, gone, strict=True):
        assert (keep == coupling.settled(~np.isin(np.arange(len(coupling)), [units[k] for k in some]))).all()
        assert all(losses[k] <= losses[other] for k in some for other in {*range(4)} - some)  # they are of one size
    assert all(less < more for less, more in pairwise(gone))
    assert all(asked.fullness(keep) > 1 for keep in found[:-1])  # no more leave than have to


@settings(max_examples=10)
@given(SEEDS)
def test_depths_respect_constraints(seed):
    coupling = coupled(blocks(4), seed).coupling
    rules = tfx.Constraints(protect="b3*", uniform=[("b0: branch", "b2: branch")], floor={"b1: branch": 1})
    asked, seen = Asked.of(coupling, tfx.Flops(0.1), rules), []

    def loss(keep):
        seen.append({k for k in range(4) if not keep[unit_of(coupling, f"b{k}: branch")]})
        return len(seen)

    found = depths(asked, loss)
    assert seen == [set(), {0, 2}]
    assert [int((~keep).sum() > 0) for keep in found] == [0, 1]


@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12))
def test_a_change_counts_in_its_standard_errors(values):
    differences = torch.tensor(values, dtype=torch.float64)
    change = _change(differences, None)
    if len({*values}) > 1:
        error = differences.std(correction=0) / len(values) ** 0.5
        assert change == pytest.approx(float(differences.mean() / error))
    else:
        assert (change > 1, change < -1) == (values[0] > 0, values[0] < 0)


def test_a_branch_that_derivatives_take_for_nothing_stays():
    """It is read by a tanh that it drives far up, where nothing changes any more until it is gone."""
    spec = serial(
        Input((3,)), stem=L.Linear(3, 4), b0=residual(serial(up=L.Linear(4, 6), act=L.Tanh(), down=L.Linear(6, 4))),
        b1=residual(serial(up=L.Linear(4, 6), act=L.Tanh(), down=L.Linear(6, 4))), act=L.Tanh(), head=L.Linear(4, 2),
    )  # fmt: skip
    net = coupled(spec)
    leaves = tfx.tree.flatten(net.params)
    leaves["b0.down.bias"] = torch.full_like(leaves["b0.down.bias"], 9.0)
    leaves["b1.down.weight"] = 0.3 * leaves["b1.down.weight"]
    params = tfx.tree.unflatten(leaves)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = (
        x,
        tfx.apply(params, spec, x) + 0.1 * torch.randn(64, 2, generator=torch.Generator().manual_seed(1)).double(),
    )
    stats = tfx.measure(params, spec, batch, net.coupling, loss=error, rows=True)
    units = [unit_of(net.coupling, f"{name}: branch") for name in ("b0", "b1")]
    blind = tfx.joint(stats, net.coupling, budget=tfx.Flops(0.7), floor=ONLY_BRANCHES, cautious=True)
    assert blind.keep[units].tolist() == [False, True]
    pruned = tfx.prune(params, spec, batch, budget=tfx.Flops(0.7), floor=ONLY_BRANCHES, branches=True, loss=error)
    assert pruned.plan.keep[units].tolist() == [True, False]


@pytest.mark.parametrize("name", [*SPECS])
def test_prune_takes_branches_and_channels_in_steps(name):
    net = coupled(SPECS[name])
    params, spec = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Flops(0.4), branches=True)
    counts = [tfx.cost.flops(tfx.couple(p, s)).total for p, s in ((net.params, net.spec), (params, spec))]
    assert counts[1] <= 0.4 * counts[0]
    tfx.apply(params, spec, net.batch[0])


@pytest.mark.parametrize("criterion", [tfx.taylor, tfx.criteria.activation_std, tfx.criteria.compat])
def test_criteria_of_statistics_score_branches(criterion):
    net = coupled(SPECS["images"])
    budget = tfx.Flops(0.5)
    params, spec = tfx.prune(
        net.params, net.spec, net.batch, budget=budget, branches=True, criterion=criterion, steps=2
    )
    whole, left = (tfx.cost.flops(tfx.couple(p, s)).total for p, s in ((net.params, net.spec), (params, spec)))
    assert left <= 0.5 * whole
    assert tfx.apply(params, spec, net.batch[0]).isfinite().all()


def test_what_branches_do_not_have_is_refused_by_name():
    net = coupled(SPECS["images"])
    prune = partial(tfx.prune, net.params, net.spec, net.batch, budget=tfx.Flops(0.5), branches=True)
    with pytest.raises(ValueError, match="none writes a branch; received 1: branch, 3: branch, 5: branch"):
        prune(criterion=tfx.criteria.weight_l2)
    with pytest.raises(tfx.SelectionError, match="has all of its branches"):
        prune(like=torch.nn.Identity())

"""The laws of the library, on random networks in float64. Each test's name is the law."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import assume, example, given
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.network.parameters import check
from taylorfx.network.run import evaluate, gating
from taylorfx.scoring.measure import derivatives
from taylorfx.selection.select import Asked, first_that_fit
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import (
    Network,
    batch_for,
    homogeneous_specs,
    network,
    networks,
    random_params,
    random_plan,
    specs,
)

SEEDS = st.integers(0, 2**16)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
LAWS = {}
"""Those of every network, by name: functions of a network and a seed."""


BRANCHED = ("residual stream", "grouped queries", "layer norm", "parallel branches")
"""Constructs whose residual branches are units, too, in every law."""


def pinned(law):
    """The law, run on every construct by name besides the random networks, and on some with their branches as units."""
    LAWS[law.__name__] = law
    for spec in CONSTRUCTS.values():
        law = example(network(spec), 1)(law)
    for name in BRANCHED:
        law = example(network(CONSTRUCTS[name], branches=True), 1)(law)
        law = example(network(CONSTRUCTS[name], branches=True), 2)(law)
    return given(networks(branches=None), SEEDS)(law)


def plan_for(net: Network, seed: int, *, exact: bool = False) -> tfx.Plan:
    generator = torch.Generator().manual_seed(seed)
    return random_plan(net.coupling, generator, float(torch.rand((), generator=generator)), exact=exact)


@pinned
def test_cutting_is_gating(net, seed):
    plan = plan_for(net, seed, exact=True)
    small = tfx.apply(tfx.cut(net.params, plan), plan.spec, net.batch[0])
    assert_close(small, tfx.apply(net.params, net.spec, net.batch[0], gates=plan.gates), **CLOSE)


@pinned
def test_gates_of_one_are_the_network_itself(net, seed):
    ones = tfx.gates(net.coupling, torch.ones(len(net.coupling), dtype=torch.float64))
    x = net.batch[0]
    assert_close(tfx.apply(net.params, net.spec, x, gates=ones), tfx.apply(net.params, net.spec, x), rtol=0, atol=0)


@pinned
def test_expanding_then_cutting_is_the_identity_and_cutting_then_expanding_zeroes(net, seed):
    plan = plan_for(net, seed)
    small = tfx.cut(net.params, plan)
    back = tfx.expand(small, plan)
    assert_trees_equal(tfx.cut(back, plan), small)
    full, zeroed = tfx.tree.flatten(net.params), tfx.tree.flatten(back)
    alive = net.coupling.alive(plan.keep)
    for path, axes in net.coupling.parameters.items():
        mask = torch.ones_like(full[path])
        for axis, number in enumerate(axes):
            shape = [1] * mask.ndim
            shape[axis] = -1
            mask = mask * torch.from_numpy(alive[number]).reshape(shape)
        assert torch.equal(zeroed[path], full[path] * mask * (path not in plan.gone))


@pinned
def test_two_cuts_are_one_composed_cut(net, seed):
    first = plan_for(net, seed)
    small = tfx.cut(net.params, first)
    second = random_plan(tfx.couple(small, first.spec), torch.Generator().manual_seed(seed + 1), 0.4)
    both = tfx.compose(first, second)
    assert_trees_equal(tfx.cut(net.params, both), tfx.cut(small, second))
    assert both.spec == second.spec


@pinned
def test_keeping_all_changes_nothing(net, seed):
    plan = tfx.Plan(net.coupling, np.ones(len(net.coupling), bool))
    assert tfx.cut(net.params, plan) is net.params
    assert tfx.expand(net.params, plan) is net.params
    assert plan.spec is net.spec


@pinned
def test_the_new_spec_describes_the_cut_parameters_and_has_the_surviving_units(net, seed):
    plan = plan_for(net, seed)
    small = tfx.cut(net.params, plan)
    check(small, plan.spec)
    again = tfx.couple(small, plan.spec, branches=bool(net.coupling.branches))
    alive = net.coupling.alive(plan.keep)
    renamed: dict[int, int] = {}
    for path, axes in net.coupling.parameters.items() if not plan.gone else ():
        for axis, number in enumerate(axes):
            old, new = net.coupling.axes[number][:, alive[number]], again.unit_ids(path, axis)
            assert old.shape[1] == new.shape[1]
            for column, found in zip(old.T, new.T, strict=True):
                before, after = {int(u) for u in column if u >= 0}, {int(u) for u in found if u >= 0}
                assert {renamed[u] for u in before if u in renamed} <= after
                assert len(after) <= len(before)
                if len(before) == len(after) == 1:
                    assert renamed.setdefault(before.pop(), *after) == after.pop()
    # What survived and is no unit any more is the last of some axis: its removal would leave a layer with nothing.
    lone = sum(
        any(not mask.any() for mask in net.coupling.alive(plan.keep & (np.arange(len(plan.keep)) != unit)))
        for unit in np.flatnonzero(plan.keep)
    )
    assert plan.gone or len(again) == plan.keep.sum() - lone


@given(
    networks(
        homogeneous_specs().filter(lambda spec: all(not isinstance(n.layer, L.Slice) for n in spec)), branches=None
    ),
    SEEDS,
)
@example(network(CONSTRUCTS["residual stream"]), 3)
@example(network(CONSTRUCTS["flatten"]), 3)
def test_permuting_units_permutes_the_scores(net, seed):
    coupling, generator = net.coupling, torch.Generator().manual_seed(seed)
    scopes = [k for k in range(len(coupling.scopes)) if coupling.sizes[k] > 1 and movable(coupling, k)]
    assume(scopes)
    members = np.flatnonzero(coupling.scope == scopes[seed % len(scopes)])
    order = np.arange(len(coupling))
    order[members] = members[torch.randperm(len(members), generator=generator).numpy()]
    leaves = tfx.tree.flatten(net.params)
    permuted = {
        path: permute(leaf, [coupling.unit_ids(path, axis) for axis in range(leaf.ndim)], order)
        for path, leaf in leaves.items()
    }
    params = tfx.tree.unflatten(permuted)
    assert_close(tfx.apply(params, net.spec, net.batch[0]), tfx.apply(net.params, net.spec, net.batch[0]), **CLOSE)
    assert [a.tolist() for a in tfx.couple(params, net.spec).axes] == [a.tolist() for a in coupling.axes]
    old = tfx.measure(net.params, net.spec, net.batch, coupling)
    new = tfx.measure(params, net.spec, net.batch, coupling)
    assert_close(tfx.taylor(new, coupling), tfx.taylor(old, coupling)[order], **CLOSE)


def movable(coupling, scope):
    """Units that alone make up the positions where they stand, so that exchanging them is a relabeling."""
    members = np.flatnonzero(coupling.scope == scope)
    rows = [axis for axis in coupling.axes if np.isin(axis, members).any()]

    def alike(axis):
        counts = np.bincount(axis[0][axis[0] >= 0], minlength=len(coupling.scope))
        return len(axis) == 1 and len(np.unique(counts[members])) == 1

    return all(map(alike, rows))


def permute(leaf, ids, order):
    """Put the positions of unit ``order[u]`` where those of ``u`` were, in their own order."""
    for axis, units in enumerate(ids):
        target = units[0].copy()
        target[target >= 0] = order[target[target >= 0]]
        index = np.empty(len(target), np.int64)
        for unit in np.unique(target):
            index[target == unit] = np.flatnonzero(units[0] == unit)
        leaf = leaf.index_select(axis, torch.from_numpy(index))
    return leaf


@given(networks(branches=None), SEEDS)
def test_statistics_add_up_to_those_of_the_union_in_any_order(net, seed):
    other = batch_for(net.spec, torch.Generator().manual_seed(seed), 2)
    union = ({k: torch.cat([net.batch[0][k], other[0][k]]) for k in other[0]}, torch.cat([net.batch[1], other[1]]))
    one, two, both = (
        tfx.measure(net.params, net.spec, b, net.coupling, moments=True) for b in (net.batch, other, union)
    )
    for total in (one + two, two + one, sum([one, two])):
        for field in ("n", "loss", "sum", "sum_abs", "sum_sq", "sum_abs_mean"):
            assert_close(getattr(total, field), getattr(both, field), **CLOSE)
        for field in ("count", "sum", "sum_sq", "zeros"):
            assert_close(getattr(total.moments, field), getattr(both.moments, field), **CLOSE)
    streamed = tfx.measure(net.params, net.spec, iter([net.batch, other]), net.coupling)
    assert_close(streamed.sum_batch_sq, one.sum_batch_sq + two.sum_batch_sq, **CLOSE)
    assert streamed.batches == 2


@pinned
def test_gate_derivatives_equal_finite_differences(net, seed):
    coupling, step = net.coupling, 1e-5
    rows = derivatives(net.params, net.spec, *net.batch, coupling)[1]
    units = np.random.default_rng(seed).permutation(len(coupling))[:4]

    def loss(inputs, targets, unit, amount):
        values = torch.ones(len(coupling), dtype=torch.float64)
        values[unit] += amount
        output = tfx.apply(net.params, net.spec, inputs, gates=tfx.gates(coupling, values))
        return torch.nn.functional.cross_entropy(output, targets)

    for k, single in enumerate(singles(net.batch)):
        for unit in units:
            whole, half = ((loss(*single, unit, s) - loss(*single, unit, -s)) / (2 * s) for s in (step, step / 2))
            if (whole - half).abs() < 1e-6:  # else a kink of ReLU or max pooling lies within the step
                assert_close(rows[k, unit], half, rtol=1e-4, atol=1e-6)


@pinned
def test_gate_derivatives_equal_activation_times_gradient_by_plain_autograd(net, seed):
    coupling = net.coupling
    rows = derivatives(net.params, net.spec, *net.batch, coupling)[1]
    for k, (inputs, targets) in enumerate(singles(net.batch)):
        seen = {}

        def tap(name, slot, x, seen=seen):
            for place in coupling.reads:
                if (place.node, place.slot) == (name, slot):
                    shift = torch.zeros_like(x).requires_grad_()
                    seen[name, slot, place.axis] = (x, shift)
                    x = x + shift
            return x

        output, _ = evaluate(net.params, net.spec, (inputs,), tap=tap)
        loss = torch.nn.functional.cross_entropy(output, targets)
        expected = torch.zeros(len(coupling), dtype=torch.float64)
        for place in coupling.reads:
            x, shift = seen[place.node, place.slot, place.axis]
            (grad,) = torch.autograd.grad(loss, shift, retain_graph=True)
            product = (x * grad).movedim(place.axis, 0).detach()
            product = product.reshape(len(product) if place.units.shape[1] > 1 else 1, -1).sum(1)
            for column, units in enumerate(place.units.T):
                for unit in units[units >= 0]:
                    expected[unit] += product[column]
        assert_close(rows[k], expected, **CLOSE)


def singles(batch):
    """Every example as a batch of one."""
    inputs, targets = batch
    return [({name: x[k : k + 1] for name, x in inputs.items()}, targets[k : k + 1]) for k in range(len(targets))]


@pinned
def test_per_example_rows_equal_batches_of_one(net, seed):
    _, rows, means, _ = derivatives(net.params, net.spec, *net.batch, net.coupling)
    for k, one in enumerate(singles(net.batch)):
        _, row, mean, _ = derivatives(net.params, net.spec, *one, net.coupling)
        assert_close(rows[k : k + 1], row, **CLOSE)
        assert_close(means[k : k + 1], mean, **CLOSE)


@given(networks(homogeneous_specs(), branches=None), SEEDS)
@example(network(CONSTRUCTS["residual stream"]), 0)
@example(network(CONSTRUCTS["groups without bias"]), 0)
def test_derivatives_at_the_reads_equal_those_at_the_writes_on_homogeneous_networks(net, seed):
    reads = tfx.measure(net.params, net.spec, net.batch, net.coupling)
    writes = tfx.measure(net.params, net.spec, net.batch, net.coupling, at_writes=True)
    assert_close(reads.sum_abs, writes.sum_abs, **CLOSE)


@pytest.mark.parametrize("at_writes", [True, False])
@pytest.mark.parametrize("name", ["multi-head", "table", "residual stream"])
def test_where_training_changes_nothing_its_sums_are_those_of_inference(name, at_writes):
    """Also of what is the same for all examples: a table of positions, which is written, and read, once a batch."""
    net = network(CONSTRUCTS[name])
    trained, inferred = (
        tfx.measure(net.params, net.spec, net.batch, net.coupling, at_writes=at_writes, training=training)
        for training in (True, False)
    )
    places = net.coupling.writes if at_writes else net.coupling.reads
    assert any(place.example is None for place in places) == (name == "table" or (name == "multi-head" and at_writes))
    for what in ("sum", "sum_batch_abs", "sum_batch_sq"):
        assert_close(getattr(trained, what), getattr(inferred, what), **CLOSE)


@pinned
def test_nothing_that_is_given_changes(net, seed):
    tensors = [*tfx.tree.flatten(net.params).values(), *net.batch[0].values(), net.batch[1]]
    before = [(t.clone(), t._version, t.data_ptr(), t.requires_grad) for t in tensors]
    text = str(net.spec)
    plan = plan_for(net, seed)
    kept = plan.keep.copy()
    tfx.measure(net.params, net.spec, net.batch, net.coupling, moments=True)
    tfx.train(net.params, net.spec, net.batch[0])
    tfx.expand(tfx.cut(net.params, plan), plan)
    tfx.prune(net.params, net.spec, net.batch, budget=tfx.Units(1.0))
    for tensor, (copy, version, place, grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert (tensor._version, tensor.data_ptr(), tensor.requires_grad) == (version, place, grad)
    assert str(net.spec) == text
    assert np.array_equal(plan.keep, kept)


@pinned
def test_a_training_step_commutes_with_cutting(net, seed):
    plan = plan_for(net, seed, exact=True)
    momentum = random_params(net.spec, torch.Generator().manual_seed(seed))
    tap = gating(plan.gates)

    def step(params, spec, momentum, tap):
        trained, rest = tfx.partition(params, spec)

        def loss(trained):
            output, new = evaluate(tfx.tree.combine(trained, rest), spec, (net.batch[0],), tap=tap, training=True)
            return torch.nn.functional.cross_entropy(output, net.batch[1]), tfx.partition(new, spec)[1]

        grads, buffers = torch.func.grad(loss, has_aux=True)(trained)
        grads, old = tfx.tree.flatten(grads), tfx.tree.flatten(momentum)
        velocity = {path: 0.9 * old[path] + grad for path, grad in grads.items()}
        moved = {path: leaf - 0.1 * velocity[path] for path, leaf in tfx.tree.flatten(trained).items()}
        return tfx.tree.combine(tfx.tree.unflatten(moved), buffers), tfx.tree.unflatten(velocity)

    gated = [tfx.cut(tree, plan) for tree in step(net.params, net.spec, momentum, tap)]
    small = step(tfx.cut(net.params, plan), plan.spec, tfx.cut(momentum, plan), None)
    for one, other in zip(gated, small, strict=True):
        assert_trees_equal(one, other, **CLOSE)


@pinned
def test_gates_of_every_examples_own_are_those_of_batches_of_one(net, seed):
    assume(not net.coupling.mixing)
    values = torch.rand(3, len(net.coupling), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    together = tfx.apply(net.params, net.spec, net.batch[0], gates=tfx.gates(net.coupling, values))
    for k, (inputs, _) in enumerate(singles(net.batch)):
        alone = tfx.apply(net.params, net.spec, inputs, gates=tfx.gates(net.coupling, values[k]))
        assert_close(together[k : k + 1], alone, **CLOSE)


@pinned
def test_the_marginal_cost_of_a_unit_is_what_leaves_with_it(net, seed):
    coupling = net.coupling
    for cost in (tfx.cost.parameters(coupling), tfx.cost.flops(coupling)):
        marginal = cost.marginal()
        for unit in np.random.default_rng(seed).permutation(len(coupling))[:4]:
            saved = cost.total - cost(np.arange(len(coupling)) != unit)
            stands = [sum(unit in coupling.axes[a] for a in axes if a < len(coupling.axes)) for axes in cost.axes]
            if max(stands) <= 1:
                assert marginal[unit].item() == pytest.approx(saved)
            else:  # on two axes of one product, the corner where they meet is counted twice
                assert marginal[unit].item() >= saved


BUDGETS = st.sampled_from([tfx.Units, tfx.Parameters, tfx.Flops])


@given(networks(branches=None), SEEDS, BUDGETS, st.lists(st.floats(0.3, 1.0), min_size=2, max_size=2), st.booleans())
def test_budgets_are_met_and_monotone(net, seed, kind, shares, per_layer):
    coupling = net.coupling
    scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(seed))
    low, high = sorted(shares)

    def plans(share):
        """What is selected, and what the prefix of the order leaves before anything comes back."""
        asked = Asked.of(coupling, kind(share), tfx.Constraints(per_layer=per_layer))
        try:
            plan = tfx.select(scores, coupling, budget=kind(share), per_layer=per_layer)
        except tfx.BudgetError as error:
            branches = kind is tfx.Units and coupling.branches  # one takes several units along
            assert "no less than" in str(error) or (branches and "the nearest" in str(error))
            return None, None
        return plan, asked.plan(first_that_fit(asked.ranked(scores.double().numpy()), asked))

    (less, small), (more, large) = plans(low), plans(high)
    cost = kind(low).cost(coupling)
    total = cost(np.ones(len(coupling), bool))
    for found, least, share in ((less, small, low), (more, large, high)):
        if found is not None:
            assert cost(found.keep) <= share * total * (1 + 1e-9)
            assert (least.keep <= found.keep).all()
            if kind is tfx.Units:
                assert found.keep.sum() == int(share * total * (1 + 1e-12))
    if small is not None:
        assert large is not None or (kind is tfx.Units and coupling.branches)
        assert large is None or (small.keep <= large.keep).all()
        rest, gone = scores[small.keep], scores[np.flatnonzero(small.leaving)]
        if len(gone) and not per_layer:  # whatever stays below the highest that left is held by a floor
            below = np.flatnonzero(small.keep & (scores.numpy() < gone.max().item()))
            assert len(below) <= sum(len(axis) for axis in coupling.axes)
        assert len(rest)


@given(networks(branches=None), SEEDS, st.integers(1, 3), st.floats(0.2, 0.9), st.sampled_from([1, 2]), st.booleans())
def test_constraints_hold(net, seed, floor, most, multiple, exact_only):
    coupling = net.coupling
    assume(len(coupling))
    scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(seed))
    protect = [coupling.scopes[seed % len(coupling.scopes)]]
    rules = {"protect": protect, "floor": floor, "most": most, "multiple": multiple, "exact_only": exact_only}
    try:
        tfx.select(scores, coupling, budget=tfx.Flops(1), **rules)
        pytest.fail("a single operation cannot do")
    except tfx.BudgetError as error:
        least = int(str(error).split("no less than ")[1].split(".")[0].replace(",", ""))
    plan = tfx.select(scores, coupling, budget=tfx.Flops(least), **rules)
    kept = np.bincount(coupling.scope[plan.keep], minlength=len(coupling.scopes))
    absent = coupling.absent(plan.keep) | {int(coupling.scope[branch.unit]) for branch in coupling.branches}
    for scope, (name, before, after) in enumerate(zip(coupling.scopes, coupling.sizes, kept, strict=True)):
        assert after == before or name not in protect
        if scope in absent:  # what leaves with a branch keeps none
            continue
        assert after >= min(floor, before)
        assert after >= (1 - most) * before - 1e-6
        assert after % multiple == 0 or after == before
    assert not (plan.leaving & ~coupling.exact).any() or not exact_only


@given(networks(specs()), SEEDS)
def test_equal_scores_leave_in_the_stated_order(net, seed):
    coupling = net.coupling
    assume(len(coupling) > len(coupling.axes) + 2)
    plan = tfx.select(torch.zeros(len(coupling)), coupling, budget=tfx.Remove(1))
    (gone,) = np.flatnonzero(~plan.keep)
    for later in range(gone + 1, len(coupling)):  # whoever comes later is held by a floor
        assert (coupling.scope[plan.keep] == coupling.scope[later]).sum() >= 1
    scope = coupling.scope[gone]
    assert gone == max(u for u in np.flatnonzero(coupling.scope == scope))

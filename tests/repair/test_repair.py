"""Repair: what is put back is exact where it can be, and the least squared error everywhere else."""

from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS, classifier
from hypothesis import assume, example, given
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers.roles import Mixing, RunningStatistics
from taylorfx.network.parameters import check
from taylorfx.network.run import evaluate
from taylorfx.repair import LeastSquares, readers
from taylorfx.repair.regression import RIDGES, Halves
from taylorfx.scoring.measure import derivatives
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import batch_for, network, networks, random_params, random_plan, token_specs

SEEDS = st.integers(0, 2**16)
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
REPAIRS = (tfx.compensate, tfx.reconstruct)


def pinned(law):
    """The law, run on every construct by name besides the random networks."""
    for spec in CONSTRUCTS.values():
        law = example(network(spec), 1)(law)
    return given(networks(), SEEDS)(law)


def plan_for(net, seed, *, exact=False):
    return random_plan(net.coupling, torch.Generator().manual_seed(seed), 0.4, exact=exact)


def whole(net):
    return tfx.Plan(net.coupling, np.ones(len(net.coupling), bool))


def more(net, seed):
    """Another batch for the network, and the two in one."""
    other = batch_for(net.spec, torch.Generator().manual_seed(seed), 2)
    inputs = {name: torch.cat([x, other[0][name]]) for name, x in net.batch[0].items()}
    return other, (inputs, torch.cat([net.batch[1], other[1]]))


def values(params, spec, inputs):
    """Every tensor that is read or given out, by node and slot."""
    seen = {}

    def tap(name, slot, x):
        seen[name, slot] = x
        return x

    evaluate(params, spec, (inputs,), tap=tap)
    return seen


def repaired_alone(net, plan, small, spec):
    """Layers with weights of their own: their output before, and after on what is kept of the same input."""
    seen = values(net.params, net.spec, net.batch[0])
    for ((node, role),) in (group for group in readers.sharing(net.spec, "weight") if len(group) == 1):
        axis = role.axis
        letters = net.coupling.letters[node.name]
        groups = plan.alive[letters["g"]] if "g" in letters else np.ones(1, bool)
        reads, writes = (np.flatnonzero(np.outer(groups, plan.alive[letters[x]])) for x in "io")
        x, y = seen[node.name, 0], seen[node.name, -1]
        x, y = (t.movedim(axis, 0)[i].movedim(0, axis) for t, i in ((x, reads), (y, writes)))
        leaves = {leaf: tfx.tree.flatten(small)[path] for leaf, path in spec[node.name].paths.items()}
        after = spec[node.name].layer.apply(leaves, x)
        consumer = next((n for n in spec if node.name in n.inputs), node)
        path = f"{consumer.params or consumer.name}.running_mean"
        if consumer.layer.role(RunningStatistics) and not spec[node.name].layer.bias:
            moved = tfx.tree.flatten(small)[path] - tfx.tree.flatten(tfx.cut(net.params, plan))[path]
            after = after - moved.reshape(-1, 1, 1)
        yield node, y, after, axis


@pinned
def test_compensation_leaves_every_layer_the_least_error_that_a_constant_can(net, seed):
    plan = plan_for(net, seed)
    small, spec = tfx.compensate(net.params, plan, net.batch)
    before = [(y, x) for _, y, x, _ in repaired_alone(net, plan, tfx.cut(net.params, plan), plan.spec)]
    for (target, left), (_, _, now, axis) in zip(before, repaired_alone(net, plan, small, spec), strict=True):
        error = (target - now).square().sum()
        assert error <= (target - left).square().sum() * (1 + 1e-12) + 1e-18
        mean = (target - now).movedim(axis, 0).flatten(1).mean(1)  # the derivative of the error by the constant
        assert_close(mean, torch.zeros_like(mean), **CLOSE)


@given(networks(token_specs()), SEEDS)
@example(network(CONSTRUCTS["multi-head"]), 1)
@example(network(CONSTRUCTS["cross attention"]), 2)
@example(network(classifier(L.Conv2d(4, 6, 1, groups=2), L.Tanh(), L.Conv2d(6, 3, 1), channels=3)), 3)
def test_where_layers_look_at_one_position_compensating_is_gating_deviations_from_the_mean(net, seed):
    plan = plan_for(net, seed, exact=True)
    centers = tfx.repair.means(net.params, net.spec, net.batch, net.coupling).centers(net.coupling)
    expected = deviating(net, torch.from_numpy(plan.keep.astype(float)), centers, net.batch[0])
    assert_close(tfx.apply(*tfx.compensate(net.params, plan, net.batch), net.batch[0]), expected, **CLOSE)


def deviating(net, values, centers, inputs):
    """The network whose gates multiply the deviations from these centers."""
    gates = tfx.gates(net.coupling, values)

    def tap(name, slot, x):
        for place in net.coupling.reads:
            if (place.node, place.slot) == (name, slot):
                center = centers.get(place.key, torch.zeros(()))
                x = center + gates[place.key] * (x - center)
        return x

    return evaluate(net.params, net.spec, (inputs,), tap=tap)[0]


@pinned
def test_derivatives_around_the_means_equal_finite_differences(net, seed):
    coupling, step = net.coupling, 1e-5
    centers = tfx.repair.means(net.params, net.spec, net.batch, coupling).centers(coupling)
    rows = derivatives(net.params, net.spec, *net.batch, coupling, around=centers)[1]
    stats = tfx.measure(net.params, net.spec, net.batch, coupling, around=centers)
    assert_close(stats.sum, rows.sum(0), **CLOSE)
    if coupling.mixing:
        return
    for unit in np.random.default_rng(seed).permutation(len(coupling))[:4]:

        def losses(amount, unit=unit):
            gates = torch.ones(len(coupling), dtype=torch.float64)
            gates[unit] += amount
            output = deviating(net, gates, centers, net.batch[0])
            return nn.functional.cross_entropy(output, net.batch[1], reduction="none")

        one, half = ((losses(s) - losses(-s)) / (2 * s) for s in (step, step / 2))
        smooth = (one - half).abs() < 1e-6  # else a kink lies within the step
        assert_close(rows[smooth, unit], half[smooth], rtol=1e-4, atol=1e-6)


CONSTANT = {
    "linear": tfx.serial(tfx.Input((2, 5, 5)), L.Conv2d(2, 6, 3), L.Flatten(), L.Linear(54, 2)),
    "strides": tfx.serial(
        tfx.Input((2, 7, 7)), L.Conv2d(2, 6, 2), L.ReLU(), L.Conv2d(6, 3, 2, 2, dilation=2, bias=False),
    ),
    "norm": tfx.serial(
        tfx.Input((2, 5, 5)), L.Conv2d(2, 6, 2), L.Conv2d(6, 3, 3, bias=False), L.BatchNorm2d(3), L.ReLU(),
    ),
    "groups": tfx.serial(tfx.Input((2, 6)), L.Conv1d(2, 6, 2), L.Tanh(), L.Conv1d(6, 4, 2, groups=2)),
    "volumes": tfx.serial(tfx.Input((1, 4, 4, 4)), L.Conv3d(1, 4, 2), L.ReLU(), L.Conv3d(4, 2, 2)),
    "transposed": tfx.serial(tfx.Input((2, 3, 3)), L.Conv2d(2, 4, 1), L.ConvTranspose2d(4, 2, 2, 1, 1)),
    "two layers": tfx.serial(
        tfx.Input((4,)), L.Linear(4, 6), L.ReLU(), L.Linear(6, 3), L.ReLU(), L.Linear(3, 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONSTANT)
@pytest.mark.parametrize("method", REPAIRS)
def test_repair_is_exact_where_what_is_removed_is_constant(name, method):
    net = network(CONSTANT[name])
    keep = ~np.isin(net.coupling.index, (0, 1)) | (net.coupling.scope != 0)
    plan = tfx.Plan(net.coupling, keep)
    gone = np.flatnonzero(~np.append(keep, True)[net.coupling.unit_ids("0.weight", 0)].all(0))
    leaves = dict(tfx.tree.flatten(net.params))
    for path, value in (("0.weight", 0.0), ("0.bias", 1.0)):  # the same number everywhere
        leaves[path] = leaves[path].index_fill(0, torch.from_numpy(gone), value)
    params, x = tfx.tree.unflatten(leaves), net.batch[0]
    lost = tfx.apply(tfx.cut(params, plan), plan.spec, x) - tfx.apply(params, net.spec, x)
    assert lost.abs().max() > 1e-3
    small, spec = method(params, plan, net.batch)
    assert_close(tfx.apply(small, spec, x), tfx.apply(params, net.spec, x), rtol=1e-7, atol=1e-7)


def test_a_layer_without_bias_shifts_the_norm_that_consumes_it_or_gains_one():
    spec = CONSTANT["norm"]
    net = network(spec)
    plan = tfx.Plan(net.coupling, np.arange(6) > 1)
    small, smaller = tfx.compensate(net.params, plan, net.batch)
    assert smaller == plan.spec
    assert not torch.equal(small["2"]["running_mean"], net.params["2"]["running_mean"])
    for alone in (
        tfx.serial(*(node.layer for node in spec if not isinstance(node.layer, L.BatchNorm2d))),
        tfx.Spec(spec.nodes, ("1", *spec.outputs)),  # the norm is not all that hears the layer
    ):
        net = network(alone)
        small, smaller = tfx.compensate(net.params, tfx.Plan(net.coupling, np.arange(6) > 1), net.batch)
        assert smaller["1"].layer.bias
        check(small, smaller)


@pytest.mark.parametrize("method", REPAIRS)
@pytest.mark.parametrize("wide", [False, True])
def test_a_removed_copy_of_a_unit_that_stays_costs_nothing(method, wide):
    """Least squares gives its weights to the unit that stays; a constant cannot."""
    second = L.Conv2d(4, 3, 3, padding=1, bias=False) if wide else L.Linear(4, 3)
    first = L.Conv2d(2, 4, 1) if wide else L.Linear(2, 4)
    spec = tfx.serial(tfx.Input((2, 4, 4) if wide else (2,)), first, L.Tanh(), second)
    net = network(spec)
    leaves = dict(tfx.tree.flatten(net.params))
    for path in ("0.weight", "0.bias"):
        leaves[path] = leaves[path].index_copy(0, torch.tensor([3]), leaves[path][1:2])
    params = tfx.tree.unflatten(leaves)
    batch = batch_for(spec, torch.Generator().manual_seed(0), 50)
    plan = tfx.Plan(net.coupling, np.arange(4) < 3)
    options = {"ridge": 1e-9} if method is tfx.reconstruct else {}
    small, smaller = method(params, plan, batch, **options)
    error = (tfx.apply(small, smaller, batch[0]) - tfx.apply(params, spec, batch[0])).abs().max()
    assert error < 1e-6 if method is tfx.reconstruct else error > 1e-2


@pinned
def test_no_other_weights_reconstruct_a_layer_better(net, seed):
    plan = plan_for(net, seed)
    small, spec = tfx.reconstruct(net.params, plan, net.batch, ridge=1e-9)
    check(small, spec)
    old, new = values(net.params, net.spec, net.batch[0]), values(small, spec, net.batch[0])
    generator = torch.Generator().manual_seed(seed)
    for group in readers.sharing(net.spec, "weight"):
        (original, role), node = group[0], spec[group[0][0].name]
        if len(group) > 1 or not role.has_bias:
            continue
        axis = role.axis
        x = new[node.name, 0].movedim(axis, 0).flatten(1)
        if x.var(1).mean() < 1e-6 * x.square().mean():
            continue  # as good as constant, for which weights are held where they were
        writes = readers.kept_channels(plan, original, role)[1]
        target = old[node.name, -1].movedim(axis, 0)[writes].movedim(0, axis)
        leaves = {leaf: tfx.tree.flatten(small)[path] for leaf, path in node.paths.items()}
        best = (node.layer.apply(leaves, new[node.name, 0]) - target).square().sum()
        for size in (1e-3, 1e-1):
            noise = {
                leaf: x + size * torch.randn(x.shape, generator=generator, dtype=x.dtype) for leaf, x in leaves.items()
            }
            assert (node.layer.apply(noise, new[node.name, 0]) - target).square().sum() > best - 1e-9


@given(networks(), SEEDS)
def test_without_biases_every_layer_has_the_parameters_that_it_had(net, seed):
    plan = plan_for(net, seed)
    small, spec = tfx.reconstruct(net.params, plan, net.batch, biases=False)
    check(small, spec)
    assert spec == plan.spec
    assert tfx.tree.flatten(small).keys() == tfx.tree.flatten(net.params).keys()


def test_without_biases_no_other_weights_reconstruct_a_layer_better():
    net = network(tfx.serial(tfx.Input((6,)), a=L.Linear(6, 5), act=L.ReLU(), b=L.Linear(5, 4, bias=False)))
    plan = tfx.Plan(net.coupling, np.arange(5) < 3)
    small, spec = tfx.reconstruct(net.params, plan, net.batch, ridge=1e-9, biases=False)
    x = values(small, spec, net.batch[0])["b", 0]
    expected = torch.linalg.lstsq(x, tfx.apply(net.params, net.spec, net.batch[0])).solution
    assert_close(small["b"]["weight"].T, expected, rtol=1e-5, atol=1e-7)


@given(SEEDS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 3))
def test_least_squares_are_those_of_torch_whatever_the_batches(seed, groups, inputs, outputs):
    generator = torch.Generator().manual_seed(seed)
    x, start, y = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((40, groups, inputs), (groups, inputs, outputs), (40, groups, outputs))
    )
    together = tfx.repair.LeastSquares.of(x, y)
    split = tfx.repair.LeastSquares.of(x[:7], y[:7]) + tfx.repair.LeastSquares.of(x[7:], y[7:])
    for sums in (together, split):
        weights, bias = sums.solve(start, 1e-12)
        for g in range(groups):
            extended = torch.cat([x[:, g], torch.ones(40, 1, dtype=torch.float64)], 1)
            expected = torch.linalg.lstsq(extended, y[:, g]).solution
            assert_close(torch.cat([weights[g], bias[g : g + 1]]), expected, rtol=1e-6, atol=1e-8)
            through_zero = torch.linalg.lstsq(x[:, g], y[:, g]).solution
            assert_close(sums.solve(start, 1e-12, intercept=False)[0][g], through_zero, rtol=1e-6, atol=1e-8)
        assert not sums.solve(start, 1e-12, intercept=False)[1].any()
        held, bias = sums.solve(start, 1e12)
        assert_close(held, start, rtol=1e-6, atol=1e-8)
        assert_close(bias, (y - torch.einsum("rgk,gko->rgo", x, start)).mean(0), rtol=1e-6, atol=1e-6)


@given(SEEDS, st.sampled_from([0.0, 0.1, 10.0]), st.integers(4, 300), st.booleans())
def test_the_ridge_that_is_chosen_has_the_least_error_on_rows_that_were_not_solved_for(seed, noise, rows, intercept):
    generator = torch.Generator().manual_seed(seed)
    x, start, weights, error = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2 * rows, 1, 6), (1, 6, 2), (1, 6, 2), (2 * rows, 1, 2))
    )
    y = torch.einsum("rgk,gko->rgo", x, weights if noise < 1 else start) + noise * error
    halves = Halves.of(x[:rows], y[:rows]) + Halves.of(x[rows:], y[rows:])
    half = rows // 2
    seen = LeastSquares.of(*(torch.cat([part[:half], part[rows : rows + half]]) for part in (x, y)))
    others = [torch.cat([part[half:rows], part[rows + half :]]) for part in (x, y)]

    def judged(ridge):
        matrix, bias = seen.solve(start, ridge, intercept=intercept)
        left = others[1] - torch.einsum("rgk,gko->rgo", others[0], matrix) - bias
        found = LeastSquares.of(*others).error(matrix, bias)
        assert_close(found, float((left.square().sum() - others[1].square().sum()) / len(left)), rtol=1e-6, atol=1e-8)
        return float(left.square().sum())

    chosen = halves.ridge(start, intercept=intercept)
    assert judged(chosen) <= min(map(judged, RIDGES)) * (1 + 1e-9)
    assert_close(halves.whole.solve(start, 0.1), LeastSquares.of(x, y).solve(start, 0.1), **CLOSE)


@pytest.mark.parametrize("examples", [16, 64])
def test_the_chosen_ridge_is_about_the_best_on_new_examples(examples):
    """Layers of 40 units that lose a fifth of them: with few examples no ridge that is set beforehand fits."""
    generator = torch.Generator().manual_seed(0)
    spec = tfx.serial(tfx.Input((30,)), L.Linear(30, 40), L.ReLU(), L.Linear(40, 40), L.ReLU(), L.Linear(40, 5))
    errors = dict.fromkeys((None, *RIDGES), 0.0)
    for _ in range(10):
        params = tfx.init(spec, generator, dtype=torch.float64)
        coupling = tfx.couple(params, spec)
        plan = tfx.select(tfx.criteria.random(coupling, generator), coupling, budget=0.8, per_layer=True)
        few, many = (torch.randn(n, 30, generator=generator, dtype=torch.float64) for n in (examples, 1000))
        wanted = tfx.apply(params, spec, many)
        cut = (tfx.apply(tfx.cut(params, plan), plan.spec, many) - wanted).square().mean()
        for ridge in errors:
            after = tfx.apply(*tfx.reconstruct(params, plan, (few, None), ridge=ridge), many)
            errors[ridge] += float((after - wanted).square().mean() / cut) / 10
    chosen, *others = errors.values()
    assert chosen < 1.1 * min(others)
    assert chosen < 0.7
    assert max(others) > 1.3 * chosen


LINEAR = [
    (L.Linear(4, 3), (5, 4)),
    (L.Conv1d(4, 6, 3, 2, 1, 2, groups=2), (4, 9)),
    (L.Conv2d(4, 6, (3, 2), (1, 2), (1, 0), groups=2), (4, 5, 6)),
    (L.Conv2d(4, 3, 3, padding="same", dilation=2), (4, 5, 5)),
    (L.Conv2d(4, 8, 3, padding=1, groups=4), (4, 5, 5)),
    (L.Conv3d(2, 3, 2), (2, 3, 4, 3)),
    (L.ConvTranspose1d(4, 6, 3, 2, 1, 1, groups=2), (4, 5)),
    (L.ConvTranspose2d(4, 6, (3, 2), 2, 1, groups=2, dilation=(1, 2)), (4, 4, 5)),
    (L.ConvTranspose3d(4, 6, (3, 2, 1), 2, 1, 1, groups=2), (4, 2, 3, 3)),
]


@pytest.mark.parametrize(("layer", "shape"), LINEAR, ids=lambda value: str(value)[:40])
def test_every_layer_is_its_windows_times_its_matrix(layer, shape):
    generator = torch.Generator().manual_seed(0)
    params = {name: leaf.double() for name, leaf in layer.init(generator).items()}
    x = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    role = layer.role(Mixing)
    matrix = role.matrix(params["weight"])
    product = torch.einsum("rgk,gko->rgo", role.windows(x), matrix)
    expected = role.rows(layer.apply(params, x))
    assert_close(product.flatten(1) + params["bias"], expected.flatten(1), **CLOSE)
    assert torch.equal(role.as_weight(matrix, params["weight"]), params["weight"])


@pinned
def test_sums_over_batches_are_those_of_the_whole(net, seed):
    assume(not net.coupling.mixing)
    other, both = more(net, seed)
    plan = plan_for(net, seed)
    parts = [tfx.repair.means(net.params, net.spec, batch, net.coupling) for batch in (net.batch, other)]
    total = tfx.repair.means(net.params, net.spec, both, net.coupling)
    for place in net.coupling.reads:
        if place.node in total.sum and place.example is not None:
            assert_close((parts[0] + parts[1]).sum[place.node], total.sum[place.node], **CLOSE)
    if any(place.example is None for place in net.coupling.reads):
        return  # a table that is the same for all examples counts once per batch
    for method in (
        tfx.compensate,
        partial(tfx.reconstruct, ridge=1.0),
    ):  # well conditioned, so that rounding stays small
        one, two = method(net.params, plan, both), method(net.params, plan, [net.batch, other])
        assert one[1] == two[1]
        # What is read may hardly vary, so that a weight is hardly determined: what they compute is.
        assert_close(*(tfx.apply(*found, both[0]) for found in (one, two)), rtol=1e-6, atol=1e-8)
    assert_trees_equal(
        tfx.compensate(net.params, plan, parts[0] + parts[1])[0], tfx.compensate(net.params, plan, both)[0], **CLOSE
    )


def test_means_are_those_of_the_activations():
    net = network(CONSTRUCTS["chain"])
    found = tfx.repair.means(net.params, net.spec, net.batch, net.coupling)
    seen = values(net.params, net.spec, net.batch[0])
    assert {*found.sum} == {place.node for place in net.coupling.reads}
    for place in net.coupling.reads:
        x = seen[place.node, 0]
        mean = x.movedim(place.axis, 0).flatten(1).mean(1)
        center = found.centers(net.coupling)[place.key]
        assert center.ndim == x.ndim
        assert_close(center.flatten(), mean, **CLOSE)


@pinned
def test_nothing_that_is_given_changes_and_a_plan_that_keeps_all_changes_nothing(net, seed):
    tensors = [*tfx.tree.flatten(net.params).values(), *net.batch[0].values(), net.batch[1]]
    before = [(t.clone(), t._version, t.requires_grad) for t in tensors]
    plan, text = plan_for(net, seed), str(net.spec)
    for method in REPAIRS:
        method(net.params, plan, net.batch)
        params, spec = method(net.params, whole(net), net.batch)
        assert params is net.params
        assert spec is net.spec
    tfx.recalibrate(net.params, net.spec, net.batch)
    for tensor, (copy, version, grad) in zip(tensors, before, strict=True):
        assert torch.equal(tensor, copy)
        assert (tensor._version, tensor.requires_grad) == (version, grad)
    assert str(net.spec) == text


def test_recalibrated_statistics_are_those_of_torch_without_momentum():
    spec = tfx.serial(
        tfx.Input((2, 6, 6)), L.Conv2d(2, 5, 3), L.BatchNorm2d(5), L.ReLU(), L.Dropout(0.5),
        L.InstanceNorm2d(5, track_running_stats=True), L.Flatten(), L.Linear(80, 4), L.BatchNorm1d(4),
    )  # fmt: skip
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5),
        nn.InstanceNorm2d(5, track_running_stats=True), nn.Flatten(), nn.Linear(80, 4), nn.BatchNorm1d(4),
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    params = random_params(spec, generator)
    module.load_state_dict(tfx.tree.flatten(params))
    module.eval()
    for layer in (module[1], module[7]):
        layer.reset_running_stats()
        layer.momentum = None
        layer.train()
    batches = [(torch.randn(n, 2, 6, 6, generator=generator, dtype=torch.float64), None) for n in (7, 4, 9)]
    for x, _ in batches:
        module(x)
    found = tfx.recalibrate(params, spec, batches)
    assert_trees_equal(found, tfx.tree.unflatten(module.state_dict()), **CLOSE)
    for path, leaf in tfx.tree.flatten(found).items():
        assert (leaf is tfx.tree.flatten(params)[path]) == (path[0] not in "17" or path.endswith(("weight", "bias")))
    assert tfx.recalibrate(params, spec, iter(batches[:1]))["1"]["num_batches_tracked"] == 1
    without = network(CONSTRUCTS["dense"])
    assert tfx.recalibrate(without.params, without.spec, without.batch) is without.params


def test_a_weight_that_an_embedding_shares_stays_as_it_is():
    nodes = (
        tfx.Node("tokens", tfx.Input((3,))),
        tfx.Node("embed", L.Embedding(5, 4), ("tokens",)),
        tfx.Node("head", L.Linear(4, 5), ("embed",), (("weight", "embed.weight"),)),
    )
    net = network(tfx.Spec(nodes))
    plan = tfx.Plan(net.coupling, np.arange(4) > 0)
    small, _ = tfx.reconstruct(net.params, plan, net.batch)
    assert_trees_equal(small, tfx.cut(net.params, plan))
    small, _ = tfx.compensate(net.params, plan, net.batch)
    assert torch.equal(small["embed"]["weight"], net.params["embed"]["weight"][:, 1:])
    assert not torch.equal(small["head"]["bias"], net.params["head"]["bias"])


@pytest.mark.parametrize("method", REPAIRS)
def test_prune_repairs_on_the_same_batches(method):
    net = network(CONSTRUCTS["chain"])
    scores = tfx.taylor(tfx.measure(net.params, net.spec, net.batch, net.coupling), net.coupling)
    plan = tfx.select(scores, net.coupling, budget=tfx.Units(5))
    params, spec = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Units(5), criterion=tfx.taylor, repair=method)
    expected = method(net.params, plan, net.batch)
    assert spec == expected[1]
    assert_trees_equal(params, expected[0])


def test_dtypes_are_those_of_the_parameters():
    net = network(CONSTRUCTS["chain"])
    half = tfx.tree.unflatten(
        (k, v.bfloat16() if v.is_floating_point() else v) for k, v in tfx.tree.flatten(net.params).items()
    )
    batch = net.batch[0]["input"].bfloat16(), net.batch[1]
    plan = plan_for(net, 0)
    assert {x.dtype for x in tfx.repair.means(half, net.spec, batch, net.coupling).sum.values()} == {torch.float32}
    for method in REPAIRS:
        small, spec = method(half, plan, batch)
        kinds = {path: leaf.dtype for path, leaf in tfx.tree.flatten(small).items()}
        assert kinds == {path: leaf.dtype for path, leaf in tfx.tree.flatten(half).items()}
        assert tfx.apply(small, spec, batch[0]).isfinite().all()


def test_errors_say_what_to_do():
    net, other = network(CONSTRUCTS["chain"]), network(CONSTRUCTS["flatten"])
    plan = plan_for(net, 0)
    for method in REPAIRS:
        with pytest.raises(ValueError, match="already used up"):
            method(net.params, plan, iter([]))
        with pytest.raises(ValueError, match="pair"):
            method(net.params, plan, [net.batch[1]])
    with pytest.raises(ValueError, match=r"above 0.*received 0"):
        tfx.reconstruct(net.params, plan, net.batch, ridge=0)
    found = [tfx.repair.means(n.params, n.spec, n.batch, n.coupling) for n in (net, other)]
    with pytest.raises(ValueError, match=r"none of what [35, ]+ read"):
        tfx.compensate(net.params, plan, found[1])
    with pytest.raises(ValueError, match="same network"):
        found[0] + found[1]


def test_both_networks_run_once_side_by_side(monkeypatch):
    """Eight convolutions, three batches: each runs once in either network, and once to unfold its windows."""
    layers = [x for _ in range(8) for x in (L.Conv2d(4, 4, 3, padding=1), L.ReLU())]
    net = network(tfx.serial(tfx.Input((4, 4, 4)), *layers, L.Flatten(), L.Linear(64, 2)))
    plan, calls, apply = plan_for(net, 0), [], L.Conv2d.apply

    def count(self, params, *inputs):
        calls.append(self)
        return apply(self, params, *inputs)

    monkeypatch.setattr(L.Conv2d, "apply", count)
    tfx.reconstruct(net.params, plan, [net.batch] * 3)
    assert 0 < len(calls) <= 3 * (8 + 8 + 7), "one pass for each layer and batch would make 300"


@pytest.mark.parametrize("method", REPAIRS)
def test_outputs_keep_their_names_where_a_layer_gains_a_bias(method):
    nodes = (
        tfx.Node("x", tfx.Input((3,))), tfx.Node("one", L.Linear(3, 4), ("x",)),
        tfx.Node("act", L.Tanh(), ("one",)), tfx.Node("two", L.Linear(4, 2, bias=False), ("act",)),
        tfx.Node("half", L.Tanh(), ("two",)),
    )  # fmt: skip
    net = network(tfx.Spec(nodes, ("two", "half"), ("logits", "squashed")))
    small, spec = method(net.params, plan_for(net, 0), net.batch)
    assert spec["two"].layer.bias
    assert [*tfx.apply(small, spec, net.batch[0])] == ["logits", "squashed"]

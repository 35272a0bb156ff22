"""The choice of what least squares cannot undo: by brute force, and what it does inside of `prune`."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.scoring.products import Products, products
from taylorfx.selection.surgeon import RIDGE, _residual, _values, residual, surgeon


def tangled(seed, units=8, copies=0, inputs=5):
    """A network with one hidden layer; the fewer inputs, the better units predict each other.

    The last ``copies`` are copies of the first ones.

    Targets are drawn from its own outputs, so that it is at a minimum of the loss and the Fisher is the Hessian.
    """
    generator = torch.Generator().manual_seed(seed)
    spec = tfx.serial(tfx.Input((inputs,)), a=L.Linear(inputs, units), s=L.Tanh(), b=L.Linear(units, 3))
    leaves = tfx.tree.flatten(tfx.init(spec, generator, dtype=torch.float64))
    weight, bias = 2 * leaves["a.weight"], leaves["a.bias"].clone()
    if copies:
        weight[-copies:], bias[-copies:] = weight[:copies], bias[:copies]
    scale = 1 + 2 * torch.rand(units, generator=generator).double()
    changed = {"a.weight": weight, "a.bias": bias, "b.weight": leaves["b.weight"] * scale}
    params = tfx.tree.unflatten(leaves | changed)
    x = torch.randn(256, inputs, generator=generator, dtype=torch.float64)
    y = torch.multinomial(tfx.apply(params, spec, x).softmax(1), 1, generator=generator)[:, 0]
    return params, spec, tfx.couple(params, spec), (x, y)


def looked_at(params, spec, batches, coupling, **options):
    return products(params, spec, batches, coupling, measurement=tfx.Measurement(**options))


def without(coupling, *units):
    keep = np.ones(len(coupling), bool)
    keep[[*units]] = False
    return tfx.Plan(coupling, keep)


def ranks(values):
    return torch.as_tensor(values).argsort().argsort().double()


@pytest.mark.parametrize("removed", [(), (2, 5)])
def test_it_ranks_units_as_brute_force_does_where_fisher_does_not(removed):
    ours, alone = [], []
    for seed in range(6):
        params, spec, coupling, batch = tangled(seed)
        probabilities = tfx.apply(params, spec, batch[0]).softmax(1)
        truth = {}
        for unit in set(range(len(coupling))) - {*removed}:
            small, smaller = tfx.reconstruct(params, without(coupling, unit, *removed), batch, ridge=1e-6)
            logits = tfx.apply(small, smaller, batch[0])
            truth[unit] = float((probabilities * (probabilities.log() - logits.log_softmax(1))).sum(1).mean())
        units = [*truth]
        scores = residual(looked_at(params, spec, batch, coupling), coupling, without(coupling, *removed).keep)
        fisher = tfx.fisher(tfx.measure(params, spec, batch, coupling), coupling)
        pair = torch.stack([ranks(scores[units]), ranks([*truth.values()])]), ranks(fisher[units])
        ours.append(torch.corrcoef(pair[0])[0, 1])
        alone.append(torch.corrcoef(torch.stack([pair[1], pair[0][1]]))[0, 1])
    assert torch.stack(ours).mean() > 0.95
    assert torch.stack(ours).mean() > torch.stack(alone).mean() + 0.03


@pytest.mark.parametrize("seed", range(10))
def test_copies_cost_nothing_leave_first_and_are_repaired_exactly(seed, monkeypatch):
    monkeypatch.setattr("taylorfx.selection.surgeon.RIDGE", 1e-9)
    params, spec, coupling, batch = tangled(seed, copies=3, inputs=20)
    found = looked_at(params, spec, batch, coupling)
    scores = residual(found, coupling)
    assert scores[[0, 1, 2, 5, 6, 7]].max() < 1e-6 * scores[3:5].min()
    plan = surgeon(found, coupling, budget=tfx.Units(5), per_cost=False)
    assert all(plan.keep[k] != plan.keep[5 + k] for k in range(3)), "one of either pair stays"
    small, smaller = tfx.reconstruct(params, plan, batch, ridge=1e-9)
    assert_close(tfx.apply(small, smaller, batch[0]), tfx.apply(params, spec, batch[0]), rtol=1e-5, atol=1e-5)


@given(seed=st.integers(0, 9), order=st.permutations(range(8)), sizes=st.lists(st.integers(1, 3), min_size=1))
def test_what_is_updated_as_units_leave_is_the_formula_for_all_that_have_left(seed, order, sizes):
    params, spec, coupling, batch = tangled(seed)
    found = looked_at(params, spec, batch, coupling)
    values, keep = _values(found, coupling), np.ones(len(coupling), bool)
    for size in sizes:
        keep[[unit for unit in order if keep[unit]][: min(size, keep.sum() - 1)]] = False
        values = [value.among(keep) for value in values]

    sums, left = found.sums["s, axis 1"], ~keep
    covariance = sums.aa / sums.count - torch.outer(sums.a, sums.a) / sums.count**2
    covariance += RIDGE * covariance.diagonal().mean() * torch.eye(len(keep))
    inverse = torch.linalg.inv(covariance[keep][:, keep])
    carries = torch.eye(len(keep), dtype=torch.float64)[:, keep]
    carries[left] = covariance[left][:, keep] @ inverse
    steepness = carries.T @ (sums.dd / found.n) @ carries
    expected = torch.zeros(len(keep), dtype=torch.float64)
    expected[keep] = 0.5 * steepness.diagonal() / inverse.diagonal()
    assert_close(_residual(values, len(keep)), expected)
    assert_close(residual(found, coupling, keep), expected)


def test_the_products_are_those_of_activations_and_of_derivatives_by_them():
    params, spec, coupling, _ = tangled(0)
    x = torch.randn(4000, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = torch.zeros(len(x), dtype=torch.int64)
    sums = looked_at(params, spec, (x, y), coupling).sums["s, axis 1"]
    value = torch.tanh(x @ params["a"]["weight"].T + params["a"]["bias"])
    assert_close(sums.a, value.sum(0))
    assert_close(sums.aa, value.T @ value)
    logits = tfx.apply(params, spec, x)
    slopes = (logits.softmax(1) - F.one_hot(y, 3)) @ params["b"]["weight"]
    assert_close(sums.dd, slopes.T @ slopes)


def test_products_add_up_over_batches_and_micro_batches():
    params, spec, coupling, (x, y) = tangled(0)
    whole = looked_at(params, spec, (x, y), coupling)
    parts = looked_at(params, spec, [(x[:100], y[:100]), (x[100:], y[100:])], coupling, micro_batch=32)
    assert parts.n == whole.n == len(x)
    assert (Products(0) + whole).n == whole.n
    for key, sums in whole.sums.items():
        assert_close(parts.sums[key].aa, sums.aa)
        assert_close(parts.sums[key].dd, sums.dd)


def test_prune_with_reconstruct_chooses_by_what_it_cannot_undo():
    params, spec, coupling, batch = tangled(0, units=12, copies=4)
    budget = tfx.Parameters(0.75)
    pruned = tfx.prune(params, spec, batch, budget=budget, repair=tfx.reconstruct)
    found = looked_at(params, spec, batch, coupling)
    assert pruned.plan == surgeon(found, coupling, budget=budget)
    same = tfx.prune(params, spec, batch, budget=budget, repair=partial(tfx.reconstruct, ridge=0.1))
    assert same.plan == pruned.plan
    joint = tfx.prune(params, spec, batch, budget=budget, repair=tfx.reconstruct, choose=partial(tfx.joint, rounds=8))
    assert joint.plan != pruned.plan


@pytest.mark.parametrize(("share", "steps"), [(0.6, 1), (0.5, 2), (0.3, 3)])
def test_steps_that_are_repaired_leave_six_tenths_at_least(share, steps):
    params, spec, _, batch = tangled(0, units=24)
    pruned = tfx.prune(params, spec, batch, budget=tfx.Parameters(share), repair=tfx.reconstruct)
    assert len(pruned.plans) == steps


def test_products_of_other_units_and_of_no_example_are_refused():
    params, spec, coupling, batch = tangled(0)
    other = tangled(0, units=9)[2]
    with pytest.raises(tfx.SelectionError, match="of the coupling's 9 units"):
        surgeon(looked_at(params, spec, batch, coupling), other, budget=tfx.Units(3))
    with pytest.raises(tfx.SelectionError, match="one example at least"):
        surgeon(looked_at(params, spec, [], coupling), coupling, budget=tfx.Units(3))
    with pytest.raises(ValueError, match="no batch"):
        looked_at(params, spec, iter([]), coupling)
    with pytest.raises(ValueError, match="finite"):
        looked_at(params, spec, (batch[0] * float("inf"), batch[1]), coupling)
    with pytest.raises(ValueError, match="change with the outputs"):
        looked_at(params, spec, batch, coupling, loss=lambda outputs, _: outputs.detach().sum())

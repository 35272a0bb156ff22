"""The laws on random networks whose sizes are open: captured at one size, each law holds at another."""

import copy
import functools
from typing import NamedTuple

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, seed, settings
from sized import SIZED, sized
from test_laws import CLOSE, LAWS, SEEDS, plan_for
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import from_torch, to_torch
from taylorfx.layers import sizes
from taylorfx.store import load_plan, save_plan
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import Network, random_params, token_specs, trunks

IMAGES, TEXTS = ((4, 6), (7, 5), (10, 9)), ((3,), (5,), (9,))


class Classifier(nn.Module):
    """Two numbers for every image: those of a body, by a mean over all positions."""

    def __init__(self, body, maps):
        super().__init__()
        self.body, self.head = body, nn.Linear(maps, 2)

    def forward(self, x):
        y = self.body(x)
        return self.head(y.reshape(y.shape[0], y.shape[1], -1).mean(2))


class Case(NamedTuple):
    """How to make a module that takes several sizes: a network, what computes with the size of its maps, and a seed.

    Attributes:
        name: of `SIZED`; empty where the network takes texts.
    """

    spec: tfx.Spec
    name: str
    seed: int

    @property
    def sizes(self):
        return IMAGES if self.name else TEXTS

    def inputs(self, which):
        """Three examples of one of the sizes."""
        generator, size = torch.Generator().manual_seed(self.seed + which), self.sizes[which]
        if not self.name:
            return torch.randint(5, (3, *size), generator=generator)
        return torch.randn(3, self.spec.inputs[0].layer.shape[0], *size, generator=generator, dtype=torch.float64)

    def shape(self, which):
        return tuple(self.inputs(which).shape[1:])

    def batch(self, spec, which):
        targets = torch.randint(2, (3,), generator=torch.Generator().manual_seed(self.seed))
        return {spec.inputs[0].name: self.inputs(which)}, targets


@functools.cache
def module_of(case):
    with torch.random.fork_rng():
        torch.manual_seed(case.seed)
        body = to_torch(random_params(case.spec, torch.default_generator), case.spec)
        if not case.name:
            return body
        body = sized(case.name, nn.Sequential(body, nn.Conv2d(body(case.inputs(0)).shape[1], 8, 1).double())).double()
        return Classifier(body, body(case.inputs(0)).shape[1]).double().eval()


@functools.cache
def captured(case, which=0):
    """Parameters and network, from an example of one of the sizes."""
    return from_torch(module_of(case), case.inputs(which))


def elsewhere(case):
    """Captured at one size, and a batch of another."""
    params, spec = captured(case)
    return Network(spec, params, case.batch(spec, 1), tfx.couple(params, spec))


CASES = st.one_of(
    st.builds(Case, trunks(), st.sampled_from([*SIZED]), SEEDS),
    st.builds(Case, token_specs(any_length=True), st.just(""), SEEDS),
)


def law(test, share=8):
    """A law on few networks; all laws have the same ones, so that each is captured once."""
    few = settings(max_examples=settings.default.max_examples // share)
    return seed(0)(few(given(CASES, SEEDS)(test)))


@pytest.mark.parametrize("name", LAWS)
@law
def test_of_any_network(name, case, seed):
    LAWS[name](elsewhere(case), seed)


@law
def test_captured_at_one_size_it_is_the_module_at_all(case, seed):
    params, spec = captured(case)
    for which in range(3):
        x = case.inputs(which)
        assert_close(tfx.apply(params, spec, x), module_of(case)(x), **CLOSE)


def table(coupling):
    """What a coupling says, without the sizes of what is no unit."""
    return (
        coupling.names,
        coupling.exact.tolist(),
        dict(coupling.frozen),
        dict(coupling.written),
        coupling.mixing,
        {
            path: [coupling.unit_ids(path, k).tolist() for k in range(len(axes))]
            for path, axes in coupling.parameters.items()
        },
        [(place.key, place.units.tolist()) for place in (*coupling.reads, *coupling.writes)],
    )


@law
def test_captures_at_two_sizes_have_the_same_units_and_plans(case, seed):
    params, spec = captured(case)
    other, there = captured(case, 1)
    assert_trees_equal(params, other)
    moved, back = spec.at(case.shape(1)), there.at(case.shape(0))
    couplings = [tfx.couple(params, each) for each in (spec, moved, there, back)]
    keep = plan_for(elsewhere(case), seed).keep
    for coupling in couplings:
        assert table(coupling) == table(couplings[0])
        assert_trees_equal(tfx.cut(params, tfx.Plan(coupling, keep)), tfx.cut(params, tfx.Plan(couplings[0], keep)))


@law
def test_what_a_network_costs_at_a_size_is_what_its_capture_there_costs(case, seed):
    params, spec = captured(case)
    moved, there = (tfx.couple(params, each) for each in (spec.at(case.shape(1)), captured(case, 1)[1]))
    keep = plan_for(elsewhere(case), seed).keep
    for cost in (tfx.cost.parameters, tfx.cost.flops, tfx.cost.memory):
        assert cost(moved).total == cost(there).total
        assert cost(moved)(keep) == cost(there)(keep)
        assert (cost(moved).marginal() == cost(there).marginal()).all()


@law
def test_a_cut_and_another_size_commute(case, seed):
    params, spec = captured(case)
    plan = plan_for(elsewhere(case), seed)
    shape = case.shape(1)
    there = tfx.Plan(tfx.couple(params, spec.at(shape)), plan.keep)
    assert plan.spec.at(shape) == there.spec
    assert there.spec.at(case.shape(0)) == plan.spec


@law
def test_scores_are_those_of_a_capture_at_the_size_of_the_batch(case, seed):
    params, spec = captured(case)
    _, there = captured(case, 1)
    found, expected = (
        tfx.measure(params, each, case.batch(each, 1), tfx.couple(params, each), moments=True, at_writes=bool(seed % 2))
        for each in (spec, there)
    )
    assert_close(found.sum, expected.sum, **CLOSE)
    assert_close(found.moments.sum_sq, expected.moments.sum_sq, **CLOSE)


@law
def test_the_oracle_is_the_difference_that_a_gate_makes(case, seed):
    net = elsewhere(case)
    units = np.random.default_rng(seed).permutation(len(net.coupling))[:3].tolist()
    found = tfx.truth.oracle(net.params, net.spec, net.batch, net.coupling, units=units)
    ones = torch.ones(len(net.coupling), dtype=torch.float64)
    for k, unit in enumerate(units):
        silent = ones.clone()
        silent[unit] = 0
        losses = [
            nn.functional.cross_entropy(
                tfx.apply(net.params, net.spec, net.batch[0], gates=tfx.gates(net.coupling, gates)), net.batch[1]
            )
            for gates in (silent, ones)
        ]
        assert_close(found.signed()[k], losses[0] - losses[1], **CLOSE)


@law
def test_balancing_changes_nothing_at_another_size(case, seed):
    net = elsewhere(case)
    order = tfx.balance(
        net.params, net.spec, net.batch,
        criterion=lambda _, units: torch.rand(len(units), generator=torch.Generator().manual_seed(seed)),
    )  # fmt: skip
    moved = tfx.reorder(net.params, order)
    for which in range(2):
        x = case.inputs(which)
        assert_close(tfx.apply(moved, net.spec, x), tfx.apply(net.params, net.spec, x), **CLOSE)


@law
def test_folding_changes_nothing_at_another_size(case, seed):
    params, spec = captured(case)
    folded = tfx.fold(params, spec)
    assert_close(tfx.apply(*folded, case.inputs(1)), module_of(case)(case.inputs(1)), **CLOSE)


@law
def test_what_expands_again_is_gated_at_another_size(case, seed):
    net = elsewhere(case)
    plan = plan_for(net, seed, exact=True)
    back = tfx.expand(tfx.cut(net.params, plan), plan)
    gated = tfx.apply(net.params, net.spec, net.batch[0], gates=plan.gates)
    assert_close(tfx.apply(back, net.spec, net.batch[0]), gated, **CLOSE)


@law
def test_files_keep_the_sizes_open(tmp_path_factory, case, seed):
    params, spec = captured(case)
    plan = plan_for(elsewhere(case), seed)
    folder = tmp_path_factory.getbasetemp()
    small = tfx.cut(params, plan)
    tfx.save(folder / "net.safetensors", small, plan.spec)
    save_plan(folder / "plan.json", plan)
    again = tfx.load(folder / "net.safetensors")
    assert again[1] == plan.spec
    assert [*map(formulas, again[1])] == [*map(formulas, plan.spec)]
    assert (
        load_plan(folder / "plan.json", tfx.couple(params, spec.at(case.shape(1)))).keep.tolist() == plan.keep.tolist()
    )
    assert_close(tfx.apply(*again, case.inputs(1)), tfx.apply(small, plan.spec, case.inputs(1)), rtol=0, atol=0)


def formulas(node):
    return [number.formula for number in sizes.held(node.layer)]


@functools.partial(law, share=20)
def test_a_smaller_module_is_captured_with_open_sizes_again(case, seed):
    params, spec = captured(case)
    plan = plan_for(elsewhere(case), seed, exact=True)
    small = to_torch(tfx.cut(params, plan), plan.spec)
    again = from_torch(small, case.inputs(1))
    for which in range(3):
        x = case.inputs(which)
        gated = tfx.apply(params, spec, x, gates=plan.gates)
        assert_close(small(x), gated, **CLOSE)
        assert_close(tfx.apply(*again, x), gated, **CLOSE)


@law
def test_training_is_the_modules_at_another_size(case, seed):
    params, spec = captured(case)
    ours, theirs = to_torch(params, spec).train(), copy.deepcopy(module_of(case)).train()
    x = case.inputs(1)
    outputs = []
    for module in (ours, theirs):
        torch.manual_seed(seed)
        outputs.append(module(x))
        outputs[-1].sin().sum().backward()
    assert_close(*outputs, **CLOSE)
    buffers = dict(theirs.named_buffers())
    for name, buffer in ours.named_buffers():
        if name in buffers:
            assert_close(buffer, buffers[name], **CLOSE)
    grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, p in ours.named_parameters():
        if name in grads and grads[name] is not None:
            assert_close(p.grad, grads[name], **CLOSE)


@law
def test_a_budget_of_another_size_is_met_there(case, seed):
    params, spec = captured(case)
    there = tfx.couple(params, spec.at(case.shape(2)))
    scores = torch.rand(len(there), generator=torch.Generator().manual_seed(seed))
    try:
        plan = tfx.select(scores, there, budget=tfx.Flops(0.6))
    except tfx.BudgetError:
        return
    small = tfx.Plan(tfx.couple(params, spec), plan.keep)
    cost = tfx.cost.flops(tfx.couple(tfx.cut(params, small), small.spec.at(case.shape(2))))
    assert cost.total <= 0.6 * tfx.cost.flops(there).total

"""What budgets count and how they are met: peak memory, latency, any measure, several at once; scopes side by side."""

import math
import weakref
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given
from modules import MODULES
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import taylorfx as tfx
from taylorfx.spec import evaluate
from taylorfx.testing import network, networks, random_plan

SEEDS = st.integers(0, 2**16)


def pinned(law):
    """The law, run on every construct by name besides the random networks."""
    for spec in CONSTRUCTS.values():
        law = example(network(spec), 1)(law)
    return given(networks(), SEEDS)(law)


def plan_for(net, seed):
    generator = torch.Generator().manual_seed(seed)
    return random_plan(net.coupling, generator, float(torch.rand((), generator=generator)))


def scores_for(net, seed):
    return torch.rand(len(net.coupling), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class Weighed(tfx.Timings):
    """A machine without noise: a layer takes as long as its tensors are large, and a little for itself."""

    def measure(self, layer, shapes):
        return 5.0 + sum(map(math.prod, shapes)) + 3 * sum(map(math.prod, layer.shapes().values()))


def size(spec):
    return sum(math.prod(shape) ** 0.5 for shape in spec.shapes.values())


KINDS = {
    "parameters": tfx.Parameters,
    "FLOPs": tfx.Flops,
    "memory": tfx.Memory,
    "latency": lambda amount: tfx.Latency(amount, Weighed(points=3)),
    "measured": lambda amount: tfx.Measured(amount, size),
}


def planned(net, scores, budget, **options):
    """The plan, or none where the constraints leave no room."""
    try:
        return tfx.select(scores, net.coupling, budget=budget, **options)
    except tfx.BudgetError as error:
        assert "no less than" in str(error)
        return None


# What is counted.


@pinned
def test_flops_of_a_network_and_of_what_a_plan_leaves_are_those_that_torch_counts(net, seed):
    plan, cost = plan_for(net, seed), tfx.flops(net.coupling)
    for params, spec, closed in (
        (net.params, net.spec, cost.total),
        (tfx.cut(net.params, plan), plan.spec, cost(plan.keep)),
    ):
        leaves = {path: leaf.to("meta") for path, leaf in tfx.flatten(params).items()}
        inputs = {name: x[:1].to("meta") for name, x in net.batch[0].items()}
        with FlopCounterMode(display=False) as counter:
            tfx.apply(tfx.unflatten(leaves), spec, inputs)
        assert closed == counter.get_total_flops()


@pytest.mark.parametrize("name", MODULES)
def test_flops_of_a_captured_module_are_those_that_torch_counts(name):
    module, shape, _ = MODULES[name]
    x = torch.randn(3, *shape)
    params, spec = tfx.from_torch(module.eval(), x)
    coupling = tfx.couple(params, spec)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        module(x[:1])
    assert tfx.flops(coupling).total == counter.get_total_flops()
    plan = random_plan(coupling, torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        tfx.apply(tfx.cut(params, plan), plan.spec, x[:1])
    assert tfx.flops(coupling)(plan.keep) == counter.get_total_flops()


@pinned
def test_peak_memory_is_that_of_the_tensors_alive(net, seed):
    plan = plan_for(net, seed)
    params, spec = tfx.cut(net.params, plan), plan.spec
    made, peak = [], 0
    last = {x: k for k, node in enumerate(spec) for x in node.inputs}
    place = {node.name: k for k, node in enumerate(spec)}
    inputs = {name: x[:1] for name, x in net.batch[0].items()}

    def tap(name, slot, x):
        nonlocal peak
        if slot >= 0:
            return x
        x = x.clone()  # so that a value that is passed on as it is counts for itself
        if not spec[name].layer.leaf:
            made.append((weakref.ref(x), x.numel()))
        alive = sum(count for ref, count in made if ref() is not None)
        heard = [
            i for i in inputs if last.get(i, len(spec)) >= place[name] or i in spec.outputs
        ]  # the caller holds all
        peak = max(peak, alive + sum(inputs[i].numel() for i in heard))
        return x

    evaluate(params, spec, (inputs,), tap=tap)
    assert tfx.memory(spec) == peak


@pinned
def test_the_marginal_cost_in_what_a_plan_leaves_is_what_leaves_next(net, seed):
    coupling, keep = net.coupling, plan_for(net, seed).keep
    for cost in (tfx.parameters(coupling), tfx.flops(coupling)):
        marginal = cost.marginal(keep)
        assert not marginal[~torch.from_numpy(keep)].any()
        assert torch.equal(cost.marginal(np.ones_like(keep)), cost.marginal())
        for unit in np.random.default_rng(seed).permutation(np.flatnonzero(keep))[:4]:
            saved = cost(keep) - cost(keep & (np.arange(len(coupling)) != unit))
            stands = [sum(unit in coupling.axes[a] for a in axes if a < len(coupling.axes)) for axes in cost.axes]
            if max(stands) <= 1:
                assert marginal[unit].item() == pytest.approx(saved)
            else:  # on two axes of one product, the corner where they meet is counted twice
                assert marginal[unit].item() >= saved


@pinned
def test_latency_is_exact_where_the_widths_are_on_the_grid(net, seed):
    plan = plan_for(net, seed)
    everything = np.ones(len(net.coupling), bool)
    fine, coarse = Weighed(batch=3, points=1000), Weighed(batch=3, points=2)
    assert fine.over(net.coupling)(plan.keep) == pytest.approx(fine(plan.spec))
    assert coarse.over(net.coupling)(everything) == pytest.approx(coarse(net.spec))


def test_latency_between_the_grid_is_linear_and_measures_few_corners():
    """Convolutions of 8 to 8 channels, 16 steps; the layers' times are linear in each width, so is the sum in one."""
    net = network(tfx.serial(tfx.Input((3, 4, 4)), a=tfx.Conv2d(3, 17, 1), b=tfx.Conv2d(17, 2, 1)))
    timings = Weighed(points=3)  # widths 1, 9, 17
    cost = timings.over(net.coupling)
    for width in range(1, 18):
        plan = tfx.Plan(net.coupling, np.arange(17) < width)
        assert cost(plan.keep) == pytest.approx(Weighed()(plan.spec))
    assert {(layer.out_channels, shape[1]) for layer, (shape,) in timings.table} == {
        *((n, 3) for n in (1, 9, 17)),
        *((2, n) for n in (1, 9, 17)),
    }


def test_what_has_two_widths_is_interpolated_on_triangles():
    conv = network(
        tfx.serial(tfx.Input((3, 4, 4)), tfx.Conv2d(3, 5, 1), mid=tfx.Conv2d(5, 5, 1), out=tfx.Conv2d(5, 2, 1))
    )

    class Product(tfx.Timings):
        def measure(self, layer, shapes):
            return (
                float(layer.in_channels * layer.out_channels)
                if layer.in_channels > 3 or layer.out_channels == 5
                else 0.0
            )

    timings = Product(points=2)
    keep = np.array([1, 1, 1, 0, 0, 1, 1, 0, 0, 0], bool)  # three of five, then two of five: at a half and a quarter
    wide = {"0": 15.0 * 0.5, "mid": 1 + 0.25 * (25 - 1) + 0.25 * (5 - 1), "out": 2 + 0.25 * (10 - 2)}
    found = {name: timings._node(conv.coupling, conv.spec[name])(conv.coupling.counts(keep)) for name in ("mid",)}
    # From (1, 1): up the first axis alone for a quarter, then both for a quarter: 1, 5 and 25 at the corners.
    assert found["mid"] == pytest.approx(wide["mid"])

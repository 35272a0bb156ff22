"""`Latency` is held to networks that run whole. The machine is a law: a clock that advances by what a network takes."""

import itertools
import math
import re
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from networks import CAN_BUILD
from numpy.testing import assert_allclose, assert_array_equal

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.cost.timings import rising
from taylorfx.selection.budget import TOLERANCE
from taylorfx.testing.strategies import network


@dataclass
class Machine:
    """A machine whose clock advances by a law: what a run takes, and for every layer, times noise.

    Attributes:
        start: what a run takes besides its layers, in seconds.
        scale: what a layer takes within a network, of what it takes alone.
        block: widths count as the next multiple of this.
        noise: the standard deviation of the logarithm of a run's time.
    """

    start: float = 0.0
    scale: float = 1.0
    block: int = 1
    noise: float = 0.0
    now: float = 0.0
    runs: int = 0
    generator: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def clock(self) -> float:
        return self.now

    def layer(self, layer: L.Layer) -> float:
        """What a layer takes alone, in seconds: the product of its weight's widths, in blocks; a bias is free."""
        widths = [-(-n // self.block) * self.block for n in layer.shapes().get("weight", ())[:2]]
        return 1e-6 * (1 + math.prod(widths)) if widths else 1e-6

    def seconds(self, spec: tfx.Spec) -> float:
        """What a network takes, without noise."""
        return self.start + self.scale * sum(self.layer(node.layer) for node in spec)

    def ready(self, params, spec, inputs):
        """The runner."""

        def run() -> None:
            self.runs += 1
            self.now += self.seconds(spec) * math.exp(self.noise * self.generator.standard_normal())

        return run

    def timings(self, **options) -> tfx.cost.Timings:
        machine = self

        class Here(tfx.cost.Timings):
            def measure(self, layer, shapes):
                return 1e6 * machine.layer(layer) * math.exp(machine.noise * machine.generator.standard_normal())

        return Here(runner=self.ready, pace=tfx.cost.Pace(clock=self.clock, seconds=math.inf), **options)

    def share(self, plan: tfx.Plan) -> float:
        return self.seconds(plan.spec) / self.seconds(plan.coupling.spec)


def chain(*widths: int, bias: bool = False) -> tfx.Spec:
    layers = {f"l{k}": L.Linear(i, o, bias=bias) for k, (i, o) in enumerate(pairwise(widths))}
    return tfx.serial(tfx.Input((widths[0],)), **layers)


NET = network(chain(3, 32, 48, 3))
SCORES = torch.rand(len(NET.coupling), generator=torch.Generator().manual_seed(0))
STATS = tfx.measure(NET.params, NET.spec, NET.batch, NET.coupling, rows=True)


def by_scores(budget: tfx.Budget, **options) -> tfx.Plan:
    return tfx.select(SCORES, NET.coupling, budget=budget, per_cost=True, **options)


def together(budget: tfx.Budget, **options) -> tfx.Plan:
    return tfx.joint(STATS, NET.coupling, budget=budget, rounds=4, **options)


def last_step(budget: tfx.Budget, **options) -> tfx.Plan:
    return tfx.prune(NET.params, NET.spec, NET.batch, budget=budget, criterion=tfx.taylor, **options).plan


def repaired(budget: tfx.Budget, **options) -> tfx.Plan:
    return tfx.prune(NET.params, NET.spec, NET.batch, budget=budget, repair=tfx.reconstruct, **options).plan


WAYS = {"select": by_scores, "joint": together, "prune in steps": last_step, "prune, repaired": repaired}


def least(machine: Machine) -> float:
    return machine.seconds(chain(3, 1, 1, 3)) / machine.seconds(NET.spec)


@settings(max_examples=20)
@given(
    way=st.sampled_from([*WAYS]),
    share=st.floats(0.2, 0.95),
    start=st.sampled_from([0.0, 2e-4, 2e-3]),
    scale=st.floats(0.3, 2.0),
    block=st.sampled_from([1, 8]),
    noise=st.sampled_from([0.0, 0.02]),
)
@example(way="prune, repaired", share=0.5, start=0.0, scale=1.0, block=1, noise=0.0)
def test_the_measured_share_is_what_was_asked_or_the_error_says_what_can_be_had(way, share, start, scale, block, noise):
    machine = Machine(start, scale, block, noise)
    try:
        plan = WAYS[way](tfx.Latency(share, machine.timings()))
    except tfx.BudgetError as error:
        assert least(machine) > 0.99 * share
        (had,) = re.findall(r"(?:smallest network takes |measured )([\d.]+)%", str(error))
        assert float(had) / 100 == pytest.approx(least(machine), rel=0.02)
        return
    noisy = 0.015 if noise else 1e-9
    # One unit of the widest layer, or a block of them, is the step in which plans get slower.
    step = block / 20
    assert -TOLERANCE - noisy - step < machine.share(plan) / share - 1 < TOLERANCE + noisy
    *_, said = re.findall(r"measured ([\d.]+)%", plan.asked)
    assert float(said) / 100 == pytest.approx(machine.share(plan), rel=0.015)


def test_a_number_of_microseconds_is_of_the_network_that_runs_whole():
    machine = Machine(2e-4, 0.5, 1, 0.01)
    plan = by_scores(tfx.Latency(600, machine.timings()))
    assert 600 * (1 - 2 * TOLERANCE) < 1e6 * machine.seconds(plan.spec) < 600 * (1 + TOLERANCE + 0.01)


def test_without_a_runner_the_layers_sum_alone_counts():
    machine = Machine(2e-3)
    timings = replace(machine.timings(), runner=None)
    plan = by_scores(tfx.Latency(0.5, timings))
    assert timings(plan.spec) <= 0.5 * timings(NET.spec)
    assert machine.share(plan) > 0.7
    assert not machine.runs


def test_a_budget_that_no_network_meets_is_refused_before_anything_is_measured():
    machine = Machine(2e-3)
    with pytest.raises(tfx.BudgetError, match=r"run whole, the smallest network takes 5\d\.\d%"):
        tfx.prune(NET.params, NET.spec, None, budget=tfx.Latency(0.2, machine.timings()))


def test_a_plan_of_a_function_of_the_users_is_held_to_what_is_measured():
    machine = Machine(2e-4)
    budget = tfx.Latency(0.5, machine.timings(), multiples=False)

    def half(scores, coupling, *, budget, constraints, per_cost):
        return tfx.select(scores, coupling, budget=tfx.Parameters(0.5))  # so that more than half of the time remains

    with pytest.raises(tfx.BudgetError, match=r"plan of .*half does not meet at most 50\.0% of the microseconds"):
        tfx.prune(NET.params, NET.spec, NET.batch, budget=budget, criterion=tfx.taylor, choose=half, steps=1)


@pytest.mark.parametrize(("block", "expected"), [(1, {}), (8, {"l0": 8, "l1": 8}), (16, {"l0": 8, "l1": 8})])
def test_multiples_are_those_of_the_machine(block, expected):
    """By a quarter of a width at most: 8 of 32 and 48."""
    assert Machine(block=block, noise=1e-3).timings().multiple(NET.coupling) == expected


def test_a_wide_layer_has_large_multiples_and_units_of_several_positions_small_ones():
    layers = {"a": L.Conv2d(3, 64, 1), "flat": L.Flatten(), "b": L.Linear(64 * 4, 3)}
    net = network(tfx.serial(tfx.Input((3, 2, 2)), **layers))
    assert Machine(block=16).timings().multiple(net.coupling) == {"a": 16}
    (alone,) = [net.spec.nodes[k] for k in (3,)]
    wide = network(tfx.serial(tfx.Input((3, 2, 2)), conv=L.Conv2d(3, 64, 1), flat=L.Flatten(), head=alone.layer))
    machine = Machine()
    machine.layer = lambda layer: (
        1e-6 * (-(-layer.shapes()["weight"][1] // 16)) if isinstance(layer, L.Linear) else 1e-8 * layer.out_channels
    )
    assert machine.timings().multiple(wide.coupling) == {"conv": 4}  # four positions each


def test_latency_keeps_the_multiples_of_the_machine_and_those_that_were_asked_for():
    machine = Machine(block=8)
    for options, multiple in (({}, 8), ({"multiple": 3}, 24)):
        plan = by_scores(tfx.Latency(0.6, machine.timings()), **options)
        kept = np.bincount(NET.coupling.scope[plan.keep])
        assert all(n == size or n % multiple == 0 for n, size in zip(kept, NET.coupling.sizes, strict=True))
    plan = by_scores(tfx.Latency(0.6, machine.timings(), multiples=False))
    assert (np.bincount(NET.coupling.scope[plan.keep]) % 8).any()


def test_what_slows_the_machine_for_a_while_does_not_change_the_share():
    """A machine that becomes slower all the time, and stops now and then."""
    machine = Machine(noise=0.02)
    timings, small, whole = machine.timings(), chain(3, 16, 24, 3), chain(3, 32, 48, 3)
    steady = machine.seconds

    def slower(spec):
        return steady(spec) * (1 + machine.now) * (5 if machine.generator.random() < 0.02 else 1)

    expected = steady(small) / steady(whole)
    machine.seconds = slower
    assert timings.share(small, whole) == pytest.approx(expected, rel=0.02)
    runs = machine.runs
    assert timings.share(small, whole) == timings.shares[small, whole]
    assert machine.runs == runs, "measured twice"


SURFACES = st.lists(st.integers(1, 5), min_size=1, max_size=3).flatmap(
    lambda shape: st.integers(0, 10**6).map(
        lambda seed: np.random.default_rng(seed).uniform(1, 10, shape).round(int(seed % 3))
    )
)


@given(SURFACES)
def test_smoothed_timings_never_fall_with_a_width_and_are_the_nearest_such(values):
    """The projection on a convex cone: what it takes away is orthogonal to it, and points away from all of the cone."""
    smooth = rising(values)
    for axis in range(values.ndim):
        assert (np.diff(smooth, axis=axis) >= 0).all()
    taken = values - smooth
    scale = np.linalg.norm(values)
    assert abs((taken * smooth).sum()) <= 2e-2 * scale * np.linalg.norm(taken) + 1e-9
    for corner in np.ndindex(*values.shape):  # the steps up, of which all that rises is a sum with positive weights
        step = np.zeros(values.shape)
        step[tuple(slice(k, None) for k in corner)] = 1
        assert (taken * step).sum() <= 2e-2 * scale * np.linalg.norm(step)


@given(SURFACES)
def test_timings_that_rise_stay_as_they_are(values):
    for axis in range(values.ndim):
        values = np.cumsum(values, axis)
    assert_array_equal(rising(values), values)


RUNNERS = {
    "eager": tfx.cost.eager,
    "compiled": tfx.cost.compiled,
    "onnx_runtime": tfx.interop.onnx_runtime,
}


@pytest.mark.parametrize("name", RUNNERS)
def test_a_runner_computes_what_the_network_computes(name):
    if name == "onnx_runtime":
        pytest.importorskip("onnxruntime")
    if name == "compiled":
        torch.compiler.reset()
        if not CAN_BUILD:
            pytest.skip("torch.compile needs a compiler")
    spec, x = chain(3, 4, 3), torch.randn(2, 3, dtype=torch.float64)
    params = tfx.init(spec, torch.Generator().manual_seed(0), dtype=torch.float64)
    value = RUNNERS[name](params, spec, (x,))()
    assert_allclose(
        np.asarray(value[0] if name == "onnx_runtime" else value), tfx.apply(params, spec, x), rtol=1e-4, atol=1e-6
    )
    pace = tfx.cost.Pace(clock=itertools.count().__next__, seconds=0.2)  # real ones are microseconds, and noise
    timings = tfx.cost.Timings(batch=2, dtype=torch.float64, runner=RUNNERS[name], pace=pace)
    assert 0 < timings.share(chain(3, 1, 3), spec) < 2
    assert timings.whole(spec) > 0


class Tables(torch.nn.Module):
    """A network with constants of all kinds: positions that are looked up, and a mask."""

    def __init__(self):
        super().__init__()
        self.positions, self.table = torch.nn.Embedding(4, 6), torch.nn.Linear(6, 6)
        self.register_buffer("places", torch.tensor([3, 1, 0]))
        self.register_buffer("mask", torch.tensor([True, False, True]))

    def forward(self, x):
        y = self.table(x + self.positions(self.places))
        return torch.where(self.mask[:, None] & (x > 0), y, torch.zeros_like(y))


def test_whole_networks_are_timed_with_constants_of_the_dtypes_that_they_have():
    params, spec = tfx.from_torch(Tables(), torch.randn(2, 3, 6))
    fresh = tfx.init(spec, torch.Generator().manual_seed(0))
    dtypes = {path: x.dtype for path, x in tfx.tree.flatten(params).items()}
    assert {torch.int64, torch.bool} < {*dtypes.values()}
    assert {path: x.dtype for path, x in tfx.tree.flatten(fresh).items()} == dtypes
    tight = tfx.cost.Timings(batch=2, pace=tfx.cost.Pace(seconds=0.1))
    assert tight.whole(spec) > 0
    assert tfx.apply(fresh, spec, torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_a_dtype_that_torch_does_not_know_is_refused():
    with pytest.raises(L.ShapeError, match=r"Buffer takes the name of one of torch.s dtypes.* received .floaty."):
        L.Buffer((2,), dtype="floaty")

"""`Latency` is held to networks that run whole. The machine is a law: a clock that advances by what a network takes."""

import math
import re
from itertools import pairwise
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import taylorfx as tfx
from taylorfx import layers as L
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
        """What a layer takes alone, in seconds: the product of its widths, in blocks."""
        widths = [-(-n // self.block) * self.block for shape in layer.shapes().values() for n in shape[:2]]
        return 1e-6 * (1 + math.prod(widths)) if layer.shapes() else 1e-6

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


WAYS = {"select": by_scores, "joint": together, "prune in steps": last_step}


def least(machine: Machine) -> float:
    return machine.seconds(chain(3, 1, 1, 3)) / machine.seconds(NET.spec)


@given(
    way=st.sampled_from([*WAYS]),
    share=st.floats(0.2, 0.95),
    start=st.sampled_from([0.0, 0.002, 0.02]),
    scale=st.floats(0.3, 2.0),
    block=st.sampled_from([1, 8]),
    noise=st.sampled_from([0.0, 0.02]),
)
def test_the_measured_share_is_what_was_asked_or_the_error_says_what_can_be_had(
    way, share, start, scale, block, noise
):
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
    (said,) = re.findall(r"measured ([\d.]+)%", plan.asked) if way != "prune in steps" else [100 * machine.share(plan)]
    assert float(said) / 100 == pytest.approx(machine.share(plan), rel=0.015)

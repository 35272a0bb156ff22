"""Plans, statistics and timings in files: what was decided and measured once is used in another process."""

import json
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx import store
from taylorfx.cost.timings import Timings
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import networks, plans, random_params


def chain(channels=6):
    """A small network with parameters and a batch."""
    spec = tfx.serial(
        tfx.Input((1, 6, 6)), a=L.Conv2d(1, channels, 3), bn=L.BatchNorm2d(channels), relu=L.ReLU(),
        b=L.Conv2d(channels, 4, 3), act=L.GELU(), pool=L.AdaptiveAvgPool2d(1), flat=L.Flatten(), head=L.Linear(4, 3),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    params = random_params(spec, generator)
    batch = torch.randn(8, 1, 6, 6, generator=generator, dtype=torch.float64), torch.arange(8) % 3
    return params, spec, batch, tfx.couple(params, spec)


PARAMS, SPEC, BATCH, COUPLING = chain()
STATS = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, rows=True, moments=True)
PLAN = tfx.select(tfx.taylor(STATS, COUPLING), COUPLING, budget=tfx.Flops(0.5))
TIMINGS = Timings(points=2, repeats=1)
TIMINGS.over(COUPLING)(PLAN.keep)
TIMINGS.shares.update({(PLAN.spec, SPEC): 0.5, (SPEC, None): 80.0})
TIMINGS.kinds["o", ("Linear", ("weight", (16, 16)))] = np.array([1.0, 0.9, 0.5])


# Plans.


@given(st.data())
def test_a_plan_survives_a_file(tmp_path_factory, data):
    network = data.draw(networks())
    plan = data.draw(plans(network.coupling))
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    store.save_plan(path, tfx.Plan(network.coupling, plan.keep, "some of it"))
    again = store.load_plan(path, tfx.couple(network.params, network.spec))
    assert again == plan
    assert again.asked == "some of it"
    assert_trees_equal(tfx.cut(network.params, again), tfx.cut(network.params, plan))


def saved(tmp_path, plan=PLAN):
    store.save_plan(tmp_path / "plan.json", plan)
    return tmp_path / "plan.json"


class Sized(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(1, width, 3), nn.Conv2d(width, 5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.b(self.a(x).relu()).relu().mean((2, 3)))


def test_a_plan_is_replayed_on_another_checkpoint_and_another_capture(tmp_path):
    one, other = Sized(), Sized()
    captured = [tfx.from_torch(m, torch.randn(2, 1, n, n), sizes=False) for m, n in ((one, 8), (other, 12))]
    couplings = [tfx.couple(*network) for network in captured]
    assert couplings[0].spec != couplings[1].spec
    plan = tfx.select(torch.arange(float(len(couplings[0]))), couplings[0], budget=tfx.Flops(0.6))
    again = store.load_plan(saved(tmp_path, plan), couplings[1])
    assert again.coupling is couplings[1]
    assert again.keep.tolist() == plan.keep.tolist()
    x = torch.randn(3, 1, 12, 12)
    gated = tfx.apply(*captured[1], x, gates=again.gates)
    assert_close(tfx.apply(tfx.cut(captured[1][0], again), again.spec, x), gated)


def test_what_prune_did_in_steps_is_replayed_from_one_file(tmp_path):
    pruned = tfx.prune(PARAMS, SPEC, BATCH, budget=tfx.Flops(0.5), steps=3)
    again = store.load_plan(saved(tmp_path, pruned.plan), tfx.couple(PARAMS, SPEC))
    assert again.spec == pruned.spec
    assert_trees_equal(tfx.cut(PARAMS, again), pruned.params)


def refusal(path, load, *args):
    with pytest.raises(tfx.FileError) as caught:
        load(path, *args)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_the_plan_of_another_network_is_refused_with_all_that_differs(tmp_path):
    path = saved(tmp_path)
    message = refusal(path, store.load_plan, chain(channels=8)[3])
    assert "scopes[0].units: 'a' has 8 units in this network, received 6" in message
    other = tfx.serial(tfx.Input((6,)), a=L.Linear(6, 6), c=L.Linear(6, 3))
    message = refusal(path, store.load_plan, tfx.couple(tfx.init(other, torch.Generator()), other))
    assert "scopes[1].name: 'b' is no scope of the network" in message
    wide = tfx.serial(tfx.Input((2, 6, 6)), **{n.name: n.layer for n in SPEC.nodes[1:]} | {"a": L.Conv2d(2, 6, 3)})
    message = refusal(path, store.load_plan, tfx.couple(tfx.init(wide, torch.Generator()), wide))
    left = int(PLAN.keep[:6].sum())
    assert f"parameters.a.weight: from [6, 2, 3, 3] to [{left}, 2, 3, 3] in this network, [[6, 1, 3, 3], " in message


def test_a_plan_whose_units_lie_elsewhere_is_refused(tmp_path):
    """Names, numbers and shapes agree; the slices are swapped, so that other inputs of the last layer leave."""

    def network(first):
        nodes = [tfx.Node("x", tfx.Input((2,))), tfx.Node("a", L.Linear(2, 4), ("x",))]
        nodes += [tfx.Node("one", L.Slice(1, 0, 2), ("a",)), tfx.Node("two", L.Slice(1, 2, 4), ("a",))]
        nodes += [tfx.Node("cat", L.Concat(), ("one", "two") if first else ("two", "one"))]
        spec = tfx.Spec((*nodes, tfx.Node("b", L.Linear(4, 3), ("cat",))))
        return tfx.couple(tfx.init(spec, torch.Generator()), spec)

    keep = np.array([False, True, True, True])
    path = saved(tmp_path, tfx.Plan(network(True), keep))
    assert store.load_plan(path, network(True)).keep.tolist() == keep.tolist()
    assert "indices: other indices stay in this network" in refusal(path, store.load_plan, network(False))


def edited(path, **entries):
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **entries}))
    return path


WRONG_PLANS = {
    "a newer version": ({"version": 2}, "version: 2 is unknown, 1 is known; a newer taylorfx may read it"),
    "another kind": ({"kind": "timings"}, "kind: expected 'plan', received 'timings'"),
    "an unknown entry": ({"gates": 1}, "gates: unknown; known are kind, version"),
    "no list": ({"scopes": 3}, "scopes: expected a list, received an integer"),
    "no object": ({"scopes": [3]}, "scopes[0]: expected an object, received an integer"),
    "no scopes": ({"scopes": []}, "scopes: 'a' of the network is missing"),
    "a scope twice": (
        {"scopes": [{"name": "a", "units": 6, "leave": []}] * 2}, "scopes[1].name: 'a' is here twice",
    ),
    "a unit twice": (
        {"scopes": [{"name": "a", "units": 6, "leave": [1, 1]}]}, "scopes[0].leave[1]: 1 is there twice",
    ),
    "a unit that is none": (
        {"scopes": [{"name": "a", "units": 6, "leave": [1, 6]}]}, "leave[1]: no number of a unit of 'a': 6",
    ),
    "a boolean for a unit": ({"scopes": [{"name": "a", "units": 6, "leave": [True]}]}, "leave[0]: no number of a unit"),
    "a list for a unit": ({"scopes": [{"name": "a", "units": 6, "leave": [[1]]}]}, "leave[0]: no number of a unit"),
    "every unit": (
        {"scopes": [{"name": x, "units": n, "leave": [*range(n)]} for x, n in (("a", 6), ("b", 4))]},
        "scopes: Every layer keeps at least one channel",
    ),
    "no parameters": ({"parameters": {}}, "parameters.a.bias: shrinks in this network only"),
    "parameters of none": ({"parameters": {"z": []}}, "parameters.z: does not shrink in this network"),
    "a number for words": ({"asked": 3}, "asked: expected a string, received an integer"),
    "another digest": ({"indices": "0"}, "indices: other indices stay"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_PLANS)
def test_the_file_of_a_plan_that_is_wrong_is_refused_with_the_place(name, tmp_path):
    entries, expected = WRONG_PLANS[name]
    assert expected in refusal(edited(saved(tmp_path), **entries), store.load_plan, COUPLING)


# Statistics.


def same(one, other):
    """Whether two values with tensors are the same to the last bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if hasattr(one, "__dict__"):
        return vars(one).keys() == vars(other).keys() and all(
            same(x, vars(other)[name]) for name, x in vars(one).items()
        )
    return one == other


WHOLE = {"per_example": False, "loss": nn.functional.cross_entropy}


def test_statistics_survive_a_file(tmp_path):
    path = tmp_path / "stats"
    for options in ({}, {"rows": True}, {"moments": True}, {"rows": True, "moments": True}, WHOLE):
        stats = tfx.measure(PARAMS, SPEC, BATCH, COUPLING, **options)
        store.save_statistics(path, stats)
        again = store.load_statistics(path, COUPLING)
        assert same(again, stats)
        assert (again + stats).n == 2 * stats.n
        assert repr(again) == repr(stats)


def test_statistics_of_other_units_and_other_files_are_refused(tmp_path):
    path = tmp_path / "stats"
    store.save_statistics(path, STATS)
    message = refusal(path, store.load_statistics, chain(channels=8)[3])
    assert "units: 10, of this network 12, of which 2 are lacking" in message
    tfx.save(path, PARAMS, SPEC)
    assert "A file of statistics has a document in its header" in refusal(path, store.load_statistics)
    store.save_plan(path, PLAN)
    assert "cannot be read as a safetensors file" in refusal(path, store.load_statistics)
    store.save_statistics(path, STATS)
    assert "text in UTF-8" in refusal(path, store.load_plan, COUPLING)
    with pytest.raises(FileNotFoundError):
        store.load_statistics(tmp_path / "nothing")


def test_the_sums_have_to_be_all_there_of_the_right_shapes_and_finite(tmp_path):
    path = tmp_path / "stats"
    wrong = replace(
        STATS, sum=STATS.sum[:3], sum_sq=STATS.sum_sq / 0, sum_abs=STATS.sum_abs.half(), rows=STATS.rows[:2], n=-1,
        units=(*COUPLING.names[:-1], "a[0]"), moments=None, per_example=1,
    )  # fmt: skip
    store.save_statistics(path, wrong)
    message = refusal(path, store.load_statistics)
    for expected in (
        "n: expected an integer, 0 or more, received -1", "units: two have the same name",
        "per_example: expected a boolean",
        "tensor sum: expected the shape (10,), received (3,)", "tensor sum_sq: not all of its numbers are finite",
        "tensor sum_abs: expected float32, float64 or int64, received torch.float16",
        "tensor rows: expected the shape (0, 10), received (2, 10)",
    ):  # fmt: skip
        assert expected in message


def test_another_process_chooses_and_cuts_without_running_the_network(tmp_path):
    tfx.save(tmp_path / "net", PARAMS, SPEC)
    store.save_statistics(tmp_path / "stats", STATS)
    store.save_plan(tmp_path / "plan", PLAN)
    program = """
        import sys
        import taylorfx as tfx
        from taylorfx import store
        from taylorfx.layers import LAYERS

        def refuse(*_):
            raise AssertionError("a forward pass")

        for cls in LAYERS.values():
            cls.apply = refuse
        folder = sys.argv[1]
        params, spec = tfx.load(f"{folder}/net")
        coupling = tfx.couple(params, spec)
        stats = store.load_statistics(f"{folder}/stats", coupling)
        plans = {
            "replayed": store.load_plan(f"{folder}/plan", coupling),
            "selected": tfx.select(tfx.fisher(stats, coupling), coupling, budget=tfx.Flops(0.7)),
            "joint": tfx.joint(stats, coupling, budget=tfx.Parameters(0.6)),
        }
        for name, plan in plans.items():
            tfx.save(f"{folder}/{name}", tfx.cut(params, plan), plan.spec)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(tmp_path)], check=True)
    expected = {
        "replayed": PLAN,
        "selected": tfx.select(tfx.fisher(STATS, COUPLING), COUPLING, budget=tfx.Flops(0.7)),
        "joint": tfx.joint(STATS, COUPLING, budget=tfx.Parameters(0.6)),
    }
    for name, plan in expected.items():
        params, spec = tfx.load(tmp_path / name)
        assert spec == plan.spec
        assert_trees_equal(params, tfx.cut(PARAMS, plan))


# Timings.


def test_timings_survive_a_file_and_nothing_is_measured_again(tmp_path, monkeypatch):
    network = tfx.from_torch(Sized(), torch.randn(2, 1, 8, 8))
    timings = Timings(batch=2, points=3, repeats=1)
    before = timings(network[1]), timings.over(tfx.couple(*network))(np.ones(11, bool))
    store.save_timings(tmp_path / "timings", timings)
    again = store.load_timings(tmp_path / "timings")
    assert again.table == timings.table
    assert [getattr(again, name) for name in ("batch", "points", "repeats", "device", "dtype")] == [
        2, 3, 1, "cpu", torch.float32,
    ]  # fmt: skip
    monkeypatch.setattr(Timings, "measure", None)
    assert (again(network[1]), again.over(tfx.couple(*network))(np.ones(11, bool))) == before


def test_a_budget_of_loaded_timings_chooses_the_same_and_runs_nothing(tmp_path):
    """Layers, multiples and whole networks are all in the file."""
    spec = tfx.serial(tfx.Input((3,)), a=L.Linear(3, 64), relu=L.ReLU(), b=L.Linear(64, 64), head=L.Linear(64, 3))
    params = random_params(spec, torch.Generator().manual_seed(0))
    coupling = tfx.couple(params, spec)
    scores = tfx.criteria.weight_l2(params, coupling)
    timings = Timings(batch=2, repeats=1, runner=slow_runner, pace=tfx.cost.Pace(clock=slow_clock, seconds=0.1))
    budgets = [tfx.Latency(0.97, timings), tfx.Latency(round(2 * timings.whole(spec)), timings)]
    before = [tfx.select(scores, coupling, budget=budget) for budget in budgets]
    assert timings.kinds
    assert {other for _, other in timings.shares} == {spec, None}
    store.save_timings(tmp_path / "timings", timings)
    again = store.load_timings(tmp_path / "timings", runner=slow_runner)
    assert again.table == timings.table
    assert again.shares == timings.shares
    assert {key: values.tolist() for key, values in again.kinds.items()} == {
        key: values.tolist() for key, values in timings.kinds.items()
    }
    idle = replace(again, repeats=0, runner=idle_runner)  # of no repeats there is no median, but a warning
    assert [tfx.select(scores, coupling, budget=replace(budget, timings=idle)) for budget in budgets] == before


LATE = [0.0]
"""Seconds by which the clock of `slow_clock` is ahead."""


def slow_clock() -> float:
    return time.perf_counter() + LATE[0]


def slow_runner(params, spec, inputs):
    """Every parameter takes a millisecond of the clock, beside which the machine's noise is nothing."""
    takes = 1e-3 * sum(leaf.numel() for leaf in tfx.tree.flatten(params).values())

    def run() -> None:
        LATE[0] += takes

    return run


def idle_runner(params, spec, inputs):
    raise AssertionError("measured again")


def test_networks_that_another_runner_or_other_threads_ran_are_refused(tmp_path):
    store.save_timings(tmp_path / "timings", replace(TIMINGS, runner=idle_runner))
    name = f"{__name__}.idle_runner"
    assert f"runner: '{name}' ran the networks, not taylorfx.cost.runners.eager; give it as runner=" in refusal(
        tmp_path / "timings", store.load_timings
    )
    assert store.load_timings(tmp_path / "timings", runner=idle_runner).runner is idle_runner
    store.save_timings(tmp_path / "timings", replace(TIMINGS, runner=None))
    assert store.load_timings(tmp_path / "timings", runner=None).runner is None
    more = torch.get_num_threads() + 1
    found = refusal(
        edited(tmp_path / "timings", threads=more, runner="taylorfx.cost.runners.eager"), store.load_timings
    )
    assert f"threads: {more} ran, and torch has {more - 1}: torch.set_num_threads" in found


WRONG_TIMINGS = {
    "a newer version": ({"version": 9}, "version: 9 is unknown"),
    "a device of none": ({"device": "abacus"}, "device: expected one of torch's devices, received 'abacus'"),
    "a dtype of none": ({"dtype": "nn"}, "dtype: expected one of torch's dtypes, received 'nn'"),
    "no batch": ({"batch": 0}, "batch: expected an integer, 1 or more, received 0"),
    "a layer of none": (
        {"table": [{"layer": "os.system", "fields": {}, "shapes": [], "microseconds": 1}]},
        "table[0].layer: unknown: 'os.system'",
    ),
    "no time": (
        {"table": [{"layer": "ReLU", "fields": {}, "shapes": [[1]], "microseconds": -1}]},
        "table[0].microseconds: expected a number, 0 or more, received -1",
    ),
    "shapes of none": (
        {"table": [{"layer": "ReLU", "fields": {}, "shapes": [3, [-1]], "microseconds": 1}]},
        "table[0].shapes[1]: expected a list of sizes",
    ),
    "a shape without end": (
        {"table": [{"layer": "ReLU", "fields": {}, "shapes": [[2**50]], "microseconds": 1}]},
        "table[0].shapes[0]: would be an axis of 1,125,899,906,842,624",
    ),
    "a kind of none": (
        {"kinds": [{"kind": ["o", {}], "shares": [1, 1, 1]}]},
        "kinds[0].kind: expected lists of strings and integers",
    ),
    "too few shares": (
        {"kinds": [{"kind": ["o"], "shares": [1]}]},
        "kinds[0].shares: expected 3 numbers, received [1]",
    ),
    "a share without end": (
        {"kinds": [{"kind": ["o"], "shares": [1, 1, float("inf")]}]},
        "kinds[0].shares[2]: expected a number, 0 or more",
    ),
    "a network of none": ({"networks": [{"nodes": [], "outputs": []}]}, "networks[0].nodes: a network has 1 to"),
    "a network that is not there": (
        {"whole": [{"network": 7, "beside": None, "value": 1}]},
        "whole[0].network: expected the number of one of 2 networks, received 7",
    ),
    "no network": (
        {"whole": [{"network": 0, "beside": 1, "value": 1}, {"network": None, "beside": None, "value": 1}]},
        "whole[1].network: expected the number of one of 2 networks, received None",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_TIMINGS)
def test_the_file_of_timings_that_is_wrong_is_refused_with_the_place(name, tmp_path):
    store.save_timings(tmp_path / "timings", TIMINGS)
    entries, expected = WRONG_TIMINGS[name]
    assert expected in refusal(edited(tmp_path / "timings", **entries), store.load_timings)


def test_statistics_whose_bytes_were_changed_are_refused(tmp_path):
    store.save_statistics(tmp_path / "stats", STATS)
    data = bytearray((tmp_path / "stats").read_bytes())
    data[-1] ^= 1
    (tmp_path / "stats").write_bytes(data)
    assert "digest: the file was changed after it was written" in refusal(tmp_path / "stats", store.load_statistics)


def test_a_file_is_complete_or_not_there(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(type(path), "replace", lambda *_: (_ for _ in ()).throw(OSError("full")))
    for save, value in ((store.save_plan, PLAN), (store.save_statistics, STATS), (store.save_timings, TIMINGS)):
        with pytest.raises(OSError, match="full"):
            save(path, value)
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]

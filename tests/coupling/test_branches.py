"""Residual branches as units: their gates, cuts and prices, on small networks in float64."""

import math
import pickle

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS, parallel, transformer
from hypothesis import example, given, settings
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, inline, residual, serial
from taylorfx import layers as L
from taylorfx.cost.timings import Timings
from taylorfx.network.parameters import check
from taylorfx.scoring.measure import derivatives
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import Network, network, networks, random_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
COSTS = (tfx.cost.parameters, tfx.cost.flops, tfx.cost.memory)


def with_branches(net: Network) -> Network:
    return net._replace(coupling=tfx.couple(net.params, net.spec, branches=True))


def mlp(width: int = 4, hidden: int = 3) -> Spec:
    return serial(up=L.Linear(width, hidden), act=L.Tanh(), down=L.Linear(hidden, width))


def nested() -> Spec:
    """``x + f(x + g(x))``, twice: a branch within another one."""
    body = serial(inner=residual(mlp()), act=L.Tanh(), out=L.Linear(4, 4))
    return serial(Input((4,)), stem=L.Linear(4, 4), a=residual(body), b=residual(body), head=L.Linear(4, 2))


def with_table() -> Spec:
    """Two branches that both consume a projected table, which nothing else does."""
    nodes = [
        Node("x", Input((3, 4))),
        Node("stem", L.Linear(4, 4), ("x",)),
        Node("table", L.Parameter((3, 5), std=1.0)),
    ]
    nodes += [Node("project", L.Linear(5, 4), ("table",))]
    last = "stem"
    for k in range(2):
        nodes += [Node(f"mix{k}", L.Multiply(), (last, "project")), *inline(mlp(), f"mlp{k}", (f"mix{k}",))]
        nodes += [Node(f"sum{k}", L.Add(), (last, f"mlp{k}.down"))]
        last = f"sum{k}"
    return Spec((*nodes, Node("flat", L.Flatten(), (last,)), Node("head", L.Linear(12, 2), ("flat",))))


def shared() -> Spec:
    """The same branch twice, as in ALBERT, and once more with parameters of its own."""
    nodes = [Node("x", Input((4,))), Node("stem", L.Linear(4, 4), ("x",))]
    last = "stem"
    for k, path in enumerate(("block", "block", "own")):
        nodes += [Node(f"up{k}", L.Linear(4, 3), (last,), f"{path}.up"), Node(f"act{k}", L.Tanh(), (f"up{k}",))]
        nodes += [Node(f"down{k}", L.Linear(3, 4), (f"act{k}",), f"{path}.down")]
        nodes += [Node(f"sum{k}", L.Add(), (f"down{k}", last))]
        last = f"sum{k}"
    return Spec((*nodes, Node("head", L.Linear(4, 2), (last,))))


def post_norm() -> Spec:
    body = serial(norm=L.LayerNorm(4), up=L.Linear(4, 3), act=L.GELU(), down=L.Linear(3, 4))
    block = serial(body=residual(body), norm=L.LayerNorm(4))
    return serial(Input((3, 4)), L.Linear(4, 4), block, block, L.Flatten(), L.Linear(12, 2))


NETWORKS = {
    "stream": CONSTRUCTS["residual stream"], "attention": transformer(4, 2, L.LayerNorm(4)), "nested": nested(),
    "table": with_table(), "shared": shared(), "post norm": post_norm(),
    "one by one": parallel(("x", "a"), "b"), "parallel": parallel(("a", "b"), "x"),
    "of three": parallel("x", (((("a", "B"),), "c"),)), "of four": parallel((("A", "b"), ("c", "d")), "x"),
}  # fmt: skip


PINNED = [with_branches(network(spec)) for spec in NETWORKS.values()]


def pinned(law):
    """The law on every network of the table, and on a few random ones."""
    for net in PINNED:
        law = example(net, 1)(example(net, 5)(law))
    return settings(max_examples=10)(given(networks(branches=True), st.integers(0, 2**16))(law))


def plan_for(net: Network, seed: int, *, exact: bool = False) -> tfx.Plan:
    generator = torch.Generator().manual_seed(seed)
    return random_plan(net.coupling, generator, float(torch.rand((), generator=generator)), exact=exact)


def branches_of(net: Network) -> list[str]:
    coupling = net.coupling
    return [coupling.scopes[coupling.scope[branch.unit]] for branch in coupling.branches]


def only_without(coupling: tfx.Coupling, *scopes: str) -> tfx.Plan:
    """The plan by which the branches of these scopes leave, and what is in them."""
    numbers = [coupling.scopes.index(scope) for scope in scopes]
    return tfx.Plan(coupling, ~np.isin(coupling.scope, numbers))


# What is a branch.


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "stream": ["1: branch", "3: branch", "5: branch"],
        "attention": ["attn.1: branch", "mlp.1: branch"],
        "nested": ["a.inner: branch", "a: branch", "b.inner: branch", "b: branch"],
        "table": ["mlp0: branch", "mlp1: branch"],
        "shared": ["block: branch", "block: branch (2)", "own: branch"],
        "post norm": ["1.body: branch", "2.body: branch"],
        "one by one": ["a: branch", "b: branch"],
        "parallel": ["a: branch", "b: branch"],
        "of three": ["B.inner: branch", "a: branch", "B: branch", "c: branch"],
        "of four": ["A.inner: branch", "A: branch", "b: branch", "c: branch", "d: branch"],
    }.items(),
)
def test_branches_have_the_path_of_their_matrices(name, expected):
    net = with_branches(network(NETWORKS[name]))
    assert branches_of(net) == expected
    assert expected[0] in str(net.coupling) or "branch" in str(net.coupling)
    assert net.coupling.sizes[-len(expected) :].tolist() == [1] * len(expected)


def test_a_sum_without_a_plain_skip_or_without_layers_has_no_branch():
    cubic = Spec(
        (
            Node("x", Input()),
            Node("square", L.Multiply(), ("x", "x")),
            Node("cube", L.Multiply(), ("square", "x")),
            Node("sum", L.Add(), ("x", "cube")),
        )
    )
    projected = residual(L.Linear(4, 4), L.Linear(4, 4))
    spec = serial(Input((4,)), L.Linear(4, 4), cubic, projected, L.Linear(4, 2))
    assert not with_branches(network(spec)).coupling.branches


def test_branches_that_are_added_to_a_skip_with_a_branch_leave_each():
    twice = serial(one=residual(serial(a=L.Linear(4, 4)))), serial(two=residual(serial(b=L.Linear(4, 4))))
    spec = serial(Input((4,)), L.Linear(4, 4), residual(*twice), L.Linear(4, 2))  # (x + a(x)) + (x + b(x))
    assert len(with_branches(network(spec)).coupling.branches) == 2


@pinned
def test_without_asking_nothing_changes_and_with_asking_the_other_units_are_the_same(net, seed):
    plain, coupling = tfx.couple(net.params, net.spec), net.coupling
    assert coupling.names[: len(plain)] == plain.names
    assert coupling.scopes[: len(plain.scopes)] == plain.scopes
    assert all(np.array_equal(a, b) for a, b in zip(plain.axes, coupling.axes, strict=True))
    assert not plain.branches
    assert not plain.carried(np.zeros(len(plain), bool)).any()


# Gates.


class Block(nn.Module):
    """A layer of a transformer, with its norms before or after its branches."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.before = before
        self.mix, self.mlp = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4))
        self.first, self.second = nn.LayerNorm(4), nn.LayerNorm(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.before:
            x = x + self.mix(self.first(x))
            return self.mlp(self.second(x)) + x
        x = self.first(self.mix(x) + x)
        return self.second(x + self.mlp(x))


@pytest.mark.parametrize("before", [True, False])
def test_a_gate_at_zero_is_the_users_module_with_the_branch_silenced(before):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), Block(before), Block(before), nn.Linear(4, 2)).double()
    x = torch.randn(5, 3, dtype=torch.float64)
    params, spec = tfx.from_torch(module, x)
    coupling = tfx.couple(params, spec, branches=True)
    assert [name for name in coupling.scopes if "branch" in name] == [
        "1.mix: branch", "1.mlp: branch", "2.mix: branch", "2.mlp: branch",
    ]  # fmt: skip
    for scope in ("1.mix: branch", "2.mlp: branch"):
        plan = only_without(coupling, scope)
        handle = module.get_submodule(scope.partition(":")[0]).register_forward_hook(lambda _, x, y: y * 0)
        silenced = module(x)
        handle.remove()
        assert_close(tfx.apply(params, spec, x, gates=plan.gates), silenced, **CLOSE)
        small = tfx.cut(params, plan)
        assert_close(tfx.apply(small, plan.spec, x), silenced, **CLOSE)
        assert_close(tfx.to_torch(small, plan.spec)(x), silenced, **CLOSE)
        assert not [path for path in tfx.tree.flatten(small) if path.startswith(scope.partition(":")[0])]


def test_gates_hold_at_other_sizes_of_the_inputs():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Residual(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    params, spec = tfx.from_torch(module, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    coupling, x = tfx.couple(params, spec, branches=True), torch.randn(3, 2, 9, 7, dtype=torch.float64)
    plan = only_without(coupling, *(name for name in coupling.scopes if "branch" in name))
    small = tfx.apply(tfx.cut(params, plan), plan.spec, x)
    assert_close(small, tfx.apply(params, spec, x, gates=plan.gates), **CLOSE)
    tfx.measure(params, spec, (x, torch.tensor([0, 1, 2])), coupling, moments=True)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn(self.conv(x)))


@pinned
def test_derivatives_are_those_of_the_gates_by_finite_differences_and_by_autograd(net, seed):
    coupling, (x, y) = net.coupling, net.batch
    if not coupling.branches or coupling.mixing:
        return
    rows = derivatives(net.params, net.spec, x, y, coupling).summed
    plain = derivatives(net.params, net.spec, x, y, coupling, fold=False, micro_batch=1).summed
    ones = torch.ones(len(coupling), dtype=torch.float64)
    each = tfx.truth.gradient(net.params, net.spec, x, y, coupling, ones.expand(len(y), -1).clone())
    assert_close(rows, plain, rtol=1e-8, atol=1e-10)
    assert_close(rows, each, rtol=1e-8, atol=1e-10)
    for branch in coupling.branches[:2]:
        step = 1e-5 * (torch.arange(len(coupling)) == branch.unit)
        above, below = (tfx.truth.gated_loss(net.params, net.spec, x, y, coupling, ones + s) for s in (step, -step))
        assert_close(rows[:, branch.unit], (above - below) / 2e-5, rtol=1e-5, atol=1e-7)


@pinned
def test_the_oracle_of_a_branch_is_the_loss_of_the_cut_network(net, seed):
    coupling = net.coupling
    if not coupling.branches or coupling.mixing:
        return
    units = [branch.unit for branch in coupling.branches]
    changes = tfx.truth.oracle(net.params, net.spec, net.batch, coupling).signed()
    before = loss_of(net.params, net.spec, net.batch)
    for unit, change in zip(units, changes[units], strict=True):
        plan = tfx.Plan(coupling, np.arange(len(coupling)) != unit)
        assert_close(loss_of(tfx.cut(net.params, plan), plan.spec, net.batch) - before, change, rtol=1e-6, atol=1e-9)


def loss_of(params, spec, batch):
    return torch.nn.functional.cross_entropy(tfx.apply(params, spec, batch[0]), batch[1])


# Cuts.


@pinned
def test_cutting_is_gating(net, seed):
    plan = plan_for(net, seed, exact=True)
    small, x = tfx.cut(net.params, plan), net.batch[0]
    check(small, plan.spec)
    gated = tfx.apply(net.params, net.spec, x, gates=plan.gates)
    assert_close(tfx.apply(small, plan.spec, x), gated, **CLOSE)
    assert_close(tfx.apply(tfx.expand(small, plan), net.spec, x, gates=plan.gates), gated, **CLOSE)


@pinned
def test_what_is_in_a_branch_leaves_with_it_and_only_then(net, seed):
    plan, coupling = plan_for(net, seed), net.coupling
    carried = coupling.carried(plan.keep)
    assert not (carried & plan.keep).any()
    assert np.array_equal(coupling.settled(plan.keep), plan.keep)
    assert np.array_equal(plan.leaving, ~plan.keep & ~carried)
    again = tfx.Plan(coupling, ~plan.leaving)  # what is carried need not be named
    assert again == plan
    assert again.spec == plan.spec
    there = {node.name for node in plan.spec}
    for unit in np.flatnonzero(carried).tolist():
        axes = {k for k, axis in enumerate(coupling.axes) if (axis == unit).any()}
        nodes = [name for name, letters in coupling.letters.items() if axes & {*letters.values()}]
        nodes += [branch.node for branch in coupling.branches if branch.unit == unit]
        assert there.isdisjoint(nodes)


@pinned
def test_expanding_then_cutting_is_the_identity(net, seed):
    plan = plan_for(net, seed)
    small = tfx.cut(net.params, plan)
    back = tfx.expand(small, plan)
    check(back, net.spec)
    assert_trees_equal(tfx.cut(back, plan), small)
    zeros, dtypes = tfx.tree.flatten(back), {x: y.dtype for x, y in tfx.tree.flatten(net.params).items()}
    assert all(not zeros[path].any() for path in plan.gone)
    assert {path: leaf.dtype for path, leaf in zeros.items()} == dtypes


class Looked(nn.Module):
    """A residual branch with tables of whole numbers and of truth values."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bn, self.down = nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)
        self.table = nn.Parameter(torch.randn(5, 3))
        self.register_buffer("index", torch.tensor([2, 0, 4]))
        self.register_buffer("mask", torch.tensor([[True], [False], [True]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = (self.bn(self.up(x)) * self.table[self.index]).masked_fill(self.mask, 0.5)
        return x + self.down(y)


def test_tables_of_whole_numbers_come_back_like_the_original_ones():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), Looked(), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    params, spec = tfx.from_torch(module, x)
    plan = only_without(tfx.couple(params, spec, branches=True), "1: branch")
    small, full = tfx.cut(params, plan), tfx.tree.flatten(params)
    back = tfx.expand(small, plan, like=params)
    gated = tfx.apply(params, spec, x, gates=plan.gates)
    assert_close(tfx.apply(back, spec, x, gates=plan.gates), gated, **CLOSE)
    leaves = tfx.tree.flatten(back)
    assert {path: leaf.dtype for path, leaf in leaves.items()} == {path: leaf.dtype for path, leaf in full.items()}
    for path in plan.gone:
        is_buffer = path in dict(module.named_buffers())
        assert torch.equal(leaves[path], full[path]) if is_buffer else not leaves[path].any()
    assert_trees_equal(tfx.cut(back, plan), small)
    with pytest.raises(tfx.PlanError, match="A plan expands a tree like its own network's parameters"):
        tfx.expand(small, plan, like=tfx.tree.map_paths(lambda path, leaf: leaf[:1], small))


@pinned
def test_two_cuts_are_one_composed_cut(net, seed):
    first = plan_for(net, seed)
    small = tfx.cut(net.params, first)
    coupling = tfx.couple(small, first.spec, branches=bool(seed % 2))
    second = random_plan(coupling, torch.Generator().manual_seed(seed + 1), 0.4)
    both = tfx.compose(first, second)
    assert_trees_equal(tfx.cut(net.params, both), tfx.cut(small, second))
    assert both.spec == second.spec


def test_plans_of_branches_that_the_first_plan_does_not_know_do_not_compose():
    net = network(NETWORKS["stream"])
    first = tfx.Plan(net.coupling, np.ones(len(net.coupling), bool))
    second = only_without(tfx.couple(net.params, net.spec, branches=True), "3: branch")
    with pytest.raises(tfx.PlanError, match=r"branches of 3\.add, which are no units of the first"):
        tfx.compose(first, second)


def test_without_all_branches_a_stream_is_its_stem():
    net = with_branches(network(with_table()))
    plan = only_without(net.coupling, *branches_of(net))
    assert [node.name for node in plan.spec] == ["x", "stem", "flat", "head"]
    assert [*tfx.tree.flatten(tfx.cut(net.params, plan))] == ["stem.weight", "stem.bias", "head.weight", "head.bias"]
    one = only_without(net.coupling, "mlp0: branch")
    assert {"table", "project"} <= {node.name for node in one.spec}


def test_a_shared_parameter_leaves_with_the_last_branch_that_has_it():
    net = with_branches(network(shared()))
    one = only_without(net.coupling, "block: branch")
    two = only_without(net.coupling, "block: branch", "block: branch (2)")
    assert not one.gone
    assert two.gone == {"block.up.weight", "block.up.bias", "block.down.weight", "block.down.bias"}
    assert one.keep.sum() == len(net.coupling) - 1
    assert two.keep.sum() == len(net.coupling) - 2 - 3  # and the three hidden units that both have


# Prices.


class Counted(Timings):
    """Timings that are made up, so that they are exact at all widths."""

    def measure(self, layer, shapes):
        return 1.0 + sum(math.prod(shape) for shape in shapes)


@pinned
def test_costs_are_those_of_the_cut_network_and_prices_what_a_branch_still_has(net, seed):
    plan, coupling = plan_for(net, seed), net.coupling
    small = tfx.couple(tfx.cut(net.params, plan), plan.spec, branches=bool(seed % 2))
    for cost in COSTS:
        counted = cost(coupling)
        assert counted(plan.keep) == cost(small).total == counted(~plan.leaving)
        if cost is not tfx.cost.memory:
            prices = counted.marginal(~plan.leaving)
            for branch in coupling.branches:
                on, off = (np.where(np.arange(len(coupling)) == branch.unit, x, ~plan.leaving) for x in (True, False))
                assert counted(on) - counted(off) == pytest.approx(float(prices[branch.unit]))


@pytest.mark.parametrize("name", ["stream", "nested", "shared"])
def test_the_time_of_a_branch_leaves_with_it(name):
    net, timings = with_branches(network(NETWORKS[name])), Counted(points=9)
    cost = timings.over(net.coupling)
    for seed in range(4):
        plan = plan_for(net, seed)
        assert cost(plan.keep) == pytest.approx(timings(plan.spec))
    whole = np.ones(len(net.coupling), bool)
    for branch in net.coupling.branches:
        without = np.arange(len(net.coupling)) != branch.unit
        assert float(cost.marginal()[branch.unit]) == pytest.approx(cost(whole) - cost(without))


# Plans in files, optimizers, repairs.


def test_a_plan_with_branches_comes_back_from_its_file_and_from_a_pickle(tmp_path):
    net = with_branches(network(nested()))
    plan = only_without(net.coupling, "a: branch", "b.inner: branch")
    tfx.store.save_plan(tmp_path / "plan.json", plan)
    assert tfx.store.load_plan(tmp_path / "plan.json", net.coupling) == plan
    assert pickle.loads(pickle.dumps(plan)).spec == plan.spec
    assert tfx.from_json(tfx.to_json(plan.spec)) == plan.spec
    with pytest.raises(tfx.FileError, match="no scope of the network"):
        tfx.store.load_plan(tmp_path / "plan.json", tfx.couple(net.params, net.spec))


def test_a_file_is_cut_without_what_leaves(tmp_path):
    net = with_branches(network(nested()))
    plan = only_without(net.coupling, "a: branch")
    tfx.save(tmp_path / "whole.safetensors", net.params, net.spec)
    tfx.cut_file(tmp_path / "whole.safetensors", tmp_path / "small.safetensors", plan)
    params, spec = tfx.load(tmp_path / "small.safetensors")
    assert spec == plan.spec
    assert_trees_equal(params, tfx.cut(net.params, plan))


@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_goes_on_without_the_parameters_that_leave(named):
    net = with_branches(network(nested()))
    plan = only_without(net.coupling, "a: branch")
    leaves = {path: leaf.requires_grad_() for path, leaf in tfx.tree.flatten(net.params).items()}
    optimizer = torch.optim.Adam(leaves.items() if named else leaves.values())
    loss_of(tfx.tree.unflatten(leaves), net.spec, net.batch).backward()
    optimizer.step()
    small = {x: leaf.detach().requires_grad_() for x, leaf in tfx.tree.flatten(tfx.cut(net.params, plan)).items()}
    carried = tfx.interop.carry(optimizer, plan, small, old=None if named else leaves)
    assert [id(x) for x in carried.param_groups[0]["params"]] == [*map(id, small.values())]
    for path, leaf in small.items():
        assert torch.equal(carried.state[leaf]["exp_avg"], optimizer.state[leaves[path]]["exp_avg"])


@pytest.mark.parametrize("repair", [tfx.reconstruct, tfx.compensate, tfx.recalibrate])
def test_repairs_take_plans_with_branches(repair):
    net = with_branches(network(NETWORKS["attention"]))
    generator = torch.Generator().manual_seed(3)
    plan = random_plan(net.coupling, generator, 0.3)
    plan = tfx.Plan(net.coupling, plan.keep & (np.array(net.coupling.names) != "mlp.1: branch[0]"))
    batch = (torch.randint(5, (64, 3), generator=generator), torch.zeros(64, dtype=torch.int64))
    params, spec = repair(net.params, plan, batch)
    whole, as_cut, repaired = (
        tfx.apply(p, s, batch[0])
        for p, s in ((net.params, net.spec), (tfx.cut(net.params, plan), plan.spec), (params, spec))
    )
    error, before = ((x - whole).square().mean() for x in (repaired, as_cut))
    assert error <= before
    if repair is tfx.reconstruct:
        assert error < 0.5 * before

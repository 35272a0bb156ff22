"""Branches that are added to each other first: of ``x + (a + b)`` each is a unit of its own."""

from itertools import chain, combinations

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import parallel
from hypothesis import given, settings
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, inline, serial
from taylorfx import layers as L
from taylorfx.cutting.plan import former_scopes
from taylorfx.scoring.measure import derivatives
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network, random_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
SEEDS = st.integers(0, 2**16)

TREES = {
    "x + (a + b)": ("x", ("a", "b")),
    "(a + b) + x": (("a", "b"), "x"),
    "x + noise(a + noise(b))": ("x", (("a", ("b",)),)),
    "((a + b) + c) + x": ((("a", "b"), "c"), "x"),
    "x + ((a + b) + (c + d))": ("x", (("a", "b"), ("c", "d"))),
}
NETS = {name: network(parallel(*tree), branches=True) for name, tree in TREES.items()}


def letters(name):
    return [letter for letter in name if letter in "abcd"]


def subsets(several):
    return [*map(set, chain.from_iterable(combinations(several, n) for n in range(len(several) + 1)))]


def without(coupling, gone):
    """The plan by which these branches leave, of those that the network has."""
    return tfx.Plan(coupling, ~np.isin(coupling.scope, [coupling.scopes.index(f"{x}: branch") for x in gone]))


def zeroed(params, gone):
    """The parameters with which these branches give out zeros."""
    return tfx.tree.map_paths(
        lambda path, x: x * 0 if path.startswith(tuple(f"{k}.down." for k in gone)) else x, params
    )


@pytest.mark.parametrize("name", TREES)
def test_without_any_of_them_the_network_is_the_one_in_which_they_give_out_zeros(name):
    net = NETS[name]
    coupling, x = net.coupling, net.batch[0]
    assert sorted(scope for scope in coupling.scopes if "branch" in scope) == [f"{k}: branch" for k in letters(name)]
    for gone in subsets(letters(name)):
        plan, expected = without(coupling, gone), tfx.apply(zeroed(net.params, gone), net.spec, x)
        small = tfx.cut(net.params, plan)
        assert_close(tfx.apply(small, plan.spec, x), expected, **CLOSE)
        assert_close(tfx.apply(net.params, net.spec, x, gates=plan.gates), expected, **CLOSE)
        assert_close(tfx.apply(tfx.expand(small, plan), net.spec, x, gates=plan.gates), expected, **CLOSE)
        assert {net.coupling.scopes[k][0] for k in net.coupling.scope[plan.leaving]} == gone, "no branch is in another"
        sums = sum(node.name.startswith("sum") for node in plan.spec)
        assert sums == len(letters(name)) - len(gone), "every branch that leaves takes one sum along"
        assert ("norm" in plan.spec.by_name) == (len(gone) < len(letters(name)))
        assert {node.name[0] for node in plan.spec if ".down" in node.name} == {*letters(name)} - gone


@pytest.mark.parametrize("name", TREES)
def test_they_leave_in_any_number_of_steps(name):
    net = NETS[name]
    for first in subsets(letters(name)):
        plan = without(net.coupling, first)
        small = tfx.cut(net.params, plan)
        coupling = tfx.couple(small, plan.spec, branches=True)
        former = former_scopes(plan, coupling)
        assert [net.coupling.scopes[k] for k in former] == [coupling.scopes[k] for k in coupling.scope]
        for then in subsets({*letters(name)} - first):
            second, both = without(coupling, then), without(net.coupling, first | then)
            assert tfx.compose(plan, second) == both
            assert both.spec == second.spec
            assert_trees_equal(tfx.cut(net.params, both), tfx.cut(small, second))


@pytest.mark.parametrize("name", TREES)
def test_costs_are_those_of_the_cut_network(name):
    net = NETS[name]
    for gone in subsets(letters(name)):
        plan = without(net.coupling, gone)
        small = tfx.couple(tfx.cut(net.params, plan), plan.spec)
        for cost in (tfx.cost.parameters, tfx.cost.flops, tfx.cost.memory):
            assert cost(net.coupling)(plan.keep) == cost(small).total


@pytest.mark.parametrize("name", TREES)
def test_a_plan_comes_back_from_its_file(tmp_path, name):
    net = NETS[name]
    plan = without(net.coupling, {"b"})
    tfx.store.save_plan(tmp_path / "plan.json", plan)
    assert tfx.store.load_plan(tmp_path / "plan.json", net.coupling) == plan


@settings(max_examples=10)
@given(st.sampled_from([*NETS]), SEEDS)
def test_rows_of_scores_are_derivatives_by_the_gates(name, seed):
    net = NETS[name]
    coupling, (x, y) = net.coupling, net.batch
    rows = derivatives(net.params, net.spec, x, y, coupling).summed
    ones = torch.ones(len(y), len(coupling), dtype=torch.float64)
    assert_close(rows, tfx.truth.gradient(net.params, net.spec, x, y, coupling, ones), rtol=1e-8, atol=1e-10)
    changes = tfx.truth.oracle(net.params, net.spec, net.batch, coupling).signed()
    before, after = (loss(p, net) for p in (net.params, zeroed(net.params, {"a"})))
    assert_close(changes[coupling.scopes.index("a: branch") - len(coupling.scopes)], after - before)


def loss(params, net):
    return torch.nn.functional.cross_entropy(tfx.apply(params, net.spec, net.batch[0]), net.batch[1])


# What is no sum of branches.


def block(*nodes: Node) -> list[str]:
    """The names of the branches of a network of a skip ``x``, two MLPs ``a`` and ``b`` of it, and these nodes."""
    mlps = [n for k in "ab" for n in inline(serial(up=L.Linear(4, 3), down=L.Linear(3, 4)), k, ("x",))]
    first = [Node("input", Input((3, 4))), Node("x", L.Linear(4, 4), ("input",)), *mlps]
    net = network(Spec((*first, *nodes, Node("head", L.Linear(4, 2), (nodes[-1].name,)))), branches=True)
    plan = random_plan(net.coupling, torch.Generator().manual_seed(0), 0.6)
    tfx.apply(tfx.cut(net.params, plan), plan.spec, net.batch[0])
    return [scope for scope in net.coupling.scopes if "branch" in scope]


def test_only_sums_that_nothing_else_uses_and_whose_operands_have_layers_are_taken_apart():
    inner, outer = Node("inner", L.Add(), ("a.down", "b.down")), Node("outer", L.Add(), ("x", "inner"))
    apart = ["a: branch", "b: branch"]
    assert block(inner, outer) == apart
    again = Node("again", L.Multiply(), ("outer", "inner"))
    assert block(inner, outer, again) == []
    noise = Node("noise", L.Dropout(), ("inner",)), Node("outer", L.Add(), ("noise", "x"))
    assert block(inner, *noise) == apart
    assert block(inner, *noise, again) == []
    act = Node("act", L.ReLU(), ("inner",)), Node("outer", L.Add(), ("x", "act"))
    assert block(inner, *act) == ["outer: branch"]
    alpha = Node("drop", L.Dropout(alpha=True), ("inner",)), Node("outer", L.Add(), ("drop", "x"))
    assert block(inner, *alpha) == ["outer: branch"]
    same = Node("act", L.ReLU(), ("a.down",)), Node("inner", L.Add(), ("a.down", "act")), outer
    assert block(Node("b2", L.Add(), ("x", "b.down")), *same)[1:] == ["a: branch"]
    within = [Node(k, L.Linear(4, 4), ("x" if k == "h" else "h",)) for k in "hcd"]  # x + ((h + c(h)) + d(h))
    within += [Node("own", L.Add(), ("h", "c")), Node("inner", L.Add(), ("own", "d"))]
    assert block(*within, outer) == ["c: branch", "d: branch", "outer: branch"]
    one = Node("double", L.Multiply(), ("x", "x")), Node("inner", L.Add(), ("a.down", "double")), outer
    assert block(*one) == ["a: branch"]


def test_a_branch_that_has_lost_its_layers_is_one_with_those_beside_it():
    """Of ``x + ((h + a(h)) + b(x))`` only ``h`` is left of the first branch, a norm that another branch has as well."""
    nodes = [Node("input", Input((3, 4))), Node("x", L.Linear(4, 4), ("input",)), Node("h", L.LayerNorm(4), ("x",))]
    for name, x in (("a", "h"), ("b", "x"), ("c", "h")):
        nodes += inline(serial(up=L.Linear(4, 3), down=L.Linear(3, 4)), name, (x,))
    sums = {"own": ("h", "a.down"), "inner": ("own", "b.down"), "outer": ("x", "inner"), "last": ("outer", "c.down")}
    nodes += [Node(name, L.Add(), operands) for name, operands in sums.items()]
    net = network(Spec((*nodes, Node("head", L.Linear(4, 2), ("last",)))), branches=True)
    operands = [branch.operand for branch in net.coupling.branches]
    assert operands == [("own", 1), ("inner", 0), ("inner", 1), ("last", 1)]
    first = tfx.Plan(net.coupling, np.arange(len(net.coupling)) != net.coupling.branches[0].unit)
    coupling = tfx.couple(tfx.cut(net.params, first), first.spec, branches=True)
    assert [branch.operand for branch in coupling.branches] == [("outer", 1), ("last", 1)]
    former = former_scopes(first, coupling)[[branch.unit for branch in coupling.branches]]
    assert [net.coupling.scopes[k] for k in former] == ["a: branch (2)", "c: branch"]
    second = tfx.Plan(coupling, np.arange(len(coupling)) != coupling.branches[0].unit)
    both = tfx.compose(first, second)
    assert both.spec == second.spec
    assert not both.keep[[branch.unit for branch in net.coupling.branches[:3]]].any()

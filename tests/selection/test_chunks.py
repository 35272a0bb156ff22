"""Constraints on the parts of scopes, and constraints that join others."""

import functools
import random
from collections.abc import Iterator
from glob import escape

import numpy as np
import optree
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given, settings
from hypothesis import strategies as st

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.cutting.plan import former_scopes
from taylorfx.selection.constraints import Constraints
from taylorfx.testing.strategies import Network, network, networks

SPEC = tfx.serial(tfx.Input((4,)), a=L.Linear(4, 12), r=L.ReLU(), b=L.Linear(12, 9), c=L.Linear(9, 2))


@given(st.lists(st.integers(0, 9), min_size=21, max_size=21), st.integers(5, 21), st.sampled_from([2, 3, 4, 6]))
def test_chunks_keep_equal_numbers_each_its_own_best(numbers: list[int], units: int, chunks: int) -> None:
    coupling = network(SPEC).coupling
    scores = torch.tensor(numbers, dtype=torch.float64) + torch.linspace(0, 0.5, 21, dtype=torch.float64)
    constraints = Constraints(chunks={"a": chunks}, multiple={"b": 3})
    try:
        plan = tfx.select(scores, coupling, budget=tfx.Parameters(units * 4), constraints=constraints)
    except tfx.BudgetError:
        return
    assert not constraints.broken(coupling, plan.keep)
    for part, values in zip(np.split(plan.keep[:12], chunks), np.split(scores.numpy()[:12], chunks), strict=True):
        assert part.sum() * chunks == plan.keep[:12].sum()
        assert values[part].min() >= values[~part].max(initial=-1), "the best of each part stay"


def test_joint_selection_keeps_chunks_equal_when_units_change_places() -> None:
    coupling = network(SPEC).coupling
    rows = torch.randn(40, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stats = tfx.measure(
        network(SPEC).params, SPEC, (rows[:, :4], rows[:, 4:6]), coupling, rows=True,
        loss=lambda y, t: ((y - t) ** 2).sum(1),
    )  # fmt: skip
    constraints = Constraints(chunks={"a": 3})
    plan = tfx.joint(stats, coupling, budget=tfx.Units(12), constraints=constraints)
    assert not constraints.broken(coupling, plan.keep)
    assert len({part.sum() for part in np.split(plan.keep[:12], 3)}) == 1
    uneven = np.array([False, *[True] * 20])
    assert constraints.broken(coupling, uneven) == ["a keeps [3, 4, 4] in its chunks, not as many"]


def test_chunks_of_other_lengths_are_refused() -> None:
    coupling = network(SPEC).coupling
    with pytest.raises(tfx.SelectionError, match=r"parts of equal length; received b of 9\."):
        Constraints(chunks={"b": 2}).on(coupling)


def test_several_globs_are_one_family() -> None:
    coupling = network(CONSTRUCTS["multi-head"]).coupling
    same = [[k for k, size in enumerate(coupling.sizes) if size == n] for n in (2,)]
    names = tuple(coupling.scopes[k] for group in same for k in group)
    constraints = Constraints(uniform=[names])
    assert [group for group in constraints.on(coupling).groups if len(group) > 1] == same
    with pytest.raises(tfx.SelectionError, match="'gone', which match nothing"):
        Constraints(uniform=[(*names, "gone")]).on(coupling)


@given(st.data())
def test_what_joins_two_constraints_breaks_neither(data: st.DataObject) -> None:
    coupling = network(SPEC).coupling

    def some() -> Constraints:
        number = st.sampled_from([1, 2, 3])
        return Constraints(
            protect=data.draw(st.sampled_from([(), "a"])),
            multiple={"a": data.draw(number), "b": data.draw(st.sampled_from([1, 3]))},
            chunks={"a": data.draw(number)},
        )

    one, two = some(), some()
    both = one.also(two, coupling)
    scores = torch.rand(21, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
    for share in (0.9, 0.6, 0.5):
        try:
            plan = tfx.select(scores, coupling, budget=tfx.Flops(share), constraints=both)
        except tfx.BudgetError:
            continue
        assert not one.broken(coupling, plan.keep)
        assert not two.broken(coupling, plan.keep)


def positions(params: tfx.Params) -> tfx.Params:
    """Parameters whose numbers say where they were: the number of each in its own tensor."""
    return optree.tree_map(lambda x: torch.arange(float(x.numel()), dtype=torch.float64).reshape(x.shape), params)


def losing(net: Network, numbers: tfx.Params, unit: int) -> set[tuple[str, float]]:
    """The numbers that leave with a unit."""
    plan = tfx.Plan(net.coupling, np.arange(len(net.coupling)) != unit)
    before, after = (tfx.tree.flatten(tree) for tree in (numbers, tfx.cut(numbers, plan)))
    return {(path, x) for path in before for x in {*before[path].ravel().tolist()} - {*after[path].ravel().tolist()}}


def masks(coupling: tfx.Coupling, chance: random.Random) -> Iterator[np.ndarray]:
    """Units that stay: any, and all but those of one scope, of which a single one does."""
    yield np.array([chance.random() < 0.6 for _ in coupling.scope], bool)
    for scope in range(len(coupling.scopes)):
        keep = coupling.scope != scope
        keep[np.flatnonzero(~keep)[0]] = True
        yield keep


@settings(max_examples=6)
@given(networks(), st.randoms(use_true_random=False))
@example(network(CONSTRUCTS["multi-head"]), random.Random(0))
@example(network(CONSTRUCTS["grouped"]), random.Random(0))
def test_a_unit_is_of_the_scope_that_it_was_of_before_a_cut(net: Network, chance: random.Random) -> None:
    """Brute force: what leaves with a unit after the cut left, before it, with a unit of that scope."""
    numbers = positions(net.params)
    whole = {unit: losing(net, numbers, unit) for unit, n in enumerate(size_of_each(net.coupling)) if n > 1}
    for keep in masks(net.coupling, chance):
        try:
            plan = tfx.Plan(net.coupling, keep)
        except tfx.PlanError:
            continue
        left = tfx.cut(numbers, plan)
        after = Network(plan.spec, left, net.batch, tfx.couple(left, plan.spec))
        remains = {(path, x) for path, leaf in tfx.tree.flatten(left).items() for x in leaf.ravel().tolist()}
        former = former_scopes(plan, after.coupling).tolist()
        assert -1 not in former
        for unit, (scope, n) in enumerate(zip(former, size_of_each(after.coupling), strict=True)):
            lost = losing(after, left, unit) if n > 1 else None
            same = [k for k, other in whole.items() if keep[k] and other & remains == lost]
            assert lost is None or scope in net.coupling.scope[same]


def size_of_each(coupling: tfx.Coupling) -> list[int]:
    """For every unit, how many its scope has."""
    return coupling.sizes[coupling.scope].tolist()


@given(networks(), st.integers(0, 99))
@example(network(CONSTRUCTS["multi-head"]), 0)
@example(network(CONSTRUCTS["grouped queries"]), 1)
@example(network(CONSTRUCTS["grouped queries"]), 2)
def test_no_step_breaks_what_was_said_of_the_whole_network(net: Network, seed: int) -> None:
    """All cuts as one plan of the whole network respect its constraints."""
    coupling, chance = net.coupling, random.Random(seed)
    names = dict(zip(map(escape, coupling.scopes), coupling.sizes.tolist(), strict=True))
    if not names:
        return
    first = chance.choice([*names])
    constraints = Constraints(
        protect=[name for name in names if chance.random() < 0.1],
        uniform=[tuple(name for name, size in names.items() if size == names[first])],
        floor={name: chance.choice([1, 1, 2]) for name in names},
        most={name: chance.choice([0.5, 1.0]) for name in names},
        multiple={name: chance.choice([1, 1, 2]) for name in names},
        chunks={name: 2 for name, size in names.items() if size % 2 == 0 and chance.random() < 0.3},
    )
    generator, plans = torch.Generator().manual_seed(seed), list[tfx.Plan]()

    def scores(_: tfx.Statistics, left: tfx.Coupling) -> torch.Tensor:
        return torch.rand(len(left), generator=generator)

    shares = (tfx.Units(round(share * len(coupling))) for share in (0.85, 0.7, 0.55, 0.4) if share * len(coupling) > 1)
    try:
        for *_, plan in tfx.iterate(
            net.params, net.spec, net.batch, budgets=shares, criterion=scores, constraints=constraints
        ):
            plans.append(plan)
            assert not constraints.broken(coupling, functools.reduce(tfx.compose, plans).keep)
    except tfx.BudgetError:
        pass  # as far as such a small network goes

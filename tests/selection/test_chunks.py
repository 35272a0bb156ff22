"""Constraints on the parts of scopes, and constraints that join others."""

import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import given
from hypothesis import strategies as st

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.selection.constraints import Constraints
from taylorfx.testing.strategies import network

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

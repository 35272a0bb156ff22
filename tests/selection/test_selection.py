"""Who leaves, pinned on a network of two layers with four and five units."""

from glob import escape

import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS, classifier
from hypothesis import given, settings
from hypothesis import strategies as st

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import network, networks

NET = network(CONSTRUCTS["chain"])  # "0": units 0-3, "3": units 4-8
SCORES = torch.tensor([5.0, 1, 7, 3, 4, 8, 2, 9, 6])


def kept(scores=SCORES, **options):
    return np.flatnonzero(tfx.select(scores, NET.coupling, **options).keep).tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"budget": 9}, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        ({"budget": tfx.Remove(1)}, [0, 2, 3, 4, 5, 6, 7, 8]),
        ({"budget": tfx.Units(5)}, [0, 2, 5, 7, 8]),
        ({"budget": 0.5}, [2, 5, 7, 8]),
        ({"budget": tfx.Remove(0.5)}, [0, 2, 5, 7, 8]),
        ({"budget": 4, "floor": 2}, [0, 2, 5, 7]),
        ({"budget": 5, "floor": {"0": 3}}, [0, 2, 3, 5, 7]),
        ({"budget": 6, "most": 0.25}, None),
        ({"budget": 7, "most": 0.25}, [0, 2, 3, 4, 5, 7, 8]),
        ({"budget": 5, "protect": "0"}, [0, 1, 2, 3, 7]),
        ({"budget": 5, "protect": ["3"]}, None),
        ({"budget": 6, "multiple": 2}, [0, 2, 4, 5, 7, 8]),
        ({"budget": 5, "multiple": {"0": 4}}, [0, 1, 2, 3, 7]),
        ({"budget": 4, "per_layer": True}, [0, 2, 5, 7]),
        ({"budget": 2}, [2, 7]),
        ({"budget": 1}, None),
    ],
)
def test_the_lowest_leave_as_far_as_the_rules_allow(options, expected):
    if expected is None:
        with pytest.raises(tfx.BudgetError):
            kept(**options)
    else:
        assert kept(**options) == expected


def test_among_equal_scores_the_later_leaves_first():
    assert kept(torch.zeros(9), budget=7) == [0, 1, 2, 3, 4, 5, 6]
    assert kept(torch.tensor([0.0, 0, 1, 1, 1, 1, 1, 1, 1]), budget=8) == [0, 2, 3, 4, 5, 6, 7, 8]


def test_bundles_leave_by_their_mean():
    scores = torch.tensor([0.0, 10, 20, 20, 4, 4.5, 20, 20, 20])
    assert kept(scores, budget=5, multiple={"0": 2, "3": 1}, floor=2) == [2, 3, 6, 7, 8]
    assert kept(scores, budget=7, multiple={"0": 2, "3": 1}, floor=2) == [0, 1, 2, 3, 6, 7, 8]


def test_flops_are_at_most_what_was_asked_and_one_unit_more_would_be_too_many():
    cost = tfx.cost.flops(NET.coupling)
    for share in (0.3, 0.5, 0.8):
        plan = tfx.select(SCORES, NET.coupling, budget=tfx.Flops(share))
        assert cost(plan.keep) <= share * cost.total
        back = plan.keep.copy()
        back[np.flatnonzero(~plan.keep)[SCORES[~torch.tensor(plan.keep)].argmax()]] = True
        assert cost(back) > share * cost.total


def test_a_budget_that_lies_between_bundles_names_both():
    with pytest.raises(tfx.BudgetError, match="allow 6 or 8 as the nearest") as error:
        kept(budget=7, multiple=2, protect="0", floor=1)
    assert "exactly 7" in str(error.value)


def test_a_slice_keeps_its_best_whatever_the_rest_is_worth():
    nodes = (
        tfx.Node("x", tfx.Input()),
        tfx.Node("a", L.Slice(1, 0, 2), ("x",)),
        tfx.Node("b", L.Slice(1, 2, 4), ("x",)),
        tfx.Node("mix", L.Conv2d(2, 3, 1), ("a",)),
        tfx.Node("joint", L.Concat(), ("mix", "b")),
    )
    net = network(classifier(tfx.Spec(nodes), channels=5))
    scores = torch.tensor([0.0, 1, 8, 9, 5, 6, 7])
    plan = tfx.select(scores, net.coupling, budget=tfx.Units(3), floor=1)
    assert np.flatnonzero(plan.keep).tolist() == [1, 3, 6]


@settings(max_examples=30)
@given(networks(), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 3), st.floats(0.2, 1.0), st.booleans())
def test_what_is_selected_breaks_no_constraint(net, seed, floor, multiple, most, exact_only):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(net.coupling), generator=generator)
    rules = tfx.Constraints(
        protect=[*map(escape, net.coupling.scopes[:1])],
        floor=floor,
        multiple=multiple,
        most=most,
        exact_only=exact_only,
    )
    try:
        plan = tfx.select(scores, net.coupling, budget=tfx.Flops(0.8), constraints=rules)
    except tfx.BudgetError:
        return
    assert not rules.broken(net.coupling, plan.keep)

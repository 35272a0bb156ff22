"""Several budgets of one measurement: each row is the plan that its budget alone would give."""

from functools import partial

import pytest
import torch
from networks import convolutional
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx.report import sweep
from taylorfx.testing.strategies import network

NET = network(convolutional())
BUDGETS = [tfx.Flops(0.8), tfx.Parameters(0.6), [tfx.Flops(0.5), tfx.Units(0.6)]]


def test_every_plan_is_the_one_of_its_budget():
    stats = tfx.measure(NET.params, NET.spec, NET.batch, NET.coupling, rows=True)
    scores = tfx.fisher(stats, NET.coupling)
    by_scores, together = (sweep(worth, NET.coupling, budgets=BUDGETS) for worth in (scores, stats))
    for k, budget in enumerate(BUDGETS):
        assert by_scores.plans[k] == tfx.select(scores, NET.coupling, budget=budget, per_cost=True)
        assert together.plans[k] == tfx.joint(stats, NET.coupling, budget=budget, cautious=True)
    assert by_scores.changes is None
    assert_close(
        torch.tensor(together.changes), torch.stack([tfx.expected_change(stats, p) for p in together.plans]).float()
    )
    bold = sweep(stats, NET.coupling, budgets=BUDGETS[:1], choose=tfx.joint, constraints=tfx.Constraints(floor=2))
    assert bold.plans[0] == tfx.joint(stats, NET.coupling, budget=BUDGETS[0], floor=2)


def test_the_table_says_what_is_left():
    scores = torch.arange(float(len(NET.coupling)))
    table = str(sweep(scores, NET.coupling, budgets=BUDGETS[:2])).splitlines()
    plan = tfx.select(scores, NET.coupling, budget=BUDGETS[0], per_cost=True)
    kept, cost = int(plan.keep.sum()), tfx.cost.flops(NET.coupling)
    assert table[0].split() == ["asked", "for", "units", "parameters", "FLOPs"]
    assert table[2].startswith("at most 80.0% of the FLOPs ")
    assert f" {kept} ({kept / len(plan.keep):.1%}) " in table[2]
    assert table[2].endswith(f" {cost(plan.keep):,.0f} ({cost(plan.keep) / cost.total:.1%})")


def test_what_does_not_choose_is_refused():
    with pytest.raises(tfx.SelectionError, match="chooses by statistics"):
        sweep(torch.ones(len(NET.coupling)), NET.coupling, budgets=BUDGETS, choose=partial(tfx.joint, cautious=True))
    with pytest.raises(tfx.BudgetError):
        sweep(torch.ones(len(NET.coupling)), NET.coupling, budgets=[tfx.Flops(1)])

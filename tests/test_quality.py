"""The quality benchmark judges fairly: the same network, the same budget, nothing judged that was learned from."""

import math
from pathlib import Path

import pytest
import torch
from _contestants import MOST, contestants, torch_pruning
from _networks import After, Before, Inverted, Stages, noisy_digits
from _tables import MARKERS, Interval, duels, interval, table

import taylorfx as tfx

BLOCKS = {"before": (Before, True), "after": (After, False), "inverted": (Inverted, False)}


@pytest.mark.parametrize("block", BLOCKS)
def test_every_contestant_answers_with_a_plan_within_the_budget(block):
    torch.manual_seed(0)
    kind, bare = BLOCKS[block]
    module = Stages(kind, 8, 1, bare=bare).eval()
    generator = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 1, 8, 8, generator=generator), torch.randint(10, (8,), generator=generator))] * 2
    params, spec = tfx.from_torch(module, batches[0][0][:2])
    cost = tfx.flops(tfx.couple(params, spec))
    found = contestants(params, spec, batches, module, seed=0)
    assert (torch_pruning is None) == (not any(name.startswith("Torch-Pruning") for name in found))
    for name, choose in found.items():
        plans = choose([0.8, 0.6])
        assert plans.keys() == {0.8, 0.6}
        for share, plan in plans.items():
            near = 0.05 if name.startswith("Torch-Pruning") else 0.0  # its steps are coarse
            assert cost(plan.keep) <= (share + near) * cost.total, name
            for scope, size in enumerate(plan.coupling.sizes):
                assert plan.keep[plan.coupling.scope == scope].sum() >= math.floor((1 - MOST) * size), name


def test_no_test_image_is_learned_or_scored():
    data = noisy_digits(torch.Generator().manual_seed(0), Path())
    assert len({len(x) for x in (data.learned[0], data.scored[0], data.judged[0])}) == 3
    whole = {tuple(image.flatten().tolist()) for image in torch.cat([data.learned[0], data.scored[0]])}
    assert not whole & {tuple(image.flatten().tolist()) for image in data.judged[0]}


def test_an_interval_is_students_and_its_table_marks_the_best():
    found = interval([0.1, 0.2, 0.3])
    assert found.value == pytest.approx(0.2)
    assert found.high - found.value == pytest.approx(4.302652729749464 * 0.1 / math.sqrt(3))
    assert interval([0.5]) == Interval(0.5, 0.5, 0.5)

    def entry(value):
        return {"accuracy": {"as cut": value}}

    results = {
        seed: {
            "whole": {"accuracy": 0.9},
            "joint @ 0.5": entry(0.8 + 0.01 * seed),
            "Torch-Pruning A @ 0.5": entry(0.6),
            "Torch-Pruning B @ 0.5": entry(0.7 + 0.02 * seed),
            "random 0 @ 0.5": entry(0.1),
            "random 1 @ 0.5": entry(0.2),
        }
        for seed in (0, 1)
    }
    rows = table(results, 0.5).splitlines()
    assert rows[2].startswith("| joint | **80.5")
    assert rows[-1].startswith("| random | 15.0 ± 0.0 |")
    assert "| joint | 50% | 9.5 ± 6.4 |" in duels(results, [0.5])  # against B, seed by seed: 10 and 9 points


def test_the_readme_has_the_place_for_the_tables():
    text = (Path(__file__).parents[1] / "benchmarks" / "README.md").read_text()
    assert [text.count(marker) for marker in MARKERS] == [1, 1]

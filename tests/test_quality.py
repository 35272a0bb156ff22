"""The quality benchmark judges fairly: the same network, the same budget, nothing judged that was learned from."""

import math
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import pytest
import torch
from _borrowed import BORROWED, SCENE, Apart, detector, scenes
from _contestants import MOST, Case, contestants, torch_pruning
from _networks import TRAINED, After, Before, ConvNeXt, Inverted, Stages, VisionTransformer, noisy_digits
from _shares import Shares
from _tables import END_MARKERS, MARKERS, Interval, duels, ends, fidelities, interval, summary, table, verdict

import taylorfx as tfx

NETWORKS = {
    "before": (lambda: Stages(Before, 8, 1, bare=True), 8, ()),
    "after": (lambda: Stages(After, 8, 1, bare=False), 8, ()),
    "inverted": (lambda: Stages(Inverted, 8, 1, bare=False), 8, ()),
    "convnext": (lambda: ConvNeXt(8), 28, ()),
    "transformer": (lambda: VisionTransformer(32, 4, 48), 28, TRAINED["vit"].protect),
    "detection": (lambda: detector.Detector(4, Apart), SCENE, BORROWED["detection"].protect),
}


def images(size, generator):
    return torch.randn(8, 1, size, size, generator=generator), torch.randint(10, (8,), generator=generator)


@pytest.mark.parametrize("name", NETWORKS)
def test_every_contestant_answers_with_a_plan_within_the_budget(name, monkeypatch):
    monkeypatch.setattr("_contestants.STEPS", 3)  # instead of ten: seconds
    torch.manual_seed(0)
    network, size, protect = NETWORKS[name]
    module = network().eval()
    generator = torch.Generator().manual_seed(0)
    task = BORROWED.get(name, TRAINED["resnet"])
    batches = [detector.shapes(8, size, size, generator) if name in BORROWED else images(size, generator)] * 2
    params, spec = tfx.from_torch(module, batches[0][0][:2])
    case = Case(
        params,
        spec,
        module,
        batches,
        task.loss,
        protect,
        shares=Shares.of("parameters" if name == "after" else "FLOPs", 8),
    )
    found = contestants(case, seed=0)
    assert (torch_pruning is None) == (not any(name.startswith("Torch-Pruning") for name in found))
    for contestant, choose in found.items():
        plans = choose([0.8, 0.6])
        assert plans.keys() == {0.8, 0.6}
        for share, plan in plans.items():
            near = 0.05 if contestant.startswith("Torch-Pruning") else 0.0  # its steps are coarse
            assert case.shares.left(plan) <= share + near + 1e-9, contestant
            for scope, size in enumerate(plan.coupling.sizes):
                kept = plan.keep[plan.coupling.scope == scope].sum()
                gone = "branches" in contestant and kept == 0  # with its branch
                assert gone or kept >= math.floor((1 - MOST) * size), contestant
                if any(fnmatchcase(plan.coupling.scopes[scope], glob) for glob in protect):
                    assert kept == size, contestant


def test_the_transformers_protected_scopes_leave_heads_and_hidden_units():
    module = VisionTransformer(32, 4, 48).eval()
    coupling = tfx.couple(*tfx.from_torch(module, torch.randn(2, 1, 28, 28)))
    free = [
        int(size)
        for scope, size in zip(coupling.scopes, coupling.sizes, strict=True)
        if not any(fnmatchcase(scope, glob) for glob in TRAINED["vit"].protect)
    ]
    assert sorted(free) == [8] * 4 + [48] * 4  # eight heads of four dimensions


@pytest.mark.parametrize("draw", [noisy_digits, partial(scenes, learn=600, judge=100)], ids=["digits", "scenes"])
def test_no_test_image_is_learned_or_scored(draw):
    data = draw(torch.Generator().manual_seed(0), Path())
    assert len({len(x) for x in (data.learned[0], data.scored[0], data.judged[0])}) == 3
    whole = {image.numpy().tobytes() for image in torch.cat([data.learned[0], data.scored[0]])}
    assert not whole & {image.numpy().tobytes() for image in data.judged[0]}


def test_the_loss_of_scenes_is_the_mean_of_theirs_however_many_objects_they_have():
    scenes, objects = detector.shapes(6, SCENE, SCENE, torch.Generator().manual_seed(0))
    assert len(set((objects[..., 0] >= 0).sum(1).tolist())) > 1
    outputs = detector.Detector(4, Apart).eval()(scenes)
    place = detector.places(SCENE, SCENE)
    alone = [detector.loss(outputs[k, None], objects[k, None], place) for k in range(6)]
    torch.testing.assert_close(BORROWED["detection"].loss(outputs, objects), torch.stack(alone).mean())


def test_a_teacher_is_for_logits_of_classes():
    asked = ["as cut", "fine-tuned", "6 epochs", "6 epochs, teacher"]
    assert TRAINED["resnet"].repairs(asked) == asked
    assert BORROWED["detection"].repairs(asked) == asked[:3]
    assert BORROWED["english"].repairs(asked) == asked[:1]
    data = scenes(torch.Generator().manual_seed(0), Path(), learn=2, judge=1)
    network = tfx.from_torch(torch.nn.Linear(2, 2), torch.zeros(2, 2))
    with pytest.raises(ValueError, match="probabilities of classes"):
        BORROWED["detection"].trained(*network, data, 0, 1, teacher=torch.zeros(2, 80, 8))


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
            "weight_l2 @ 0.5": entry(0.2),
            "joint @ 0.5": entry(0.8 + 0.01 * seed),
            "Torch-Pruning A @ 0.5": entry(0.6),
            "Torch-Pruning B @ 0.5": entry(0.7 + 0.02 * seed),
            "random 0 @ 0.5": entry(0.1),
            "random 1 @ 0.5": entry(0.2),
        }
        for seed in (0, 1, 2)
    }
    rows = table(results, 0.5).splitlines()
    assert rows[2].startswith("| joint | **81.0 ± 2.5**")
    assert rows[3].startswith("| weight_l2 | 20.0 ± 0.0 |")  # ours first, and Torch-Pruning last, whoever ran first
    assert rows[4].startswith("| random | 15.0 ± 0.0 |")
    assert "| joint | 50% | 9.0 ± 2.5 |" in duels(results, [0.5])  # against B, seed by seed: 10, 9 and 8 points

    assert "joint, measured" not in duels(results, [0.5])
    line = summary({"task": results}, {"task": "a task"}, [0.5]).splitlines()[2]
    assert line.startswith("| a task (90.0 ± 0.0) | 50% | - / - / 81.0 / - / 81.0 / 72.0, **+9.0 ± 2.5** |")


def test_fidelity_is_the_mean_over_the_seeds_that_have_it():
    found = {"a": {0: {"fidelity": {"taylor": 0.5}}, 1: {"fidelity": {"taylor": 0.6}}, 2: {}}, "b": {0: {}}}
    assert fidelities(found).splitlines() == ["| criterion | a (2) |", "| --- | --- |", "| taylor | 0.55 |"]
    assert fidelities({"b": {0: {}}}) == ""


def test_what_users_end_with_is_compared_with_the_best_of_the_others():
    def kept(prune, random, taylor, time):
        return {
            "whole": {"accuracy": 0.9},
            "prune @ 0.5": {"accuracy": {"reconstructed": prune}},
            "random 0 @ 0.5": {"accuracy": {"reconstructed": random}},
            "Torch-Pruning GroupTaylor @ 0.5": {"accuracy": {"reconstructed": taylor}, "latency": time},
        }

    found = {"t": {0: kept(0.8, 0.5, 0.7, 0.9), 1: kept(0.9, 0.6, 0.7, 0.8), 2: kept(0.7, 0.7, 0.7, 0.7)}}
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ")[1:] for line in ends(found, {"t": "a task"}).splitlines()
    }
    assert rows["`prune`"][1] == "80.0 ± 24.8"
    assert rows["random"][1] == "60.0 ± 24.8"
    assert rows["Torch-Pruning's best"][:2] == ["", "70.0 ± 0.0"]
    assert verdict(found, {"t": "a task"}).splitlines()[2] == "| a task | 50% | prune | +10.0 ± 24.8 |"
    assert "| Torch-Pruning GroupTaylor | 70.0 ± 0.0 | 80.0 ± 24.8 |" in table(found["t"], 0.5)


@pytest.mark.parametrize("file", ["README.md", "benchmarks/README.md", "benchmarks/QUALITY.md"])
def test_there_is_a_place_for_the_tables(file):
    text = (Path(__file__).parents[1] / file).read_text()
    there = [*END_MARKERS] if file == "README.md" else [*END_MARKERS, *MARKERS]
    assert [text.count(marker) for marker in there] == [1] * len(there)

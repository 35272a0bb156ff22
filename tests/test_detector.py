"""The detector of the examples: its boxes, assigner and mean average precision against brute force; and a run."""

from __future__ import annotations

import re
import sys
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_examples import ROOT, missing, run

sys.path.insert(0, str(ROOT / "examples"))
import detector as d

SEEDS = st.integers(0, 2**16)


def boxes(count, generator):
    """Integer corners that often meet or coincide."""
    corners = torch.randint(0, 6, (count, 2), generator=generator)
    return torch.cat((corners, corners + torch.randint(1, 6, (count, 2), generator=generator)), 1).double()


def cells(box):
    """The unit squares of a box."""
    left, top, right, bottom = map(int, box)
    return set(product(range(left, right), range(top, bottom)))


@given(SEEDS)
def test_overlaps_are_shares_of_unit_squares(seed):
    a, b = boxes(2, torch.Generator().manual_seed(seed))
    one, other = cells(a), cells(b)
    shared = len(one & other) / len(one | other)
    hull = cells(torch.cat((torch.minimum(a, b)[:2], torch.maximum(a, b)[2:])))
    assert d.overlap(a, b).item() == pytest.approx(shared)
    assert d.generous(a, b).item() == pytest.approx(shared - len(hull - one - other) / len(hull))


def drawn(generator):
    """Objects of three images, and detections: near objects, near none, several of one, with equal scores."""
    objects = torch.full((3, 4, 5), -1.0, dtype=torch.float64)
    found = []
    for rows in objects:
        count = int(torch.randint(0, 5, (), generator=generator))
        rows[:count, 0] = torch.randint(0, 3, (count,), generator=generator).div(2, rounding_mode="floor").double()
        rows[:count, 1:] = boxes(count, generator)
        many = torch.randint(0, 5, (int(torch.randint(0, 9, (), generator=generator)),), generator=generator)
        near = torch.cat((rows[:, 1:], boxes(1, generator)))[many]
        near = near + torch.randint(0, 2, near.shape, generator=generator)
        scores = torch.rand(len(many), generator=generator).sort(descending=True).values
        classes = torch.randint(0, 3, (len(many),), generator=generator).div(2, rounding_mode="floor")
        found.append(d.Detections(scores, classes, near))
    return found, objects


def by_definition(found, objects, kind):
    """For each number of objects to be found, the best precision of any list that is long enough, averaged."""
    ranked = sorted(
        (
            (score.item(), k, box)
            for k, one in enumerate(found)
            for score, c, box in zip(*one, strict=True)
            if c == kind
        ),
        key=lambda entry: -entry[0],
    )
    left = {k: [row[1:] for row in rows if row[0] == kind] for k, rows in enumerate(objects)}
    total, taken, right = sum(map(len, left.values())), set(), []
    for _, k, box in ranked:
        shares = [len(cells(box) & cells(b)) / len(cells(box) | cells(b)) if (box[2:] > box[:2]).all() else 0.0
                  for b in left[k]]  # fmt: skip
        best = max(range(len(shares)), key=shares.__getitem__, default=None)
        right.append(best is not None and shares[best] >= 0.5 and (k, best) not in taken)
        taken |= {(k, best)} if right[-1] else set()
    precisions = [(sum(right[: n + 1]), sum(right[: n + 1]) / (n + 1)) for n in range(len(right))]
    return [max((p for hits, p in precisions if hits >= n), default=0.0) for n in range(1, total + 1)]


@given(st.lists(st.booleans(), min_size=1), st.integers(1, 3))
def test_an_average_precision_is_that_of_its_definition(right, missed):
    """At each recall the best precision from there on; objects that nothing finds count as zero."""
    precision = [sum(right[: n + 1]) / (n + 1) for n in range(len(right))]
    best = [max(precision[n:]) for n, hit in enumerate(right) if hit]
    scores = torch.linspace(1, 0, len(right))
    order = torch.randperm(len(right), generator=torch.Generator().manual_seed(0))
    value = d.average_precision(scores[order], torch.tensor(right)[order], len(best) + missed)
    assert value == pytest.approx(sum(best) / (len(best) + missed))


@given(SEEDS)
def test_the_mean_average_precision_is_that_of_its_definition(seed):
    found, objects = drawn(torch.Generator().manual_seed(seed))
    values = [by_definition(found, objects, kind) for kind in range(3)]
    expected = [sum(value) / len(value) for value in values if value]
    if expected:
        assert d.mean_average_precision(found, objects) == pytest.approx(sum(expected) / len(expected))


def test_all_that_is_there_and_nothing_else_is_a_precision_of_one():
    _, objects = d.shapes(4, 64, 64, torch.Generator().manual_seed(0))
    found = [d.Detections(torch.ones(int((rows[:, 0] >= 0).sum())), *split(rows[rows[:, 0] >= 0])) for rows in objects]
    assert d.mean_average_precision(found, objects) == 1
    assert d.mean_average_precision([d.Detections(*(x[:0] for x in one)) for one in found], objects) == 0


def split(rows):
    return rows[:, 0].long(), rows[:, 1:]


@given(SEEDS)
def test_of_detections_that_overlap_the_best_stays(seed):
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.cat((boxes(7, generator), 2 * torch.randn(7, 4, generator=generator).double()), 1)
    found = d.detections(outputs)
    chances, classes = outputs[:, 5:].softmax(-1).max(-1)
    scores = (outputs[:, 4].sigmoid() * chances).tolist()
    kept = []
    for k in sorted((k for k in range(7) if scores[k] >= 0.01), key=lambda k: -scores[k]):
        same = [j for j in kept if classes[j] == classes[k]]
        if all(d.overlap(outputs[k, :4], outputs[j, :4]) <= 0.5 for j in same):
            kept.append(k)
    assert found.scores.tolist() == pytest.approx([scores[k] for k in kept])
    assert torch.equal(found.boxes, outputs[kept, :4])


@given(SEEDS)
def test_every_object_has_the_places_about_its_center(seed):
    generator, place = torch.Generator().manual_seed(seed), d.places(32, 48)
    objects = torch.full((2, 4, 5), -1.0)
    for rows in objects:  # they overlap
        rows[:3, 0], rows[:3, 1:] = 0, 4.5 * boxes(3, generator)
    index, positive = d.assign(place, objects)
    for n, k in product(range(2), range(len(place))):
        x, y, stride = place[k].tolist()
        allowed = [
            ((right - left) * (bottom - top), m)
            for m, (kind, left, top, right, bottom) in enumerate(objects[n].tolist())
            if kind >= 0 and left < x < right and top < y < bottom
            and max(abs(x - (left + right) / 2), abs(y - (top + bottom) / 2)) < stride
        ]  # fmt: skip
        assert bool(positive[n, k]) == bool(allowed)
        assert not allowed or index[n, k] == min(allowed)[1]


def test_every_object_has_a_place():
    _, objects = d.shapes(20, 64, 64, torch.Generator().manual_seed(0))
    index, positive = d.assign(d.places(64, 64), objects)
    for n, rows in enumerate(objects):
        assert set(index[n][positive[n]].tolist()) == set(range(int((rows[:, 0] >= 0).sum())))


def test_the_loss_of_a_batch_is_that_of_examples_and_falls_to_nothing_at_the_truth():
    images, objects = d.shapes(3, 64, 64, torch.Generator().manual_seed(0))
    place = d.places(64, 64)
    outputs = d.Detector(4)(images)
    assert outputs.shape == (3, len(place), 8)
    alone = torch.func.vmap(lambda y, t: d.loss(y[None], t[None], place))(outputs, objects)
    assert [d.loss(outputs[k : k + 1], objects[k : k + 1], place).item() for k in range(3)] == pytest.approx(
        alone.tolist(), rel=1e-5
    )
    index, positive = d.assign(place, objects)
    target = objects.gather(1, index[..., None].expand(*index.shape, 5))
    kinds = torch.nn.functional.one_hot(target[..., 0].long().clamp(min=0), 3)
    perfect = torch.cat((target[..., 1:], 40.0 * (2 * positive[..., None] - 1), 40.0 * kinds), -1)
    assert d.loss(perfect, objects, place) < 1e-4 < d.loss(perfect + 1, objects, place)


def test_a_detector_is_pruned_and_used_at_another_resolution():
    printed = run("detector.py", "--smoke")
    rows = re.findall(r"mAP@0.5 ([a-z-]+(?: cut)?): ([\d.]+) at 64 x 64, ([\d.]+) at 96 x 128", printed)
    values = {name: (float(same), float(other)) for name, same, other in rows}
    assert list(values) == ["unpruned", "as cut", "fine-tuned"], printed
    assert min(values["unpruned"]) > 0.3
    assert min(values["fine-tuned"]) > 0.8 * min(values["unpruned"])
    assert float(printed.split(" of the FLOPs")[0]) <= 0.5
    if not missing("onnxruntime") and not missing("onnxscript"):
        (error,) = re.findall(r"onnxruntime differs at 96 x 128 by (\S+)", printed)
        assert float(error) < 1e-4

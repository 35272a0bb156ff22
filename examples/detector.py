"""A detector of shapes, captured from its module at one resolution, halved, and used at another, also in ONNX.

The network is a small YOLO: blocks that split and concatenate their maps, a neck that goes up and down again, a head
per map, and anchors made in forward, so that it takes images of any height and width in multiples of 16. It learns to
find circles, rectangles and triangles on noise, with an assigner that gives every object the places near its center.
Then half of its FLOPs leave, chosen by that loss, and what is left is fine-tuned as any module is:

    python examples/detector.py                      # five minutes on two cores
    python examples/detector.py --flops 0.3

Quality is the mean average precision at an overlap of one half (mAP@0.5), at the resolution of training, 64 x 64, and
at 96 x 128, which the network has never been run at before.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from training import arguments, cosine

import taylorfx as tfx

CLASSES = ("circle", "rectangle", "triangle")
STRIDES = (8, 16)
MOST = 4
"""Objects in an image of 64 x 64."""


# The network.


def unit(i: int, o: int, k: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution, batch norm and SiLU."""
    return nn.Sequential(nn.Conv2d(i, o, k, stride, k // 2, bias=False), nn.BatchNorm2d(o), nn.SiLU())


class Block(nn.Module):
    """Half of the maps pass, two convolutions with a shortcut continue the other half; all are mixed."""

    def __init__(self, i: int, o: int) -> None:
        super().__init__()
        self.split, self.mix = unit(i, o), unit(3 * (o // 2), o)
        self.body = nn.Sequential(unit(o // 2, o // 2, 3), unit(o // 2, o // 2, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.split(x).chunk(2, 1)
        y: Tensor = self.mix(torch.cat((first, second, second + self.body(second)), 1))
        return y


class Detector(nn.Module):
    """Images to ``(N, places, 4 + 1 + classes)``: a box's corners in pixels, logits of any object and of each class."""

    def __init__(self, c: int = 16, block: Callable[[int, int], nn.Module] = Block) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(3, c, 3, 2), unit(c, 2 * c, 3, 2), block(2 * c, 2 * c))
        self.down3 = nn.Sequential(unit(2 * c, 3 * c, 3, 2), block(3 * c, 4 * c))
        self.down4 = nn.Sequential(unit(4 * c, 4 * c, 3, 2), block(4 * c, 4 * c))
        self.up = block(8 * c, 3 * c)
        self.again, self.last = unit(3 * c, 3 * c, 3, 2), block(7 * c, 4 * c)
        widths, outputs = (3 * c, 4 * c), 5 + len(CLASSES)
        self.heads = nn.ModuleList(nn.Sequential(unit(w, 2 * c, 3), nn.Conv2d(2 * c, outputs, 1)) for w in widths)

    def forward(self, image: Tensor) -> Tensor:
        x3 = self.down3(self.stem(image))
        x4 = self.down4(x3)
        x3 = self.up(torch.cat((F.interpolate(x4, size=x3.shape[2:]), x3), 1))
        x4 = self.last(torch.cat((self.again(x3), x4), 1))
        maps = [head(x).flatten(2).transpose(1, 2) for head, x in zip(self.heads, (x3, x4), strict=True)]
        y, place = torch.cat(maps, 1), places(image.shape[2], image.shape[3])
        near, far = (F.softplus(y[..., k : k + 2]) * place[:, 2:] for k in (0, 2))
        return torch.cat((place[:, :2] - near, place[:, :2] + far, y[..., 4:]), -1)


def places(height: int, width: int) -> Tensor:
    """The center of every place of the two maps and its stride, ``(places, 3)``: x, y, stride.

    Of an image of 16 x 32, eight places of stride 8, row by row, and two of stride 16: (4, 4, 8), (12, 4, 8), ...
    """
    parts = []
    for stride in STRIDES:
        y, x = (stride * (torch.arange(size // stride) + 0.5) for size in (height, width))
        grid = torch.meshgrid(y, x, indexing="ij")
        parts.append(torch.stack((grid[1], grid[0], torch.full_like(grid[0], stride)), -1).flatten(0, 1))
    return torch.cat(parts)


# What it learns.


def shapes(count: int, height: int, width: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images ``(count, 3, height, width)``, and their objects ``(count, objects, 5)``: class, left, top, right, bottom.

    An image with fewer objects has rows of class -1. Objects do not overlap by more than a tenth.
    """
    most = MOST * height * width // 64**2
    images = 0.5 * torch.randn(count, 3, height, width, generator=generator)
    objects = torch.full((count, most, 5), -1.0)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for image, rows in zip(images, objects, strict=True):
        here = 0
        for _ in range(int(torch.randint(1, most + 1, (), generator=generator))):
            drawn = torch.rand(8, generator=generator)
            kind, (w, h) = int(drawn[0] * len(CLASSES)), (12 + 20 * drawn[1:3]).tolist()
            w, h = (max(w, h),) * 2 if CLASSES[kind] == "circle" else (w, h)
            left, top = (drawn[3] * (width - w)).item(), (drawn[4] * (height - h)).item()
            box = torch.tensor([left, top, left + w, top + h])
            if here and overlap(box, rows[:here, 1:]).max() > 0.1:
                continue
            u, v = (x - left) / w, (y - top) / h
            inside = (u - u.clamp(0, 1)).abs() + (v - v.clamp(0, 1)).abs() == 0
            if CLASSES[kind] == "circle":
                inside = (u - 0.5) ** 2 + (v - 0.5) ** 2 < 0.25
            elif CLASSES[kind] == "triangle":  # its tip is at the top
                inside &= (u - 0.5).abs() < v / 2
            color = 3 * (drawn[5:] - 0.5)
            image += inside * (color + 0.8 * color.sign())[:, None, None]
            rows[here] = torch.cat((torch.tensor([float(kind)]), box))
            here += 1
    return images, objects


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes ``(..., 4)``."""
    first, last = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    common = (last - first).clamp(min=0).prod(-1)
    return common / (area(a) + area(b) - common).clamp(min=1e-9)


def area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] - boxes[..., :2]).prod(-1)


def generous(a: Tensor, b: Tensor) -> Tensor:
    """Generalized intersection over union (Rezatofighi et al. 2019, arXiv 1902.09630): also where boxes are apart."""
    hull = area(torch.cat((torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])), -1))
    shared = overlap(a, b)
    union = (area(a) + area(b)) / (1 + shared)
    return shared - (hull - union) / hull.clamp(min=1e-9)


def assign(place: Tensor, objects: Tensor) -> tuple[Tensor, Tensor]:
    """Which object each place is to find, ``(N, places)``, and whether it is to find any.

    An object's places are those inside its box within a stride of its center; of several objects, the smallest.
    """
    boxes = objects[:, None, :, 1:]  # (N, 1, objects, 4) against (places, 1, ...)
    x, stride = place[:, None, :2], place[:, None, 2:]
    inside = ((x > boxes[..., :2]) & (x < boxes[..., 2:])).all(-1)
    near = ((x - (boxes[..., :2] + boxes[..., 2:]) / 2).abs() < stride).all(-1)
    wanted = inside & near & (objects[:, None, :, 0] >= 0)
    sizes = torch.where(wanted, area(boxes), torch.inf)
    return sizes.argmin(-1), wanted.any(-1)


def loss(outputs: Tensor, objects: Tensor, place: Tensor) -> Tensor:
    """Of boxes (generalized overlap), of whether there is an object, and of its class, per place that has one."""
    index, positive = assign(place, objects)
    target = objects.gather(1, index[..., None].expand(*index.shape, 5))
    boxes, there, classes = outputs[..., :4], outputs[..., 4], outputs[..., 5:]
    found = F.binary_cross_entropy_with_logits(there, positive.to(there.dtype), reduction="sum")
    kinds = target[..., :1] == torch.arange(len(CLASSES), device=target.device)
    named = -(kinds * classes.log_softmax(-1)).sum(-1)
    placed = 1 - generous(boxes, target[..., 1:])
    return (found + (positive * (named + 2 * placed)).sum()) / positive.sum().clamp(min=1)


def train(module: nn.Module, images: Tensor, objects: Tensor, steps: int, peak: float, seed: int) -> nn.Module:
    """AdamW along half a cosine, as for any module: it is one, before and after pruning."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=peak, weight_decay=1e-2)
    rate, place = cosine(peak, warmup=0.1), places(*images.shape[2:])
    module.train()
    for step in range(steps):
        chosen = torch.randint(len(images), (32,), generator=generator)
        optimizer.param_groups[0]["lr"] = rate(step / steps)
        optimizer.zero_grad()
        loss(module(images[chosen]), objects[chosen], place).backward()
        optimizer.step()
    return module.eval()


# How good it is.


class Detections(NamedTuple):
    """What was found in an image, best first: scores, classes, and boxes ``(detections, 4)``."""

    scores: Tensor
    classes: Tensor
    boxes: Tensor


def detections(outputs: Tensor, least: float = 0.01, same: float = 0.5) -> Detections:
    """Of one image's outputs ``(places, ...)``: by class, without those that overlap a better one by more than half."""
    chances, classes = outputs[:, 5:].softmax(-1).max(-1)
    scores = outputs[:, 4].sigmoid() * chances
    order = [k for k in scores.argsort(descending=True).tolist() if scores[k] >= least]
    double = (overlap(outputs[:, None, :4], outputs[None, :, :4]) > same) & (classes[:, None] == classes)
    kept: list[int] = []
    for k in order:
        if not double[k, kept].any():
            kept.append(k)
    return Detections(scores[kept], classes[kept], outputs[kept, :4])


def average_precision(scores: Tensor, right: Tensor, total: int) -> float:
    """The area under precision against recall, at each recall the best precision from there on.

    >>> average_precision(torch.tensor([0.9, 0.8, 0.7]), torch.tensor([True, False, True]), 2)  # (1 + 2/3) / 2
    0.8333333...
    """
    right = right[scores.argsort(descending=True, stable=True)].double()
    precision = right.cumsum(0) / torch.arange(1, len(right) + 1)
    best = precision.flip(0).cummax(0).values.flip(0) if len(right) else precision
    return float((best * right).sum() / total)


def matches(found: Detections, objects: Tensor, kind: int, least: float = 0.5) -> tuple[Tensor, Tensor]:
    """The scores of an image's detections of a class, and which are right.

    Best first, each takes the object of its class that it overlaps most. It is right if that is half or more, and if
    none before has taken the object.
    """
    mine, boxes = found.classes == kind, objects[objects[:, 0] == kind, 1:]
    taken, right = set[int](), []
    for box in found.boxes[mine]:
        shared = overlap(box, boxes)
        best = int(shared.argmax()) if len(boxes) else -1
        right.append(best >= 0 and bool(shared[best] >= least) and best not in taken)
        taken |= {best} if right[-1] else set()
    return found.scores[mine], torch.tensor(right, dtype=torch.bool)


def mean_average_precision(found: list[Detections], objects: Tensor) -> float:
    """The mean over classes that occur of the average precision over all images, at an overlap of one half."""
    values = []
    for kind in range(len(CLASSES)):
        total = int((objects[..., 0] == kind).sum())
        parts = [matches(one, rows, kind) for one, rows in zip(found, objects, strict=True)]
        scores, right = (torch.cat(part) for part in zip(*parts, strict=True))
        values += [average_precision(scores, right, total)] if total else []
    return sum(values) / len(values)


@torch.inference_mode()
def quality(network: Callable[[Tensor], Tensor], images: Tensor, objects: Tensor) -> float:
    """The mAP@0.5 of a network on images."""
    found = [detections(outputs) for part in images.split(50) for outputs in network(part)]
    return mean_average_precision(found, objects)


# From training to another resolution, and to ONNX.


@torch.inference_mode()
def in_onnx(module: nn.Module, example: Tensor, images: Tensor) -> float | None:
    """By how much onnxruntime's outputs differ at another resolution than the example's, relatively; if it is there."""
    if any(importlib.util.find_spec(name) is None for name in ("onnxruntime", "onnxscript")):
        return None
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "detector.onnx"
        free = ((torch.export.Dim.AUTO,) * 4,)
        torch.onnx.export(module, (example,), path, dynamo=True, dynamic_shapes=free, verbose=False)
        session = onnxruntime.InferenceSession(str(path))
        (outputs,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    expected = module(images)
    return float((torch.from_numpy(outputs) - expected).abs().max() / expected.abs().max())


def main() -> None:
    smoke = {"width": 12, "images": 300, "steps": 120, "tune": 40, "test": 40}
    options = arguments(
        __doc__, smoke, width=(16, "channels of the first convolution"), images=(2000, "to learn from"),
        steps=(800, "before pruning"), tune=(400, "steps of fine-tuning"), test=(200, "images of each resolution"),
        flops=(0.5, "share of the FLOPs that may remain"),
    )  # fmt: skip
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    images, objects = shapes(options.images, 64, 64, generator)
    tests = {f"{h} x {w}": shapes(options.test, h, w, generator) for h, w in ((64, 64), (96, 128))}

    module = train(Detector(options.width), images, objects, options.steps, 2e-3, options.seed)
    params, spec = tfx.from_torch(module, images[:2])
    rows = {"unpruned": module}

    sample = images[:256].split(64), objects[:256].split(64)
    batches = list(zip(*sample, strict=True))
    small = tfx.prune(
        params, spec, batches, budget=tfx.Flops(options.flops), loss=partial(loss, place=places(64, 64)), floor=2
    )
    rows["as cut"] = tfx.to_torch(*small)
    rows["fine-tuned"] = train(tfx.to_torch(*small), images, objects, options.tune, 1e-3, options.seed)

    first, last = (tfx.cost.flops(tfx.couple(*network)).total for network in ((params, spec), small))
    print(f"{last / first:.3f} of the FLOPs are left")
    for name, network in rows.items():
        values = (f"{quality(network, *test):.3f} at {size}" for size, test in tests.items())
        print(f"mAP@0.5 {name}: {', '.join(values)}")
    error = in_onnx(rows["fine-tuned"], images[:2], tests["96 x 128"][0][:3])
    print("onnxruntime is not installed" if error is None else f"onnxruntime differs at 96 x 128 by {error:.0e}")


if __name__ == "__main__":
    main()

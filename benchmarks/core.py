"""Coupling and cutting a network of ResNet-50's size, against copying the surviving weights once.

    python benchmarks/core.py

Prints the median and the quartiles of interleaved runs. Times differ from machine to machine; the ratios matter.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import taylorfx as tfx


def bottleneck(channels: int, width: int, stride: int) -> tfx.Spec:
    """torchvision's block: 1x1, 3x3, 1x1, with a projection where the shape changes."""
    body = tfx.serial(
        conv1=tfx.Conv2d(channels, width, 1, bias=False),
        bn1=tfx.BatchNorm2d(width),
        relu1=tfx.ReLU(),
        conv2=tfx.Conv2d(width, width, 3, stride, 1, bias=False),
        bn2=tfx.BatchNorm2d(width),
        relu2=tfx.ReLU(),
        conv3=tfx.Conv2d(width, 4 * width, 1, bias=False),
        bn3=tfx.BatchNorm2d(4 * width),
    )
    project = tfx.serial(tfx.Conv2d(channels, 4 * width, 1, stride, bias=False), tfx.BatchNorm2d(4 * width))
    return tfx.serial(tfx.residual(body, None if channels == 4 * width else project), tfx.ReLU())


def resnet50() -> tfx.Spec:
    """He et al. 2016, for 224 x 224 images: 25,557,032 parameters."""
    parts: list[tfx.Layer | tfx.Spec] = [
        tfx.Input((3, 224, 224)),
        tfx.Conv2d(3, 64, 7, 2, 3, bias=False),
        tfx.BatchNorm2d(64),
        tfx.ReLU(),
        tfx.MaxPool2d(3, 2, 1),
    ]
    channels = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for k in range(count):
            parts.append(bottleneck(channels, width, stride if k == 0 else 1))
            channels = 4 * width
    return tfx.serial(*parts, tfx.AdaptiveAvgPool2d(1), tfx.Flatten(), tfx.Linear(channels, 1000))


def timed(call: Callable[[], object]) -> float:
    """Seconds of CPU that a call takes, in all threads."""
    start = time.process_time()
    call()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=9)
    options = parser.parse_args()
    spec = resnet50()
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    coupling = tfx.couple(params, spec)
    scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(0))
    half = tfx.Flops(0.5)
    small = tfx.cut(params, tfx.select(scores, coupling, budget=half))
    rows: dict[str, list[float]] = {"couple": [], "select": [], "cut": [], "copy": []}
    for _ in range(options.runs):
        rows["couple"].append(timed(lambda: tfx.couple(params, spec)))
        found: list[tfx.Plan] = []
        rows["select"].append(timed(lambda found=found: found.append(tfx.select(scores, coupling, budget=half))))
        rows["cut"].append(timed(lambda found=found: (tfx.cut(params, found[0]), found[0].spec)))
        rows["copy"].append(timed(lambda: [leaf.clone() for leaf in tfx.flatten(small).values()]))
    kept = tfx.parameters(tfx.couple(small, found[0].spec)).total
    print(f"ResNet-50: {len(spec)} nodes, {len(coupling):,} units, {tfx.parameters(coupling).total:,} parameters, "
          f"{kept:,} kept at half the FLOPs")  # fmt: skip
    for name, times in rows.items():
        report(f"{name}, seconds", times)
    report("cut / copy", [a / b for a, b in zip(rows["cut"], rows["copy"], strict=True)])
    steps = zip(rows["couple"], rows["select"], rows["cut"], strict=True)
    report("couple + select + cut / copy", [sum(s) / c for s, c in zip(steps, rows["copy"], strict=True)])


def report(name: str, values: list[float]) -> None:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    print(f"{name:32} {middle:8.3f}   ({low:.3f} to {high:.3f})")


if __name__ == "__main__":
    main()

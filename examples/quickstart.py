"""Couple, measure, select, cut: a residual network on handwritten digits, pruned to a fifth of its FLOPs.

A small residual network learns scikit-learn's digits (1,797 images of 8 x 8 pixels, a fixed 30 % of them held out). It is
then pruned in a few equal-ratio steps and fine-tuned after each, its momentum cut along with its parameters. A table and a
plot show what it costs and what it keeps. From the root of the repository, in about a minute on two cores:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from training import accuracy, at_rest, cosine, fit, latency

import taylorfx as tfx


def network(width: int) -> tfx.Spec:
    """A convolution, three stages of two residual blocks (norm and ReLU first), global average pooling, a linear layer."""

    def block(before: int, after: int, stride: int) -> tfx.Spec:
        body = tfx.serial(
            bn1=tfx.BatchNorm2d(before),
            relu1=tfx.ReLU(),
            conv1=tfx.Conv2d(before, after, 3, stride, 1, bias=False),
            bn2=tfx.BatchNorm2d(after),
            relu2=tfx.ReLU(),
            conv2=tfx.Conv2d(after, after, 3, 1, 1, bias=False),
        )
        return tfx.residual(body, tfx.Conv2d(before, after, 1, stride, bias=False) if before != after else None)

    def stage(before: int, after: int, stride: int) -> tfx.Spec:
        return tfx.serial(block(before, after, stride), block(after, after, 1))

    return tfx.serial(
        tfx.Input((1, 8, 8)),
        stem=tfx.Conv2d(1, width, 3, padding=1, bias=False),
        stage1=stage(width, width, 1),
        stage2=stage(width, 2 * width, 2),
        stage3=stage(2 * width, 4 * width, 2),
        bn=tfx.BatchNorm2d(4 * width),
        relu=tfx.ReLU(),
        pool=tfx.AdaptiveAvgPool2d(1),
        flatten=tfx.Flatten(),
        head=tfx.Linear(4 * width, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and targets, test images and targets: the same split whatever the seed."""
    images, targets = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    targets = torch.tensor(targets)
    train, test = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=targets)
    return images[train], targets[train], images[test], targets[test]


@dataclass(frozen=True)
class Row:
    """What is known of the network after a step."""

    units: int
    parameters: int
    flops: int
    accuracy: float
    latency: float


def main() -> None:
    options = arguments()
    generator = torch.Generator().manual_seed(options.seed)
    images, targets, test_images, test_targets = digits()
    if options.smoke:
        images, targets = images[:256], targets[:256]

    spec = network(options.width)
    params = tfx.init(spec, generator)
    momentum = at_rest(params, spec)

    def row() -> Row:
        coupling = tfx.couple(params, spec)
        return Row(
            len(coupling),
            tfx.parameters(coupling).total,
            tfx.flops(coupling).total,
            accuracy(params, spec, test_images, test_targets),
            latency(params, spec, test_images[:256]),
        )

    def train(epochs: int, peak: float, label: str) -> tuple[tfx.Params, tfx.Params]:
        return fit(
            params, momentum, spec, images, targets, epochs=epochs, batch_size=32, lr=cosine(peak, warmup=0.1),
            weight_decay=5e-4, generator=generator, label=label,
        )  # fmt: skip

    params, momentum = train(options.epochs, 0.1, "train")
    original, rows = spec, [row()]

    for step in range(1, options.steps + 1):
        share = options.flops ** (step / options.steps)
        chosen = torch.randperm(len(images), generator=generator)[:512]
        batch = images[chosen], targets[chosen]

        coupling = tfx.couple(params, spec)
        stats = tfx.measure(params, spec, batch, coupling)
        scores = CRITERIA[options.criterion](stats, coupling) if options.criterion != "weight_l1" else tfx.weight_l1(params, coupling)
        plan = tfx.select(scores, coupling, budget=tfx.Flops(int(share * rows[0].flops)), floor=2)
        params, momentum = (tfx.cut(tree, plan) for tree in (params, momentum))
        spec = plan.spec

        params, momentum = train(options.tune, options.tune_lr, f"fine-tune {step} of {options.steps}")
        rows.append(row())

    show(rows)

CRITERIA = {n: getattr(tfx, n) for n in ("taylor", "second_order", "fisher", "signed", "taylor_squared")}
CRITERIA["random"] = lambda s, c: tfx.random(c, torch.Generator().manual_seed(0))
CRITERIA["taylor_l2"] = lambda s, c: tfx.taylor(s, c, normalizer=tfx.per_layer_l2)

def show(rows):
    table = Table()
    for name in ("step", "units", "parameters", "FLOPs", "", "accuracy", "latency"):
        table.add_column(name, justify="right")
    for k, r in enumerate(rows):
        table.add_row(str(k), f"{r.units:,}", f"{r.parameters:,}", f"{r.flops:,}", f"{r.flops / rows[0].flops:.0%}", f"{r.accuracy:.2%}", f"{1e3 * r.latency:.2f} ms")
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--flops", type=float, default=0.2)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--tune", type=int, default=3)
    parser.add_argument("--tune_lr", type=float, default=.02)
    parser.add_argument("--criterion", default="taylor")
    parser.add_argument("--out", type=Path, default=Path("docs/quickstart.png"))
    parser.add_argument("--smoke", action="store_true")
    options = parser.parse_args()
    return options


if __name__ == "__main__":
    main()

"""The original's purpose, whole: a CNN for Japanese characters, pruned one feature map after another.

The network is the original's: seven convolutions of 96, 128, 160, 256, 256, 384 and 384 maps, 3 x 3, batch norm, PReLU,
max pooling 3/2, a linear layer of 1,024 units, dropout. So is the loop: score on one batch, remove the lowest maps,
fine-tune, repeat, until 72 % and then 90 % of the maps are gone. Two scores run from the same trained network:
`taylor`, and `compat`, the original's own arithmetic, which is rounding noise behind batch norms.

The characters are rendered from pen strokes and typefaces (see `japanese_data`), and whole typefaces are kept for the
test.

    python examples/japanese_characters.py                 # minutes on two cores
    python examples/japanese_characters.py --full          # 3,036 classes at 96 x 96, one map at a time: take a GPU

"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from japanese_data import Characters, load
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor
from training import accuracy, at_rest, cosine, fit, latency, sgd_step

import taylorfx as tfx
from taylorfx import layers as L

WIDTHS = (96, 128, 160, 256, 256, 384, 384)
POOLED = (True, True, True, False, True, False, True)
SCORES = ("taylor", "compat")


def network(classes: int, size: int, share: float = 1.0) -> tfx.Spec:
    """The original's CNN for ``size`` x ``size`` images; ``share`` narrows every layer."""
    parts: dict[str, tfx.Layer] = {}
    channels, side, padding = 1, size, 0 if size >= 64 else 1
    for k, (width, pooled) in enumerate(zip(WIDTHS, POOLED, strict=True), start=1):
        width = max(4, round(share * width))
        parts[f"conv{k}"] = L.Conv2d(channels, width, 3, padding=1)
        parts[f"norm{k}"] = L.BatchNorm2d(width)
        parts[f"act{k}"] = L.PReLU()
        if pooled:
            parts[f"pool{k}"] = L.MaxPool2d(3, 2, padding)
            side = (side + 2 * padding - 3) // 2 + 1
        channels = width
    hidden = max(16, round(share * 1024))
    return tfx.serial(
        tfx.Input((1, size, size)),
        **parts,
        flatten=L.Flatten(),
        fc1=L.Linear(channels * side * side, hidden),
        norm8=L.BatchNorm1d(hidden),
        act8=L.PReLU(),
        dropout=L.Dropout(0.5),
        fc2=L.Linear(hidden, classes),
    )


class Point(NamedTuple):
    """What is known of a network with so many maps."""

    maps: int
    widths: tuple[int, ...]
    macs: float
    accuracy: float


class Data(NamedTuple):
    """Images between 0 and 1, and their classes."""

    images: Tensor
    targets: Tensor


def normalized(characters: Characters, device: torch.device) -> Data:
    """Ink is one, paper is zero."""
    return Data(characters.images.to(device, torch.float32) / 255, characters.targets.to(device))


def point(params: tfx.Params, spec: tfx.Spec, test: Data) -> Point:
    """Maps, convolution multiply-adds and test accuracy of a network."""
    widths = tuple(node.layer.out_channels for node in spec if isinstance(node.layer, L.Conv2d))
    coupling = tfx.couple(params, spec)
    linear = sum(2 * n.layer.in_features * n.layer.out_features for n in spec if isinstance(n.layer, L.Linear))
    return Point(sum(widths), widths, (tfx.cost.flops(coupling).total - linear) // 2, accuracy(params, spec, *test))


def score(
    name: str, params: tfx.Params, spec: tfx.Spec, batch: Data, coupling: tfx.Coupling, generator: torch.Generator
) -> Tensor:
    """One number per unit, by name."""
    if name == "compat":
        stats = tfx.measure(params, spec, batch, coupling, at_writes=True, training=True, generator=generator)
        return tfx.criteria.compat(stats, coupling)
    return tfx.taylor(tfx.measure(params, spec, batch, coupling), coupling)


def shrink(
    name: str, params: tfx.Params, spec: tfx.Spec, train: Data, options: argparse.Namespace, generator: torch.Generator
) -> Iterator[tuple[tfx.Params, tfx.Spec]]:
    """The original's loop: score, remove the lowest maps, fine-tune; yields the network after every step.

    The momentum is cut along, where the original began anew at every step and lost it.
    """
    momentum = at_rest(params, spec)
    total = sum(node.layer.out_channels for node in spec if isinstance(node.layer, L.Conv2d))
    goal = total - math.floor((1 - max(options.remove)) * total + 1e-9)
    gone = 0
    with Progress(transient=True) as progress:
        task = progress.add_task(f"prune by {name}", total=goal)
        while gone < goal:
            chosen = torch.randint(len(train.images), (options.batch,), generator=generator, device=generator.device)
            count = min(options.maps_per_step, goal - gone)
            coupling = tfx.couple(params, spec)
            scores = score(name, params, spec, Data(*(x[chosen] for x in train)), coupling, generator)
            plan = tfx.select(scores, coupling, budget=tfx.Remove(count), protect=("fc*",), floor=options.floor)
            params, momentum = (tfx.cut(tree, plan) for tree in (params, momentum))
            spec = plan.spec
            chosen = torch.randint(
                len(train.images), (options.tune * options.batch,), generator=generator, device=generator.device
            )
            for index in chosen.split(options.batch):
                params, momentum, _ = sgd_step(
                    params, momentum, spec, train.images[index], train.targets[index], lr=options.tune_lr,
                    generator=generator,
                )  # fmt: skip
            gone += count
            progress.advance(task, count)
            yield params, spec


def main() -> None:
    options = arguments()
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(options.seed)
    console = Console()
    with Progress(transient=True) as progress:
        tasks: dict[str, int] = {}

        def report(what: str, done: int, total: int) -> None:
            tasks.setdefault(what, progress.add_task(what, total=total))
            progress.update(tasks[what], completed=done)  # type: ignore[arg-type]

        sources = load(
            options.classes, options.size, train_per_face=options.per_face, train_at_least=options.at_least,
            seed=options.seed, progress=report,
        )  # fmt: skip
    train, test = (normalized(part, device) for part in sources)
    console.print(
        f"{options.classes} characters of {options.size}x{options.size}: {len(train.images):,} images of "
        f"{', '.join(sources[0].faces)} to train on, {len(test.images):,} of {', '.join(sources[1].faces)} to test"
    )

    spec = network(options.classes, options.size, options.width)
    params: tfx.Params = tfx.init(spec, generator, device=device)
    params, _ = fit(
        params, at_rest(params, spec), spec, *train, epochs=options.epochs, batch_size=options.batch,
        lr=cosine(options.lr, warmup=0.1), weight_decay=1e-4, generator=generator,
    )  # fmt: skip
    start = point(params, spec, test)

    curves: dict[str, list[Point]] = {}
    ends: dict[str, tuple[tfx.Params, tfx.Spec]] = {}
    for name in SCORES:
        own = torch.Generator(device).manual_seed(options.seed + 1)
        curve, marks = [start], sorted(options.remove)
        for small, smaller in shrink(name, params, spec, train, options, own):
            ends[name] = small, smaller
            maps = sum(node.layer.out_channels for node in smaller if isinstance(node.layer, L.Conv2d))
            reached = marks and maps <= (1 - marks[0]) * start.maps + 1e-9
            if reached or curve[-1].maps - maps >= start.maps / options.points or maps == 0:
                curve.append(point(small, smaller, test))
            if reached:
                marks.pop(0)
        curves[name] = curve

    show(console, curves)
    x = test.images[: options.batch]
    before = latency(params, spec, x)
    for name, (small, smaller) in ends.items():
        first, last = curves[name][0], curves[name][-1]
        faster = before / latency(small, smaller, x)
        console.print(
            f"{name}: {first.maps} -> {last.maps} maps, accuracy {first.accuracy:.4f} -> {last.accuracy:.4f}, "
            f"{first.macs / last.macs:.1f}x fewer MACs, {faster:.1f}x faster (batch of {len(x)})",
            soft_wrap=True,
        )
    if options.plot is not None:
        plot(curves, options.plot)
        console.print(f"plotted to {options.plot}")


def show(console: Console, curves: dict[str, list[Point]]) -> None:
    """Accuracy against remaining maps."""
    for name, curve in curves.items():
        table = Table("maps", "removed", "conv MACs", "accuracy", "maps of each convolution", title=name)
        for p in curve:
            less = f"{curve[0].macs / p.macs:.1f}x fewer"
            table.add_row(
                f"{p.maps:,}",
                f"{1 - p.maps / curve[0].maps:.1%}",
                less,
                f"{p.accuracy:.4f}",
                " ".join(map(str, p.widths)),
            )
        console.print(table)


def plot(curves: dict[str, list[Point]], path: Path) -> None:
    """Accuracy against the share of maps that remains."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for (name, curve), color, marker in zip(curves.items(), ("#1f6f8b", "#c8553d"), "os", strict=True):
        shares = [100 * p.maps / curve[0].maps for p in curve]
        axes.plot(shares, [100 * p.accuracy for p in curve], color=color, marker=marker, ms=4, label=name)
    axes.set(xlabel="feature maps that remain, %", ylabel="accuracy on unseen faces, %", xlim=(102, 0))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


PRESETS = {
    "small": {
        "classes": 60, "size": 32, "width": 0.5, "per_face": 4, "at_least": 56, "epochs": 8, "maps_per_step": 24,
        "tune": 60,
    },
    "smoke": {
        "classes": 12, "size": 32, "width": 0.125, "per_face": 6, "at_least": 84, "epochs": 6, "maps_per_step": 16,
        "tune": 12,
    },
    "full": {
        "classes": 3036, "size": 96, "width": 1.0, "per_face": 12, "at_least": 168, "epochs": 15, "maps_per_step": 1,
        "tune": 250,
    },
}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument(
        "--smoke", dest="preset", action="store_const", const="smoke", help="seconds, to see that it runs"
    )
    preset.add_argument("--full", dest="preset", action="store_const", const="full", help="the original's setting")
    parser.add_argument("--classes", type=int, help="how many characters: hiragana first, then kanji; up to 3,036")
    parser.add_argument("--size", type=int, help="side of an image in pixels")
    parser.add_argument("--width", type=float, help="share of the original's widths")
    parser.add_argument("--per-face", type=int, help="training images of a character in each face")
    parser.add_argument("--at-least", type=int, help="training images of a character in all faces together, at least")
    parser.add_argument("--epochs", type=int, help="epochs of training")
    parser.add_argument("--maps-per-step", type=int, help="maps that leave at once; the original took 1")
    parser.add_argument("--tune", type=int, help="SGD steps after each; the original took 250")
    parser.add_argument("--remove", type=float, nargs="+", default=[0.72, 0.90], help="shares of the maps to remove")
    parser.add_argument("--floor", type=int, default=2, help="the fewest maps of a convolution")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--tune-lr", type=float, default=0.02)
    parser.add_argument("--points", type=int, default=10, help="how often to test on the way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("out/japanese_characters.png"),
        help="where to draw accuracy against remaining maps",
    )
    options = parser.parse_args()
    for name, value in PRESETS[options.preset or "small"].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


if __name__ == "__main__":
    main()

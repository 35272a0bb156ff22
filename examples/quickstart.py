"""Couple, measure, select, cut: a residual network on handwritten digits, pruned to a fifth of its FLOPs.

A small residual network learns scikit-learn's digits: 1,797 images of 8 x 8 pixels, a fixed 30 % of them held out.
It is then pruned in steps of equal ratio and fine-tuned after each, its momentum cut along with its parameters. A table
and a plot show what it costs and what it can. From the root of the repository, in about a minute on two cores:

    python examples/quickstart.py
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from training import accuracy, at_rest, cosine, fit, latency

import taylorfx as tfx
from taylorfx import layers as L


def network(width: int = 24) -> tfx.Spec:
    """A convolution, three stages of two residual blocks (norm and ReLU first), average pooling, a linear layer."""

    def block(before: int, after: int, stride: int) -> tfx.Spec:
        body = tfx.serial(
            bn1=L.BatchNorm2d(before),
            relu1=L.ReLU(),
            conv1=L.Conv2d(before, after, 3, stride, 1, bias=False),
            bn2=L.BatchNorm2d(after),
            relu2=L.ReLU(),
            conv2=L.Conv2d(after, after, 3, 1, 1, bias=False),
        )
        return tfx.residual(body, L.Conv2d(before, after, 1, stride, bias=False) if before != after else None)

    def stage(before: int, after: int, stride: int) -> tfx.Spec:
        return tfx.serial(block(before, after, stride), block(after, after, 1))

    return tfx.serial(
        tfx.Input((1, 8, 8)),
        stem=L.Conv2d(1, width, 3, padding=1, bias=False),
        stage1=stage(width, width, 1),
        stage2=stage(width, 2 * width, 2),
        stage3=stage(2 * width, 4 * width, 2),
        bn=L.BatchNorm2d(4 * width),
        relu=L.ReLU(),
        pool=L.AdaptiveAvgPool2d(1),
        flatten=L.Flatten(),
        head=L.Linear(4 * width, 10),
    )


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and targets, test images and targets: the same split whatever the seed."""
    data, classes = load_digits(return_X_y=True)
    images = torch.tensor(data, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1  # from 0..16 to -1..1
    targets = torch.tensor(classes)
    train, test = train_test_split(range(len(images)), test_size=0.3, random_state=0, stratify=targets)
    return images[train], targets[train], images[test], targets[test]


class Row(NamedTuple):
    """What is known of the network after a step."""

    units: int
    parameters: float
    flops: float
    accuracy: float


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)  # for layers as small as these a second thread costs more than it brings
    generator = torch.Generator().manual_seed(options.seed)
    images, targets, test_images, test_targets = digits()

    def train(
        params: tfx.Params, momentum: tfx.Params, epochs: int, peak: float, label: str
    ) -> tuple[tfx.Params, tfx.Params]:
        return fit(
            params, momentum, spec, images, targets, epochs=epochs, batch_size=64, lr=cosine(peak, warmup=0.1),
            weight_decay=5e-4, generator=generator, label=label,
        )  # fmt: skip

    def look(params: tfx.Params, spec: tfx.Spec) -> Row:
        coupling = tfx.couple(params, spec)
        parameters, flops = (cost(coupling).total for cost in (tfx.cost.parameters, tfx.cost.flops))
        return Row(len(coupling), parameters, flops, accuracy(params, spec, test_images, test_targets))

    spec = network()
    params: tfx.Params = tfx.init(spec, generator)
    params, momentum = train(params, at_rest(params, spec), options.epochs, 0.1, "train")
    rows, plans, networks = [look(params, spec)], [], [(params, spec)]

    # Which criterion? Scores are in units of the loss, the budget is in FLOPs, and a unit of the first stage costs four
    # times one of the last: so ask for the loss per FLOP. The test accuracy at 60 % of the FLOPs, in one step without
    # any fine-tuning, three seeds' mean, at the prices that units have in the whole network (`per_cost` follows them as
    # they change): Taylor per FLOP 94.8 %, Fisher per FLOP 92.3 %, Fisher 75.8 %, second order 73.6 %, Taylor 69.8 %,
    # weight magnitude 44.0 %, random 34.7 %. The floor leaves no layer with a single channel.
    for step in range(1, options.steps + 1):
        chosen = torch.randperm(len(images), generator=generator)[:512]
        budget = tfx.Flops(round(rows[0].flops * options.flops ** (step / options.steps)))

        coupling = tfx.couple(params, spec)
        stats = tfx.measure(params, spec, (images[chosen], targets[chosen]), coupling)
        plan = tfx.select(tfx.taylor(stats, coupling), coupling, budget=budget, floor=2, per_cost=True)
        params, momentum = (tfx.cut(tree, plan) for tree in (params, momentum))
        spec = plan.spec

        params, momentum = train(params, momentum, options.tune, 0.05, f"fine-tune {step} of {options.steps}")
        rows.append(look(params, spec))
        plans.append(plan)
        networks.append((params, spec))

    # All networks in turn, so that whatever else the machine does slows all of them alike.
    rounds = [[latency(*network, test_images[:256], repeats=2) for network in networks] for _ in range(20)]
    seconds = [min(times) for times in zip(*rounds, strict=True)]
    show(rows, seconds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        whole = reduce(tfx.compose, plans)  # all steps as one plan against the original network
        plot(rows, seconds, whole, options.out)
        print(f"plot: {options.out}")


def show(rows: Sequence[Row], seconds: Sequence[float]) -> None:
    """The table of all steps, and the sum of it in one line."""
    first, last = rows[0], rows[-1]
    table = Table("step", "units", "parameters", "FLOPs", "share", "latency", "test accuracy", header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for step, row in enumerate(rows):
        table.add_row(
            str(step), f"{row.units:,}", f"{row.parameters:,}", f"{row.flops:,}", f"{row.flops / first.flops:.1%}",
            f"{1e3 * seconds[step]:.2f} ms", f"{row.accuracy:.2%}", style="bold" if row is last else "",
        )  # fmt: skip
    Console(width=100).print(table)
    print(
        f"accuracy {first.accuracy:.4f} -> {last.accuracy:.4f} at {last.flops / first.flops:.4f} of the FLOPs "
        f"and {last.parameters / first.parameters:.4f} of the parameters, {seconds[0] / seconds[-1]:.2f} x as fast"
    )


def plot(rows: Sequence[Row], seconds: Sequence[float], plan: tfx.Plan, path: Path) -> None:
    """Accuracy and costs against the steps, and the channels of every convolution before and after."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import PercentFormatter

    ink, soft, pale = "#1f2933", "#7b8794", "#e4e7eb"
    blue, orange, teal = "#2563a8", "#d9622b", "#178c7e"
    clear = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    figure = Figure(figsize=(11, 5.4), dpi=160, layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=(1.15, 1), height_ratios=(1, 1.3), wspace=0.08, hspace=0.06)
    top, costs, layers = (figure.add_subplot(cell) for cell in (grid[0, 0], grid[1, 0], grid[:, 1]))
    for axes in (top, costs, layers):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(soft)
        axes.tick_params(length=0, labelcolor=ink, labelsize=9)

    steps = range(len(rows))
    reached = [row.accuracy for row in rows]
    top.plot(steps, reached, "-o", color=blue, linewidth=2, markersize=5)
    top.axhline(reached[0], color=soft, linewidth=1, linestyle=":")
    for step in (0, len(rows) - 1):
        top.annotate(f"{reached[step]:.1%}", (step, reached[step]), (0, -17), "data", "offset points",
                     ha="center", color=blue, fontsize=10, fontweight="bold", bbox=clear)  # fmt: skip
    top.set_ylim(min(*reached, 0.96) - 0.01, 1.004)
    top.set_title("Accuracy on the test images, fine-tuned after each step", loc="left", fontsize=11, color=ink)

    ends = []
    for name, color, values in (
        ("latency", teal, seconds),
        ("FLOPs", orange, [row.flops for row in rows]),
        ("parameters", ink, [row.parameters for row in rows]),
    ):
        share = [value / values[0] for value in values]
        costs.plot(steps, share, "-o", color=color, linewidth=2, markersize=4)
        ends.append((share[-1], f"{name} {share[-1]:.0%}", color))
    height = -1.0
    for end, text, color in sorted(ends):
        height = max(end, height + 0.09)  # labels that would touch move apart
        costs.annotate(text, (len(rows) - 1, height), (8, 0), "data", "offset points",
                       va="center", color=color, fontsize=10, fontweight="bold", bbox=clear)  # fmt: skip
    costs.set_ylim(0, 1.08 * max(1.0, *(second / seconds[0] for second in seconds)))
    costs.set_xlabel("pruning step", color=ink, fontsize=9)
    costs.set_title("What is left of the original", loc="left", fontsize=11, color=ink)
    for axes in (top, costs):
        axes.grid(axis="y", color=pale)
        axes.set_xticks(list(steps))
        axes.set_xlim(-0.5, 1.4 * len(rows) - 1.5)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))

    coupling = plan.coupling
    names = [node.name for node in coupling.spec if isinstance(node.layer, L.Conv2d)]
    first = {name: coupling.unit_ids(f"{name}.weight", 0)[0, 0] for name in names}
    shared = Counter(first.values())
    for place, name in enumerate(names):
        before, after = (spec.shapes[f"{name}.weight"][0] for spec in (coupling.spec, plan.spec))
        layers.barh(place, before, 0.72, color=pale)
        layers.barh(place, after, 0.72, color=blue if shared[first[name]] > 1 else orange)
        layers.text(after + 1, place, str(after), va="center", fontsize=8.5, color=ink)
    layers.set_yticks(range(len(names)), names)
    layers.set_ylim(len(names) - 0.4, -0.6)
    layers.set_xlabel("channels", color=ink, fontsize=9)
    layers.set_title("Channels of every convolution", loc="left", fontsize=11, color=ink)
    kinds = ((pale, "before"), (blue, "after, tied by a residual stream"), (orange, "after, on its own"))
    layers.legend(
        handles=[Patch(color=color, label=text) for color, text in kinds], frameon=False, fontsize=9, loc="upper right"
    )
    figure.savefig(path)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flops", type=float, default=0.2, help="share of the FLOPs that may remain (default: 0.2)")
    parser.add_argument("--steps", type=int, default=7, help="pruning steps (default: 7)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs before pruning (default: 20)")
    parser.add_argument("--tune", type=int, default=4, help="epochs after each step (default: 4)")
    parser.add_argument("--out", type=Path, help="the plot (default: docs/quickstart.png; none with --smoke)")
    parser.add_argument("--smoke", action="store_true", help="seconds: few epochs, two steps, half of the FLOPs")
    options = parser.parse_args()
    if options.smoke:
        options.flops, options.steps, options.epochs, options.tune = 0.5, 2, 4, 1
    elif options.out is None:
        options.out = Path("docs/quickstart.png")
    return options


if __name__ == "__main__":
    main()

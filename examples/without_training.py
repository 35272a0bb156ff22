"""Prune once, and train never again: what the choice and the repair each bring.

The network of the quickstart learns scikit-learn's digits and is cut to a share of its FLOPs by magnitude, by one joint
choice, and in twelve steps that measure again, as `prune` does; every result is tested as cut and reconstructed. The
last one is folded, timed, and cut from file to file. About two minutes of one core:

    python examples/without_training.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import torch
from quickstart import digits, network
from rich.console import Console
from rich.table import Table
from torch import Tensor
from training import accuracy, arguments, learn, some

import taylorfx as tfx

Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    options = arguments(
        __doc__, {"epochs": 3, "width": 8},
        flops=(0.3, "share of the FLOPs that may remain"),
        epochs=(20, "epochs of training, before"),
        width=(24, "channels of the first stage"),
    )  # fmt: skip
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    images, targets, *test = digits()
    spec = network(options.width)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator)
    batches = some(images, targets, 512, generator)

    coupling, budget = tfx.couple(params, spec), tfx.Flops(options.flops)
    stats = tfx.measure(params, spec, batches, coupling, rows=True)
    magnitude = tfx.criteria.weight_l2(params, coupling, normalizer=tfx.criteria.per_layer_mean)
    steps = tfx.iterate(params, spec, batches, budgets=tfx.schedule.exponential(budget, 12), floor=2)
    stepwise = reduce(tfx.compose, [plan for *_, plan in steps])  # all steps as one plan of the whole network
    plans = {
        "magnitude": tfx.select(magnitude, coupling, budget=budget, floor=2),
        "jointly, at once": tfx.joint(stats, coupling, budget=budget, floor=2),
        "in twelve steps, as prune does": stepwise,
    }
    table = Table("chosen", "as cut", "reconstructed", title=f"{options.flops:.0%} of the FLOPs")
    for name, plan in plans.items():
        cut = accuracy(tfx.cut(params, plan), plan.spec, *test)
        repaired = accuracy(*tfx.reconstruct(params, plan, batches), *test)
        table.add_row(name, f"{cut:.1%}", f"{repaired:.1%}")
    Console().print(table)
    deploy(params, spec, stepwise, batches, tfx.cost.Timings(batch=len(test[0])), test)


def deploy(
    params: tfx.Params,
    spec: tfx.Spec,
    plan: tfx.Plan,
    batches: Batches,
    timings: tfx.cost.Timings,
    test: Sequence[Tensor],
) -> None:
    """Repair, fold batch norms away, and write files: the cut checkpoint is cut from the whole one, row by row."""
    small, smaller = tfx.fold(*tfx.reconstruct(params, plan, batches))
    with tempfile.TemporaryDirectory() as folder:
        whole, part = Path(folder) / "whole.safetensors", Path(folder) / "part.safetensors"
        tfx.save(whole, params, spec)
        tfx.cut_file(whole, part, plan)
        sizes = [file.stat().st_size for file in (whole, part)]
        same = accuracy(*tfx.load(part), *test) == accuracy(tfx.cut(params, plan), plan.spec, *test)
    print(
        f"folded: {len(spec)} layers -> {len(smaller)}, {timings(spec):.0f} -> {timings(smaller):.0f} microseconds of "
        f"layers, accuracy {accuracy(small, smaller, *test):.1%}; "
        f"file: {sizes[0]:,} -> {sizes[1]:,} bytes, {'the same' if same else 'another'} network"
    )


if __name__ == "__main__":
    main()

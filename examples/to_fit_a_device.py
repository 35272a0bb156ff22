"""A network that has to fit: so much time on this machine, so much memory, widths that its kernels like.

A small network of grouped convolutions and attention learns scikit-learn's digits. First every group of channels and
every head is put into an order of its own, so that all stay of equal size and each loses what it needs least. Then
units are chosen by the time that the network takes on this very machine, by the values that are alive at once, by both,
in multiples of four and evenly over the blocks, within like structures only. A few minutes of one core:

    python examples/to_fit_a_device.py
"""

from __future__ import annotations

from typing import Any

import torch
from quickstart import digits
from rich.console import Console
from rich.table import Table
from training import accuracy, arguments, latency, learn, some

import taylorfx as tfx
from taylorfx import layers as L


def network(width: int = 64, heads: int = 4, blocks: int = 3) -> tfx.Spec:
    """Grouped convolutions down to 4 x 4 places, blocks of attention and a wide layer, the mean over the places."""

    def conv(before: int, after: int, stride: int, groups: int) -> tfx.Spec:
        return tfx.serial(
            conv=L.Conv2d(before, after, 3, stride, 1, groups=groups),
            norm=L.GroupNorm(heads, after),
            relu=L.ReLU(),
        )

    def block() -> tfx.Spec:
        attend = tfx.serial(norm=L.LayerNorm(width), attention=tfx.multihead_attention(width, heads))
        wide = tfx.serial(
            norm=L.LayerNorm(width),
            up=L.Linear(width, 4 * width),
            gelu=L.GELU(),
            down=L.Linear(4 * width, width),
        )
        return tfx.serial(attend=tfx.residual(attend), wide=tfx.residual(wide))

    return tfx.serial(
        tfx.Input((1, 8, 8)),
        stem=tfx.serial(conv(1, width, 1, 1), conv(width, 2 * width, 2, heads)),
        project=L.Conv2d(2 * width, width, 1),
        flatten=L.Flatten(2),
        places=L.Permute((0, 2, 1)),
        blocks=tfx.serial(*(block() for _ in range(blocks))),
        norm=L.LayerNorm(width),
        channels=L.Permute((0, 2, 1)),
        pool=L.AdaptiveAvgPool1d(1),
        flat=L.Flatten(),
        head=L.Linear(width, 10),
    )


def main() -> None:
    options = arguments(
        __doc__, {"epochs": 6, "width": 32, "share": 0.9, "seconds": 1.0},
        seconds=(10.0, "for which two networks are timed beside each other, at most"),
        share=(0.7, "of time or memory that may remain"),
        epochs=(20, "epochs of training"),
        width=(64, "channels of the stream"),
    )  # fmt: skip
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    images, targets, *test = digits()
    spec = network(options.width)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator, peak=0.02)
    batches = some(images, targets, 512, generator)

    order = tfx.balance(params, spec, batches)
    params = tfx.reorder(params, order)  # computes the same
    print(order, end="\n\n")
    coupling = tfx.couple(params, spec)
    scores = tfx.fisher(tfx.measure(params, spec, batches, coupling), coupling)
    pace = tfx.cost.Pace(error=0.01, seconds=options.seconds)
    timings, share = tfx.cost.Timings(batch=len(test[0]), pace=pace), options.share
    time, memory = tfx.Latency(share, timings), tfx.Memory(share)
    asked: dict[str, dict[str, Any]] = {
        "time": {"budget": time},
        "memory": {"budget": memory},
        "both": {"budget": (time, memory)},
        "time; in fours, all blocks alike": {"budget": time, "multiple": 4, "uniform": ["*.h", "*.k", "*.v", "*.up"]},
        "time; like structures compete": {"budget": time, "isomorphic": True},
    }
    costs = [cost(coupling) for cost in (tfx.cost.memory, tfx.cost.flops, tfx.cost.parameters)]
    whole = latency(params, spec, test[0])
    table = Table(
        "asked for", "layers' time", "batch's time", "memory", "FLOPs", "parameters", "as cut", "reconstructed"
    )
    for name, how in asked.items():
        try:
            plan = tfx.select(scores, coupling, most=0.9, per_cost=True, **how)
        except tfx.BudgetError as error:  # a network as narrow as this may take its time whatever leaves
            print(f"{name}: {error}\n")
            continue
        small = tfx.cut(params, plan)
        shares = [
            timings(plan.spec) / timings(spec), latency(small, plan.spec, test[0]) / whole,
            *(cost(plan.keep) / cost.total for cost in costs),
            accuracy(small, plan.spec, *test), accuracy(*tfx.reconstruct(params, plan, batches), *test),
        ]  # fmt: skip
        table.add_row(name, *(f"{x:.0%}" if k < 5 else f"{x:.1%}" for k, x in enumerate(shares)))
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

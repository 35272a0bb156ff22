"""Joint selection of many units: CPU time and memory, up to 350,000 units and 512 examples.

    python benchmarks/selection.py            # some minutes and 4 GB
    python benchmarks/selection.py --quick    # seconds
    python benchmarks/selection.py --passes   # a minute: what `prune` computes, in forward and backward passes

The network is a chain of linear layers of equal width, of which only shapes exist; every example has a random
derivative for every unit, of another size in each layer. Half of the FLOPs may stay. Every size runs in a process of
its own, which says how much memory it has come to hold above what it held with the derivatives. Prints Markdown.

``--passes`` counts the FLOPs of `prune` with its defaults, choosing and cutting among them, and divides them by those
of one forward and backward pass of the unpruned module, with the gradients of its weights, over the same examples. They
are counted as they are computed, by ``torch.utils.flop_counter``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial

import torch
from _passes import loss, model
from cutting import peak, timed
from torch.utils.flop_counter import FlopCounterMode

import taylorfx as tfx
from taylorfx import layers as L

WIDTH, DEPTHS, EXAMPLES = 3_500, (1, 4, 16, 100), 512


def network(depth: int) -> tuple[tfx.Params, tfx.Spec]:
    """A chain of linear layers, and parameters that take no memory."""
    layers = [L.Linear(WIDTH, WIDTH) for _ in range(depth)]
    spec = tfx.serial(tfx.Input((8,)), L.Linear(8, WIDTH), *layers[1:], L.Linear(WIDTH, 8))
    return tfx.tree.unflatten({path: torch.empty(shape, device="meta") for path, shape in spec.shapes.items()}), spec


def one(depth: int, examples: int) -> dict[str, float]:
    """Seconds of CPU and megabytes of one selection, with exchanges at the end and without."""
    coupling = tfx.couple(*network(depth))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(examples, len(coupling), generator=generator)
    rows *= torch.rand(len(coupling.scopes), generator=generator)[torch.from_numpy(coupling.scope)]
    stats = statistics(rows, coupling)
    found: dict[str, float] = {"units": len(coupling), "rows": rows.numel() * 4 / 2**20}
    for name, options in {"swaps": {}, "cautious": {"cautious": True}}.items():
        seconds: list[float] = []

        def choose(options: dict = options, seconds: list[float] = seconds) -> None:
            (cpu, _), _ = timed(lambda: tfx.joint(stats, coupling, budget=tfx.Flops(0.5), **options))
            seconds.append(cpu)

        found[f"{name}, MB"] = peak(choose) or 0.0
        found[name] = seconds[0]
    return found


def statistics(rows: torch.Tensor, coupling: tfx.Coupling) -> tfx.Statistics:
    """As `measure` would have summed them up."""
    zero = rows.new_zeros(len(coupling))
    return tfx.Statistics(
        n=len(rows), batches=1, loss=rows.new_zeros(()), sum=rows.sum(0), sum_abs=zero, sum_sq=zero, sum_abs_mean=zero,
        sum_batch_abs=zero, sum_batch_sq=zero, moments=None, rows=rows, units=coupling.names,
    )  # fmt: skip


def passes(name: str, length: int, shares: tuple[float, ...]) -> list[float]:
    """What `prune` computes down to each share of the FLOPs, by what a full pass over the same examples does."""

    def counted(run: Callable[[], object]) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    module, x, y = model(name, (4, length))
    params, spec = tfx.from_torch(module, (x,))
    full = counted(lambda: loss(module(x), y).backward())
    prune = partial(tfx.prune, params, spec, (x, y), loss=loss)
    return [counted(lambda share=share: prune(budget=tfx.Flops(share))) / full for share in shares]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes")
    parser.add_argument("--depth", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--passes", action="store_true", help="count what `prune` computes instead")
    options = parser.parse_args()
    if options.depth:
        print(json.dumps(one(options.depth, EXAMPLES)))
        return
    if options.passes:
        shares = 0.7, 0.5, 0.3
        print(f"| passes of `prune` to | {' | '.join(f'{share:.0%}' for share in shares)} |\n{'| --- ' * 4}|")
        for name, length in {"resnet18": 64, "mobilenet_v2": 64, "vit_b_16": 224}.items():
            print(f"| {name} | {' | '.join(f'{n:.2f}' for n in passes(name, length, shares))} |", flush=True)
        return
    print("| units | derivatives, MB | with exchanges, s | more MB | cautious, s | more MB |")
    print("| --- " * 6 + "|")
    for depth in DEPTHS[:2] if options.quick else DEPTHS:
        command = [sys.executable, __file__, "--depth", str(depth)]
        found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        cells = [f"{found['units']:,.0f}", f"{found['rows']:,.0f}"]
        for name in ("swaps", "cautious"):
            cells += [f"{found[name]:.1f}", f"{found[f'{name}, MB']:,.0f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Half of the time: what `Latency` was asked for, what the table of layers says, and what networks take that run whole.

Every network is cut twice for every runner: once by the layers' sum alone, without multiples, and once as `Latency`
does it by default, where the limit on the sum is corrected until the network that runs whole takes what was asked. What
is left of each is then timed beside the original once more, by turns, independently of what the budget measured:

    python benchmarks/latency.py                             # every network, eager
    python benchmarks/latency.py --networks ResNet-18 --runners eager compiled "ONNX Runtime" --batches 1 16
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _torchvision import library
from rich.console import Console
from rich.table import Table
from torch import nn

import taylorfx as tfx
from taylorfx.cost.runners import Pace, race


class Encoder(nn.Sequential):
    """A small transformer: four layers of width 256 over 64 vectors."""

    def __init__(self) -> None:
        layer = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True, dropout=0.0)
        super().__init__(nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), nn.Linear(256, 10))


def runners() -> dict[str, Any]:
    return {"eager": tfx.cost.eager, "compiled": tfx.cost.compiled, "ONNX Runtime": tfx.interop.onnx_runtime}


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-18": (lambda: library().resnet18(), (3, 112, 112)),
    "MobileNetV2": (lambda: library().mobilenet_v2(), (3, 112, 112)),
    "encoder": (Encoder, (64, 256)),
}


def timed(timings: tfx.cost.Timings, plan: tfx.Plan) -> tuple[float, float]:
    """The share of the time that a plan leaves, and half of the range in which half of the rounds are."""
    seconds = race([timings.ready(plan.spec), timings.ready(plan.coupling.spec)], timings.pace)
    low, middle, high = np.percentile(seconds[:, 0] / seconds[:, 1], [25, 50, 75])
    return float(middle), float(high - low) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS])
    parser.add_argument("--runners", nargs="+", choices=runners(), default=["eager"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1])
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--seconds", type=float, default=5.0, help="of processor time for every comparison")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pace = Pace(error=0.01, seconds=options.seconds, clock=time.process_time)
    table = Table("network", "batch", "runner", "budget", "asked", "table", "measured", "FLOPs", "runs", "seconds")
    for name in options.networks:
        make, shape = NETWORKS[name]
        torch.manual_seed(0)
        params, spec = tfx.from_torch(make().eval(), torch.randn(2, *shape))
        coupling = tfx.couple(params, spec)
        scores = tfx.criteria.weight_l2(params, coupling)
        for batch in options.batches:
            rest: dict[str, Any] = {}
            for runner in options.runners:
                for budget in ("the layers' sum", "run whole, any width", "run whole"):
                    held = None if budget == "the layers' sum" else runners()[runner]
                    timings = tfx.cost.Timings(batch, runner=held, pace=pace, **rest)
                    asked = tfx.Latency(options.share, timings, multiples=budget == "run whole")
                    start = time.perf_counter()
                    plan = tfx.select(scores, coupling, budget=asked, per_cost=True)
                    took = time.perf_counter() - start
                    rest = {"table": timings.table, "kinds": timings.kinds}
                    again = tfx.cost.Timings(batch, runner=runners()[runner], pace=pace)
                    share, spread = timed(again, plan)
                    sums, flops = timings.over(coupling), tfx.cost.flops(coupling)
                    row = (
                        name, f"{batch}", runner, budget, f"{options.share:.3f}", f"{sums(plan.keep) / sums.total:.3f}",
                        f"{share:.3f} ± {spread:.3f}", f"{flops(plan.keep) / flops.total:.3f}",
                        f"{len(timings.shares)}", f"{took:.0f}",
                    )  # fmt: skip
                    print(*row, sep=" | ", flush=True)
                    table.add_row(*row)
    Console(width=130).print(table)


if __name__ == "__main__":
    main()

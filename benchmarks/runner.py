"""What running a network as a spec costs beyond the module itself: microseconds per node, on the smallest inputs.

    OMP_NUM_THREADS=1 python benchmarks/runner.py

The networks and their inputs are so small that the time goes into Python, not into kernels; the batch is one example,
in training two. The module, ``apply`` and the module that ``to_torch`` gives run by turns, in processor time; every
number is a median, and the overhead per node is the difference to the module's time over the number of nodes.
A difference below zero says that the spec is faster than the module. Then networks of torchvision, at one image of
32 x 32: the plain module by the user's own, both as they are and compiled, and what each step of `deploy` gave. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy

import numpy as np
import torch
from _networks import After, Inverted, Stages, VisionTransformer
from _torchvision import library
from torch import nn

import taylorfx as tfx
from taylorfx.cost.runners import Pace, race

NETWORKS: Mapping[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "small ResNet": (lambda: Stages(After, 8, 2, bare=False), (1, 8, 8)),
    "MobileNet-like": (lambda: Stages(Inverted, 8, 2, bare=False), (1, 8, 8)),
    "small vision transformer": (lambda: VisionTransformer(16, 4, 32), (1, 28, 28)),
}


def rows(title: str, module: nn.Module, shape: tuple[int, ...], seconds: float) -> list[str]:
    """The rows of one network: what runs, the module's time, the overhead per node, the ratio to the module."""
    x = torch.randn(2, *shape)
    params, spec = tfx.from_torch(module.eval(), x)
    out = tfx.to_torch(params, spec)
    with torch.no_grad():
        inference = {"apply": lambda: tfx.apply(params, spec, x[:1]), "to_torch": lambda: out(x[:1])}
        spent = {"inference": beside(lambda: module(x[:1]), inference, seconds)}
    learner, copied = deepcopy(module).train(), deepcopy(out).train()
    spent["training"] = beside(lambda: learner(x), {"to_torch": lambda: copied(x)}, seconds)
    lines = []
    for mode, found in spent.items():
        for name, (base, more, ratio) in found.items():
            cells = title, f"{len(spec)}", f"{name}, {mode}", f"{base:,.0f}", f"{more / len(spec):.1f}", f"{ratio:.2f}"
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def beside(
    base: Callable[[], object], runs: Mapping[str, Callable[[], object]], seconds: float
) -> dict[str, tuple[float, float, float]]:
    """Of every function the microseconds of the first one, those above them, and the ratio; medians of all rounds."""
    times = race([base, *runs.values()], Pace(seconds=seconds, clock=time.process_time))
    first = times[:, 0]
    return {
        name: (1e6 * float(np.median(first)), 1e6 * float(np.median(own - first)), float(np.median(own / first)))
        for name, own in zip(runs, times.T[1:], strict=True)
    }


def deployed(module: nn.Module, seconds: float) -> Iterator[tuple[str, float, str]]:
    """One image of 32 x 32: the plain module by the user's own, eager and compiled, and the steps of `deploy`."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2)
    x, pace = torch.randn(2, 3, 32, 32), Pace(seconds=seconds, clock=time.process_time)
    params, spec = tfx.from_torch(module.eval(), x)
    plain = tfx.to_torch(params, spec)
    for way, ready in {"plain module": lambda m: m, "plain module, compiled": torch.compile}.items():
        with torch.no_grad():
            both = [lambda network=network: network(x[:1]) for network in map(ready, (plain, module))]
            times = race(both, pace)
        low, share, high = np.percentile(times[:, 0] / times[:, 1], [25, 50, 75])
        yield f"{way}, by the module's own time", share, f"{low:.3f} to {high:.3f}"
    with tempfile.TemporaryDirectory() as folder:
        ready = tfx.interop.deploy(params, spec, x[:1], path=f"{folder}/network.onnx", compiled=True, pace=pace)
    for step in ready.steps:
        yield f"deploy: {step.name}", step.time, f"{step.low:.3f} to {step.high:.3f}"
    yield "deploy, together", ready.time, ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=10.0, help="for every comparison")
    parser.add_argument("--networks", nargs="+", default=[], help="only these")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print("| network | nodes | what runs | module, µs | overhead per node, µs | ratio to the module |")
    print("| --- " * 6 + "|")
    for title, (make, shape) in NETWORKS.items():
        if not options.networks or title in options.networks:
            print(*rows(title, make(), shape, options.seconds), sep="\n", flush=True)
    models = library()
    networks = {
        "ResNet-18": lambda: models.resnet18(num_classes=10),
        "MobileNetV2": lambda: models.mobilenet_v2(num_classes=10),
        "ViT of four layers": lambda: models.VisionTransformer(32, 4, 4, 4, 64, 128, num_classes=10),
    }
    print("\n| network | what | time | quartiles |\n" + "| --- " * 4 + "|")
    for title, make in networks.items():
        if not options.networks or title in options.networks:
            for what, share, quartiles in deployed(make(), options.seconds):
                print(f"| {title} | {what} | {share:.3f} | {quartiles} |", flush=True)


if __name__ == "__main__":
    main()

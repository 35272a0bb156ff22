"""Networks as people build them, at three sizes each: whole, cut, exported again, and pruned, tuned and used.

    python benchmarks/realistic.py                      # all eight, some minutes
    python benchmarks/realistic.py Demucs Conformer     # some

Each is captured at its first size, in float64, with random weights. Half of its exact units leave at random, and what
is left is compared with the gated network at all three sizes. It is exported again with free sizes, and run at those
that torch leaves free in the module's own export. Then the network is pruned to half of its FLOPs on batches of two
sizes, and tuned for some steps on both. Prints Markdown.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from _proof import randomized
from _realistic import REALISTIC
from _sizes import free
from torch import Tensor, nn

import taylorfx as tfx
from taylorfx.testing.strategies import random_plan

SIZES = 3
RATES = (2e-4, 1e-3)
"""Learning rates of Adam that are tried."""


def given(name: str, size: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The inputs of one of the three sizes, by name."""
    return {key: x.to(dtype) if x.is_floating_point() else x for key, x in REALISTIC[name].inputs(size).items()}


@functools.cache
def captured(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, tfx.Params, tfx.Spec]:
    """A module in general position, and what was captured of it at its first size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = randomized(REALISTIC[name].make(), given(name, 0)).to(dtype)
    return module, *tfx.from_torch(module, given(name, 0, dtype))


@functools.cache
def halved(name: str, dtype: torch.dtype = torch.float64) -> tuple[tfx.Params, tfx.Plan]:
    """Half of its exact units removed at random: parameters, and the plan."""
    _, params, spec = captured(name, dtype) if dtype != torch.float64 else captured(name)
    plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(1), 0.5, exact=True)
    return tfx.cut(params, plan), plan


def tensors(value: Any) -> list[Tensor]:
    return list(value) if isinstance(value, tuple) else [value]


def error(values: Any, expected: Any) -> float:
    """The largest difference of an output, as a share of its largest entry."""
    pairs = list(zip(tensors(values), tensors(expected), strict=True))
    assert [a.shape for a, _ in pairs] == [b.shape for _, b in pairs]
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def exported(module: nn.Module, inputs: dict[str, Tensor]) -> nn.Module:
    """A program of torch.export with all sizes free that torch leaves free."""
    return torch.export.export(module, (), inputs, dynamic_shapes=free(inputs)).module()


def takes(program: nn.Module, inputs: dict[str, Tensor]) -> bool:
    """A program does not refuse these sizes."""
    try:
        program(**inputs)
    except AssertionError as failed:
        if "Guard failed" not in str(failed):
            raise
        return False
    return True


def distance(outputs: Any, targets: Any) -> Tensor:
    """Of the outputs that are no whole numbers: the mean square of their differences, relative to the targets' size."""
    pairs = zip(tensors(outputs), tensors(targets), strict=True)
    terms = [(a - b).square().mean() / b.var() for a, b in pairs if a.is_floating_point()]
    return torch.stack(terms).sum()


def astray(outputs: Any, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Outputs with noise on them: at a network's own outputs all derivatives would be zero."""
    return tuple(
        y + 0.3 * y.std() * torch.randn(y.shape, generator=generator, dtype=y.dtype) if y.is_floating_point() else y
        for y in tensors(outputs)
    )


Batches = list[tuple[dict[str, Tensor], tuple[Tensor, ...]]]


def pruned(name: str) -> tuple[tuple[tfx.Params, tfx.Spec], Batches]:
    """The network at half of its FLOPs, and batches of two sizes with the outputs of the whole one."""
    module, params, spec = captured(name)
    with torch.no_grad():
        batches = [(x, tuple(tensors(module(**x)))) for x in (given(name, size) for size in range(SIZES)[:2])]
    noise = torch.Generator().manual_seed(0)
    measured = [(x, astray(y, noise)) for x, y in batches]
    small = tfx.prune(params, spec, measured, budget=tfx.Flops(0.5), criterion=tfx.fisher, steps=1, loss=distance)
    return small, batches


def tuned(student: nn.Module, batches: Batches, rate: float, training: bool) -> tuple[list[float], list[float]]:
    """The losses on the two sizes before and after some steps on them in turn, in training mode or not."""

    def losses() -> list[float]:
        student.eval()
        with torch.no_grad():
            return [distance(student(**x), y).item() for x, y in batches]

    before = losses()
    student.train(training)
    optimizer = torch.optim.Adam([p for p in student.parameters() if p.requires_grad], lr=rate)
    for step in range(16):
        inputs, targets = batches[step % len(batches)]
        optimizer.zero_grad()
        distance(student(**inputs), targets).backward()
        optimizer.step()
    return before, losses()


def best_tuned(small: tuple[tfx.Params, tfx.Spec], batches: Batches) -> tuple[list[float], list[float]]:
    """The same in the way that is best for the worse of the two sizes: some norms learn nothing from two examples."""
    ways = itertools.product(RATES, (False, True))
    runs = (tuned(tfx.to_torch(*small), batches, rate, training) for rate, training in ways)
    return min(runs, key=lambda run: max(b / a for a, b in zip(*run, strict=True)))


def shown(inputs: dict[str, Tensor]) -> str:
    return ", ".join(" x ".join(map(str, x.shape[1:])) for x in inputs.values() if x.ndim > 1)


def row(name: str) -> list[str]:
    """What a network does, whole, cut, exported and tuned."""
    module, params, spec = captured(name)
    small, plan = halved(name)
    inputs = [given(name, size) for size in range(SIZES)]
    with torch.no_grad():
        whole = max(error(tfx.apply(params, spec, x), module(**x)) for x in inputs)
        pairs = [(tfx.apply(small, plan.spec, x), tfx.apply(params, spec, x, gates=plan.gates)) for x in inputs]
        cut = max(error(a, b) for a, b in pairs)
        own, program = exported(module, inputs[0]), exported(tfx.to_torch(small, plan.spec), inputs[0])
        taken = [x for x in inputs if takes(own, x)]
        again = max(error(program(**x), tfx.apply(small, plan.spec, x)) for x in taken)
    network, batches = pruned(name)
    before, after = best_tuned(network, batches)
    share = tfx.cost.flops(tfx.couple(*network)).total / tfx.cost.flops(tfx.couple(params, spec)).total
    losses = "; ".join(f"{a:.2g} to {b:.2g}" for a, b in zip(before, after, strict=True))
    sizes = "; ".join(map(shown, inputs))
    return [
        name, sizes, f"{whole:.0e}", f"{1 - plan.keep.mean():.0%}", f"{cut:.0e}", f"{len(taken)}: {again:.0e}",
        f"{share:.2f}", losses,
    ]  # fmt: skip


HEADS = (
    "network",
    "sizes",
    "whole",
    "units that left",
    "cut",
    "exported, at how many sizes",
    "FLOPs",
    "loss when tuned",
)


def main(printed: Callable[[str], None] = print) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(REALISTIC), metavar="NAME")
    warnings.simplefilter("ignore")
    for cells in (HEADS, ["---"] * len(HEADS)):
        printed(f"| {' | '.join(cells)} |")
    for name in parser.parse_args().names:
        printed(f"| {' | '.join(row(name))} |")


if __name__ == "__main__":
    main()

"""What the examples of pretrained networks share: finding them, and pruning one by several criteria to several budgets.

Every criterion is given the same measurement, every budget the whole network: couple, measure, select, cut, all in one
shot. Each network that comes out is compared with the gated original on real input, tested as it is, and, where asked
for, fine-tuned for some steps and tested again.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import taylorfx as tfx

Network = Callable[[Tensor], Tensor]
"""Inputs to outputs."""

Batch = tuple[Tensor, Tensor]
"""Inputs and targets."""

CRITERIA = ("taylor", "taylor per FLOP", "second order", "second order per FLOP", "weights", "random")


def folder(package: str, install: str) -> Path:
    """Where an installed package lies; it is not imported.

    Raises:
        SystemExit: if it is not installed; the message says how to.
    """
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise SystemExit(f"This example needs the package {package}: pip install --no-deps {install}")
    return Path(next(iter(found.submodule_search_locations)))


def source(name: str, **stand_ins: Mapping[str, Any]) -> ModuleType:
    """One module of a package without whatever else the package would import.

    ``stand_ins`` take the place of modules meanwhile, by their attributes: one with a ``__path__`` is a package whose
    own ``__init__`` does not run.
    """
    modules = {stand_in: ModuleType(stand_in) for stand_in in stand_ins}
    for stand_in, attributes in stand_ins.items():
        vars(modules[stand_in]).update(attributes)
    with patch.dict(sys.modules, modules):
        return importlib.import_module(name)


@dataclass(frozen=True)
class Study:
    """A pretrained network, and what it is measured, fine-tuned and tested on.

    Attributes:
        loss: of outputs and targets, a mean over the batch.
        sample: what is measured; its inputs are also what cut and gated networks are compared on.
        lesson: a new batch to fine-tune on, of so many examples.
        quality: how good a network is on the test examples: a share, higher is better.
    """

    params: tfx.Params
    spec: tfx.Spec
    loss: Callable[[Tensor, Tensor], Tensor]
    sample: Batch
    lesson: Callable[[int, torch.Generator], Batch]
    quality: Callable[[Network], float]


def scores(study: Study, coupling: tfx.Coupling, generator: torch.Generator) -> dict[str, Tensor]:
    """One number per unit by each of the criteria compared.

    A budget in FLOPs and a score in units of the loss call for the loss per FLOP; the magnitude of weights says nothing
    across layers unless each layer's is divided by its mean.
    """
    stats = tfx.measure(study.params, study.spec, batches(study.sample, 32), coupling, loss=study.loss)
    taylor, second_order = tfx.taylor(stats, coupling), tfx.criteria.second_order(stats, coupling)
    cost = tfx.cost.flops(coupling).marginal()
    return {
        "taylor": taylor,
        "taylor per FLOP": taylor / cost,
        "second order": second_order,
        "second order per FLOP": second_order / cost,
        "weights": tfx.criteria.weight_l2(study.params, coupling, normalizer=tfx.criteria.per_layer_mean),
        "random": tfx.criteria.random(coupling, generator),
    }


def batches(examples: Batch, size: int) -> list[Batch]:
    """Examples in batches of at most ``size``."""
    return list(zip(*(x.split(size) for x in examples), strict=True))


def outputs(network: Network, inputs: Tensor) -> Tensor:
    """What a network says, a few examples at a time: large batches leave the processor's cache."""
    with torch.inference_mode():
        return torch.cat([network(x) for x in inputs.split(50)])


def inference(params: tfx.Params, spec: tfx.Spec) -> Network:
    """The network in inference mode."""
    return lambda x: tfx.apply(params, spec, x)


@torch.inference_mode()
def difference(params: tfx.Params, plan: tfx.Plan, x: Tensor) -> float:
    """How far the cut network is from the gated one, as a share of the largest output."""
    gated = tfx.apply(params, plan.coupling.spec, x, gates=plan.gates)
    cut = tfx.apply(tfx.cut(params, plan), plan.spec, x)
    return float((cut - gated).abs().max() / gated.abs().max())


def tune(study: Study, params: tfx.Params, spec: tfx.Spec, options: Namespace) -> Network:
    """The network as a module, fine-tuned by Adam with a rate that falls along half a cosine.

    It stays in inference mode: batch norms keep the statistics that were learned from far more than is seen here.
    """
    module = tfx.to_torch(params, spec).eval()
    optimizer = torch.optim.Adam(module.parameters(), options.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps)
    generator = torch.Generator().manual_seed(options.seed + 1)  # the same lessons for all
    for _ in range(options.steps):
        x, target = study.lesson(options.batch, generator)
        optimizer.zero_grad()
        study.loss(module(x), target).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return module


def run(study: Study, options: Namespace) -> None:
    """Prune by every criterion to every budget, and print what is left of the quality."""
    console, start = Console(), time.perf_counter()
    coupling = tfx.couple(study.params, study.spec)
    costs = [cost(coupling).total for cost in (tfx.cost.parameters, tfx.cost.flops)]
    console.print(f"{len(coupling):,} units, {costs[0]:,} parameters, {costs[1]:,} FLOPs", highlight=False)
    console.print(f"unpruned: {study.quality(inference(study.params, study.spec)):.1%}", highlight=False)

    table = Table("FLOPs that remain", *(f"{share:.0%}" for share in options.flops), header_style="bold")
    worst = 0.0
    compared = scores(study, coupling, torch.Generator().manual_seed(options.seed))
    for name, score in track(compared.items(), "prune", transient=True):
        cells, tuned = [], []
        for share in options.flops:
            plan = tfx.select(score, coupling, budget=tfx.Flops(share), floor=2)
            params = tfx.cut(study.params, plan)
            worst = max(worst, difference(study.params, plan, study.sample[0][:8]))
            cells.append(f"{study.quality(inference(params, plan.spec)):.1%}")
            if name in options.tune:
                tuned.append(f"{study.quality(tune(study, params, plan.spec, options)):.1%}")
        table.add_row(name, *cells)
        if tuned:
            table.add_row("  fine-tuned", *tuned)
    assert worst < 1e-4, "the cut network has to compute what the gated one computes"
    console.print(table)
    console.print(f"cut and gated networks differ by at most {worst:.0e} of the largest output", highlight=False)
    console.print(f"{options.steps} steps of fine-tuning; {time.perf_counter() - start:.0f} s in all", highlight=False)


def options(parser: ArgumentParser, presets: Mapping[str, Mapping[str, Any]], given: Sequence[str] | None) -> Namespace:
    """Those of both examples besides the parser's own; a preset fills in what is not given."""
    preset = parser.add_mutually_exclusive_group()
    preset.add_argument("--smoke", dest="preset", action="store_const", const="smoke", help="to see that it runs")
    preset.add_argument("--full", dest="preset", action="store_const", const="full", help="every criterion fine-tuned")
    parser.add_argument("--flops", type=float, nargs="+", default=[0.8, 0.6, 0.4, 0.2], help="shares that may remain")
    parser.add_argument("--tune", nargs="*", choices=CRITERIA, help="criteria whose networks are fine-tuned, too")
    parser.add_argument("--sample", type=int, help="examples to measure on")
    parser.add_argument("--test", type=int, help="examples to test on")
    parser.add_argument("--steps", type=int, help="steps of fine-tuning")
    parser.add_argument("--batch", type=int, help="examples of a step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak rate of fine-tuning")
    parser.add_argument("--seed", type=int, default=0)
    found = parser.parse_args(given)
    for name, value in presets[found.preset or "small"].items():
        if getattr(found, name) is None:
            setattr(found, name, value)
    return found

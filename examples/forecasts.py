"""Whom to believe? Criteria against the truth, one unit at a time, and forecasts of whole plans.

The truth about a unit is what the loss does without it: the oracle leaves each out by its gate. Scores are compared
with it by rank. Then the lowest units leave together, by each criterion and by joint choice, and what was promised of
that is set against what the loss does. The network is the quickstart's; a minute of one core:

    python examples/forecasts.py --plot fidelity.png
"""

from __future__ import annotations

from pathlib import Path

import torch
from quickstart import digits, network
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F
from training import arguments, learn, some

import taylorfx as tfx
from taylorfx.report.plots import plot_fidelity

Batches = list[tuple[Tensor, Tensor]]


def main() -> None:
    options = arguments(
        __doc__, {"epochs": 3, "width": 6, "examples": 64},
        flops=([0.98, 0.8], "shares that may remain (default: 0.98 0.8)"),
        examples=(256, "to score with, and to ask the oracle"),
        epochs=(12, "epochs of training"),
        width=(16, "channels of the first stage"),
        plot=(Path, "draw the fidelities"),
    )  # fmt: skip
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    images, targets, *_ = digits()
    spec = network(options.width)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator)
    batches = some(images, targets, options.examples, generator)
    coupling = tfx.couple(params, spec)

    stats = tfx.measure(params, spec, batches, coupling, rows=True)
    scores = {
        "taylor": tfx.taylor(stats, coupling),
        "fisher": tfx.fisher(stats, coupling),
        "second order": tfx.criteria.second_order(stats, coupling),
        "second order, exact": tfx.truth.exact_second_order(params, spec, batches, coupling),
        "path integral": tfx.truth.path_integral(params, spec, batches, coupling),
        "magnitude": tfx.criteria.weight_l2(params, coupling),
        "random": tfx.criteria.random(coupling, generator),
    }
    truth = tfx.truth.oracle(params, spec, batches, coupling, progress=True)
    found = tfx.truth.fidelity(scores, truth, coupling)
    print(found, end="\n\n")
    if options.plot:
        plot_fidelity(found).savefig(options.plot)

    for share in options.flops:
        budget = tfx.Flops(share)
        plans = {name: tfx.select(values, coupling, budget=budget, floor=2) for name, values in scores.items()}
        plans["jointly"] = tfx.joint(stats, coupling, budget=budget, floor=2)
        plans["jointly, cautious"] = tfx.joint(stats, coupling, cautious=True, budget=budget, floor=2)
        title = f"The loss rises at {share:.0%} of the FLOPs"
        table = Table("chosen by", "one by one", "jointly", "Hessian", "path", "in truth", title=title)
        for name, plan in plans.items():
            forecasts = (
                truth.signed()[torch.from_numpy(~plan.keep)].sum(),
                tfx.expected_change(stats, plan),
                tfx.truth.plan_second_order(params, spec, batches, plan),
                tfx.truth.plan_path_integral(params, spec, batches, plan, nodes=8).sum(),
                loss(tfx.cut(params, plan), plan.spec, batches) - loss(params, spec, batches),
            )
            table.add_row(name, *(f"{float(value):.4f}" for value in forecasts))
        Console().print(table)


@torch.inference_mode()
def loss(params: tfx.Params, spec: tfx.Spec, batches: Batches) -> float:
    """The mean over all examples."""
    losses = [F.cross_entropy(tfx.apply(params, spec, x), y, reduction="sum") for x, y in batches]
    return float(sum(losses)) / sum(len(y) for _, y in batches)


if __name__ == "__main__":
    main()

"""The contestants of the quality benchmark: each says which units stay at each share of the FLOPs.

All look at the same network and the same scored examples, and a layer loses no more than nine of ten units. All answer
with a plan, Torch-Pruning too, so that cost, repair and fine-tuning are the same for all.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import taylorfx as tfx

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning
except ImportError:
    torch_pruning = None

MOST = 0.9
DRAWS = 10

Batches = Sequence[tuple[Tensor, Tensor]]
Plans = Mapping[float, tfx.Plan]
"""By the share of the FLOPs that may remain."""

Contestant = Callable[[Sequence[float]], Plans]

Collect = Callable[[nn.Module, Batches], None]
"""Gives every parameter the ``.grad`` that an importance of Torch-Pruning looks at."""


def contestants(
    params: tfx.Params, spec: tfx.Spec, batches: Batches, module: nn.Module, seed: int
) -> dict[str, Contestant]:
    """All of them by name, in the order of the tables; what they measure is measured once."""
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, batches, coupling, rows=True)
    raw = tfx.measure(params, spec, batches, coupling, at_writes=True, training=True)
    means = tfx.means(params, spec, batches, coupling)
    around = tfx.measure(params, spec, batches, coupling, rows=True, around=means.centers(coupling))
    cost = tfx.flops(coupling).marginal()
    scores: dict[str, Tensor] = {}
    for criterion in (tfx.taylor, tfx.fisher, tfx.second_order):
        scores[criterion.__name__] = criterion(stats, coupling)
        scores[f"{criterion.__name__} per FLOP"] = criterion(stats, coupling) / cost
    scores["taylor around the mean, per FLOP"] = tfx.taylor(around, coupling) / cost
    scores["weight_l2, per_layer_l2"] = tfx.weight_l2(params, coupling, normalizer=tfx.per_layer_l2)
    scores["compat"] = tfx.compat(raw, coupling)
    generator = torch.Generator().manual_seed(seed)
    scores |= {f"random {k}": tfx.random(coupling, generator) for k in range(DRAWS)}

    def jointly(stats: tfx.Statistics, shares: Sequence[float]) -> Plans:
        return {s: tfx.joint(stats, coupling, budget=tfx.Flops(s), most=MOST) for s in shares}

    def ranked(scores: Tensor, shares: Sequence[float]) -> Plans:
        return {s: tfx.select(scores, coupling, budget=tfx.Flops(s), most=MOST) for s in shares}

    return {
        "joint": partial(jointly, stats),
        "joint around the mean": partial(jointly, around),
        **{name: partial(ranked, values) for name, values in scores.items()},
        **(torch_prunings(params, coupling, module, batches) if torch_pruning else {}),
    }


def torch_prunings(
    params: tfx.Params, coupling: tfx.Coupling, module: nn.Module, batches: Batches
) -> dict[str, Contestant]:
    """Torch-Pruning's criteria, global: scored once as ours are, and for Taylor also anew at each of its steps."""
    kinds = {
        "GroupMagnitude": ("GroupMagnitude", None, False),
        "GroupTaylor": ("GroupTaylor", slopes, False),
        "GroupTaylor, scored at every step": ("GroupTaylor", slopes, True),
        "GroupHessian": ("GroupHessian", squares, False),
    }
    return {
        f"Torch-Pruning {name}": partial(iterated, params, coupling, module, batches, *kind)
        for name, kind in kinds.items()
    }


def slopes(module: nn.Module, batches: Batches) -> None:
    """Gradients of the mean loss, as its scripts collect them for `GroupTaylorImportance`."""
    module.zero_grad()
    for x, y in batches:
        (F.cross_entropy(module(x), y) / len(batches)).backward()


def squares(module: nn.Module, batches: Batches) -> None:
    """The mean of the examples' squared gradients, which `GroupHessianImportance` is about.

    Its ``accumulate_grad`` (1.6.1) looks for a parameter by its name among keys that are parameters, finds none and
    starts anew with each example, so that the last one's would be all there is: what it was meant to sum is given here.
    """
    leaves = {name: leaf.detach() for name, leaf in module.named_parameters()}
    rest = dict(module.named_buffers())

    def loss(leaves: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(module, (leaves, rest), (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = sum(len(y) for _, y in batches)
    for x, y in ((x, y) for batch in batches for x, y in zip(*(part.split(32) for part in batch), strict=True)):
        for name, grads in each(leaves, x, y).items():
            total[name] += grads.square().sum(0) / count
    for name, leaf in module.named_parameters():
        leaf.grad = total[name]


def iterated(
    params: tfx.Params,
    coupling: tfx.Coupling,
    module: nn.Module,
    batches: Batches,
    importance: str,
    collect: Collect | None,
    again: bool,
    shares: Sequence[float],
) -> Plans:
    """Torch-Pruning in small steps; for each share the nearest of its networks, be it above or below.

    Raises:
        AssertionError: if a plan of ours for the same units does not compute what its module computes.
    """
    cost, x = tfx.flops(coupling), batches[0][0]
    near: dict[float, tuple[float, tfx.Plan]] = {}
    for keep, pruned in stepped(coupling, module, batches, importance, collect, 100 if again else 200, again):
        plan, left = tfx.Plan(coupling, keep), cost(keep) / cost.total
        for share in shares:
            if share not in near or abs(left - share) < near[share][0]:
                near[share] = abs(left - share), plan
        if left <= min(shares):
            ours = tfx.apply(tfx.cut(params, plan), plan.spec, x)
            torch.testing.assert_close(ours, pruned(x).detach(), rtol=1e-3, atol=1e-3)
            break
    return {share: plan for share, (_, plan) in near.items()}


def stepped(
    coupling: tfx.Coupling,
    original: nn.Module,
    batches: Batches,
    importance: str,
    collect: Collect | None,
    steps: int,
    again: bool,
) -> Iterator[tuple[NDArray[np.bool_], nn.Module]]:
    """The units that its pruner keeps after each step, and its module."""
    module = copy.deepcopy(original)
    names = {m: name for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    last = next(reversed(names))
    pruner = torch_pruning.pruner.BasePruner(
        module, batches[0][0][:2], getattr(torch_pruning.importance, f"{importance}Importance")(),
        ignored_layers=[last], global_pruning=True, pruning_ratio=1.0, max_pruning_ratio=MOST, iterative_steps=steps,
    )  # fmt: skip
    outputs = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)
    alive = {layer: np.arange(len(layer.weight)) for layer in names}
    for step in range(steps - 1):
        if collect and (again or not step):
            collect(module, batches)
        for group in pruner.step(interactive=True):
            for dep, gone in group:
                if dep.handler in outputs and dep.target.module in alive:
                    alive[dep.target.module] = np.delete(alive[dep.target.module], gone)
            group.prune()
        keep = np.ones(len(coupling), bool)
        for layer, name in names.items():
            units = coupling.unit_ids(f"{name}.weight", 0)
            keep[units[:, np.setdiff1d(np.arange(units.shape[1]), alive[layer])].ravel()] = False
        yield keep, module

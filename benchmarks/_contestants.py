"""The contestants of the quality benchmark: each says which units stay at each share of the FLOPs.

All look at the same network and the same scored examples, and a layer loses no more than nine of ten units. All answer
with a plan, Torch-Pruning too, so that cost, repair and fine-tuning are the same for all.
"""

from __future__ import annotations

import copy
import warnings
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from _shares import Shares
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

import taylorfx as tfx
from taylorfx.scoring.criteria import Criterion
from taylorfx.scoring.losses import Loss

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch_pruning
except ImportError:
    torch_pruning = None

MOST = 0.9
DRAWS = 10
STEPS = 10

Batches = Sequence[tuple[Tensor, Tensor]]
Plans = Mapping[float, tfx.Plan]
"""By the share of the FLOPs, of the parameters, or of the measured time, that may remain."""

Contestant = Callable[[Sequence[float]], Plans]

Collect = Callable[[nn.Module, Loss, Batches], None]
"""Gives every parameter the ``.grad`` that an importance of Torch-Pruning looks at."""

BATCH = 256
"""Examples at a time where time is measured: as many as make layers of this size worth their calls."""


@dataclass(frozen=True)
class Case:
    """What all contestants look at.

    Attributes:
        module: the same network for Torch-Pruning.
        protect: globs of the scopes that stay whole.
        shares: what shares are of.
    """

    params: tfx.Params
    spec: tfx.Spec
    module: nn.Module
    batches: Batches
    loss: Loss = F.cross_entropy
    protect: tuple[str, ...] = ()
    shares: Shares = field(default_factory=partial(Shares.of, "FLOPs", BATCH))

    @cached_property
    def coupling(self) -> tfx.Coupling:
        return tfx.couple(self.params, self.spec)

    @cached_property
    def deep(self) -> tfx.Coupling:
        """With branches."""
        return tfx.couple(self.params, self.spec, branches=True)

    def measure(self, **options: Any) -> tfx.Statistics:
        return tfx.measure(self.params, self.spec, self.batches, self.coupling, loss=self.loss, **options)

    def asked(self, share: float) -> dict[str, Any]:
        """Budget and constraints, as `select` and `joint` take them."""
        return {"budget": self.shares.budget(share), "most": MOST, "protect": self.protect}


@dataclass(frozen=True)
class Ranked:
    """The units with the lowest scores leave, or those with the lowest for what they cost."""

    case: Case
    scores: Tensor
    per_cost: bool = False
    per_layer: bool = False

    def __call__(self, shares: Sequence[float]) -> Plans:
        how = {"per_cost": self.per_cost, "per_layer": self.per_layer}
        return {s: tfx.select(self.scores, self.case.coupling, **how, **self.case.asked(s)) for s in shares}


@dataclass(frozen=True)
class Joint:
    """Units leave together."""

    case: Case
    stats: tfx.Statistics
    swaps: bool = True
    cautious: bool = False

    def __call__(self, shares: Sequence[float]) -> Plans:
        coupling = self.case.coupling
        how = {"swaps": self.swaps, "cautious": self.cautious}
        return {s: tfx.joint(self.stats, coupling, **how, **self.case.asked(s)) for s in shares}


@dataclass(frozen=True)
class Stepwise:
    """Units leave in steps of equal ratio, each measured on what the one before has left; together, or by a score."""

    case: Case
    criterion: Criterion | None = None
    cautious: bool = True

    def __call__(self, shares: Sequence[float]) -> Plans:
        last = min(shares)
        ways = sorted({*shares, *(last ** (k / STEPS) for k in range(1, STEPS))}, reverse=True)
        plans = self.along(map(self.case.shares.budget, ways))
        return {share: plan for share, plan in zip(ways, plans, strict=True) if share in shares}

    def along(self, ways: Iterable[tfx.Budget]) -> Iterator[tfx.Plan]:
        """What stays of the whole network after each step."""
        case = self.case
        steps = tfx.iterate(
            case.params, case.spec, case.batches, budgets=ways, loss=case.loss, criterion=self.criterion,
            cautious=self.cautious, protect=case.protect, most=MOST,
        )  # fmt: skip
        return accumulate((plan for *_, plan in steps), tfx.compose)


@dataclass(frozen=True)
class Prune:
    """What `tfx.prune` does for each share, by default or with these keywords."""

    case: Case
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, shares: Sequence[float]) -> Plans:
        case = self.case
        prune = partial(tfx.prune, case.params, case.spec, case.batches, loss=case.loss, **self.options)
        return {share: prune(**case.asked(share)).plan for share in shares}


def drawn(case: Case, generator: torch.Generator) -> Case:
    """The same with labels drawn from the network itself."""
    with torch.no_grad():
        batches = [(x, tfx.criteria.sampled(tfx.apply(case.params, case.spec, x), generator)) for x, _ in case.batches]
    return replace(case, batches=batches)


def of_outputs(case: Case, generator: torch.Generator) -> Case:
    """The same with outputs for the loss: each example's are projected at random (on a normal vector).

    The mean square of the projected change is that of the outputs themselves, so `joint` removes what changes these
    least. Targets are not needed, and derivatives do not vanish where the loss does.
    """
    with torch.no_grad():
        outputs = [tfx.apply(case.params, case.spec, x) for x, _ in case.batches]
    drawn = [torch.randn(y.shape, generator=generator) for y in outputs]
    batches = [(x, projection) for (x, _), projection in zip(case.batches, drawn, strict=True)]
    return replace(case, batches=batches, loss=projected)


def projected(outputs: Tensor, projections: Tensor) -> Tensor:
    return (outputs * projections).flatten(1).sum(1).mean()


def contestants(case: Case, seed: int) -> dict[str, Contestant]:
    """All of them by name, in the order of the tables; what they measure is measured once."""
    coupling = case.coupling
    normed = bool(tfx.tree.flatten(tfx.partition(case.params, case.spec)[1]))
    stats, raw = case.measure(rows=True), case.measure(at_writes=True, training=normed)
    centers = tfx.repair.means(case.params, case.spec, case.batches, coupling).centers(coupling)
    around = case.measure(rows=True, around=centers)
    per = f"per {case.shares.by.removesuffix('s')}"
    scores = {
        criterion.__name__: criterion(stats, coupling)
        for criterion in (tfx.taylor, tfx.fisher, tfx.criteria.second_order)
    }
    priced = {f"{name} {per}": values for name, values in scores.items()}
    priced[f"taylor around the mean, {per}"] = tfx.taylor(around, coupling)
    scores["weight_l2, per_layer_l2"] = tfx.criteria.weight_l2(
        case.params, coupling, normalizer=tfx.criteria.per_layer_l2
    )
    scores["compat"] = tfx.criteria.compat(raw, coupling)
    generator = torch.Generator().manual_seed(seed)
    scores |= {f"random {k}": tfx.criteria.random(coupling, generator) for k in range(DRAWS)}
    outputs, repaired = of_outputs(case, generator), {"repair": tfx.reconstruct}
    return {
        "prune": Prune(case),
        "prune, repaired at every step": Prune(case, repaired),
        "prune, branches too": Prune(case, {"branches": True}),
        "prune, branches too, repaired at every step": Prune(case, repaired | {"branches": True}),
        "prune, repaired once": Prune(case, repaired | {"steps": 1}),
        "joint, repaired at every step": Prune(
            case, repaired | {"steps": 4, "choose": partial(tfx.joint, cautious=True)}
        ),
        "joint": Joint(case, stats),
        "joint, cautious": Joint(case, stats, cautious=True),
        "joint without swaps": Joint(case, stats, swaps=False),
        "joint around the mean": Joint(case, around),
        "joint, measured at every step": Stepwise(case, cautious=False),
        "joint, cautious, measured at every step": Stepwise(case),
        "joint on outputs": Joint(case, outputs.measure(rows=True)),
        "joint on outputs, measured at every step": Stepwise(outputs, cautious=False),
        "joint on outputs, cautious, measured at every step": Stepwise(outputs),
        f"fisher {per}, measured at every step": Stepwise(case, tfx.fisher),
        **{name: Ranked(case, values, per_cost=True) for name, values in priced.items()},
        **{name: Ranked(case, values) for name, values in scores.items()},
        "weight_l2, equal in all layers": Ranked(case, tfx.criteria.weight_l2(case.params, coupling), per_layer=True),
        **({"prune, labels drawn": Prune(drawn(case, generator))} if case.loss is F.cross_entropy else {}),
        **(torch_prunings(case) if torch_pruning else {}),
    }


def torch_prunings(case: Case) -> dict[str, Contestant]:
    """Torch-Pruning's criteria, global: scored once as ours are, and for Taylor also anew at each of its steps."""
    kinds = {
        "GroupMagnitude": ("GroupMagnitude", None, False),
        "GroupTaylor": ("GroupTaylor", slopes, False),
        "GroupTaylor, scored at every step": ("GroupTaylor", slopes, True),
        "GroupHessian": ("GroupHessian", squares, False),
    }
    return {f"Torch-Pruning {name}": partial(iterated, case, *kind) for name, kind in kinds.items()}


def slopes(module: nn.Module, loss: Loss, batches: Batches) -> None:
    """Gradients of the mean loss, as its scripts collect them for `GroupTaylorImportance`."""
    module.zero_grad()
    for x, y in batches:
        (loss(module(x), y) / len(batches)).backward()


def squares(module: nn.Module, loss: Loss, batches: Batches) -> None:
    """The mean of the examples' squared gradients, which `GroupHessianImportance` is about.

    Its ``accumulate_grad`` (1.6.1) looks for a parameter by its name among keys that are parameters, finds none and
    starts anew with each example, so that the last one's would be all there is: what it was meant to sum is given here.
    """
    leaves = {name: leaf.detach() for name, leaf in module.named_parameters()}
    rest = dict(module.named_buffers())

    def alone(leaves: Mapping[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return loss(torch.func.functional_call(module, (leaves, rest), (x[None],)), y[None])

    each = torch.func.vmap(torch.func.grad(alone), (None, 0, 0))
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    count = sum(len(y) for _, y in batches)
    for x, y in ((x, y) for batch in batches for x, y in zip(*(part.split(32) for part in batch), strict=True)):
        for name, grads in each(leaves, x, y).items():
            total[name] += grads.square().sum(0) / count
    for name, leaf in module.named_parameters():
        leaf.grad = total[name]


def iterated(case: Case, importance: str, collect: Collect | None, again: bool, shares: Sequence[float]) -> Plans:
    """Torch-Pruning in small steps; for each share the nearest of its networks, be it above or below.

    By time it is the first that `Latency` would take, found by bisection.

    Raises:
        AssertionError: if a plan of ours for the same units does not compute what its module computes.
    """
    x, plans = case.batches[0][0], list[tfx.Plan]()
    counted, least = case.shares, min(shares)
    if counted.by == "time":  # which is measured at few of the steps; half of it takes more than half of the FLOPs
        counted, least = Shares.of("FLOPs", BATCH), least / 4
    for keep, pruned in stepped(case, importance, collect, 100 if again else 200, again):
        plans.append(tfx.Plan(case.coupling, keep))
        if counted.left(plans[-1]) <= least:
            ours = tfx.apply(tfx.cut(case.params, plans[-1]), plans[-1].spec, x)
            torch.testing.assert_close(ours, pruned(x).detach(), rtol=1e-3, atol=1e-3)
            break
    if counted is case.shares:
        return {share: min(plans, key=lambda plan: abs(case.shares.left(plan) - share)) for share in shares}
    found = {s: bisect_left(plans, -1.03 * s, key=lambda plan: -case.shares.left(plan)) for s in shares}
    return {share: plans[k] for share, k in found.items() if k < len(plans)}


def stepped(
    case: Case, importance: str, collect: Collect | None, steps: int, again: bool
) -> Iterator[tuple[NDArray[np.bool_], nn.Module]]:
    """The units that its pruner keeps after each step, and its module."""
    module, coupling = copy.deepcopy(case.module), case.coupling
    names = {m: name for name, m in module.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}
    units = {layer: coupling.unit_ids(f"{name}.weight", 0) for layer, name in names.items()}  # factors, positions
    held = [k for k, scope in enumerate(coupling.scopes) if any(fnmatchcase(scope, glob) for glob in case.protect)]
    free = np.append(~np.isin(coupling.scope, held), False)  # what unit -1 is
    heads = {layer: len(np.unique(ids[0])) for layer, ids in units.items() if len(ids) > 1}
    if heads:  # its pruner breaks off at a step in which no head leaves; queries, keys and values share theirs
        steps = min(steps, sum(heads.values()) // 3)
    pruner = torch_pruning.pruner.BasePruner(
        module, case.batches[0][0][:2], getattr(torch_pruning.importance, f"{importance}Importance")(),
        ignored_layers=[layer for layer, ids in units.items() if not free[ids].any()],
        global_pruning=True, pruning_ratio=1.0, max_pruning_ratio=MOST, iterative_steps=steps,
        num_heads=heads, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=1.0 if heads else 0.0,
    )  # fmt: skip
    outputs = (torch_pruning.prune_conv_out_channels, torch_pruning.prune_linear_out_channels)
    alive = {layer: np.arange(len(layer.weight)) for layer in names}
    for step in range(steps - 1):
        if collect and (again or not step):
            collect(module, case.loss, case.batches)
        for group in pruner.step(interactive=True):
            for dep, gone in group:
                if dep.handler in outputs and dep.target.module in alive:
                    alive[dep.target.module] = np.delete(alive[dep.target.module], gone)
            group.prune()
        keep = np.ones(len(coupling) + 1, bool)
        for layer, ids in units.items():
            keep[np.setdiff1d(ids, ids[:, alive[layer]])] = False  # nothing of theirs is left
        yield keep[:-1], module

"""What the examples share: functional SGD with momentum, accuracy and latency.

Nothing here knows about pruning. Parameters and momentum are plain trees of tensors, every function returns new ones,
and after a cut the same functions go on with the smaller trees:

    params, momentum = (tfx.cut(tree, plan) for tree in (params, momentum))
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from torch.nn import functional as F

import taylorfx as tfx
from taylorfx.scoring.losses import Loss

Schedule = Callable[[float], float]
"""The learning rate, from the share of the steps that are done (0 to 1)."""


def cosine(peak: float, *, warmup: float = 0.0) -> Schedule:
    """Straight up to ``peak`` during the first share ``warmup`` of the steps, then down to 0 along half a cosine."""

    def schedule(done: float) -> float:
        if done < warmup:
            return peak * done / warmup
        return peak * (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2

    return schedule


def at_rest(params: tfx.Params, spec: tfx.Spec) -> tfx.Params:
    """Momentum to begin with: zeros in the shape of everything that is trained."""
    trained, _ = tfx.partition(params, spec)
    return tfx.tree.map_paths(lambda path, leaf: torch.zeros_like(leaf), trained)


def sgd_step(
    params: tfx.Params,
    momentum: tfx.Params,
    spec: tfx.Spec,
    x: Tensor,
    y: Tensor,
    *,
    lr: float,
    beta: float = 0.9,
    weight_decay: float = 0.0,
    generator: torch.Generator | None = None,
    loss: Loss = F.cross_entropy,
) -> tuple[tfx.Params, tfx.Params, Tensor]:
    """One step as ``torch.optim.SGD`` takes it: new parameters, new momentum, and the loss."""
    trained, buffers = tfx.partition(params, spec)

    def objective(trained: tfx.Params) -> tuple[Tensor, tfx.Params]:
        outputs, new = tfx.train(tfx.tree.combine(trained, buffers), spec, x, generator=generator)
        return loss(outputs, y), tfx.partition(new, spec)[1]

    grads, (value, running) = torch.func.grad_and_value(objective, has_aux=True)(trained)
    slopes, weights = tfx.tree.flatten(grads), tfx.tree.flatten(trained)
    moved = {k: beta * m + slopes[k] + weight_decay * weights[k] for k, m in tfx.tree.flatten(momentum).items()}
    stepped = tfx.tree.unflatten({path: weight - lr * moved[path] for path, weight in weights.items()})
    return tfx.tree.combine(stepped, running), tfx.tree.unflatten(moved), value


def fit(
    params: tfx.Params,
    momentum: tfx.Params,
    spec: tfx.Spec,
    images: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    batch_size: int,
    lr: Schedule,
    generator: torch.Generator,
    beta: float = 0.9,
    weight_decay: float = 0.0,
    loss: Loss = F.cross_entropy,
    label: str = "train",
) -> tuple[tfx.Params, tfx.Params]:
    """Train for some epochs, in a new order each; ``generator`` lives on the images' device."""
    batch_size = min(batch_size, len(images))
    per_epoch = len(images) // batch_size
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("loss {task.fields[loss]}"))
    with Progress(*columns, TimeRemainingColumn(), transient=True) as progress:
        task = progress.add_task(label, total=epochs * per_epoch, loss="-")
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=generator, device=generator.device)
            losses = []
            for k, index in enumerate(order[: per_epoch * batch_size].split(batch_size)):
                rate = lr((epoch * per_epoch + k) / (epochs * per_epoch))
                params, momentum, value = sgd_step(
                    params, momentum, spec, images[index], targets[index],
                    lr=rate, beta=beta, weight_decay=weight_decay, generator=generator, loss=loss,
                )  # fmt: skip
                losses.append(value)
                progress.advance(task)
            progress.update(task, loss=f"{torch.stack(losses).mean().item():.4f}")
    return params, momentum


def learn(
    spec: tfx.Spec,
    images: Tensor,
    targets: Tensor,
    *,
    epochs: int,
    generator: torch.Generator,
    peak: float = 0.1,
    label: str = "train",
) -> tfx.Params:
    """A network from the start: as the quickstart trains its own."""
    params: tfx.Params = tfx.init(spec, generator)
    params, _ = fit(
        params, at_rest(params, spec), spec, images, targets, epochs=epochs, batch_size=64,
        lr=cosine(peak, warmup=0.1), weight_decay=5e-4, generator=generator, label=label,
    )  # fmt: skip
    return params


def some(
    images: Tensor, targets: Tensor, count: int, generator: torch.Generator, batch_size: int = 64
) -> list[tuple[Tensor, Tensor]]:
    """Some of the examples, drawn without repetition, in batches."""
    chosen = torch.randperm(len(images), generator=generator)[:count].split(batch_size)
    return [(images[index], targets[index]) for index in chosen]


def arguments(doc: str | None, smoke: Mapping[str, Any], **options: tuple[Any, str]) -> argparse.Namespace:
    """The options of a command line: defaults, or types of what need not be there, and helps by name.

    All have ``--seed``, and ``--smoke``, which sets some of the others.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, text) in {"seed": (0, "of all that is random"), **options}.items():
        if isinstance(default, type):
            parser.add_argument(f"--{name}", type=default, help=text)
        elif isinstance(default, bool):
            parser.add_argument(f"--{name}", action="store_true", help=text)
        elif isinstance(default, list):
            parser.add_argument(f"--{name}", type=type(default[0]), nargs="+", default=default, help=text)
        else:
            parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    parser.add_argument("--smoke", action="store_true", help="seconds: few epochs, a narrow network")
    found = parser.parse_args()
    if found.smoke:
        vars(found).update(smoke)
    return found


@torch.inference_mode()
def accuracy(params: tfx.Params, spec: tfx.Spec, images: Tensor, targets: Tensor, *, batch_size: int = 500) -> float:
    """The share of the images that the network, in inference mode, puts into their class."""
    batches = zip(images.split(batch_size), targets.split(batch_size), strict=True)
    right = sum((tfx.apply(params, spec, x).argmax(1) == y).sum() for x, y in batches)
    return float(right) / len(images)


@torch.inference_mode()
def latency(params: tfx.Params, spec: tfx.Spec, x: Tensor, *, repeats: int = 30) -> float:
    """Seconds that a batch takes in inference mode: the fastest of some repeats, as others can only slow it down."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        tfx.apply(params, spec, x)
        if x.device.type == "cuda":
            torch.cuda.synchronize(x.device)
        times.append(time.perf_counter() - start)
    return min(times)

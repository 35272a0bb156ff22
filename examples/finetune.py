"""A training loop in plain PyTorch, pruned as it goes, killed at any time, and resumed to the same bits.

AdamW, a cosine schedule, bfloat16 autocast, an average of the weights, and a checkpoint after every epoch. At some
epochs units leave: module, optimizer, schedule and average are carried over the cut, and the loop goes on with a
smaller module of the same class, which also learns from the unpruned one. It ends in ONNX. Started again after a kill,
it goes on from the last epoch, and computes what it would have computed. A quarter of a minute on one core:

    python examples/finetune.py --folder /tmp/run
    python examples/finetune.py --folder /tmp/other --network resnet18 --size 32    # of torchvision
"""

from __future__ import annotations

import argparse
import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from quickstart import digits
from rich.progress import track
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset
from training import arguments, some

import taylorfx as tfx
from taylorfx.interop import carry, reschedule
from taylorfx.interop.huggingface import distillation

PARTS = ("model", "average", "optimizer", "scheduler")
"""What has a state_dict."""


# The network: any module would do.


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)
        self.conv2, self.bn2 = nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after)
        self.shortcut = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return torch.relu(inner + self.shortcut(x))


class Small(nn.Module):
    """A residual network of three blocks."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2), Block(2 * width, 4 * width, 2))
        self.dropout, self.head = nn.Dropout(0.1), nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.body(self.stem(x)).mean((2, 3))))  # type: ignore[no-any-return]


def network(options: argparse.Namespace) -> nn.Module:
    """The network of this file, or one of torchvision's, with random weights."""
    if options.network == "small":
        return Small(options.width)
    from torchvision.models import get_model

    return get_model(options.network, num_classes=10)  # type: ignore[no-any-return]


# The state of a run, which a checkpoint brings back.


@dataclass
class Run:
    """All that changes from step to step, with torch's own random numbers."""

    model: nn.Module
    average: AveragedModel
    optimizer: Optimizer
    scheduler: CosineAnnealingLR
    generator: torch.Generator
    epoch: int = 0
    share: float = 1.0
    teacher: nn.Module | None = None

    @staticmethod
    def of(model: nn.Module, options: argparse.Namespace, steps: int) -> Run:
        """A run at its start; ``steps`` are those of all epochs."""
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95), use_buffers=True)
        optimizer = AdamW(model.named_parameters(), options.lr, weight_decay=0.01)
        scheduler = CosineAnnealingLR(optimizer, steps)
        return Run(model, average, optimizer, scheduler, torch.Generator().manual_seed(options.seed))


def write(path: Path, value: object) -> None:
    """A file that is whole whenever there is one: under another name until it is."""
    temporary = path.with_suffix(".part")
    torch.save(value, temporary)
    temporary.replace(path)


def checkpoint(run: Run, folder: Path) -> None:
    """Write all of a run but the two networks that `prune` has written."""
    states = {name: getattr(run, name).state_dict() for name in PARTS}
    random = {"torch": torch.get_rng_state(), "loader": run.generator.get_state()}
    write(folder / "checkpoint.pt", {**states, "random": random, "epoch": run.epoch, "share": run.share})


def resume(model: nn.Module, options: argparse.Namespace, steps: int) -> Run:
    """The run of the last checkpoint, or a new one; ``model`` is the unpruned network, whatever its weights are."""
    if not (options.folder / "checkpoint.pt").exists():
        return Run.of(model, options, steps)
    saved = torch.load(options.folder / "checkpoint.pt")
    share, small = saved["share"], model
    if share < 1:
        small = tfx.to_torch(*tfx.load(options.folder / f"pruned-{share}.safetensors"), like=model)
        model.load_state_dict(torch.load(options.folder / "unpruned.pt"))
    run = Run.of(small, options, steps)
    for name in PARTS:
        getattr(run, name).load_state_dict(saved[name])
    run.epoch, run.share, run.teacher = saved["epoch"], share, model.eval() if share < 1 else None
    run.generator.set_state(saved["random"]["loader"])
    torch.set_rng_state(saved["random"]["torch"])
    return run


# What happens in an epoch.


def prune(run: Run, share: float, data: tuple[Tensor, Tensor], folder: Path) -> None:
    """Cut the module, and carry over what trains it; the teacher is the average as it was before the first cut."""
    if run.teacher is None:
        run.teacher = run.average.module.eval()
        write(folder / "unpruned.pt", run.teacher.state_dict())
    old, batches = run.model, some(*data, 512, run.generator)
    params, spec = tfx.from_torch(old, data[0][:2])
    class_holds = tfx.interop.holdable(old, params, spec)
    budgets = [tfx.Flops(share / run.share)]
    [(params, spec, plan)] = tfx.iterate(params, spec, batches, budgets=budgets, constraints=class_holds)
    tfx.save(folder / f"pruned-{share}.safetensors", params, spec)

    run.model, run.share = tfx.to_torch(params, spec, like=old), share
    run.optimizer = carry(run.optimizer, plan, run.model)
    run.scheduler = reschedule(run.scheduler, run.optimizer)
    run.average = carry(run.average, plan, run.model)
    print(f"pruned to {share:.0%} of the FLOPs: {plan.keep.sum()} of {len(plan.keep)} units stay", flush=True)


def train(run: Run, loader: DataLoader[tuple[Tensor, ...]]) -> None:
    """An epoch, as of any module."""
    run.model.train()
    for x, y in track(loader, f"epoch {run.epoch + 1}", transient=True):
        moved = x.roll((*torch.randint(-1, 2, (2,)).tolist(),), (2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            logits = run.model(moved)
            loss = F.cross_entropy(logits, y)
            if run.teacher is not None:
                with torch.no_grad():
                    known = run.teacher(moved)
                loss = loss + distillation(logits, known).mean()
        run.optimizer.zero_grad()
        loss.backward()
        run.optimizer.step()
        run.scheduler.step()
        run.average.update_parameters(run.model)
    run.epoch += 1


@torch.inference_mode()
def accuracy(module: nn.Module, images: Tensor, targets: Tensor) -> float:
    """The share of the images that a module puts into their class."""
    right = [module.eval()(x).argmax(1) == y for x, y in zip(images.split(256), targets.split(256), strict=True)]
    return float(torch.cat(right).float().mean())


def main() -> None:
    options = arguments(
        __doc__, {"epochs": 4, "width": 8, "images": 640},
        folder=(Path("finetune"), "of the checkpoints; one that has some is gone on with"),
        network=("small", "that of this file, or the name of one of torchvision's"), width=(24, "of the small network"),
        size=(8, "height and width of the images; torchvision's networks need 32 or more"),
        images=(1257, "to learn from"), epochs=(15, "in all"), lr=(3e-3, "at the start"),
        shares=([0.8, 0.6], "of the FLOPs, that remain after a third of the epochs, two thirds, ..."),
    )  # fmt: skip
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    options.folder.mkdir(parents=True, exist_ok=True)
    images, targets, test, expected = digits()
    targets = targets[: options.images]
    images, test = (F.interpolate(x, options.size).repeat(1, 3, 1, 1) for x in (images[: options.images], test))
    steps = options.epochs * (len(images) // 64)
    cuts = {options.epochs * (k + 1) // (len(options.shares) + 1): share for k, share in enumerate(options.shares)}

    run = resume(network(options), options, steps)
    loader = DataLoader(TensorDataset(images, targets), 64, shuffle=True, drop_last=True, generator=run.generator)
    while run.epoch < options.epochs:
        if run.epoch in cuts:  # which a run that was killed here does again
            prune(run, cuts[run.epoch], (images, targets), options.folder)
        train(run, loader)
        checkpoint(run, options.folder)
        quality = accuracy(run.average.module, test, expected)
        print(f"epoch {run.epoch}: accuracy {quality:.1%} at {run.share:.0%} of the FLOPs", flush=True)

    if any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")):
        print("ONNX is left out: pip install onnx onnxscript")
        return
    file = options.folder / "network.onnx"
    batch = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(run.average.module, (test[:2],), file, dynamo=True, dynamic_shapes=batch, verbose=False)
    print(f"written: {file}")


if __name__ == "__main__":
    main()

"""Scoring one batch against one full forward and backward pass of the same model and batch.

    python benchmarks/scoring.py                   # seven models
    python benchmarks/scoring.py resnet50 --runs 9

CPU time of all threads, in runs that take turns; each is divided by the full pass of its turn. "plain" is
`taylorfx.derivatives` of the network as it is, "folded" of the copy that `taylorfx.measure` makes once per call, and
"last" of that copy on images in `torch.channels_last`. "fold" is the making of the copy. "peer" is Torch-Pruning's
Taylor where it is installed: its backward pass and its importance of every group, which is found beforehand.

Peak memory is taken in a child process for each, above what is held before the pass: where Linux can reset the peak.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _torchvision import library
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import taylorfx as tfx

# Examples and, for images, their height and width.
MODELS = {
    "resnet50": (8, 160), "mobilenet_v2": (8, 160), "vgg16_bn": (4, 128), "densenet121": (8, 160),
    "convnext_tiny": (8, 160), "bert": (4, 128), "vit_b_16": (4, 224),
}  # fmt: skip
TOKENS = ("bert", "vit_b_16")  # where no image goes through convolutions
MODULES: dict[str, nn.Module] = {}
KINDS = ("full", "plain", "folded", "last", "peer", "fold")


class Logits(nn.Module):
    """A classifier of transformers that gives out a tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        return self.module(input_ids=tokens).logits


def model(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The module in inference mode, with random weights, and a batch."""
    torch.manual_seed(0)
    count, size = MODELS[name]
    models = library()  # before transformers, which imports it, too
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(attn_implementation="eager", num_labels=10)
        return (
            Logits(BertForSequenceClassification(config)).eval(),
            torch.randint(999, (count, size)),
            torch.arange(count),
        )
    module = models.get_model(name, weights=None).eval()
    return module, torch.randn(count, 3, size, size), torch.arange(count)


def peer(module: nn.Module, x: Tensor, full: Callable[[], object]) -> Callable[[], object]:
    """Torch-Pruning's Taylor importance of every group of the model, after a full pass."""
    import torch_pruning

    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(module, x[:1])
    groups = list(graph.get_all_groups(ignored_layers=[list(module.modules())[-1]]))
    importance = torch_pruning.importance.GroupTaylorImportance()

    def run() -> None:
        full()
        for group in groups:
            importance(group)

    return run


def passes(name: str, kinds: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """What is timed, by its kind; what a model has no kind of is left out."""
    module, x, y = model(name)
    MODULES[name] = module

    def full() -> None:
        module.zero_grad(set_to_none=True)
        cross_entropy(module(x), y).backward()

    found: dict[str, Callable[[], object]] = {"full": full}
    if "peer" in kinds:
        try:
            found["peer"] = peer(module, x, full)
        except Exception as error:  # the table shows what fails, and goes on
            print(f"{name}: no peer, {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    if not {*kinds} - {"full", "peer"}:
        return found
    params, spec = tfx.from_torch(module, (x,))
    coupling = tfx.couple(params, spec)
    # Folded beforehand, so that a pass is one of many of the same call; its reads are those of the original.
    copy = tfx.fold(params, spec)
    folded = (*copy, tfx.couple(*copy))
    found["fold"] = lambda: tfx.fold(params, spec)
    found["plain"] = lambda: tfx.derivatives(params, spec, x, y, coupling, fold=False)
    found["folded"] = lambda: tfx.derivatives(*folded[:2], x, y, folded[2], fold=False)
    if name not in TOKENS:
        last = x.to(memory_format=torch.channels_last)
        found["last"] = lambda: tfx.derivatives(*folded[:2], last, y, folded[2], fold=False)
    return {kind: found[kind] for kind in kinds if kind in found}


def timed(name: str, runs: int) -> dict[str, list[float]]:
    """CPU seconds of every kind, one number per turn."""
    found = passes(name, KINDS)
    times: dict[str, list[float]] = {kind: [] for kind in found}
    for turn in range(runs + 1):
        for kind, run in found.items():
            start = time.process_time()
            run()
            if turn:  # the first one warms up
                times[kind].append(time.process_time() - start)
    return times


def status(key: str) -> int:
    """A number of this process in kB, from the kernel."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def highest() -> int:
    """The most memory that this process has held, in kB."""
    return (
        status("VmHWM:") if Path("/proc/self/status").exists() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )


def peak(name: str, kind: str) -> float:
    """Megabytes that one pass holds at most, above what is held before it (the gradients are the full pass's own)."""
    found = passes(name, (kind,))
    found[kind]()
    MODULES[name].zero_grad(set_to_none=True)
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # the highest is the present from here on
    before = highest()
    found[kind]()
    return (highest() - before) / 1024


def child(name: str, kind: str) -> float | None:
    """`peak` in a process of its own, which gives memory back at once."""
    freeing = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, name, "--peak", kind]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **freeing})
    return float(done.stdout.split()[-1]) if done.returncode == 0 else None


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(MODELS))
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--peak", choices=KINDS, help="only the peak memory of one kind, in MB")
    parser.add_argument("--out", type=Path, help="where to write the numbers as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(peak(options.names[0], options.peak))
        return
    rows: dict[str, Any] = {}
    print("| model | " + " | ".join(KINDS[1:]) + " |")
    for name in options.names:
        times = timed(name, options.runs)
        ratios = {kind: [a / b for a, b in zip(values, times["full"], strict=True)] for kind, values in times.items()}
        cells = [quartiles(ratios[kind]) if kind in ratios else "-" for kind in KINDS[1:]]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        rows[name] = {"seconds": times}
    if not options.no_memory:
        print("\npeak memory\n| model | full, MB | " + " | ".join(KINDS[1:-1]) + " |")
        for name in options.names:
            peaks = {kind: child(name, kind) for kind in KINDS[:-1] if kind in rows[name]["seconds"]}
            cells = [f"{peaks[kind] / peaks['full']:.2f}" if peaks.get(kind) else "-" for kind in KINDS[1:-1]]
            print(f"| {name} | {peaks['full']:.0f} | {' | '.join(cells)} |", flush=True)
            rows[name]["megabytes"] = peaks
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

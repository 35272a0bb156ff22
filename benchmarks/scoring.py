"""Scoring one batch against one full forward and backward pass of the same model and batch.

    python benchmarks/scoring.py                   # nine models, two batches each, an hour
    python benchmarks/scoring.py --quick           # three small ones, some minutes
    python benchmarks/scoring.py resnet50 --runs 9
    python benchmarks/scoring.py --out scoring.json --write   # continues, and writes the tables of README.md

CPU time of all threads, and wall time, in runs that take turns; each is divided by the full pass of its turn. Every
model is timed in a process of its own, in which threads that wait for each other sleep. Peak memory is taken in one
more for each kind, above what is held before the pass: where Linux can reset the peak. `_passes.py` says what runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _passes import KINDS, LONG, MODELS, QUICK, TOKENS, Size, passes
from cutting import peak

import taylorfx as tfx

HERE = Path(__file__).parent
MARKERS = "<!-- scoring: begin -->", "<!-- scoring: end -->"
TIMED = [kind for kind in KINDS if kind != "micro"]
SHOWN = TIMED[1:]
HELD = [kind for kind in KINDS if kind not in ("limit", "copy")]
TARGETS = {
    "resnet50": (0.68, 0.50), "mobilenet_v2": (0.55, 0.45), "densenet121": (0.75, 0.65), "vgg16_bn": (0.58, 0.50),
    "convnext_tiny": (0.65, 0.60), "bert": (0.62, 0.62), "vit_b_16": (0.62, 0.62), "llama": (0.75, 0.75),
    "llama_bfloat16": (0.75, 0.75), "llama_float16": (0.75, 0.75),
}  # fmt: skip
"""What ``same`` and ``measure`` are to cost at most, as shares of the full pass."""

Rows = dict[str, Any]


def timed(name: str, size: Size, runs: int) -> dict[str, list[tuple[float, float]]]:
    """Seconds of CPU and of wall time of every kind, one pair per turn."""
    found = passes(name, size, tuple(TIMED))
    gc.freeze()  # what has been set up is not searched for garbage in the middle of some turn
    times: dict[str, list[tuple[float, float]]] = {kind: [] for kind in found}
    for turn in range(runs + 1):
        for kind, run in found.items():
            start = time.process_time(), time.perf_counter()
            run()
            if turn:  # the first one warms up
                times[kind].append((time.process_time() - start[0], time.perf_counter() - start[1]))
    return times


def growth(runs: int) -> dict[int, list[float]]:
    """CPU seconds of `taylorfx.measure` for so many examples, in batches of 16, of MobileNetV2 on small images."""
    from _passes import model

    module, x, y = model("mobilenet_v2", (16, 64))
    params, spec = tfx.from_torch(module, (x,))
    coupling = tfx.couple(params, spec)
    times: dict[int, list[float]] = {16 * 4**k: [] for k in range(4)}
    for turn in range(runs + 1):
        for count, found in times.items():
            start = time.process_time()
            tfx.measure(params, spec, [(x, y)] * (count // 16), coupling)
            if turn:
                found.append(time.process_time() - start)
    return times


def holds(name: str, size: Size, kind: str) -> float | None:
    """Megabytes that one pass holds at most, above what is held before it (the full pass's gradients are its own)."""
    run = passes(name, size, (kind,))[kind]
    run()
    return peak(run)


def child(task: Sequence[Any], options: argparse.Namespace) -> Any:
    """What a process of its own says; none where it fails. It gives memory back at once."""
    settings = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if task[0] == "peak" else {}
    command = [sys.executable, __file__, "--threads", str(options.threads), "--task", json.dumps(task)]
    environment = {**os.environ, **settings, "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def quartiles(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "-"
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def shares(times: Mapping[str, Sequence[Sequence[float]]], kind: str, clock: int) -> list[float]:
    """What a kind took, as a share of the full pass of its turn."""
    return [a[clock] / b[clock] for a, b in zip(times.get(kind, ()), times["full"], strict=False)]


def tables(rows: Rows) -> str:
    """All of it as Markdown."""
    parts = []
    models = {name: row for name, row in rows.items() if name != "growth"}
    for clock, title in enumerate(("CPU time", "Wall time")):
        lines = [f"{title} / that of the full pass, median and quartiles:\n"]
        targets = ["target, same layout", "target"] if clock == 0 else []
        lines += [line(["model", "full, s", *SHOWN, *targets]), line(["---"] * (2 + len(SHOWN) + len(targets)))]
        for name, row in models.items():
            if times := row.get("seconds"):
                middle = statistics.median(pair[clock] for pair in times["full"])
                goal = [f"{x:.2f}" for x in TARGETS.get(row["model"], ())][: len(targets)]
                cells = [quartiles(shares(times, kind, clock)) for kind in SHOWN]
                lines.append(line([name, f"{middle:.2f}", *cells, *(goal or [""] * len(targets))]))
        parts.append("\n".join(lines))
    lines = ["Peak memory / that of the full pass:\n", line(["model", "full, MB", *HELD[1:]])]
    lines.append(line(["---"] * (1 + len(HELD))))
    for name, row in models.items():
        if (held := row.get("megabytes")) and held.get("full"):
            cells = [f"{held[kind] / held['full']:.2f}" if held.get(kind) else "-" for kind in HELD[1:]]
            lines.append(line([name, f"{held['full']:.0f}", *cells]))
    parts.append("\n".join(lines))
    if found := rows.get("growth", {}).get("seconds"):
        cells = [
            f"{int(count)}: {1000 * statistics.median(values) / int(count):.1f}" for count, values in found.items()
        ]
        parts.append(f"CPU milliseconds of `measure` for an example, by the number of examples: {', '.join(cells)}.")
    return "\n\n".join(parts)


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(rows: Rows, path: Path) -> None:
    """A bar for every kind and model: CPU time as a share of the full pass."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    names = [name for name in rows if rows[name].get("seconds") and name != "growth"]
    kinds = [kind for kind in SHOWN if kind != "copy"]
    figure, axes = plt.subplots(figsize=(12, 3.6), layout="constrained")
    for k, kind in enumerate(kinds):
        found = [shares(rows[name]["seconds"], kind, 0) for name in names]
        at = [j + (k - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for j in range(len(names))]
        middles = [statistics.median(values) if values else 0.0 for values in found]
        axes.bar(at, middles, 0.8 / len(kinds), label=f"{kind}: {KINDS[kind]}", color=f"C{k}")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(names)), [name.replace(", ", "\n") for name in names], fontsize=7)
    axes.set_ylabel("CPU time / full pass")
    axes.legend(fontsize=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def publish(rows: Rows) -> None:
    """Write the tables between the markers of README.md, the numbers into scoring.json, and the plot."""
    readme = HERE / "README.md"
    old = readme.read_text()
    before, after = old.split(MARKERS[0])[0], old.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n\n{tables(rows)}\n\n{MARKERS[1]}{after}")
    (HERE / "scoring.json").write_text(json.dumps(rows) + "\n")
    draw(rows, HERE.parent / "docs" / "scoring.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--quick", action="store_true", help="three small models and images, fewer runs")
    parser.add_argument("--runs", type=int, default=None, help="turns; 7, or 3 if quick")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--no-time", action="store_true")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="the numbers as JSON; what it has is not taken again")
    parser.add_argument("--write", action="store_true", help="the tables of README.md, scoring.json, docs/scoring.png")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.task:
        task, *arguments = options.task
        print(json.dumps({"timed": timed, "peak": holds, "growth": growth}[task](*arguments)))
        return
    sizes = QUICK if options.quick else MODELS
    runs = options.runs or (3 if options.quick else 7)
    rows: Rows = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}

    def keep() -> None:
        if options.out:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")

    names = options.names or [*sizes, "growth"]
    for name in names:
        for size in sizes[name] if name != "growth" else ():
            row = rows.setdefault(f"{name}, {size[0]} x {size[1]}", {"model": name})
            if not options.no_time and "seconds" not in row:
                row["seconds"] = child(("timed", name, size, runs), options)  # none where it fails; the others go on
                keep()
            if not options.no_memory and "megabytes" not in row and (size == sizes[name][0] or name in LONG):
                left_out = {"hooks", "same"} if name in TOKENS else set[str]()
                left_out |= {"plain", "peer", "micro"} if name in LONG else set()
                kinds = [kind for kind in HELD if kind not in left_out]
                row["megabytes"] = {kind: child(("peak", name, size, kind), options) for kind in kinds}
                keep()
    if "growth" in names and not options.no_time and "growth" not in rows:
        rows["growth"] = {"seconds": child(("growth", runs), options)}
        keep()
    print(tables(rows))
    if options.write:
        publish(rows)


if __name__ == "__main__":
    main()

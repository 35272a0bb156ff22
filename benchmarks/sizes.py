"""Published models, captured at one size and run at others: what is right, what is fixed and why, what is not right.

    python benchmarks/sizes.py --quick                        # a dozen small ones
    python benchmarks/sizes.py --only 'resnet|swin'           # those whose name matches
    python benchmarks/sizes.py --group transformers           # all of a group
    python benchmarks/sizes.py --write                        # the rows so far become the table of benchmarks/README.md

Models have random weights in float64. Each is captured with two examples of one size, and run with three of another:
text of one word, half and twice the length; images of another height and width; video that is longer, too. A row says

- **captured**: the largest error against the module, as a share of the largest difference between two examples;
- **cut**: the same of the cut network against the gated one, half of its exact units removed at random;
- **exported**: the same of the cut network's plain module, exported again with free sizes, against the cut network;
- **ONNX**: the same of its ONNX file in onnxruntime, of networks with fewer than ten million parameters;
- **fixed**: what the module itself, or the captured network, says where it does not take the size;
- **capture / export**: the processor time of `from_torch` as a multiple of one plain ``torch.export`` of the module.

A model that fails is a row that says so. Rows are kept in a file (``--rows``), and a run continues after an
interruption.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _proof import Case, randomized
from _sizes import TOLERANCE, elsewhere, said
from _timm import timm_models
from _torchvision import classification, detection, segmentation, small, video
from _transformers import cases
from torch import nn

import taylorfx as tfx
from taylorfx.testing.strategies import random_plan

Makers = dict[str, Callable[[], Case]]
Row = dict[str, Any]

GROUPS: dict[str, Callable[[], Makers]] = {
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "video": video,
    "timm": timm_models,
    "transformers": cases,
}
QUICK = ("resnet", "mobilenet_v3", "shufflenet", "swin", "maxvit", "deeplab", "resnet fpn", "bert, masked", "gpt2",
         "llama", "t5", "whisper")  # fmt: skip
README = Path(__file__).with_name("README.md")
MARK = "<!-- {} of sizes.py -->\n"
ROUNDINGS = 4
"""How many times what rounding does to a network an error may be."""
ONNX = 1e7
"""How many parameters a network may have that goes to ONNX here, too: large files take long."""


def row(make: Callable[[], Case]) -> Row:
    """What a model computes at other sizes, or why it is not captured."""
    torch.manual_seed(0)
    try:
        module, inputs = make()
        module = randomized(module, inputs)
        few = {name: x[:2].contiguous() for name, x in inputs.items()}
        export = spent(lambda: torch.export.export(module, (), few))
        start = time.process_time()
        params, spec = tfx.from_torch(module, few)
        capture = time.process_time() - start
        plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(1), 0.5, exact=True)
        onnx = sum(p.numel() for p in module.parameters()) < ONNX
        runs = [asdict(run) for run in elsewhere(module, params, spec, plan, inputs, onnx=onnx)]
        return {"runs": runs, "export": export, "capture": capture}
    except Exception as error:  # the table shows what fails, and goes on
        return {"failed": said(error)}
    finally:
        gc.collect()  # graphs have reference cycles


def spent(work: Callable[[], object]) -> float:
    """Seconds of processor time; none of work that fails counts."""
    start = time.process_time()
    try:
        work()
    except Exception:  # what torch.export refuses, from_torch may take for one example at a time
        return float("nan")
    return time.process_time() - start


def verdict(row: Row) -> str:
    """One word for a row."""
    runs = row.get("runs")
    if runs is None:
        return "failed"
    errors = [
        run[key] / max(TOLERANCE, ROUNDINGS * (run.get("rounding") or 0))
        for run in runs
        for key in ("captured", "cut")
        if run[key] is not None
    ]
    if errors and not max(errors) <= 1:
        return "wrong"
    if any(run["refused"] for run in runs):
        return "refused"
    return "right" if errors else "fixed"


def received(refused: str) -> str:
    """What a refusal says of this size, without the rule before it and the advice after it."""
    return refused.rpartition("; received: ")[2].partition(" Capture the module on")[0]


def cells(row: Row) -> list[str]:
    """A row of the table but its name."""
    if "failed" in row:
        return ["failed", "", "", "", "", row["failed"][:160], ""]
    runs = row["runs"]
    kinds = ("captured", "cut", "exported", "onnx")
    largest = [max((run[key] for run in runs if run[key] is not None), default=None) for key in kinds]
    reasons = dict.fromkeys(
        f"{run['size']}: {'the module: ' * bool(run['fixed'])}{(run['fixed'] or received(run['refused']))[:140]}"
        for run in runs
        if run["fixed"] or run["refused"]
    )
    reasons |= dict.fromkeys(run["left"][:140] for run in runs if run["left"])
    errors = ["" if error is None else f"{error:.0e}" for error in largest]
    return [verdict(row), *errors, "; ".join(reasons), f"{row['capture'] / row['export']:.1f}"]


HEADS = ("model", "verdict", "captured", "cut", "exported", "ONNX", "what is fixed, and why", "capture / export")


def table(name: str, rows: dict[str, Row]) -> str:
    """The rows of a group in Markdown."""
    verdicts = [verdict(row) for row in rows.values()]
    counts = ", ".join(f"{verdicts.count(word)} {word}" for word in dict.fromkeys(verdicts))
    lines = [list(HEADS), ["---"] * len(HEADS), *([key, *cells(row)] for key, row in rows.items())]
    text = "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)
    return f"### {name.capitalize()}\n\nOf {len(rows)} models: {counts}.\n\n{text}"


def write(rows: dict[str, dict[str, Row]]) -> None:
    """Put the tables between their marks in the README."""
    before, _, rest = README.read_text().partition(MARK.format("tables"))
    after = rest.partition(MARK.format("end"))[2]
    tables = "\n".join(table(name, rows[name]) for name in GROUPS if name in rows)
    README.write_text(f"{before}{MARK.format('tables')}\n{tables}\n{MARK.format('end')}{after}")


def chosen(options: argparse.Namespace) -> dict[str, Makers]:
    """The makers of each group that is asked for."""
    if options.quick:
        makers = cases() | small()
        return {"quick": {name: makers[name] for name in QUICK}}
    groups = {name: GROUPS[name]() for name in ([options.group] if options.group else GROUPS)}
    wanted = re.compile(options.only or "")
    return {group: {name: m for name, m in makers.items() if wanted.search(name)} for group, makers in groups.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", help="a regular expression in the names; rows are made anew")
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--quick", action="store_true", help="a dozen small models")
    parser.add_argument("--rows", type=Path, default=Path("out/sizes.json"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    stored: dict[str, dict[str, Row]] = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    if options.write:
        write(stored)
        return
    warnings.simplefilter("ignore")
    torch.export.export(nn.Linear(2, 2), (torch.zeros(2, 2),))  # the first one loads much of torch
    for group, makers in chosen(options).items():
        rows = stored.setdefault(group, {})
        for name, make in makers.items():
            if options.only or options.quick or "failed" in rows.get(name, {"failed": "not yet"}):
                rows[name] = row(make)
                print(f"{name:28}", *cells(rows[name]), sep="  ", flush=True)
                options.rows.parent.mkdir(exist_ok=True, parents=True)
                options.rows.write_text(json.dumps(stored, indent=1))


if __name__ == "__main__":
    main()

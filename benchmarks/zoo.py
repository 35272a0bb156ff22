"""Models of torchvision and transformers, captured, pruned at random, and checked.

    python benchmarks/zoo.py                            # a dozen of torchvision's classification models
    python benchmarks/zoo.py resnet18 swin_t bert       # some
    python benchmarks/zoo.py --group transformers       # small random ones of that library's families
    python benchmarks/zoo.py --group classification     # all of torchvision's: hours; also segmentation, detection
    python benchmarks/zoo.py --write                    # the rows so far become the tables of benchmarks/README.md

Every model has random weights in float64. `_proof.py` says what is proven of it. A model that fails is a row that
says so. Rows are kept in a file (``--rows``), and a group continues after an interruption.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from _proof import Case, prove, randomized
from _torchvision import QUICK, classification, detection, segmentation
from _transformers import cases

GROUPS: dict[str, Callable[[], dict[str, Callable[[], Case]]]] = {
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "transformers": cases,
}
README = Path(__file__).with_name("README.md")
MARK = "<!-- {} of zoo.py -->\n"

Row = dict[str, Any]


def row(make: Callable[[], Case]) -> Row:
    """What is proven of a model, or why it is not."""
    torch.manual_seed(0)
    try:
        module, inputs = make()
        return asdict(prove(randomized(module, inputs), inputs))
    except Exception as error:  # the table shows what fails, and goes on
        return {"failed": f"{type(error).__name__}: {error}"}
    finally:
        gc.collect()  # graphs have reference cycles


def sound(row: Row) -> bool:
    """Whether what was captured, cut and trained is right but for rounding."""
    return max(row["captured"], row["cut"]) < 1e-9 and abs(row["step"] - 1) < 0.1


def reasons(row: Row) -> str:
    """Why more than a thousandth of the parameters stays, but for the outputs, and how many scopes do."""
    if row["prunable"] > 0.999:
        return ""
    counts: Counter[str] = Counter()
    for reason, scopes in row["frozen"].items():
        if not reason.endswith("is an output of the network"):
            counts[re.sub(r" at \S+", "", reason.rpartition(": ")[2])] += len(scopes)
    counts.update({f"no rule for {name}": count for name, count in row["unmapped"].items()})
    return "; ".join(f"{reason} ({count})" for reason, count in counts.most_common())


def cells(row: Row) -> list[str]:
    """A row of the table but its name."""
    if "failed" in row:
        return [row["failed"].splitlines()[0]]
    numbers = [f"{row['parameters'] / 1e6:,.1f}" if row["parameters"] > 1e5 else f"{row['parameters'] / 1e6:.3f}"]
    numbers += [f"{row['units']:,}", f"{row['prunable']:.1%}", f"{row['exact']:.1%}", reasons(row)]
    numbers += [f"{row['captured']:.0e}", f"{row['cut']:.0e}", f"{row['export']:.1f}"]
    return [*numbers, f"{row['total'] / row['export']:.2f}", f"{row['couple']:.2f}"]


HEADS = (
    "model", "parameters, M", "units", "can leave", "exact units", "what else stays, and why", "captured",
    "cut against gated", "export, s", "import / export", "couple, s",
)  # fmt: skip


def table(name: str, rows: dict[str, Row]) -> str:
    """The rows of a group in Markdown."""
    proven = [row for row in rows.values() if "failed" not in row and sound(row)]
    ratio = max(row["total"] / row["export"] for row in proven)
    couple, cut = max(row["couple"] for row in proven), max(row["cut"] for row in proven)
    text = f"### {name.capitalize()}\n\n{len(proven)} of {len(rows)} models proven; at most {cut:.0e} between cut and "
    text += f"gated, {ratio:.2f} times the export to import, {couple:.2f} s to couple.\n\n"
    lines = [list(HEADS), ["---"] * len(HEADS), *([key, *cells(row)] for key, row in rows.items())]
    return text + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def write(rows: dict[str, dict[str, Row]]) -> None:
    """Put the tables between their marks in the README."""
    before, _, rest = README.read_text().partition(MARK.format("tables"))
    after = rest.partition(MARK.format("end"))[2]
    tables = "\n".join(table(name, rows[name]) for name in GROUPS if name in rows)
    README.write_text(f"{before}{MARK.format('tables')}\n{tables}\n{MARK.format('end')}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--group", choices=GROUPS)
    parser.add_argument("--rows", type=Path, default=Path("out/zoo.json"))
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    stored: dict[str, dict[str, Row]] = json.loads(options.rows.read_text()) if options.rows.exists() else {}
    if options.write:
        write(stored)
        return
    groups = [options.group] if options.group else [g for g in GROUPS if options.names or g == "classification"]
    for group in groups:
        makers, rows = GROUPS[group](), stored.setdefault(group, {})
        wanted = options.names or (makers if options.group else QUICK)
        for name in (name for name in makers if name in wanted):
            if not options.group or "failed" in rows.get(name, {"failed": "not yet"}):
                rows[name] = row(makers[name])
                print(f"{name:28}", *cells(rows[name]), sep="  ", flush=True)
                stored[group] = {key: rows[key] for key in makers if key in rows}
                options.rows.parent.mkdir(exist_ok=True)
                options.rows.write_text(json.dumps(stored, indent=1))


if __name__ == "__main__":
    main()

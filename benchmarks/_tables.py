"""Tables and plots of the quality benchmark, from the results that are kept."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from taylorfx.fidelity import Interval
from taylorfx.report import plot_frontier

REPAIRS = ("as cut", "compensated", "recalibrated", "reconstructed", "fine-tuned", "reconstructed, fine-tuned")
RIVAL = "Torch-Pruning"
DRAWN = ("joint", "taylor per FLOP", "random", f"{RIVAL} GroupMagnitude", f"{RIVAL} GroupTaylor, scored at every step")
"""Who is in the plots: with all of them nothing can be seen."""

MARKERS = "<!-- quality: begin -->", "<!-- quality: end -->"
HERE = Path(__file__).parent

Results = Mapping[int, Mapping[str, Any]]
"""By the seed, what `quality.py` keeps of a network: by ``"contestant @ share"``, and ``whole``."""


def interval(values: Sequence[float]) -> Interval:
    """The mean and its 95 % interval (Student's t over the seeds); of one seed there is none."""
    middle = mean(values)
    if len(values) < 2:
        return Interval(middle, middle, middle)
    spread = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / math.sqrt(len(values))
    return Interval(middle, middle - spread, middle + spread)


def per_seed(results: Results, contestant: str, share: float, repair: str) -> dict[int, float]:
    """One accuracy for each seed that has it; ``random`` is the mean of its draws."""
    found = {}
    for seed, entries in results.items():
        draws = [
            entry["accuracy"][repair]
            for key, entry in entries.items()
            if key.endswith(f" @ {share}") and kind(key) == contestant and repair in entry["accuracy"]
        ]
        if draws:
            found[seed] = mean(draws)
    return found


def kind(key: str) -> str:
    """The contestant that an entry is of."""
    name = key.split(" @ ")[0]
    return "random" if name.startswith("random ") else name


def names(results: Results) -> list[str]:
    """The contestants, in the order in which they ran."""
    return list(dict.fromkeys(kind(key) for entries in results.values() for key in entries if " @ " in key))


def points(values: Sequence[float], seeds: int) -> str:
    """In percent, with half the width of the interval; in brackets how many seeds there are, if some are missing."""
    if not values:
        return ""
    found = interval(values)
    spread = f" ± {100 * (found.high - found.value):.1f}" if len(values) > 1 else ""
    return f"{100 * found.value:.1f}{spread}" + (f" ({len(values)})" if len(values) < seeds else "")


def done(results: Results) -> list[str]:
    """The repairs that there are numbers of."""
    entries = [entry for kept in results.values() for key, entry in kept.items() if " @ " in key]
    return [repair for repair in REPAIRS if any(repair in entry["accuracy"] for entry in entries)]


def table(results: Results, share: float) -> str:
    """Contestants down, repairs across; bold is a column's best mean, among those with most seeds."""
    shown = done(results)
    rows = [[name] for name in names(results)]
    for repair in shown:
        column = [[*per_seed(results, name, share, repair).values()] for name in names(results)]
        most = max(map(len, column))
        best = max((mean(values) for values in column if values and len(values) == most), default=None)
        for row, values in zip(rows, column, strict=True):
            first = len(values) == most and values and mean(values) == best
            row.append(f"**{points(values, len(results))}**" if first else points(values, len(results)))
    head = [["contestant", *shown], ["---"] * (1 + len(shown))]
    return "\n".join(f"| {' | '.join(row)} |" for row in (*head, *rows))


def duels(results: Results, shares: Sequence[float]) -> str:
    """What we are ahead of Torch-Pruning's best criterion, seed by seed, on the same networks."""
    rivals = [name for name in names(results) if name.startswith(RIVAL)]
    if not rivals:
        return ""
    shown = done(results)
    rows = [["", "FLOPs", *shown], ["---"] * (2 + len(shown))]
    for ours in ("joint", "joint around the mean", "taylor per FLOP", "fisher per FLOP"):
        for share in shares:
            cells = []
            for repair in shown:
                mine = per_seed(results, ours, share, repair)
                others = [per_seed(results, name, share, repair) for name in rivals]
                their = max((x for x in others if x), key=lambda x: (len(x), mean(x.values())), default={})
                cells.append(points([mine[seed] - their[seed] for seed in mine if seed in their], len(results)))
            rows.append([ours, f"{share:.0%}", *cells])
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return f"Points ahead of {RIVAL}'s best criterion in that column, seed by seed:\n\n" + "\n".join(lines)


def tables(found: Mapping[str, Results], titles: Mapping[str, str], shares: Sequence[float]) -> str:
    """All of it as Markdown."""
    parts = []
    for task, results in found.items():
        if not results:
            continue
        whole = points([entries["whole"]["accuracy"] for entries in results.values()], len(results))
        count = f"{len(results)} seed{'s' * (len(results) > 1)}"
        parts.append(f"### {titles[task]}\n\nTest accuracy in percent, {count}; unpruned {whole}.")
        run = [
            share for share in shares if any(key.endswith(f" @ {share}") for kept in results.values() for key in kept)
        ]
        parts += [f"{share:.0%} of the FLOPs:\n\n{table(results, share)}" for share in run]
        parts.append(duels(results, run))
    return "\n\n".join(part for part in parts if part)


def publish(
    text: str, found: Mapping[str, Results], titles: Mapping[str, str], shares: Sequence[float], docs: Path
) -> None:
    """Write the tables between the markers of README.md, the numbers into quality.json, a plot of each task."""
    readme = HERE / "README.md"
    old = readme.read_text()
    before, after = old.split(MARKERS[0])[0], old.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}")
    (HERE / "quality.json").write_text(json.dumps(found, indent=1) + "\n")
    for task, results in found.items():
        for repair in ("as cut", "recalibrated"):
            if drawn := frontier(results, shares, repair):
                whole = mean(entries["whole"]["accuracy"] for entries in results.values())
                figure = plot_frontier(drawn, x="share of the FLOPs", title=f"{titles[task]}, {repair}", whole=whole)
                figure.savefig(docs / f"quality_{task}_{repair.replace(' ', '_')}.png")


def frontier(results: Results, shares: Sequence[float], repair: str) -> dict[str, list[tuple[float, Interval]]]:
    """The lines of a plot."""
    lines = {}
    for name in names(results):
        if name in DRAWN:
            values = {share: per_seed(results, name, share, repair) for share in shares}
            lines[name] = [(share, interval([*x.values()])) for share, x in values.items() if x]
    return {name: line for name, line in lines.items() if line}

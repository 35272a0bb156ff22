"""Tables and plots of the quality benchmark, from the results that are kept."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from scipy.stats import t as student

from taylorfx.report.plots import plot_frontier
from taylorfx.truth.correlations import Interval

REPAIRS = ("as cut", "compensated", "recalibrated", "reconstructed", "fine-tuned", "reconstructed, fine-tuned")
RIVAL = "Torch-Pruning"
STEPS, ON_OUTPUTS = "joint, cautious, measured at every step", "joint on outputs, cautious, measured at every step"
OURS = (
    "prune", "prune, branches too", "prune, repaired at every step", "prune, branches too, repaired at every step",
    "prune, repaired once", "joint, repaired at every step",
    "joint", STEPS, "joint on outputs", ON_OUTPUTS, "joint, cautious",
    "joint, measured at every step", "joint on outputs, measured at every step",
    "joint without swaps", "joint around the mean",
    "fisher per FLOP", "fisher per FLOP, measured at every step", "fisher",
    "taylor per FLOP", "taylor", "taylor around the mean, per FLOP", "second_order per FLOP", "second_order",
)  # fmt: skip
LEADERS = ("prune", "prune, repaired at every step", "prune, branches too, repaired at every step")
OTHERS = (
    "weight_l2, equal in all layers",
    "random",
    *(f"{RIVAL} Group{x}" for x in ("Magnitude", "Taylor", "Hessian")),
)
ENDS = [*LEADERS, "random 0", *OTHERS]
"""Who is compared by what users end with, and who of them with whom."""

DUELISTS = ("prune", STEPS, ON_OUTPUTS, "joint", "joint on outputs", "fisher per FLOP")
"""Who is compared with Torch-Pruning one by one."""

DRAWN = ("prune", "joint", ON_OUTPUTS, "random", f"{RIVAL} GroupTaylor, scored at every step", f"{RIVAL} GroupHessian")
"""Who is in the plots: with all of them nothing can be seen."""

MARKERS = "<!-- quality: begin -->", "<!-- quality: end -->"
END_MARKERS = "<!-- ends: begin -->", "<!-- ends: end -->"
HERE = Path(__file__).parent

Results = Mapping[int, Mapping[str, Any]]
"""By the seed, what `quality.py` keeps of a network: by ``"contestant @ share"``; ``whole``, and ``fidelity``."""


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
    for seed, kept in results.items():
        keys = [key for key in kept if key.endswith(f" @ {share}") and kind(key) == contestant]
        if draws := [kept[key]["accuracy"][repair] for key in keys if repair in kept[key]["accuracy"]]:
            found[seed] = mean(draws)
    return found


def kind(key: str) -> str:
    """The contestant that an entry is of."""
    name = key.split(" @ ")[0]
    return "random" if name.startswith("random ") else name


def names(results: Results) -> list[str]:
    """The contestants: ours, what to compare them with, Torch-Pruning."""
    found = list(dict.fromkeys(kind(key) for entries in results.values() for key in entries if " @ " in key))
    place = {name: k for k, name in enumerate(OURS)}

    def rank(name: str) -> tuple[bool, int]:
        return name.startswith(RIVAL), place.get(name.replace("per parameter", "per FLOP"), len(OURS))

    return sorted(found, key=rank)


def points(values: Sequence[float], seeds: int) -> str:
    """In percent, of three or more with half the width of the interval; in brackets how many, if some are missing."""
    if not values:
        return ""
    found = interval(values)
    spread = f" ± {100 * (found.high - found.value):.1f}" if len(values) > 2 else ""
    return f"{100 * found.value:.1f}{spread}" + (f" ({len(values)})" if len(values) < seeds else "")


def done(results: Results, share: float | None = None) -> list[str]:
    """The repairs that there are numbers of (at this share), in their order."""
    end = "" if share is None else f" @ {share}"
    entries = [x for kept in results.values() for key, x in kept.items() if " @ " in key and key.endswith(end)]
    found = dict.fromkeys(repair for entry in entries for repair in entry["accuracy"])
    return [repair for repair in REPAIRS if repair in found] + [repair for repair in found if repair not in REPAIRS]


def table(results: Results, share: float, costs: Sequence[str] = ("latency",)) -> str:
    """Contestants down, repairs across; bold is a column's best mean, among those with most seeds."""
    shown = done(results, share)
    rows = [[name] for name in names(results)]
    for repair in shown:
        column = [[*per_seed(results, name, share, repair).values()] for name in names(results)]
        most = max(map(len, column))
        best = max((mean(values) for values in column if values and len(values) == most), default=None)
        for row, values in zip(rows, column, strict=True):
            first = len(values) == most and values and mean(values) == best
            row.append(f"**{points(values, len(results))}**" if first else points(values, len(results)))
    rows = [row for row in rows if any(row[1:])]
    for cost in costs:
        keys = [[key for key in draws(results) if key.endswith(f" @ {share}") and kind(key) == row[0]] for row in rows]
        column = [[kept[k[0]][cost] for kept in results.values() if k and cost in kept.get(k[0], {})] for k in keys]
        if any(column):
            shown.append(cost)
            for row, values in zip(rows, column, strict=True):
                row.append(points(values, len(results)))
    return markdown(["contestant", *shown], rows)


def draws(results: Results) -> list[str]:
    """The entries, of all draws of one seed the first."""
    keys = dict.fromkeys(key for kept in results.values() for key in kept if " @ " in key)
    return [key for key in keys if not key.startswith("random ") or key.startswith("random 0")]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def best(results: Results, among: Sequence[str], share: float, repair: str) -> dict[int, float]:
    """The accuracies of the best of these contestants: of those with most seeds the one with the highest mean."""
    found = (per_seed(results, name, share, repair) for name in among)
    return max((x for x in found if x), key=lambda x: (len(x), mean(x.values())), default={})


def ahead(mine: Mapping[int, float], their: Mapping[int, float], seeds: int) -> str:
    """The difference seed by seed, on the same networks."""
    return points([mine[seed] - their[seed] for seed in mine if seed in their], seeds)


def duels(results: Results, shares: Sequence[float]) -> str:
    """What we are ahead of Torch-Pruning's best criterion, seed by seed, on the same networks."""
    rivals = [name for name in names(results) if name.startswith(RIVAL)]
    if not rivals:
        return ""
    shown = done(results)
    rows = []
    for ours in (name for name in DUELISTS if name in names(results)):
        for share in shares:
            cells = [
                ahead(per_seed(results, ours, share, repair), best(results, rivals, share, repair), len(results))
                for repair in shown
            ]
            rows.append([ours, f"{share:.0%}", *cells])
    return f"Points ahead of {RIVAL}'s best criterion in that column, seed by seed:\n\n" + markdown(
        ["", "stays", *shown], rows
    )


def summary(found: Mapping[str, Results], titles: Mapping[str, str], shares: Sequence[float]) -> str:
    """A row for each task and share, a column for each repair: ours, the best of ours, theirs, the difference."""
    shown = ("as cut", "recalibrated", "reconstructed", "fine-tuned", "reconstructed, fine-tuned")
    rows = []
    for task, results in found.items():
        rivals = [name for name in names(results) if name.startswith(RIVAL)]
        ours = [name for name in names(results) if name.replace("per parameter", "per FLOP") in OURS]
        title = f"{titles[task]} ({whole(results)})"
        for share in shares:
            cells = []
            for repair in shown:
                named = [per_seed(results, name, share, repair) for name in ("prune", STEPS, "joint", ON_OUTPUTS)]
                mine, their = best(results, ours, share, repair), best(results, rivals, share, repair)
                means = " / ".join(f"{100 * mean(x.values()):.1f}" if x else "-" for x in (*named, mine, their))
                gap = ahead(mine, their, len(mine))
                count = f" ({len(mine)})" if 0 < len(mine) < len(results) else ""
                cells.append(means + (f", **{signed(gap)}**" if gap else "") + count if mine else "")
            if any(cells):
                rows.append([title, f"{share:.0%}", *cells])
                title = ""
    return markdown(["task (unpruned)", "stays", *shown], rows)


ENDINGS = [
    ("50 %, as cut", "", 0.5, "as cut"), ("repaired", "", 0.5, "reconstructed"),
    ("30 %, as cut", "", 0.3, "as cut"), ("repaired", "", 0.3, "reconstructed"),
    ("tuned", "", 0.3, "reconstructed, fine-tuned"), ("6 epochs", "", 0.3, "6 epochs"),
    ("60 % of the time, repaired", "-time", 0.6, "reconstructed"), ("6 epochs", "-time", 0.6, "6 epochs"),
]  # fmt: skip
"""The columns of the README: title, variant, share and repair."""


def ends(found: Mapping[str, Results], titles: Mapping[str, str]) -> str:
    """For the README: what users end with, the leaders and the others, at a few shares."""
    rows = []
    for task in (name for name in found if "-" not in name):
        rows.append([f"**{titles[task]}**, {whole(found[task])}", *[""] * len(ENDINGS)])
        lines = {f"`{name}`" if name == "prune" else name: [name] for name in (*LEADERS, *OTHERS[:2])}
        lines[f"{RIVAL}'s best"] = [name for name in OTHERS if name.startswith(RIVAL)]
        for label, among in lines.items():
            cells = [best(found.get(f"{task}{kind}", {}), among, share, x) for _, kind, share, x in ENDINGS]
            rows.append([label, *(points([*x.values()], 3) for x in cells)])
    return markdown(["", *(title for title, *_ in ENDINGS)], rows)


def verdict(found: Mapping[str, Results], titles: Mapping[str, str]) -> str:
    """How far the leaders are ahead of the best other contestant in a column, seed by seed."""
    rows, shown = [], list(dict.fromkeys(x for results in found.values() for x in done(results)))
    for task, results in found.items():
        for share, name in itertools.product(shares_of(results), LEADERS):
            pairs = [(per_seed(results, name, share, x), best(results, OTHERS, share, x)) for x in shown]
            cells = [ahead(mine, their, min(len(mine), len(their))) for mine, their in pairs]
            if any(cells):
                rows.append([titles[task], f"{share:.0%}", name, *map(signed, cells)])
    return markdown(["task", "stays", "contestant", *shown], rows)


def shares_of(results: Results) -> list[float]:
    return sorted({float(key.split(" @ ")[1]) for key in draws(results)}, reverse=True)


def endings(found: Mapping[str, Results], titles: Mapping[str, str]) -> str:
    """What users end with: a table for each task and share."""
    parts = []
    for task, results in found.items():
        what = "time" if "-time" in task else "parameters" if "-parameters" in task else "FLOPs"
        costs = ("FLOPs", "parameters", "latency")
        parts.append(f"### {titles[task]}\n\nUnpruned {whole(results)}, {len(results)} seeds.")
        parts += [f"{s:.0%} of the {what}:\n\n{table(results, s, costs)}" for s in shares_of(results)]
    return "\n\n".join(parts)


def signed(number: str) -> str:
    return number if number.startswith("-") or not number else f"+{number}"


def whole(results: Results) -> str:
    """The unpruned network's accuracy."""
    return points([kept["whole"]["accuracy"] for kept in results.values()], len(results))


def fidelities(found: Mapping[str, Results]) -> str:
    """Criteria down, tasks across: Spearman's correlation with the oracle, the mean over the seeds that have it."""
    asked = {}
    for task, results in found.items():
        if each := [kept["fidelity"] for kept in results.values() if "fidelity" in kept]:
            asked[f"{task} ({len(each)})"] = each
    rows = []
    for name in dict.fromkeys(name for each in asked.values() for one in each for name in one):
        values = ([one[name] for one in each if name in one] for each in asked.values())
        rows.append([name, *(f"{mean(some):.2f}" if some else "" for some in values)])
    return markdown(["criterion", *asked], rows) if rows else ""


def tables(found: Mapping[str, Results], titles: Mapping[str, str], shares: Sequence[float]) -> str:
    """All of it as Markdown."""
    parts = []
    for task, results in found.items():
        if not results:
            continue
        count = f"{len(results)} seed{'s' * (len(results) > 1)}"
        parts.append(f"## {titles[task]}\n\nTest accuracy in percent, {count}; unpruned {whole(results)}.")
        run = [s for s in shares if any(key.endswith(f" @ {s}") for kept in results.values() for key in kept)]
        counted = "parameters" if "parameters" in task else "FLOPs"
        parts += [f"{share:.0%} of the {counted}:\n\n{table(results, share)}" for share in run]
        parts.append(duels(results, run))
    if fidelity := fidelities(found):
        parts.append(f"## Fidelity\n\nSpearman's correlation with the oracle over all units (seeds):\n\n{fidelity}")
    return "\n\n".join(part for part in parts if part)


def publish_endings(found: Mapping[str, Results], titles: Mapping[str, str]) -> None:
    """The same of what users end with; the numbers go into ends.json."""
    replaced(HERE.parent / "README.md", END_MARKERS, ends(found, titles))
    replaced(HERE / "README.md", END_MARKERS, verdict(found, titles))
    replaced(HERE / "QUALITY.md", END_MARKERS, endings(found, titles))
    (HERE / "ends.json").write_text(numbers(found))


def publish(found: Mapping[str, Results], titles: Mapping[str, str], shares: Sequence[float], docs: Path) -> None:
    """Tables into this folder's README.md and QUALITY.md, the numbers into quality.json, a plot of each task."""
    replaced(HERE / "README.md", MARKERS, summary(found, titles, shares))
    replaced(HERE / "QUALITY.md", MARKERS, tables(found, titles, shares))
    (HERE / "quality.json").write_text(numbers(found))
    for task, results in found.items():
        for repair in ("as cut", "recalibrated"):
            if "-" not in task and (drawn := frontier(results, shares, repair)):
                accuracy = mean(kept["whole"]["accuracy"] for kept in results.values())
                figure = plot_frontier(drawn, x="share of the FLOPs", title=f"{titles[task]}, {repair}", whole=accuracy)
                figure.savefig(docs / f"quality_{task}_{repair.replace(' ', '_')}.png")


def replaced(file: Path, markers: tuple[str, str], text: str) -> None:
    """Put a text between the markers of a file."""
    old = file.read_text()
    before, after = old.split(markers[0])[0], old.split(markers[1])[1]
    file.write_text(f"{before}{markers[0]}\n\n{text}\n\n{markers[1]}{after}")


def numbers(found: Mapping[str, Results]) -> str:
    """All of it as JSON, an entry in a line, but for the units."""
    lines = (
        f"{json.dumps(f'{task}-{seed} {key}')}: {json.dumps({x: y for x, y in entry.items() if x != 'keep'})}"
        for task, results in found.items() for seed, kept in results.items() for key, entry in kept.items()
    )  # fmt: skip
    return "{" + ",\n".join(lines) + "}\n"


def frontier(results: Results, shares: Sequence[float], repair: str) -> dict[str, list[tuple[float, Interval]]]:
    """The lines of a plot."""
    lines = {}
    for name in names(results):
        if name in DRAWN:
            values = {share: per_seed(results, name, share, repair) for share in shares}
            lines[name] = [(share, within(interval([*x.values()]))) for share, x in values.items() if x]
    return {name: line for name, line in lines.items() if line}


def within(found: Interval) -> Interval:
    """What of an interval can be an accuracy."""
    return Interval(found.value, max(0.0, found.low), min(1.0, found.high))

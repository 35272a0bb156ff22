"""Listing: a coupling as text. Scopes of one kind in repeated blocks are one row."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from taylorfx.coupling.causes import cause_of
from taylorfx.network.spec import Spec
from taylorfx.network.tables import columns

__all__ = ["Row", "listed"]


class Row(NamedTuple):
    """A scope: its name, how many units it has, how many parameters shrink with them, and whether all are exact."""

    name: str
    units: int
    parameters: int
    exact: bool


def listed(rows: Sequence[Row], frozen: Mapping[str, str], spec: Spec) -> str:
    """A table of the scopes, and below it what is frozen, by reasons.

    >>> from taylorfx import Input, serial
    >>> rows = [Row("block0.up", 8, 64, True), Row("block1.up", 4, 32, True)]
    >>> print(listed(rows, {"head": "no layer consumes it"}, serial(Input((4,)))))
    12 units in 2 scopes
    <BLANKLINE>
    scope      scopes   units  parameters
    ---------  ------  ------  ----------
    block*.up       2  4 to 8          96
    <BLANKLINE>
    head: frozen, no layer consumes it
    """
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(_kind(row.name), []).append(row)
    lines = [f"{sum(row.units for row in rows):,} units in {len(rows):,} scopes"]
    if rows:
        head = ("scope", "scopes", "units", "parameters")
        cells = columns([head, *(_cells(kind, same) for kind, same in kinds.items())], right=3).splitlines()
        notes = ["", "", *(_note(same) for same in kinds.values())]
        lines += ["", *(f"{cell}{note}" for cell, note in zip(cells, notes, strict=True))]
    reasons = _reasons(frozen, spec)
    return "\n".join([*lines, *([""] if reasons else []), *reasons])


def _kind(name: str) -> str:
    """A scope's name without the numbers of the blocks that it lies in, and without that of equal names.

    >>> _kind("layers.3.self_attn: heads"), _kind("layer1.0.conv1 (2)"), _kind("features.8"), _kind("3")
    ('layers.*.self_attn: heads', 'layer*.*.conv1', 'features.8', '3')
    """
    path, colon, role = re.sub(r" \(\d+\)$", "", name).partition(": ")
    blocks, dot, last = (path, "", "") if colon else path.rpartition(".")
    return re.sub(r"\d+(?=\.|$)", "*", blocks) + dot + last + colon + role


def _cells(kind: str, rows: Sequence[Row]) -> tuple[str, str, str, str]:
    """A row of the table, for scopes of one kind."""
    least, most = min(row.units for row in rows), max(row.units for row in rows)
    units = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    return _shown(kind, [row.name for row in rows]), f"{len(rows):,}", units, f"{sum(r.parameters for r in rows):,}"


def _note(rows: Sequence[Row]) -> str:
    inexact = sum(not row.exact for row in rows)
    some = "" if inexact == len(rows) else f"{inexact} of them "
    return f"  ({some}inexact: a norm's statistics change)" if inexact else ""


def _shown(kind: str, names: Sequence[str]) -> str:
    return kind if len(names) > 1 else names[0]


def _reasons(frozen: Mapping[str, str], spec: Spec) -> list[str]:
    """What is frozen: by kind and cause one line, which names the first place where it is."""
    alike: dict[tuple[str, str], list[str]] = {}
    for name, reason in frozen.items():
        alike.setdefault((_kind(name), str(cause_of(spec, reason)[0])), []).append(name)
    by_reason: dict[str, list[str]] = {}
    for (kind, _), names in alike.items():
        several = f" ({len(names)} scopes)" if len(names) > 1 else ""
        by_reason.setdefault(_said(names, frozen), []).append(f"{_shown(kind, names)}{several}")
    return [f"{_enumerated(kinds)}: frozen, {reason}" for reason, kinds in by_reason.items()]


def _said(names: Iterable[str], frozen: Mapping[str, str]) -> str:
    """The reason of scopes of one cause: the first one's, and at how many other places it is the same."""
    different = list(dict.fromkeys(frozen[name] for name in names))
    return different[0] + (f", and {len(different) - 1} more like it" if len(different) > 1 else "")


def _enumerated(kinds: Sequence[str], most: int = 6) -> str:
    return ", ".join(kinds[:most]) + (f" and {len(kinds) - most} more" if len(kinds) > most else "")

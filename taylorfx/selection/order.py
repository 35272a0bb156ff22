"""The order in which units leave, and the steps in which constraints let them leave.

Without constraints every unit is a step. ``multiple`` and ``uniform`` bundle units: those of one bundle leave in the
same step. Here are two scopes, ``a`` of 5 units and ``b`` of 3, with their scores, in multiples of two of which at
least two stay:

    units       a0 a1 a2 a3 a4   b0 b1 b2
    scores       7  1  3  5  9    2  8  4
    queue       a1 a2 a3 a0 a4   b0 b2 b1       scope by scope, the lowest scores first
    bundle       0  1  1  .  .    2  .  .       5 units leave as 1 and 2, 3 units as 1; the others stay
    mean         1  4  4          2
    step         0  2  2          1             bundles by their mean scores
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.network.labels import Labels
from taylorfx.selection.budget import SelectionError
from taylorfx.selection.constraints import Rules

__all__ = ["finite", "last_of_axis", "like_structures", "quantiles", "returned", "steps", "unlike"]

Values = NDArray[np.float64]
"""``(units,)``: one score per unit, higher means keep."""


def finite(scores: torch.Tensor, coupling: Coupling) -> Values:
    """Scores in double precision.

    Raises:
        SelectionError: unless there is one real, finite number per unit.
    """
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(coupling),) or scores.is_complex():
        shown = f"{scores.dtype} of shape {tuple(scores.shape)}" if hasattr(scores, "dtype") else type(scores).__name__
        raise SelectionError(f"Scores are a tensor of one real number per unit, ({len(coupling)},); received {shown}.")
    values: Values = scores.detach().to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        named = ", ".join(f"{coupling.names[k]} = {values[k]}" for k in bad[:8])
        more = f", and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise SelectionError(f"Scores have to be finite; received {named}{more}. Look at the criterion and its data.")
    return values


def _order(values: Values) -> Labels:
    """Indices by ascending value; among equal values the later index first.

    >>> _order(np.array([2.0, 1.0, 2.0, 3.0]))
    array([1, 2, 0, 3])
    """
    order, n = values.argsort(), len(values)
    ascending = values[order]
    run = np.cumsum(ascending != np.roll(ascending, 1))  # equal values have one number
    # Sorting by run and then by index from the end; to sort twice is faster than stably once.
    return n - 1 - np.sort(run * n + n - 1 - order) % n


def quantiles(values: Values, groups: Labels) -> Values:
    """The share of its group that leaves no later than each unit.

    >>> quantiles(np.array([5.0, 3.0, 9.0, 7.0]), np.array([0, 0, 0, 1])).round(2)
    array([0.67, 0.33, 1.  , 1.  ])
    """
    result = np.empty_like(values)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        result[members[_order(values[members])]] = np.arange(1, len(members) + 1) / len(members)
    return result


def like_structures(coupling: Coupling) -> Labels:
    """``(scopes,)``: the class of each. Scopes of one class run along the same letters of the same kinds of layers.

    Branches are alike if the same kinds of layers leave with them.
    """
    places: list[set[tuple[str, str]]] = [set() for _ in coupling.scopes]
    for node in coupling.spec:
        for letter, number in coupling.letters[node.name].items():
            axis = coupling.axes[number]
            for scope in np.unique(coupling.scope[axis[axis >= 0]]):
                places[scope].add((type(node.layer).__name__, letter))
    for branch in coupling.branches:
        kinds = {type(coupling.spec[name].layer).__name__ for name in coupling.nodes_of(branch)}
        places[coupling.scope[branch.unit]].update((kind, "") for kind in kinds)
    forms = [frozenset(each) for each in places]
    numbers = {form: k for k, form in enumerate(dict.fromkeys(forms))}
    return np.array([numbers[form] for form in forms], np.int64)


def last_of_axis(values: Values, coupling: Coupling) -> Mask:
    """The best unit of every axis that has only a part of a scope (a slice): no axis may lose all of its indices.

    An axis that has a whole scope keeps at least as many indices as the floor of that scope.
    """
    held = np.zeros(len(coupling), bool)
    for row in _sliced(coupling):
        units = np.unique(row)
        present, counts = np.unique(coupling.scope[units], return_counts=True)
        if not (counts == coupling.sizes[present]).any():
            held[units[_order(values[units])[-1]]] = True
    return held


def _sliced(coupling: Coupling) -> list[Labels]:
    """The rows of all axes that may have only parts of scopes.

    Nearly every row shows a whole scope at once, as one run of units that ascend by one or repeat. The scope of units
    2, 3 and 4 has three units:

        row         2  3  4     2  2  3  3  4  4     0  1  3  4      2  3 -1
        runs        2..4        2..4                 0..1  3..4      2..3
                    whole       whole                sliced          a position that stays is never lost
    """
    rows = [row for axis in coupling.axes for row in axis]
    units = np.concatenate(rows)
    row = np.repeat(np.arange(len(rows)), [*map(len, rows)])
    scope = np.append(coupling.scope, -1)[units]
    rise = np.diff(units)
    breaks = (np.diff(row) != 0) | (np.diff(scope) != 0) | (rise < 0) | (rise > 1)
    first, last = np.flatnonzero(np.append(True, breaks)), np.flatnonzero(np.append(breaks, True))
    whole = (units[first] >= 0) & (units[last] - units[first] + 1 == np.append(coupling.sizes, 0)[scope[first]])
    safe = np.zeros(len(rows), bool)
    safe[row[first[whole]]] = safe[row[units < 0]] = True
    return [rows[k] for k in np.flatnonzero(~safe)]


class Queue(NamedTuple):
    """The units that may leave, scope by scope, those of each scope in the order in which they leave."""

    units: Labels
    scopes: Labels
    """The scope of each."""
    places: Labels
    """Its place among those of its scope."""


class Bundles(NamedTuple):
    """How the units of each scope leave, ``(scopes,)`` each: in a first bundle, and then in bundles of one width.

    Of 10 units in multiples of four, of which at least four stay, 2 leave first and then 4. Scopes that keep the same
    number of units share their bundles.
    """

    offset: Labels
    """The number of the first bundle among those of all scopes."""
    first: Labels
    """The size of the first bundle."""
    width: Labels
    """The size of the others."""
    number: Labels
    """How many bundles may leave."""


def steps(values: Values, coupling: Coupling, held: Mask, rules: Rules) -> tuple[Labels, int]:
    """The step in which each unit leaves, and the number of steps, which stands for never.

    Args:
        held: ``(units,)``, those that stay whatever they are worth.
    """
    part, by_part = rules.parts(coupling)
    queue, sizes = _queue(values, part, held), np.bincount(part, minlength=len(by_part.floors))
    bundles, count = _bundles(np.bincount(queue.scopes, minlength=len(sizes)), sizes, by_part)
    units, bundle = _dealt(queue, bundles)
    step = np.full(len(coupling), count)
    step[units] = _ranks(values, units, bundle, count)[bundle]
    return step, count


def _queue(values: Values, scope: Labels, held: Mask) -> Queue:
    """Queue the units that may leave. Unit 4, the lowest of scope 1, is held:

    >>> held = np.array([False, False, False, False, True])
    >>> for column in _queue(np.array([3.0, 1.0, 2.0, 5.0, 4.0]), np.array([0, 0, 0, 1, 1]), held):
    ...     print(column)
    [1 2 0 3]
    [0 0 0 1]
    [0 1 2 0]
    """
    order = _order(values)
    units = order[~held[order]]
    short = scope.astype(np.min_scalar_type(scope.max(initial=0)))  # a few bits sort faster
    units = units[np.argsort(short[units], kind="stable")]
    scopes = scope[units]
    free = np.bincount(scopes)
    starts = np.cumsum(free) - free
    return Queue(units, scopes, np.arange(len(units)) - starts[scopes])


def _bundles(free: Labels, sizes: Labels, rules: Rules) -> tuple[Bundles, int]:
    """Bundle the units of every scope, and count the bundles. Scopes of 10 units and of 3, in multiples of 4 and 1:

    >>> rules = Rules([[0], [1]], [1, 2], [0.6, 1.0], [4, 1], np.zeros(13, bool))
    >>> bundles, count = _bundles(np.array([10, 3]), np.array([10, 3]), rules)
    >>> bundles.first, bundles.width, bundles.number  # at most 0.6 of 10 leave, as 2 and 4; at least 2 of 3 stay
    (array([2, 1]), array([4, 1]), array([2, 1]))
    >>> bundles.offset, count
    (array([0, 2]), 3)

    Args:
        free: ``(scopes,)``, how many units of each may leave.
        sizes: ``(scopes,)``, how many units each has.
    """
    columns = np.zeros((4, len(sizes)), np.int64)
    count, allowed = 0, free.tolist()
    for group in rules.groups:
        size = int(sizes[group[0]])
        least = max(size - min([allowed[k] for k in group]), *[rules.least(k, size) for k in group])
        width = rules.width(group)
        first = size % width or width  # what is left over leaves first; what stays is a multiple of the width
        leaving = size - -(-least // width) * width
        number = (leaving - first) // width + 1 if leaving >= first else 0
        columns[:, group] = [[count], [first], [width], [number]]
        count += number
    return Bundles(*columns), count


def _dealt(queue: Queue, bundles: Bundles) -> tuple[Labels, Labels]:
    """The units that are in a bundle, and the bundle of each. A scope with a first bundle of 2, and 2 bundles in all:

    place       0  1  2  3  4  5  6  7  8  9
    bundle      0  0  1  1  1  1  2  2  2  2      there is no bundle 2: these stay
    """
    scope = queue.scopes
    bundle = (queue.places - bundles.first[scope]) // bundles.width[scope] + 1
    leaves = bundle < bundles.number[scope]
    return queue.units[leaves], (bundles.offset[scope] + bundle)[leaves]


def _ranks(values: Values, units: Labels, bundle: Labels, count: int) -> Labels:
    """The rank of every bundle by its mean score; of equal ones that with the later first unit is lower.

    Bundles of units 1 and 2, of unit 0, and of unit 3 have the means 4, 4 and 2:

    >>> _ranks(np.array([4.0, 3.0, 5.0, 2.0]), np.array([1, 2, 0, 3]), np.array([0, 0, 1, 2]), 3)
    array([1, 2, 0])
    """
    mean = np.bincount(bundle, values[units], count) / np.bincount(bundle, minlength=count)
    first = np.empty(count, np.int64)
    first[bundle[::-1]] = units[::-1]  # of several that are written, the first in the queue stays
    by_first = np.argsort(first)
    ranks = np.empty(count, np.int64)
    ranks[by_first[_order(mean[by_first])]] = np.arange(count)
    return ranks


def unlike(coupling: Coupling) -> Mask:
    """``(scopes,)``: those whose units need not cost the same, as they are on different axes or not equally often.

    ::

        scope of units 0 1 2 3      sliced into 0 1 and 2 3, of which a layer consumes the first two only
    """
    draw = np.random.default_rng(0)
    places = np.zeros(len(coupling), np.uint64)  # a sum of numbers that tell the axes apart
    for row in (row for axis in coupling.axes for row in axis):
        times = np.bincount(row[row >= 0], minlength=len(coupling)).astype(np.uint64)
        places += times * draw.integers(2**64, dtype=np.uint64)
    different = np.zeros(len(coupling.scopes), bool)
    first = np.full(len(coupling.scopes), len(coupling))
    np.minimum.at(first, coupling.scope, np.arange(len(coupling)))
    different[coupling.scope[places != places[first[coupling.scope]]]] = True
    return different


def returned(
    keep: Mask,
    away: Mask,
    values: Values,
    parts: tuple[Labels, Rules],
    fits: Callable[[Mask], bool],
    unlike: Mask | None = None,
) -> Mask:
    """The units that stay when all that still fits comes back, bundle by bundle, the highest mean first.

    Of every scope the best units come back first, and once a bundle of it does not fit no other one does, where they
    cost the same. Units 0 and 1 have left, of scopes of their own, and there is room for two in all:

    >>> alone = np.arange(3), Rules([[0], [1], [2]], [1] * 3, [1.0] * 3, [1] * 3, np.zeros(3, bool))
    >>> keep = np.array([False, False, True])
    >>> returned(keep, ~keep, np.array([4.0, 5.0, 1.0]), alone, lambda mask: mask.sum() <= 2)
    array([False,  True,  True])

    Args:
        keep: ``(units,)``, a choice that the rules allow.
        away: ``(units,)``: those that may come back.
        parts: the part of its scope of each unit, ``(units,)``, and the rules of these parts (`Rules.parts`).
        fits: whether these units may stay.
        unlike: ``(units,)``: those of which others of the scope may cost less; none by default.
    """
    (part, rules), kept = parts, keep.copy()
    best = _order(values)[::-1]
    best = best[away[best]]
    queues = {int(k): best[part[best] == k].tolist() for k in np.unique(part[best])}

    def push(k: int) -> None:
        """Let the next bundle of a group wait: as many of each scope as leave together, or what is left over."""
        width, group = rules.width(rules.groups[k]), [queues[scope] for scope in rules.groups[k] if scope in queues]
        units = [unit for queue in group for unit in queue[:width]]
        for queue in group:
            del queue[:width]
        if units:
            heapq.heappush(waiting, (-float(values[units].mean()), k, units))

    waiting: list[tuple[float, int, list[int]]] = []
    for k in range(len(rules.groups)):
        push(k)
    while waiting:
        _, k, units = heapq.heappop(waiting)
        more = kept.copy()
        more[units] = True
        fit = fits(more)
        if fit:
            kept = more
        if fit or (unlike is not None and unlike[units].any()):
            push(k)
    return kept

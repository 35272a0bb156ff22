"""The order in which units leave, and the steps that constraints make of it."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.network.labels import Labels
from taylorfx.selection.budget import (
    SelectionError,
)
from taylorfx.selection.constraints import Rules

__all__ = ["finite", "last_of_axis", "like_structures", "quantiles", "steps"]


def finite(scores: torch.Tensor, coupling: Coupling) -> NDArray[np.float64]:
    if not isinstance(scores, torch.Tensor) or scores.shape != (len(coupling),) or scores.is_complex():
        found = f"{scores.dtype} of shape {tuple(scores.shape)}" if hasattr(scores, "dtype") else type(scores).__name__
        raise SelectionError(f"Scores are a tensor of one real number per unit, ({len(coupling)},); received {found}.")
    values: NDArray[np.float64] = scores.detach().to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        named = ", ".join(f"{coupling.names[k]} = {values[k]}" for k in bad[:8])
        more = f", and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise SelectionError(f"Scores have to be finite; received {named}{more}. Look at the criterion and its data.")
    return values


def _order(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by ascending value; among equal ones the later first."""
    order, n = values.argsort(), len(values)
    found = values[order]
    run = np.cumsum(found != np.roll(found, 1))  # equal ones; to sort twice is faster than stably once
    return n - 1 - np.sort(run * n + n - 1 - order) % n


def quantiles(values: NDArray[np.float64], groups: Labels) -> NDArray[np.float64]:
    """The share of its group that leaves no later than each unit."""
    result = np.empty_like(values)
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        result[members[_order(values[members])]] = np.arange(1, len(members) + 1) / len(members)
    return result


def like_structures(coupling: Coupling) -> Labels:
    """The class of like structures of every scope."""
    found: list[set[tuple[str, str]]] = [set() for _ in coupling.scopes]
    for node in coupling.spec:
        for letter, number in coupling.letters[node.name].items():
            axis = coupling.axes[number]
            for scope in np.unique(coupling.scope[axis[axis >= 0]]):
                found[scope].add((type(node.layer).__name__, letter))
    forms = [frozenset(places) for places in found]
    numbers = {form: k for k, form in enumerate(dict.fromkeys(forms))}
    return np.array([numbers[form] for form in forms], np.int64)


def last_of_axis(values: NDArray[np.float64], coupling: Coupling) -> Mask:
    """The best unit of every axis that is only a part of a scope (a slice): no axis may lose all of its indices.

    Axes with whole scopes on them are held by the floor.
    """
    held = np.zeros(len(coupling), bool)
    rows = [row for axis in coupling.axes for row in axis]
    units = np.concatenate(rows)
    row = np.repeat(np.arange(len(rows)), [*map(len, rows)])
    # A run of units of one scope, one after the other or repeated, as long as the scope, is that whole scope.
    scope = np.append(coupling.scope, -1)[units]
    step = np.diff(units)
    apart = (np.diff(row) != 0) | (np.diff(scope) != 0) | (step < 0) | (step > 1)
    first, last = np.flatnonzero(np.append(True, apart)), np.flatnonzero(np.append(apart, True))
    whole = (units[first] >= 0) & (units[last] - units[first] + 1 == np.append(coupling.sizes, 0)[scope[first]])
    done = np.zeros(len(rows), bool)
    done[row[first[whole]]] = done[row[units < 0]] = True
    for k in np.flatnonzero(~done):
        units = np.unique(rows[k])
        present, counts = np.unique(coupling.scope[units], return_counts=True)
        if not (counts == coupling.sizes[present]).any():
            held[units[_order(values[units])[-1]]] = True
    return held


def steps(
    values: NDArray[np.float64],
    coupling: Coupling,
    held: Mask,
    rules: Rules,
) -> tuple[Labels, int]:
    """The step at which each unit leaves, and the number of steps, which stands for never."""
    order = _order(values)
    loose = order[~held[order]]
    short = coupling.scope.astype(np.min_scalar_type(len(coupling.scopes)))  # a few bits sort faster
    loose = loose[np.argsort(short[loose], kind="stable")]  # scope by scope, in the order to leave
    scope = coupling.scope[loose]
    free, sizes = np.bincount(scope, minlength=len(coupling.scopes)), coupling.sizes.tolist()
    offset, first, width, steps = bundled = np.zeros(
        (4, len(coupling.scopes)), np.int64
    )  # of the bundles of each scope
    count = 0
    for group in rules.groups:
        size = sizes[group[0]]
        least = max(size - min([free[k] for k in group]), *[rules.floors[k] for k in group], 1)
        least = max(least, math.ceil((1 - min([rules.most[k] for k in group])) * size - 1e-9))
        bundle = math.lcm(*[rules.multiples[k] for k in group])
        begin, leaving = size % bundle or bundle, size - -(-least // bundle) * bundle
        number = (leaving - begin) // bundle + 1 if leaving >= begin else 0
        bundled[:, group] = [[count], [begin], [bundle], [number]]
        count += number
    position = np.arange(len(loose)) - (np.cumsum(free) - free)[scope]
    bundles = (position - first[scope]) // width[scope] + 1
    gone = bundles < steps[scope]
    loose, bundles = loose[gone], (offset[scope] + bundles)[gone]
    mean = np.bincount(bundles, values[loose], count) / np.bincount(bundles, minlength=count)
    firsts = np.empty(count, np.int64)
    firsts[bundles[::-1]] = loose[::-1]  # the first to leave in the first of its scopes is written last
    place, by = np.empty(count + 1, np.int64), np.argsort(firsts)
    place[by[_order(mean[by])]], place[-1] = np.arange(count), count
    step = np.full(len(coupling), count)
    step[loose] = place[bundles]
    return step, count

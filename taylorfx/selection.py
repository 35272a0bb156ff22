"""Select: who stays, given one score per unit and a budget.

Units leave in the order of their scores, lowest first; among equal scores the one that was written later leaves first.
Constraints (protected scopes, a floor and a most per layer, multiples) take units out of that order or bundle them;
then the shortest prefix that meets the budget leaves. All of it is a statement about the coupling: nothing is cut.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx.cost import flops, parameters
from taylorfx.coupling import Coupling
from taylorfx.plan import Plan

__all__ = ["Budget", "BudgetError", "Flops", "Parameters", "Remove", "SelectionError", "Units", "select"]

Mask = NDArray[np.bool_]
T = TypeVar("T", int, float)


class SelectionError(ValueError):
    """Scores or constraints that make no sense; the message lists every offender."""


class BudgetError(SelectionError):
    """A budget that cannot be met; the message names the nearest that can."""


@dataclass(frozen=True)
class Budget(ABC):
    """What may remain: a share of the whole (a float up to 1) or an absolute number (an int).

    A new kind is one subclass: ``cost`` says what to count, and it must never grow when a unit leaves.
    """

    amount: float | int

    def __post_init__(self) -> None:
        share = isinstance(self.amount, float)
        if not self.amount > 0 or (share and not self.amount <= 1):
            raise BudgetError(
                f"A budget is a share above 0 and up to 1.0, or a whole number above 0 of what may remain; received "
                f"{self}. Write an int for a number, a float for a share."
            )

    @abstractmethod
    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        """The function that says what the network costs when these units are kept."""

    def limit(self, total: float) -> float:
        """The most that may remain, of a network that costs ``total``."""
        return self.amount * total * (1 + 1e-12) if isinstance(self.amount, float) else self.amount

    def __str__(self) -> str:
        what = type(self).__name__.lower()
        return (
            f"at most {self.amount:.1%} of the {what}" if isinstance(self.amount, float) else f"{self.amount:,} {what}"
        )


class Flops(Budget):
    """At most this share or number of floating-point operations for one example."""

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return flops(coupling)


class Parameters(Budget):
    """At most this share or number of trained parameters."""

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return parameters(coupling)


class Units(Budget):
    """Exactly this number of units, or this share of them (rounded down)."""

    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        return lambda keep: float(keep.sum())

    def limit(self, total: float) -> float:
        return math.floor(super().limit(total))


class Remove(Units):
    """All but this number of units: ``Remove(1)`` takes one feature map, as Molchanov et al. 2016 did at each step."""

    def limit(self, total: float) -> float:
        return total - math.floor(self.amount * total if isinstance(self.amount, float) else self.amount)

    def __str__(self) -> str:
        return f"{self.amount:,} units less" if isinstance(self.amount, int) else f"{self.amount:.1%} of the units less"


def select(
    scores: torch.Tensor,
    coupling: Coupling,
    *,
    budget: Budget | float | int,
    protect: Sequence[str] = (),
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int | Mapping[str, int] = 1,
    per_layer: bool = False,
) -> Plan:
    """Decide which units stay: remove the lowest scores until the budget is met.

    Args:
        scores: ``(units,)``, higher means keep.
        budget: what may remain; a plain number means `Units`.
        protect: globs of scopes that lose nothing (``"layer1.*"``).
        floor: the fewest units that a scope keeps; a number, or by glob (the first that matches counts).
        most: the largest share of its units that a scope loses; likewise.
        multiple: scopes keep multiples of this number of units (or all of them); likewise. Units then leave in
            bundles, ordered by their mean score.
        per_layer: rank within each scope instead of across the network, so that all lose about the same share.

    Raises:
        BudgetError: if the budget cannot be met; the message names the nearest that can.
        SelectionError: for scores that are not finite or globs that match nothing.
    """
    budget = Units(budget) if isinstance(budget, (int, float)) else budget
    values = _finite(scores, coupling)
    if per_layer:
        values = _quantiles(values, coupling)
    held = _protected(coupling, protect) | _last_of_axis(values, coupling)
    units, bounds = _steps(
        values,
        coupling,
        held,
        _by_scope(coupling, floor, "floor", 1),
        _by_scope(coupling, most, "most", 1.0),
        _by_scope(coupling, multiple, "multiple", 1),
    )
    step = np.full(len(coupling), len(bounds))  # the step at which a unit leaves; beyond the last: never
    step[units] = np.repeat(np.arange(len(bounds) - 1), np.diff(bounds))
    cost = budget.cost(coupling)
    taken = _shortest(lambda count: cost(step >= count), len(bounds) - 1, budget)
    return Plan(coupling, step >= taken, str(budget))


def _finite(scores: torch.Tensor, coupling: Coupling) -> NDArray[np.float64]:
    if scores.shape != (len(coupling),):
        raise SelectionError(f"Scores are one per unit, ({len(coupling)},); received shape {tuple(scores.shape)}.")
    values: NDArray[np.float64] = scores.detach().to("cpu", torch.float64).numpy()
    bad = np.flatnonzero(~np.isfinite(values))
    if len(bad):
        named = ", ".join(f"{coupling.names[k]} = {values[k]}" for k in bad[:8])
        more = f", and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise SelectionError(f"Scores have to be finite; received {named}{more}. Look at the criterion and its data.")
    return values


def _order(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices by ascending value; among equal ones the later first."""
    return np.lexsort((-np.arange(len(values)), values))


def _quantiles(values: NDArray[np.float64], coupling: Coupling) -> NDArray[np.float64]:
    """The share of its scope that leaves no later than each unit."""
    result = np.empty_like(values)
    for k in range(len(coupling.scopes)):
        members = np.flatnonzero(coupling.scope == k)
        result[members[_order(values[members])]] = np.arange(1, len(members) + 1) / len(members)
    return result


def _protected(coupling: Coupling, globs: Sequence[str]) -> Mask:
    chosen = [any(fnmatchcase(name, glob) for glob in globs) for name in coupling.scopes]
    _all_match(coupling, globs, "protect")
    return np.array(chosen, bool)[coupling.scope]


def _all_match(coupling: Coupling, globs: Sequence[str], what: str) -> None:
    known = (*coupling.scopes, *coupling.frozen)
    unknown = [glob for glob in globs if not any(fnmatchcase(name, glob) for name in known)]
    if unknown:
        raise SelectionError(
            f"Globs name scopes of the network; {what} received {', '.join(map(repr, unknown))}, which match nothing. "
            f"The scopes are {', '.join(known)}."
        )


def _by_scope(coupling: Coupling, value: T | Mapping[str, T], what: str, default: T) -> list[T]:
    """One number per scope, from a number for all or a mapping from globs."""
    if not isinstance(value, Mapping):
        value = {"*": value}
    else:
        _all_match(coupling, tuple(value), what)
    bad = [f"{glob!r}: {n}" for glob, n in value.items() if n < 0 or (what == "most" and n > 1) or (what == "multiple" and n < 1)]  # fmt: skip
    if bad:
        raise SelectionError(f"{what} is at least {int(what == 'multiple')}{' and at most 1' * (what == 'most')}; received {', '.join(bad)}.")  # fmt: skip
    found = ([n for glob, n in value.items() if fnmatchcase(name, glob)] for name in coupling.scopes)
    return [numbers[0] if numbers else default for numbers in found]


def _last_of_axis(values: NDArray[np.float64], coupling: Coupling) -> Mask:
    """The best unit of every axis that is only a part of a scope (a slice): no axis may lose all of its indices.

    Axes with whole scopes on them are held by the floor.
    """
    held = np.zeros(len(coupling), bool)
    for axis in coupling.axes:
        for row in axis:
            if (row < 0).any():
                continue
            units = np.unique(row)
            present = np.bincount(coupling.scope[units], minlength=len(coupling.scopes))
            if not ((present == coupling.sizes) & (present > 0)).any():
                held[units[_order(values[units])[-1]]] = True
    return held


def _steps(
    values: NDArray[np.float64],
    coupling: Coupling,
    held: Mask,
    floors: Sequence[int],
    most: Sequence[float],
    multiples: Sequence[int],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The units that may leave, in order, and the bounds of the bundles in which they do."""
    keys, firsts, bundles = [np.zeros(0)], [np.zeros(0, np.int64)], []
    for k, size in enumerate(coupling.sizes.tolist()):
        members = np.flatnonzero((coupling.scope == k) & ~held)
        members = members[_order(values[members])]
        step = multiples[k]
        least = max(floors[k], 1, math.ceil((1 - most[k]) * size - 1e-9), size - len(members))
        least = min(size, -(-least // step) * step)
        spare = (size - least) - (size - least - size % step) % step if step > 1 else size - least
        cuts = np.arange(size % step if size % step and spare else 0, spare + 1, step)
        cuts = np.unique(np.append(0, cuts[cuts <= spare]))
        if len(cuts) > 1:
            gone = members[: cuts[-1]]
            keys.append(np.add.reduceat(values[gone], cuts[:-1]) / np.diff(cuts))
            firsts.append(gone[cuts[:-1]])
            bundles += np.split(gone, cuts[1:-1])
    order = np.lexsort((-np.concatenate(firsts), np.concatenate(keys)))
    chosen = [bundles[k] for k in order]
    return np.concatenate([np.zeros(0, np.int64), *chosen]), np.cumsum([0, *map(len, chosen)])


def _shortest(cost: Callable[[int], float], steps: int, budget: Budget) -> int:
    """The fewest steps after which the budget holds; for `Units`, after which it holds exactly."""
    limit = budget.limit(cost(0))
    low, high = 0, steps
    if cost(steps) > limit:
        raise BudgetError(
            f"The budget is {budget}, a limit of {limit:,.0f}; the constraints allow no less than {cost(steps):,.0f}. "
            "Loosen floor, most, multiple or protect, or ask for no less."
        )
    while low < high:
        middle = (low + high) // 2
        if cost(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    if isinstance(budget, Units) and cost(low) != limit:
        near = [cost(low - 1)] * (low > 0) + [cost(low)]
        raise BudgetError(
            f"The budget is {budget}, exactly {limit:,.0f} to stay; the nearest that the constraints allow are "
            f"{' and '.join(f'{n:,.0f}' for n in near)}."
        )
    return low

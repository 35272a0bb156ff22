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
        number = isinstance(self.amount, (int, float, np.integer)) and not isinstance(self.amount, bool)
        if not number or not 0 < self.amount <= (1.0 if isinstance(self.amount, float) else math.inf):
            raise BudgetError(
                "A budget says what may remain: a share, a float above 0 and up to 1.0, or a number, an int above 0; "
                f"received {type(self).__name__}({self.amount!r})."
            )

    @abstractmethod
    def cost(self, coupling: Coupling) -> Callable[[Mask], float]:
        """The function that says what the network costs when these units are kept."""

    def limit(self, total: float) -> float:
        """The most that may remain, of a network that costs ``total``."""
        return self.amount * total * (1 + 1e-12) if isinstance(self.amount, float) else self.amount

    def __str__(self) -> str:
        what = type(self).__name__.lower().replace("flops", "FLOPs")
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
        if isinstance(self.amount, float):
            return f"{self.amount:.1%} of the units less"
        return f"{self.amount:,} unit{'s' * (self.amount != 1)} less"


def select(
    scores: torch.Tensor,
    coupling: Coupling,
    *,
    budget: Budget | float | int,
    protect: str | Sequence[str] = (),
    floor: int | Mapping[str, int] = 1,
    most: float | Mapping[str, float] = 1.0,
    multiple: int | Mapping[str, int] = 1,
    per_layer: bool = False,
    exact_only: bool = False,
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
        exact_only: keep the units whose removal changes a norm's statistics (``coupling.exact``).

    Raises:
        BudgetError: if the budget cannot be met; the message names the nearest that can.
        SelectionError: for scores that are not finite or globs that match nothing.
    """
    budget = budget if isinstance(budget, Budget) else Units(budget)
    values = _finite(scores, coupling)
    if per_layer:
        values = _quantiles(values, coupling)
    held = _protected(coupling, protect) | _last_of_axis(values, coupling)
    if exact_only:
        held |= ~coupling.exact
    rules = (
        _by_scope(coupling, floor, "floor", 1),
        _by_scope(coupling, most, "most", 1.0),
        _by_scope(coupling, multiple, "multiple", 1),
    )
    cost = budget.cost(coupling)
    while True:
        step, count = _steps(values, coupling, held, *rules)
        taken = _shortest(lambda n, step=step: cost(step >= n), count, budget, coupling)  # type: ignore[misc]
        keep = step >= taken
        empty = np.flatnonzero(coupling.counts(keep) == 0)
        if not len(empty):
            return Plan(coupling, keep, str(budget))
        for axis in (coupling.axes[k] for k in empty):  # products and slices may need more than a floor per scope
            worth = np.where(axis >= 0, values[axis], np.inf).min(0)
            held[axis[:, worth.argmax()]] = True


def _finite(scores: torch.Tensor, coupling: Coupling) -> NDArray[np.float64]:
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
    return np.lexsort((-np.arange(len(values)), values))


def _quantiles(values: NDArray[np.float64], coupling: Coupling) -> NDArray[np.float64]:
    """The share of its scope that leaves no later than each unit."""
    result = np.empty_like(values)
    for k in range(len(coupling.scopes)):
        members = np.flatnonzero(coupling.scope == k)
        result[members[_order(values[members])]] = np.arange(1, len(members) + 1) / len(members)
    return result


def _protected(coupling: Coupling, globs: str | Sequence[str]) -> Mask:
    globs = (globs,) if isinstance(globs, str) else globs
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
    least, largest = int(what == "multiple"), 1 if what == "most" else math.inf
    bad = [f"{n} for {glob!r}" for glob, n in value.items() if not least <= n <= largest]
    if bad:
        above = " and at most 1" if what == "most" else ""
        raise SelectionError(f"{what} is at least {least}{above}; received {', '.join(bad)}.")
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
) -> tuple[NDArray[np.int64], int]:
    """The step at which each unit leaves, and the number of steps, which stands for never."""
    step = np.full(len(coupling), -1)
    keys, firsts, count = [np.zeros(0)], [np.zeros(0, np.int64)], 0
    for k, size in enumerate(coupling.sizes.tolist()):
        members = np.flatnonzero((coupling.scope == k) & ~held)
        members = members[_order(values[members])]
        bundle = multiples[k]
        least = max(floors[k], 1, math.ceil((1 - most[k]) * size - 1e-9), size - len(members))
        least = -(-least // bundle) * bundle
        cuts = np.array([0, *range(size % bundle or bundle, size - least + 1, bundle)])  # how many have left
        gone, widths = members[: cuts[-1]], np.diff(cuts)
        step[gone] = count + np.repeat(np.arange(len(widths)), widths)
        if len(widths):
            keys.append(np.add.reduceat(values[gone], cuts[:-1]) / widths)
            firsts.append(gone[cuts[:-1]])
        count += len(widths)
    order = np.lexsort((-np.concatenate(firsts), np.concatenate(keys)))
    place = np.empty(count + 1, np.int64)
    place[order], place[-1] = np.arange(count), count
    return place[step], count


def _shortest(cost: Callable[[int], float], steps: int, budget: Budget, coupling: Coupling) -> int:
    """The fewest steps after which the budget holds; for `Units`, after which it holds exactly."""
    total, least = cost(0), cost(steps)
    limit = budget.limit(total)
    low, high = 0, steps
    if least > limit:
        frozen = f" Frozen are {', '.join(coupling.frozen)}: see coupling.frozen." if coupling.frozen else ""
        raise BudgetError(
            f"The budget is {budget}, a limit of {limit:,.0f} in {total:,.0f}; the constraints allow no less than "
            f"{least:,.0f}. Loosen floor, most, multiple or protect, or ask for no less.{frozen}"
        )
    while low < high:
        middle = (low + high) // 2
        if cost(middle) <= limit:
            high = middle
        else:
            low = middle + 1
    if isinstance(budget, Units) and cost(low) != limit:
        near = [cost(low)] + [cost(low - 1)] * (low > 0)
        raise BudgetError(
            f"The budget is {budget}, exactly {limit:,.0f} to stay; the constraints allow "
            f"{' or '.join(f'{n:,.0f}' for n in near)} as the nearest."
        )
    return low

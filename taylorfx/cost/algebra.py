"""Costs as values: sums and multiples of costs are costs, with prices."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.functions import name_of, pickled, present_as
from taylorfx.network.labels import Labels

__all__ = ["Cost", "CostFunction"]


@dataclass(frozen=True, eq=False)
class Cost(ABC):
    """What a network costs, by the lengths of its coupling's axes.

    Call it with the mask of kept units, ``(units,)``. Sums of costs of one coupling, and multiples by numbers that are
    not negative, are costs: ``4 * parameters(coupling) + flops(coupling)``.
    """

    coupling: Coupling

    def __call__(self, keep: Mask) -> float:
        return self.of(self.coupling.lengths(keep))

    @property
    def total(self) -> float:
        """The cost of the whole network."""
        return self(np.ones(len(self.coupling), bool))

    def marginal(self, keep: Mask | None = None) -> Tensor:
        """What leaves with each unit, to first order: ``(units,)``, in float64.

        A score divided by it is worth per cost: ``taylor(stats, coupling) / flops(coupling).marginal()``.

        Args:
            keep: the units that the network still has, ``(units,)``; by default all. Of the others it is what would
                come back with them.
        """
        coupling = self.coupling
        kept = np.append(np.ones(len(coupling), bool) if keep is None else keep, True)
        saved = np.zeros(len(coupling) + 1)  # the last is that of indices without a unit, -1
        slopes = self.slopes(coupling.lengths(kept[:-1]))
        for unit, number in coupling.pivotal(kept[:-1]):
            saved[unit] += slopes[len(coupling.axes) + number]
        for axis, slope in zip(coupling.axes, slopes, strict=False):
            for k, row in enumerate(axis):
                others = kept[np.delete(axis, k, 0)].all(0)  # an index of several factors is there if all of them are
                saved += slope * np.bincount(row[others] % len(saved), minlength=len(saved))
        return torch.from_numpy(saved[:-1])

    @abstractmethod
    def of(self, lengths: Labels) -> float:
        """The cost at these lengths, ``(axes,)``; with branches also the conditions that hold (`Coupling.lengths`)."""

    @abstractmethod
    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        """How it grows with each of them, in that order; perhaps one more, which is not looked at."""

    def __add__(self, other: Cost | int) -> Cost:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not isinstance(other, Cost):
            return NotImplemented
        mine, theirs = self.coupling, other.coupling
        if mine is not theirs and (mine.spec != theirs.spec or mine.names != theirs.names):
            raise ValueError(
                f"Costs add up when they are of one coupling; received those of {len(mine)} and of {len(theirs)} units "
                "of different networks. Make both from the same coupling."
            )
        return _Combined(mine, (*_terms(self), *_terms(other)))

    __radd__ = __add__

    def __mul__(self, factor: float) -> Cost:
        if not isinstance(factor, Real):
            return NotImplemented
        weight = _weight(factor)
        return _Combined(self.coupling, tuple((weight * inner, cost) for inner, cost in _terms(self)))

    __rmul__ = __mul__


@dataclass(frozen=True, eq=False)
class _Combined(Cost):
    """A sum of multiples of costs."""

    terms: tuple[tuple[float, Cost], ...]

    def of(self, lengths: Labels) -> float:
        return sum(weight * cost.of(lengths) for weight, cost in self.terms)

    def slopes(self, lengths: Labels) -> NDArray[np.float64]:
        slopes = np.zeros(len(lengths))
        for weight, cost in self.terms:
            slopes += weight * cost.slopes(lengths)[: len(lengths)]
        return slopes


def _terms(cost: Cost) -> tuple[tuple[float, Cost], ...]:
    return cost.terms if isinstance(cost, _Combined) else ((1, cost),)


def _weight(factor: float) -> float:
    if isinstance(factor, bool) or not 0 <= factor < math.inf:
        raise ValueError(
            "A cost is multiplied by a finite number that is not negative, so that none grows when a unit leaves; "
            f"received {factor!r}."
        )
    return factor


@dataclass(frozen=True)
class CostFunction:
    """A function of a coupling that gives a `Cost`; sums of such functions and multiples of them are ones.

    `parameters`, `flops` and `memory` are ones. A budget of a sum has prices, so that ``per_cost=True`` takes it:

    >>> import taylorfx as tfx
    >>> print(tfx.Budget.of(0.5, 4 * tfx.cost.parameters + tfx.cost.flops))
    at most 50.0% of the 4 * parameters + flops

    Attributes:
        function: ``function(coupling)`` gives the `Cost`.
        words: what is counted, in words; by default the function's name.
    """

    function: Callable[[Coupling], Cost]
    words: str = ""

    def __post_init__(self) -> None:
        if not self.words:
            object.__setattr__(self, "words", name_of(self.function))
            present_as(self, self.function)

    def __call__(self, coupling: Coupling) -> Cost:
        return self.function(coupling)

    def __reduce__(self) -> str | tuple[object, ...]:
        return pickled(self)

    def __str__(self) -> str:
        return self.words

    def __add__(self, other: Callable[[Coupling], Cost] | int) -> CostFunction:
        if isinstance(other, int) and other == 0:  # the start of Python's sum()
            return self
        if not callable(other):
            return NotImplemented
        name = str(other) if isinstance(other, CostFunction) else name_of(other)
        return CostFunction(lambda coupling: self(coupling) + other(coupling), f"{self} + {name}")

    __radd__ = __add__

    def __mul__(self, factor: float) -> CostFunction:
        if not isinstance(factor, Real):
            return NotImplemented
        weight, inner = _weight(factor), f"({self})" if " + " in self.words else self.words
        return CostFunction(lambda coupling: weight * self(coupling), f"{weight:g} * {inner}")

    __rmul__ = __mul__

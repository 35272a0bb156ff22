"""Schedules: budgets that fall step by step, as plain iterators.

With ``u = 1 - t / steps``, which falls from 1 to 0, step ``t = 1, ..., steps`` may keep

| schedule | what may remain | source |
| --- | --- | --- |
| `linear` | ``end + (start - end) u`` | equal amounts leave |
| `cubic` | ``end + (start - end) u^3`` | Zhu & Gupta 2017, arXiv 1710.01878, eq. 1: much leaves early |
| `exponential` | ``end (start / end)^u`` | equal shares of what is left leave |

The last step is ``end`` exactly. Shares are of the original network, as `taylorfx.iterate` takes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar, cast

from taylorfx.selection.budget import Budget

__all__ = ["cubic", "exponential", "linear"]

End = TypeVar("End", bound=Budget | float)
Curve = Callable[[float, float, float], float]


def linear(end: End, steps: int, *, start: float | None = None) -> Iterator[End]:
    """Equal amounts leave at every step.

    Args:
        end: the last budget, or its bare number.
        steps: how many budgets.
        start: what there is before the first step, of the same kind as ``end``; for shares 1.0.

    Raises:
        ValueError: at once, for no steps, a start below the end, or a number as the end without a start.

    >>> [round(share, 3) for share in linear(0.4, 3)]
    [0.8, 0.6, 0.4]
    """
    return _steps(end, steps, start, lambda last, first, u: last + (first - last) * u)


def cubic(end: End, steps: int, *, start: float | None = None) -> Iterator[End]:
    """Much leaves early, little late (Zhu & Gupta 2017, arXiv 1710.01878, eq. 1, for what remains instead of what is
    gone). The arguments and errors are those of `linear`.

    >>> [round(share, 3) for share in cubic(0.4, 3)]
    [0.578, 0.422, 0.4]
    """
    return _steps(end, steps, start, lambda last, first, u: last + (first - last) * u**3)


def exponential(end: End, steps: int, *, start: float | None = None) -> Iterator[End]:
    """Every step keeps the same share of what the step before left. The arguments and errors are those of `linear`.

    >>> [round(share, 3) for share in exponential(0.125, 3)]
    [0.5, 0.25, 0.125]
    """
    return _steps(end, steps, start, lambda last, first, u: last * (first / last) ** u)


def _steps(end: End, steps: int, start: float | None, curve: Curve) -> Iterator[End]:
    last = end.amount if isinstance(end, Budget) else end
    first = 1.0 if start is None and isinstance(last, float) else start
    if steps < 1 or first is None or isinstance(first, float) != isinstance(last, float) or not 0 < last <= first:
        raise ValueError(
            "A schedule has one or more steps and falls from a start to an end of the same kind, shares or numbers, "
            f"both above 0; received {steps} steps from {start} to {end}. A number needs its start, start=..."
        )
    amounts = (curve(last, first, 1 - k / steps) for k in range(1, steps + 1))
    exact: Iterator[float] = amounts if isinstance(last, float) else map(round, amounts)
    return (cast("End", replace(end, amount=amount) if isinstance(end, Budget) else amount) for amount in exact)

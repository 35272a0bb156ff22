"""Conditions on sizes that torch noted while it ran a module: which count, where they hold, which line they are of."""

from __future__ import annotations

import itertools
import math
import re
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.printers import PythonPrinter

__all__ = ["in_steps", "lines_of", "of_values", "predicate"]

_LAYOUT = re.compile("contiguous|stride|channels_last|non_overlapping|memory_format|_reshape_view")
"""Functions of torch that ask how tensors lie in memory."""


def lines_of(env: ShapeEnv) -> dict[sympy.Symbol, str]:
    """For every symbol that has conditions the line that is most likely to have settled its size.

    It is that of the last condition of the best kind: one of the user's code, and an equation.
    """
    lines: dict[sympy.Symbol, tuple[tuple[bool, bool], str]] = {}
    for guard in env.guards:
        user, equation = guard.sloc.maybe_user_loc, isinstance(guard.expr, sympy.Eq)
        line, rank = user or _line(guard.sloc.framework_loc), (bool(user), equation)
        for symbol in guard.expr.free_symbols if line else ():
            if rank >= lines.get(symbol, (rank, ""))[0]:
                lines[symbol] = rank, line
    return {symbol: line for symbol, (_, line) in lines.items()}


def predicate(symbol: sympy.Symbol, guard: sympy.Basic) -> Callable[[int], bool]:
    """A guard on one symbol as a function of its size."""
    told = eval(f"lambda {symbol}: {PythonPrinter().doprint(guard)}", {"math": math, "torch": torch})

    def holds(size: int) -> bool:
        try:
            return bool(told(size))
        except ArithmeticError:
            return False

    return holds


def in_steps(sizes: Sequence[int]) -> bool:
    """Whether sizes follow each other in equal steps.

    >>> in_steps([8, 16, 24]), in_steps([8, 9, 11])
    (True, False)
    """
    return len({b - a for a, b in itertools.pairwise(sizes)}) <= 1


def _line(place: object) -> str:
    """``"net.py:31 in forward"``, where the place is known."""
    if not isinstance(place, traceback.FrameSummary):
        return ""
    return f"{place.filename.rpartition('/')[2]}:{place.lineno} in {place.name}"


def of_values(guard: Any) -> bool:
    """Whether a guard is about values, not about where they lie in memory, which a network does not fix.

    Nor about a size of one among tensors that broadcast: a network broadcasts as torch does.
    """
    place = guard.sloc.framework_loc
    if not isinstance(place, traceback.FrameSummary):
        return True
    alone = isinstance(guard.expr, sympy.Ne) and guard.expr.rhs == 1
    return not _LAYOUT.search(place.name) and not (alone and place.name == "_broadcast_shapes")

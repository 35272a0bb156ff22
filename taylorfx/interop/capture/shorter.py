"""Sizes of torch.export in a short form: what a chain of convolutions makes of an axis, in one division.

A layer's size is written in that of the layer before, and repeats it: three times in a convolution with TensorFlow's
"same" padding, twice where windows are padded. After ten layers nobody, and torch least, reasons about it. Yet what it
is, at any depth, is a line and a staircase:

    size     16  17  18 ... 32  33               of the input
    f(size)   4   5   5 ...  8   9               after two convolutions of stride 2 with "same" padding

    f(size) = (size + 3) // 4
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence

import sympy
from torch.utils._sympy import functions
from torch.utils._sympy.printers import PythonPrinter

from taylorfx.interop.capture.formulas import floor_div

__all__ = ["shortened"]

_DENSE = range(1, 2049)
"""Sizes at which a short form is compared, one by one."""

_FAR = tuple(2**k + n for k in range(12, 25, 2) for n in range(-13, 14))
"""And larger ones: a clamp that acts only there is no part of a short form."""


_OPERATORS = (
    sympy.Symbol, sympy.Integer, sympy.Add, sympy.Mul, functions.FloorDiv, functions.Mod, functions.PythonMod,
    functions.Max, functions.Min, functions.IntTrueDiv, functions.CeilToInt, functions.FloorToInt,
)  # fmt: skip
"""What the size of a layer is made of. Of these, it is a line and stairs that repeat, but for clamps."""


@functools.lru_cache(4096)
def shortened(size: sympy.Expr) -> sympy.Expr:
    """The same size in a form that names its axis less often, or has fewer operations; of several axes, axis by axis.

    >>> h = sympy.Symbol("h", positive=True, integer=True)
    >>> after = lambda n: floor_div(n - 1, 2) + 1
    >>> shortened(after(after(after(h))))
    ((h + 7)//8)
    """
    symbols = size.free_symbols
    if not symbols or size.is_Symbol:
        return size
    (symbol, *more) = symbols
    if not more and symbol.is_positive and _length(size) > (1, 2):  # what is read from a tensor may be negative
        form = _form(size, symbol)
        if form is not None and _length(form) < _length(size):
            return form
    parts = [shortened(part) if isinstance(part, sympy.Expr) else part for part in size.args]
    return size if all(map(sympy.Basic.__eq__, parts, size.args)) else size.func(*parts)


def _length(size: sympy.Expr) -> tuple[int, int]:
    """How often a size names axes, by which it grows from layer to layer, and how many operations it has."""
    return size.count(sympy.Symbol), size.count_ops()


def _form(size: sympy.Expr, symbol: sympy.Symbol) -> sympy.Expr | None:
    """``e s + c ((s + a) // b) + d``, if that is what a size is."""
    if not all(isinstance(part, _OPERATORS) for part in sympy.preorder_traversal(size)):
        return None
    try:
        values, far = _values(size, symbol)
    except ZeroDivisionError:
        return None
    if not all(isinstance(n, int) for n in values):
        return None  # a quotient
    steps = [after - before for before, after in itertools.pairwise(values)]
    slopes = sorted({*steps}, key=lambda step: (step != 0, abs(step)))
    for slope in slopes if len(slopes) < 3 else ():
        jumps = [k for k, step in enumerate(steps) if step != slope]  # between the sizes k + 1 and k + 2
        form = slope * symbol + _stairs(symbol, values[0] - slope, jumps, sum({*slopes}) - 2 * slope)
        if _values(form, symbol) == (values, far):
            return form
    return None


def _stairs(symbol: sympy.Symbol, first: int, jumps: Sequence[int], height: int) -> sympy.Expr:
    """What is ``first`` at one, and higher by ``height`` after each jump: ``height ((s + shift) // width) + rest``."""
    if len(jumps) < 2:
        return sympy.Integer(first)
    width = jumps[1] - jumps[0]
    shift = -(jumps[0] + 2) % width
    rest = first - height * ((1 + shift) // width)
    if rest % height == 0:
        shift, rest = shift + width * (rest // height), 0
    return height * floor_div(symbol + shift, sympy.Integer(width)) + rest


def _values(size: sympy.Expr, symbol: sympy.Symbol) -> tuple[list[int], list[int]]:
    """What an expression is where the symbol is one of `_DENSE`, and one of `_FAR`."""
    written = PythonPrinter().doprint(size)
    function: Callable[[int], int] = eval(f"lambda {symbol}: {written}", {"math": math})
    return [*map(function, _DENSE)], [*map(function, _FAR)]

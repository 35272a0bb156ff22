"""Sizes while a graph is read: numbers of the example that are equal only if they are so at all sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch

from taylorfx.interop.capture.formulas import floor_div, modulo

__all__ = ["SYMBOLIC", "Open", "OpenRatio", "Symbolic", "expression", "opened"]

SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
Symbolic = torch.SymInt | torch.SymFloat | torch.SymBool
"""torch's numbers that stand for several."""


class Open(int):
    """A size of the example that follows from the inputs' sizes. Two are equal if they are the same expression.

    Sums, products, quotients and remainders of it are expressions again.
    """

    expr: sympy.Expr

    def __new__(cls, number: int, expr: sympy.Expr) -> Open:
        size = super().__new__(cls, number)
        size.expr = expr
        return size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Open) and bool(self.expr == other.expr)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.expr)


class OpenRatio(float):
    """The same of a floating-point number."""

    expr: sympy.Expr

    def __new__(cls, number: float, expr: sympy.Expr) -> OpenRatio:
        ratio = super().__new__(cls, number)
        ratio.expr = expr
        return ratio


def _arithmetic(name: str, of: Callable[[Any, Any], sympy.Expr]) -> None:
    """Give `Open` an operator and its reflected one."""
    operate = getattr(int, f"__{name}__")

    def forward(self: Open, other: object) -> object:
        number = operate(int(self), int(other)) if isinstance(other, int) else NotImplemented
        return number if number is NotImplemented else opened(number, of(self.expr, expression(other)))

    def reflected(self: Open, other: object) -> object:
        number = operate(int(other), int(self)) if isinstance(other, int) else NotImplemented
        return number if number is NotImplemented else opened(number, of(expression(other), self.expr))

    setattr(Open, f"__{name}__", forward)
    setattr(Open, f"__r{name}__", reflected)


def opened(number: int, expr: sympy.Expr) -> int:
    """A size with its expression; one that is the same at all sizes is a plain number."""
    return Open(number, expr) if expr.free_symbols else number


for _name, _of in {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "floordiv": floor_div,
    "mod": modulo,
}.items():  # fmt: skip
    _arithmetic(_name, _of)


def _power(self: Open, power: float) -> OpenRatio:
    return OpenRatio(int(self) ** power, self.expr ** sympy.sympify(power))


Open.__pow__ = _power  # type: ignore[assignment, method-assign]


def expression(size: object) -> sympy.Expr:
    """A size in sympy."""
    if isinstance(size, SYMBOLIC):
        return size.node.expr
    return size.expr if isinstance(size, (Open, OpenRatio)) else sympy.sympify(size)

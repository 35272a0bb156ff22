"""Expressions of torch's symbols as formulas: what a captured graph says of a size, in the plain data of a network."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import sympy
from torch.utils._sympy import functions

from taylorfx.layers.sizes import Formula

__all__ = ["Unwritten", "floor_div", "formula_of", "modulo", "quotient"]


class Unwritten(ValueError):
    """An expression that has no formula."""


floor_div: Callable[[object, object], sympy.Expr] = functions.FloorDiv
modulo: Callable[[object, object], sympy.Expr] = functions.Mod
quotient: Callable[[object, object], sympy.Expr] = functions.IntTrueDiv

_NAMES = {
    "FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%", "Max": "max", "Min": "min", "IntTrueDiv": "/",
    "FloatTrueDiv": "/", "ToFloat": "float", "FloorToInt": "floor", "CeilToInt": "ceil", "TruncToInt": "trunc",
    "RoundToInt": "round", "PowByNatural": "**", "FloatPow": "**", "Abs": "abs", "Where": "if", "Equality": "==",
    "Unequality": "!=", "StrictLessThan": "<", "LessThan": "<=", "StrictGreaterThan": ">", "GreaterThan": ">=",
    "And": "and", "Or": "or", "Not": "not", "floor": "floor", "ceiling": "ceil",
}  # fmt: skip
"""The operators of formulas, by torch's and sympy's names."""

_ROUNDED = {"FloorToInt": 0, "floor": 0, "CeilToInt": 1, "ceiling": 1}


def formula_of(expression: sympy.Basic, symbols: Mapping[sympy.Symbol, Formula]) -> Formula:
    """An expression as a formula, each symbol replaced.

    >>> h = sympy.Symbol("h")
    >>> formula_of(3 * h - 1, {h: "x.2"})
    ('-', ('*', 3, 'x.2'), 1)

    Raises:
        Unwritten: if it has an operator that formulas have not, or a symbol that is not among these.
    """
    name = type(expression).__name__

    def parts(terms: tuple[sympy.Basic, ...]) -> tuple[Formula, ...]:
        return tuple(formula_of(term, symbols) for term in terms)

    if isinstance(expression, sympy.Symbol):
        if expression not in symbols:
            raise Unwritten(str(expression))
        return symbols[expression]
    if isinstance(expression, sympy.Integer):
        return int(expression)
    if isinstance(expression, sympy.Rational):
        return ("/", int(expression.p), int(expression.q))
    if isinstance(expression, sympy.Float):
        return float(expression)
    if expression in (sympy.true, sympy.false):
        return int(bool(expression))
    if isinstance(expression, sympy.Add):
        return _sum(parts(expression.as_ordered_terms()))
    if isinstance(expression, sympy.Mul):
        # Halves of a size stand in an expression where the size is known to be even: the quotient is a whole number.
        factor, rest = expression.as_coeff_Mul()
        if isinstance(factor, sympy.Rational) and factor.q != 1:
            return ("//", formula_of(rest * factor.p, symbols), int(factor.q))
        return ("*", *parts(expression.args))
    if isinstance(expression, sympy.Pow):
        base, power = parts(expression.args)
        return ("/", 1, base) if power == -1 else ("**", base, power)
    if name == "ModularIndexing":
        base, divisor, modulus = parts(expression.args)
        return ("%", ("//", base, divisor), modulus)
    if name == "Identity":
        return formula_of(expression.args[0], symbols)
    if name in _ROUNDED and type(expression.args[0]).__name__ == "IntTrueDiv":
        one, other = parts(expression.args[0].args)  # whole numbers stay exact: the quotient is never a float
        return ("-", 0, ("//", ("-", 0, one), other)) if _ROUNDED[name] else ("//", one, other)
    if name.startswith("OpaqueUnaryFn_sqrt"):
        return ("**", *parts(expression.args), 0.5)
    if name in _NAMES:
        return (_NAMES[name], *parts(expression.args))
    raise Unwritten(f"{name} of {expression}")


def _sum(terms: tuple[Formula, ...]) -> Formula:
    """A sum with its negative numbers subtracted: ``x.2 - 1``, not ``x.2 + -1``."""
    plus = [term for term in terms if not _negative(term)]
    minus = [term for term in terms if _negative(term)]
    if not plus:
        return ("+", *terms)
    result: Formula = plus[0] if len(plus) == 1 else ("+", *plus)
    for term in minus:
        positive = -term if isinstance(term, (int, float)) else _positive(term)
        result = ("-", result, positive)
    return result


def _negative(term: Formula) -> bool:
    if isinstance(term, (int, float)):
        return term < 0
    return isinstance(term, tuple) and term[0] == "*" and isinstance(term[1], int) and term[1] < 0


def _positive(term: Formula) -> Formula:
    assert isinstance(term, tuple)
    _, factor, *rest = term
    if factor == -1:
        return rest[0] if len(rest) == 1 else ("*", *rest)
    return ("*", -factor, *rest)

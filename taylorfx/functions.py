"""Functions as values: what a function is called, how it may be called, and values that stand for one."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import partial

__all__ = ["filled_in", "innermost", "name_of", "pickled", "present_as", "unfit"]


def unfit(function: Callable[..., object], *args: object, **keywords: object) -> str:
    """Why a function cannot be called with these arguments; empty if it can, or does not tell.

    >>> unfit(len, [1], [2])
    'too many positional arguments'
    """
    try:
        inspect.signature(function).bind(*args, **keywords)
    except TypeError as error:
        return str(error)
    except ValueError:  # a built-in function without a signature
        return ""
    return ""


def name_of(value: object) -> str:
    """A function by its name, anything else by its type.

    >>> name_of(len), name_of("taylor")
    ('len', "str 'taylor'")
    """
    name = getattr(value, "__name__", None)
    return name if isinstance(name, str) and name else f"{type(value).__name__} {value!r:.80}"


def innermost(function: object) -> object:
    """What a ``functools.partial``, or one of one, calls."""
    while isinstance(function, partial):
        function = function.func
    return function


def filled_in(function: object) -> set[str]:
    """The keywords that a ``functools.partial``, or one of one, has filled in.

    >>> sorted(filled_in(partial(partial(sorted, reverse=True), key=len)))
    ['key', 'reverse']
    """
    names: set[str] = set()
    while isinstance(function, partial) or is_dataclass(function):  # a value may stand for a partial, too
        names |= {*function.keywords} if isinstance(function, partial) else set()
        function = function.func if isinstance(function, partial) else getattr(function, "__wrapped__", None)
    return names


def present_as(value: object, function: object) -> None:
    """Give a frozen value the name, the documentation and the signature of the function that it stands for."""
    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        object.__setattr__(value, name, getattr(innermost(function), name, None))
    object.__setattr__(value, "__wrapped__", function)


def pickled(value: object) -> str | tuple[object, ...]:
    """How a dataclass that stands for a function is pickled: by its name if a module defines it, as functions are."""
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str) and getattr(sys.modules.get(value.__module__), name, None) is value:
        return name
    assert is_dataclass(value)
    return type(value), tuple(getattr(value, field.name) for field in fields(value))

"""Globs: what the names that a constraint is given stand for in a network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import translate

from taylorfx.coupling.units import Coupling
from taylorfx.selection.budget import SelectionError

__all__ = ["Globs", "all_match", "first_of", "globs"]

Globs = str | Iterable[str]

SHOWN, LISTED = 3, 24
"""How many near names an error shows for a glob, and how many scopes it lists."""


def globs(value: object, what: str) -> tuple[str, ...]:
    """One glob or several, as a tuple; anything else is refused as what it is given for."""
    several = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else None
    if several is None or not all(isinstance(glob, str) for glob in several):
        raise SelectionError(f"{what} takes a glob or several, strings like 'layer1.*'; received {value!r}.")
    return several


def _scopes(coupling: Coupling, glob: str) -> set[int] | None:
    """The scopes that a glob stands for, perhaps none since they are frozen; None if it matches nothing.

    Those of a name that it matches, or written with a parameter that it matches. If there are none, those that shrink
    a parameter that it matches.
    """
    matches = re.compile(translate(glob)).match
    frozen = any(map(matches, coupling.frozen))
    close = {k for k, name in enumerate(coupling.scopes) if any(map(matches, (name, *coupling.written.get(name, ()))))}
    if close or frozen:
        return close
    if any(map(matches, coupling.parameters)):
        return {k for k, paths in enumerate(coupling.paths) if any(map(matches, paths))}
    return None


def first_of(coupling: Coupling, names: Sequence[str]) -> dict[int, str]:
    """For every scope that a glob stands for, the first that does."""
    first: dict[int, str] = {}
    for glob in names:
        for scope in _scopes(coupling, glob) or ():
            first.setdefault(scope, glob)
    return first


def all_match(coupling: Coupling, names: Sequence[str], what: str) -> None:
    """Refuse globs that match nothing, with names that are spelled like them."""
    unknown = [glob for glob in names if _scopes(coupling, glob) is None]
    if unknown:
        scopes = (*coupling.scopes, *coupling.frozen)
        near = [name for glob in unknown for name in _near(glob, (*scopes, *coupling.parameters))]
        listed = f"Near them are {', '.join(dict.fromkeys(near))}. " if near else ""
        raise SelectionError(
            f"Globs name scopes of the network, or parameters; {what} received {', '.join(map(repr, unknown))}, which "
            f"match nothing. {listed}The scopes are {_enumerated(scopes)}."
        )


def _near(glob: str, names: Iterable[str]) -> list[str]:
    """Names that are spelled like a glob, or parts of which are.

    >>> _near("*q_prj*", ["layers.0.q_proj.weight", "layers.0.k_proj.weight", "norm.weight"])
    ['layers.0.q_proj.weight', 'layers.0.k_proj.weight']
    """
    plain = glob.strip("*")
    parts: dict[str, list[str]] = {}
    for name in names:
        for part in {name, *re.split(r"[.:] ?", name)}:
            parts.setdefault(part, []).append(name)
    return list(dict.fromkeys(parts[part][0] for part in get_close_matches(plain, parts, SHOWN)))


def _enumerated(names: Sequence[str]) -> str:
    """Names, the first ones of many."""
    more = f" and {len(names) - LISTED} more (print the coupling)" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more

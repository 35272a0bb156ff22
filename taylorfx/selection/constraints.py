"""Constraints: what a selection respects, as a value that is checked against a coupling before anything is measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from glob import escape
from numbers import Integral, Real
from typing import Any, NamedTuple, TypeVar

import numpy as np

from taylorfx.coupling.units import Coupling, Mask
from taylorfx.selection.budget import SelectionError

__all__ = ["Constraints", "Rules"]

T = TypeVar("T")
Globs = str | Iterable[str]


class Rules(NamedTuple):
    """Constraints on one coupling, by the numbers of its scopes."""

    groups: list[list[int]]
    """Scopes that keep the same number of units; most are alone."""
    floors: list[int]
    most: list[float]
    multiples: list[int]
    protected: Mask
    """``(units,)``: those that stay whatever they are worth."""


@dataclass(frozen=True)
class Constraints:
    """The constraints of `select`, which documents them."""

    protect: Globs = ()
    floor: int | Mapping[str, int] = 1
    most: float | Mapping[str, float] = 1.0
    multiple: int | Mapping[str, int] = 1
    uniform: Globs = ()
    per_layer: bool = False
    isomorphic: bool = False
    exact_only: bool = False

    def __post_init__(self) -> None:
        for name in ("protect", "uniform"):
            object.__setattr__(self, name, _globs(getattr(self, name), name))

    @staticmethod
    def of(options: Mapping[str, Any]) -> Constraints:
        """Constraints by their names.

        Raises:
            SelectionError: for names that no constraint has, and for globs that are no strings.
        """
        known = [field.name for field in fields(Constraints)]
        strange = [name for name in options if name not in known]
        if strange:
            raise SelectionError(f"The constraints are {', '.join(known)}; received {', '.join(strange)}.")
        return Constraints(**options)

    @property
    def options(self) -> dict[str, Any]:
        """As keywords of `select`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def on(self, coupling: Coupling) -> Rules:
        """What they say of this coupling.

        Raises:
            SelectionError: for globs that match nothing and numbers out of range; of every constraint at once.
        """
        problems: list[str] = []

        def checked(rule: Callable[..., T], *args: Any) -> Any:
            try:
                return rule(coupling, *args)
            except SelectionError as error:
                problems.append(str(error))
                return None

        groups = checked(_together, self.uniform)
        floors, most, multiples = (
            checked(_by_scope, value, what, default)
            for value, what, default in (
                (self.floor, "floor", 1), (self.most, "most", 1.0), (self.multiple, "multiple", 1),
            )
        )  # fmt: skip
        protected = checked(_protected, self.protect)
        if problems:
            raise SelectionError(" ".join(problems))
        held = protected | ~coupling.exact if self.exact_only else protected
        return Rules(groups, floors, most, multiples, held)

    def lasting(self, coupling: Coupling) -> Constraints:
        """The same with ``floor`` and ``most`` as one floor for every scope of this network."""
        rules = self.on(coupling)
        sizes = zip(coupling.scopes, rules.floors, rules.most, coupling.sizes.tolist(), strict=True)
        least = {escape(name): max(floor, math.ceil((1 - most) * size - 1e-9)) for name, floor, most, size in sizes}
        return replace(self, floor=least, most=1.0)

    def standing(self, coupling: Coupling) -> Constraints:
        """The same without the globs that match nothing in this network."""

        def still(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {glob: number for glob, number in value.items() if _matches(coupling, glob)}
            return tuple(glob for glob in value if _matches(coupling, glob)) if isinstance(value, tuple) else value

        return replace(self, **{name: still(value) for name, value in self.options.items()})


def _globs(value: Any, what: str) -> tuple[str, ...]:
    several = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else None
    if several is None or not all(isinstance(glob, str) for glob in several):
        raise SelectionError(f"{what} takes a glob or several, strings like 'layer1.*'; received {value!r}.")
    return several


def _matches(coupling: Coupling, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in (*coupling.scopes, *coupling.frozen))


def _all_match(coupling: Coupling, globs: Sequence[str], what: str) -> None:
    unknown = [glob for glob in globs if not _matches(coupling, glob)]
    if unknown:
        known = (*coupling.scopes, *coupling.frozen)
        raise SelectionError(
            f"Globs name scopes of the network; {what} received {', '.join(map(repr, unknown))}, which match nothing. "
            f"The scopes are {', '.join(known)}."
        )


def _protected(coupling: Coupling, globs: Sequence[str]) -> Mask:
    _all_match(coupling, globs, "protect")
    chosen = [any(fnmatchcase(name, glob) for glob in globs) for name in coupling.scopes]
    return np.array(chosen, bool)[coupling.scope]


def _together(coupling: Coupling, globs: Sequence[str]) -> list[list[int]]:
    """The scopes in groups that keep the same number of units; most are alone."""
    _all_match(coupling, globs, "uniform")
    groups: dict[str | int, list[int]] = {}
    for k, name in enumerate(coupling.scopes):
        groups.setdefault(next((glob for glob in globs if fnmatchcase(name, glob)), k), []).append(k)
    unequal = [
        f"for {glob!r} {', '.join(f'{coupling.scopes[k]} of {coupling.sizes[k]}' for k in group)}"
        for glob, group in groups.items()
        if len(group) > 1 and len({*coupling.sizes[group].tolist()}) > 1
    ]
    if unequal:
        raise SelectionError(
            f"uniform takes scopes of as many units; received {'; '.join(unequal)}. Give each size a glob of its own."
        )
    return list(groups.values())


def _by_scope(coupling: Coupling, value: Any, what: str, default: float) -> list[Any]:
    """One number per scope, from a number for all or a mapping from globs."""
    if not isinstance(value, Mapping):
        value = {"*": value}
    else:
        _all_match(coupling, _globs(value, what), what)
    kind, least, largest = (Real, 0, 1.0) if what == "most" else (Integral, 1, math.inf)

    def number(n: Any) -> bool:
        return isinstance(n, kind) and not isinstance(n, bool)

    bad = [f"{n!r} for {glob!r}" for glob, n in value.items() if not number(n) or not least <= n <= largest]
    if bad:
        whole = "" if all(map(number, value.values())) else "a number, " if what == "most" else "a whole number, "
        above = " and at most 1" if what == "most" else ""
        raise SelectionError(f"{what} is {whole}at least {least}{above}; received {', '.join(bad)}.")
    return [next((n for glob, n in value.items() if fnmatchcase(name, glob)), default) for name in coupling.scopes]

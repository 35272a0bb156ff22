"""Choose: which classes are units.

A class is a unit unless it is a product of others, or has to stay: its labels touch an axis that cannot shrink, no
layer consumes it, or it is the whole of an axis. Of several reasons the first is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taylorfx.coupling.axes import Axes
from taylorfx.coupling.expand import Factors
from taylorfx.coupling.labeling import Labeling, copies
from taylorfx.coupling.scopes import Scopes
from taylorfx.coupling.units import Mask
from taylorfx.coupling.weights import of_weights
from taylorfx.network.labels import Labeled, Labels, Ties

__all__ = ["Units", "choose"]


@dataclass(frozen=True)
class Units:
    """The classes that are units, in the order in which they are first written.

    Attributes:
        number: ``(classes + 1,)``, the unit of every class; -1 for none, and at the end.
        scopes: the names of the scopes that have units.
        scope: ``(units,)``, the number of each unit's scope.
        index: ``(units,)``, each unit's position where it is first written.
        exact: ``(units,)``, false where a statistic changes when the unit leaves.
        frozen: by scope, why labels of it have to stay.
        ungated: the identities of the sites that read a weight, which carries no gate.
    """

    number: Labels
    scopes: tuple[str, ...]
    scope: Labels
    index: Labels
    exact: Mask
    frozen: Mapping[str, str]
    ungated: frozenset[int]


def choose(labeling: Labeling, factors: Factors, axes: Axes, scopes: Scopes) -> Units:
    """Choose the classes that are units, and number them in the order of their first labels."""
    ties, first = labeling.ties, factors.classes.first
    stays, frozen = _staying(labeling, factors, axes, scopes)
    units = np.flatnonzero(factors.single & ~stays[:-1])
    units = units[np.argsort(first[units], kind="stable")]
    number = np.full(len(first) + 1, -1)
    number[units] = np.arange(len(units))

    def along(axis: Labeled) -> set[int]:
        return {unit for unit in number[factors.along(axis)].tolist() if unit >= 0}

    weights = of_weights(labeling.spec, labeling.bounds, along)
    exact = ~_inexact(ties, factors)[units]
    exact[list(set[int]().union(*weights.values()))] = False
    names, scope, index = _named(first[units], scopes)
    return Units(number, names, scope, index, exact, frozen, frozenset(weights))


def _staying(labeling: Labeling, factors: Factors, axes: Axes, scopes: Scopes) -> tuple[Mask, dict[str, str]]:
    """The classes that have to stay, and for every scope that has some, why."""
    first = factors.classes.first
    stays = np.zeros(len(first) + 1, bool)
    stays[-1] = True  # what has no class
    reasons: dict[str, list[str]] = {}

    def hold(classes: Labels, reason: str) -> None:
        classes = classes[(classes >= 0) & (classes < len(first))]
        for scope in np.unique(scopes.of(first[classes[factors.single[classes]]])):  # products stay by their factors
            reasons.setdefault(scopes.names[scope], []).append(reason)
        stays[classes] = True

    for labels, reason in labeling.ties.frozen:
        hold(factors.behind(labels), reason)
    hold(np.flatnonzero(~(_consumed(labeling, factors) | stays)), "no layer consumes it")
    whole = axes.alone()
    hold(whole[~stays[whole]], "the whole axis would leave at once")
    given_out = copies(labeling.spec)
    return stays, {scope: _said(several, given_out) for scope, several in reasons.items()}


def _said(reasons: Sequence[str], copies: Mapping[str, tuple[str, ...]]) -> str:
    """The first reason. Where all of them are outputs that layers consume, too, also which outputs these are.

    >>> _said(["norm is an output of the network"], {"norm is an output of the network": ("hidden_states.*",)})
    'norm is an output of the network; it would not be frozen without hidden_states.*: from_torch(..., outputs=...)'
    """
    if not all(reason in copies for reason in reasons):
        return reasons[0]
    names = ", ".join(dict.fromkeys(name for reason in reasons for name in copies[reason]))
    return f"{reasons[0]}; it would not be frozen without {names}: from_torch(..., outputs=...)"


def _consumed(labeling: Labeling, factors: Factors) -> Mask:
    """``(classes + 1,)``: some layer mixes along labels of the class."""
    consumed = np.zeros(len(factors.classes.first) + 1, bool)
    for site in labeling.reads:
        consumed[factors.along(site.labels)] = True
    return consumed


def _inexact(ties: Ties, factors: Factors) -> Mask:
    """``(classes + 1,)``: some layer computes statistics along labels of the class."""
    inexact = np.zeros(len(factors.classes.first) + 1, bool)
    for labels in ties.inexact:
        inexact[factors.behind(labels)] = True
    return inexact


def _named(first: Labels, scopes: Scopes) -> tuple[tuple[str, ...], Labels, Labels]:
    """The names of the scopes that have units, and of every unit the number of its scope and its index there.

    >>> scopes = Scopes(np.array([0, 4, 6, 9]), np.array([0, 1, 2, 0]), ("conv1", "conv2", "fc"), (), {})
    >>> _named(np.array([1, 2, 7, 10]), scopes)
    (('conv1', 'fc'), array([0, 0, 1, 0]), array([1, 2, 1, 1]))

    Args:
        first: ``(units,)``, the first label of each, ascending.
    """
    scope = scopes.of(first)
    numbers, place = np.unique(scope, return_inverse=True)
    order = np.argsort(np.unique(scope, return_index=True)[1], kind="stable")
    renumber = np.empty_like(order)
    renumber[order] = np.arange(len(order))
    return tuple(scopes.names[k] for k in numbers[order].tolist()), renumber[place], scopes.within(first)

"""Scopes: the families of units. Labels that one node creates along one axis are of one scope, which has a name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from taylorfx.coupling.axes import Axes
from taylorfx.coupling.expand import Factors
from taylorfx.coupling.labeling import Labeling
from taylorfx.coupling.naming import facts_of, names_by_role
from taylorfx.network.labels import Labels

__all__ = ["Scopes", "scopes_of"]


class Scopes(NamedTuple):
    """The scopes of labels. Labels are created in runs; each run begins at its first label and is of one scope.

    >>> scopes = Scopes(np.array([0, 4, 6]), np.array([0, 1, 0]), ("conv1", "fc"), ("conv1", "fc"), {})
    >>> scopes.of(np.array([3, 4, 9]))
    array([0, 1, 0])

    Attributes:
        starts: ``(runs,)``, the first label of each.
        numbers: ``(runs,)``, the scope of each.
        names: by scope.
        nodes: by scope, the node that creates its labels.
        written: by scope, the parameters whose layers write it; none for a residual stream, which many layers write.
    """

    starts: Labels
    numbers: Labels
    names: tuple[str, ...]
    nodes: tuple[str, ...]
    written: Mapping[int, tuple[str, ...]]

    def of(self, labels: Labels) -> Labels:
        """The scopes of these labels."""
        return self.numbers[np.searchsorted(self.starts, labels, "right") - 1]

    def within(self, labels: Labels) -> Labels:
        """The position of each label in its run.

        >>> Scopes(np.array([0, 4]), np.array([0, 1]), ("a", "b"), ("a", "b"), {}).within(np.array([3, 4, 6]))
        array([3, 0, 2])
        """
        return labels - self.starts[np.searchsorted(self.starts, labels, "right") - 1]


def scopes_of(labeling: Labeling, factors: Factors, axes: Axes) -> Scopes:
    """The scopes of a network.

    In a network that is written by hand a scope has the name of the node that creates its labels, and a letter if the
    node creates others, too. The graph of a captured module numbers its nodes as it likes, so there the name says which
    role the units have in which part of the module (`names_by_role`).
    """
    origins = labeling.ties.origins or [(0, "")]
    numbers: dict[str, int] = {}
    of_run = np.array([numbers.setdefault(name, len(numbers)) for _, name in origins])
    nodes = tuple(name if name in labeling.bounds else name.rpartition(".")[0] for name in numbers)
    scopes = Scopes(np.array([start for start, _ in origins]), of_run, tuple(numbers), nodes, {})
    first = factors.classes.first
    of_class = np.full(len(first) + 1, -1)
    of_class[:-1][factors.single] = scopes.of(first[factors.single])
    facts = facts_of(labeling, axes, of_class)
    written = {scope: tuple(paths) for scope, paths in facts.written.items() if scope not in facts.streams}
    names = scopes.names
    if labeling.spec.interface is not None:
        names = names_by_role(facts, labeling.spec, np.unique(of_class[of_class >= 0]).tolist(), names)
    return scopes._replace(names=names, written=written)

"""Assemble: units along axes become a `Coupling`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from taylorfx.coupling.axes import Axes
from taylorfx.coupling.choose import Units
from taylorfx.coupling.labeling import Labeling
from taylorfx.coupling.scopes import Scopes
from taylorfx.coupling.units import Coupling, Place
from taylorfx.network.labels import STATE, Labels, Site, length

__all__ = ["assemble"]


def assemble(labeling: Labeling, axes: Axes, units: Units, scopes: Scopes) -> Coupling:
    """Look up the units of every axis, and keep the axes that differ in them."""
    rows = axes.rows(units.number)
    different, place = _different(axes, rows)
    bounds, ties = labeling.bounds, labeling.ties

    def places(sites: Iterable[Site]) -> tuple[Place, ...]:
        return tuple(_places(sites, labeling, axes, rows))

    return Coupling(
        spec=labeling.spec,
        scopes=units.scopes,
        scope=units.scope,
        index=units.index,
        exact=units.exact,
        frozen=units.frozen,
        origins=dict(zip(scopes.names, scopes.nodes, strict=True)),
        written={scopes.names[scope]: paths for scope, paths in scopes.written.items()},
        axes=different,
        parameters={path: tuple([place[id(axis)] for axis in each]) for path, each in ties.parameters.items()},
        letters={name: {x: place[id(axis)] for x, axis in bound.letters.items()} for name, bound in bounds.items()},
        bounds=bounds,
        reads=places(site for site in labeling.reads if id(site) not in units.ungated),
        writes=places(labeling.writes),
        mixing=tuple(ties.mixing),
    )


def _different(axes: Axes, rows: Mapping[int, Labels]) -> tuple[tuple[Labels, ...], dict[int, int]]:
    """The shown axes that differ in units or length, and the place of every axis among them, by its identity.

    Axes of different labels may have the same units: those of a tied weight, or of two rigid axes of one length.
    """
    shown = [
        rows[k] if k in rows else np.broadcast_to(np.int64(-1), (1, length(axis)))
        for k, axis in enumerate(axes.axes[: axes.shown])
    ]
    keys = [(len(axis), axis.tobytes() if k in rows else axis.size) for k, axis in enumerate(shown)]
    different = dict(zip(keys, shown, strict=True))
    places = {key: k for k, key in enumerate(different)}
    return tuple(different.values()), {x: places[keys[k]] for x, k in axes.numbers.items() if k < axes.shown}


def _places(sites: Iterable[Site], labeling: Labeling, axes: Axes, rows: Mapping[int, Labels]) -> Iterator[Place]:
    """The sites that have units, each with the shape of its tensor."""
    for site in sites:
        units = rows.get(axes.numbers[id(site.labels)])
        if units is not None:
            bound = labeling.bounds[site.node]
            shape = bound.state if site.slot == STATE else bound.inputs[site.slot] if site.slot >= 0 else bound.shape
            yield Place(site.node, site.slot, site.axis, shape, units, site.example)

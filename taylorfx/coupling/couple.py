"""Couple: from parameters and a spec to the units."""

from __future__ import annotations

from taylorfx.coupling.solve import Solver
from taylorfx.coupling.units import Coupling
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.limits import Room
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["couple", "own"]


def couple(params: Params, spec: Spec) -> Coupling:
    """Find the units of a network: the smallest sets of channels that leave together.

    Args:
        params: the parameters; only their shapes are looked at.
        spec: the network; its `Input` nodes declare the shapes of an example (or use ``spec.at(shape)``).

    Raises:
        SpecError: if the parameters do not fit the network.
        ShapeError: if an input's shape is not declared, or the layers do not fit each other.
    """
    check(params, spec)
    ties = Ties(room=Room.beside(spec.shapes.values()))
    bounds = propagate(spec, ties)
    for name in spec.outputs:
        for axis in bounds[name].output:
            ties.freeze(axis, f"{name} is an output of the network")
    return Solver(spec, bounds, ties).coupling()


def own(params: Params, spec: Spec, coupling: Coupling) -> None:
    """Refuse parameters or a coupling that are not of this network."""
    if coupling.spec != spec:
        raise ValueError(
            f"Units are those of the network itself; received a coupling of another one, of {len(coupling)} units. "
            "Couple again: couple(params, spec)."
        )
    check(params, spec)

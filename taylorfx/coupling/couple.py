"""Couple: find what leaves together, from a network's labels to its units.

Every axis of every tensor carries labels (`taylorfx.network.labels`). Layers tie labels, and lay some out as products
of others. From them five steps lead to the units:

    join        labels that are tied become one class
    expand      a class that is a product gets the factors of its factors
    name        classes that are created together are a scope, which has a name
    choose      classes that may leave are the units
    assemble    the units of every position of every axis

    q_proj.weight, axis 0 (2 heads of 2):   label   0  1  2  3       each the product of a head and of a dimension
                                            class   0  1  2  3
                                            factors 4  4  5  5       the head h
                                                    6  7  6  7       the dimension k
                                            units   h0 h0 h1 h1
                                                    k0 k1 k0 k1

A position leaves if any of its units does. Usually it has one; it has one per factor where its axis is a product.

Residual branches have no positions along axes. Where they are units, they come last (`taylorfx.coupling.branches`).
"""

from __future__ import annotations

from taylorfx.coupling.assemble import assemble
from taylorfx.coupling.axes import lay_out
from taylorfx.coupling.branches import with_branches
from taylorfx.coupling.choose import choose
from taylorfx.coupling.expand import expand
from taylorfx.coupling.join import join
from taylorfx.coupling.labeling import label
from taylorfx.coupling.scopes import scopes_of
from taylorfx.coupling.units import Coupling
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["couple", "own"]


def couple(params: Params, spec: Spec, *, branches: bool = False) -> Coupling:
    """Find the units of a network: the smallest sets of channels that leave together.

    Args:
        params: the parameters; only their shapes are looked at.
        spec: the network; its `Input` nodes declare the shapes of an example (or use ``spec.at(shape)``).
        branches: every residual branch is a unit, too, of its own scope (``layers.3.mlp: branch``), after the others:
            one operand of a sum of two that is computed from the other one, or each operand of the sum that it is
            (``x + (a + b)``). A sum on whose skip there is a layer of its own has no branch.

    Raises:
        SpecError: if the parameters do not fit the network.
        ShapeError: if an input's shape is not declared, or the layers do not fit each other.

    >>> import torch
    >>> from taylorfx import Input, init, serial
    >>> from taylorfx.layers import Linear, ReLU
    >>> spec = serial(Input((2,)), Linear(2, 3), ReLU(), Linear(3, 2), Linear(2, 4))
    >>> coupling = couple(init(spec, torch.Generator()), spec)
    >>> coupling
    Coupling(5 units in 2 scopes, 1 frozen)
    >>> coupling.names
    ('0[0]', '0[1]', '0[2]', '2[0]', '2[1]')
    >>> coupling.unit_ids("2.weight", 1)  # what the second linear layer reads, the first one writes
    array([[0, 1, 2]])

    >>> from taylorfx import residual
    >>> spec = serial(Input((2,)), block=residual(serial(a=Linear(2, 3), b=Linear(3, 2))), head=Linear(2, 4))
    >>> couple(init(spec, torch.Generator()), spec, branches=True).scopes
    ('block.a', 'block: branch')
    """
    check(params, spec)
    labeling = label(spec)
    factors = expand(join(labeling.ties))
    axes = lay_out(labeling, factors)
    scopes = scopes_of(labeling, factors, axes)
    units = choose(labeling, factors, axes, scopes)
    coupling = assemble(labeling, axes, units, scopes)
    return with_branches(coupling) if branches else coupling


def own(params: Params, spec: Spec, coupling: Coupling) -> None:
    """Refuse parameters or a coupling that are not of this network."""
    if coupling.spec != spec:
        raise ValueError(
            f"Units are those of the network itself; received a coupling of another one, of {len(coupling)} units. "
            "Couple again: couple(params, spec)."
        )
    check(params, spec)

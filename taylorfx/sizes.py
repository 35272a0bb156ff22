"""Sizes and labels of everything in a network: its layers bound one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from taylorfx.labels import EXAMPLE, Bound, Factor, Labeled, Ties, bind, rigid
from taylorfx.layers import Input, Shape, ShapeError

__all__ = ["propagate"]


class Network(Protocol):
    """What a `Spec` is here: nodes in an order in which each comes after its inputs."""

    @property
    def nodes(self) -> Sequence[Any]:
        """Each has a name, a layer, inputs and the paths of its parameters."""


def propagate(spec: Network, ties: Ties) -> dict[str, Bound]:
    """Carry shapes and labels through the network, from its inputs to its outputs.

    Raises:
        ShapeError: if the declared inputs and the layers do not fit, or an input declares no shape; all at once.
    """
    bounds: dict[str, Bound] = {}
    for node in spec.nodes:
        if isinstance(node.layer, Input):
            if node.layer.shape is None:
                ties.errors.append(
                    f"{node.name}: the shape of the input is not known; declare it, Input((channels, height, width)), "
                    "or use spec.at(shape)"
                )
            elif wrong := node.layer.refusal(_sizes(node.layer.shape)):
                ties.errors.append(f"{node.name}: {wrong}")
            else:
                example: Labeled = rigid(1) if node.layer.alone else (Factor(1, EXAMPLE),)
                if node.layer.alone:
                    ties.mixing.append(f"{node.name}: the network takes one example at a time")
                bounds[node.name] = Bound((example, *map(rigid, _sizes(node.layer.shape))))
        elif all([x in bounds for x in node.inputs]):  # noqa: C419
            try:
                bounds[node.name] = bind(node.layer, node.name, node.paths, [bounds[x] for x in node.inputs], ties)
            except ShapeError as error:
                ties.errors.append(str(error))
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                found = ", ".join(str(bounds[x].shape) for x in node.inputs)
                ties.errors.append(f"{node.name}: {node.layer} does not take inputs of shape {found} ({error!r})")
        if node.name in bounds and not ties.room.holds(node.name, bounds[node.name].shape):
            del bounds[node.name]  # and nothing that consumes it is looked at
    ties.errors += [f"{name} gives {problem}" for name, problem in ties.room.wrong]
    if ties.errors:
        raise ShapeError("Layers and their inputs have to fit; received:\n  " + "\n  ".join(ties.errors))
    return bounds


def _sizes(shape: Shape | int) -> Shape:
    return shape if isinstance(shape, tuple) else (shape,)

"""A network between two passes, and the layers that stand for others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.layers import Layer, Shape
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["Draft", "Pass", "StandIn"]


@dataclass(frozen=True)
class Draft:
    """A network between two passes.

    Attributes:
        leaves: its parameters by their paths, and perhaps some that no node has any more.
        spec: its nodes. Those where gates lie have the names that they had before the first pass.
        coupling: that of the network before the first pass, which says where gates lie.
    """

    leaves: Mapping[str, Tensor]
    spec: Spec
    coupling: Coupling

    @staticmethod
    def of(params: Params, coupling: Coupling) -> Draft:
        """The network before the first pass."""
        return Draft(flatten(params), coupling.spec, coupling)

    @cached_property
    def params(self) -> Params:
        """The parameters that the nodes have."""
        return unflatten((path, self.leaves[path]) for path in self.spec.shapes)

    @cached_property
    def gated(self) -> set[str]:
        """The nodes whose values depend on a gate: those that read at one, and all behind them."""
        return self.spec.downstream(place.node for place in self.coupling.reads)

    def parameters(self, node: Node) -> dict[str, Tensor]:
        """The parameters of a node, by their names in its layer."""
        return {leaf: self.leaves[path] for leaf, path in node.paths.items()}

    def rewritten(self, nodes: Iterable[Node], leaves: Mapping[str, Tensor] | None = None) -> Draft:
        """The network of these nodes; ``leaves`` are new parameters, beside those that there are."""
        merged = {**self.leaves, **leaves} if leaves else self.leaves
        return replace(self, spec=replace(self.spec, nodes=tuple(nodes)), leaves=merged)


Pass = Callable[[Draft], Draft]
"""A rewrite of a network that keeps the values at the reads and the derivatives by their gates, up to rounding."""


@dataclass(frozen=True)
class StandIn(Layer):
    """A layer that stands for another, and has its axes."""

    layer: Layer

    def signature(self, *shapes: Shape) -> str | None:
        return self.layer.signature(*shapes)

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return self.layer.letters(*shapes)

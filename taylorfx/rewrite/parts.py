"""A pass: slices that take an axis apart become the parts of one split.

In the backward pass every slice would fill a tensor of the whole size with zeros around its gradient, and these would
be summed. The gradients of the parts of a split are written into one tensor.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from taylorfx.layers import Layer, Leaves, Shape
from taylorfx.layers.roles import Slicing
from taylorfx.network.build import unused
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.draft import Draft, StandIn

__all__ = ["Part", "Parts", "slices_as_parts"]


@dataclass(frozen=True)
class Parts(Layer):
    """A tensor split along an axis, as a list. The parts begin at ``starts``.

    Of an axis of 6, the starts 0, 2 and 3 make three parts::

        [a b c d e f]  ->  [a b] [c] [d e f]
    """

    dim: int
    starts: tuple[int, ...]

    def signature(self, *shapes: Shape) -> str:
        return "... -> ..."

    def apply(self, params: Leaves, *inputs: Tensor) -> list[Tensor]:  # type: ignore[override]  # for `Part` alone
        (x,) = inputs
        # The gradients are joined into a contiguous tensor. Its axes are to lie in memory as those of x do, of which
        # the outermost has the largest stride; so x is split in that order of its axes.
        strides = x.stride()
        order = sorted(range(x.ndim), key=lambda k: -strides[k])
        lengths = [b - a for a, b in pairwise((*self.starts, x.shape[self.dim]))]
        parts = torch.split(x.permute(order), lengths, order.index(self.dim % x.ndim))
        return [part.permute([order.index(k) for k in range(x.ndim)]) for part in parts]


@dataclass(frozen=True)
class Part(StandIn):
    """A slice as one of the parts of its input, `Parts`."""

    index: int

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0][self.index]  # of a list, as if it were a stack of the parts


def slices_as_parts(draft: Draft) -> Draft:
    """Replace slices by parts where all that consumes a value is slices of one axis that do not overlap.

                 /--> slice 0:2 --> q                                   /--> part 0 --> q
        x of 6 -+                            becomes   x --> x.parts --+
                 \\--> slice 3:6 --> v                                   \\--> part 2 --> v

    Part 1, from 2 to 3, is what no slice takes.
    """
    taken, starts = draft.spec.by_name.keys(), _starts(draft.spec)
    nodes: dict[str, Node] = {}
    for node in draft.spec.nodes:
        slicing = node.layer.role(Slicing)
        if slicing is not None and node.inputs[0] in starts:
            (source,) = node.inputs
            name = unused(f"{source}.parts", taken)
            nodes.setdefault(name, Node(name, Parts(slicing.dim, starts[source]), (source,)))
            node = replace(node, layer=Part(node.layer, starts[source].index(slicing.start)), inputs=(name,))
        nodes[node.name] = node
    return draft.rewritten(nodes.values())


def _starts(spec: Spec) -> dict[str, tuple[int, ...]]:
    """For every value that slices alone use, two or more of one axis without overlap, where its parts begin."""
    slices: dict[str, list[Slicing]] = {}
    for node in spec.nodes:
        slicing = node.layer.role(Slicing)
        if slicing is not None:
            slices.setdefault(node.inputs[0], []).append(slicing)
    starts = {}
    for name, several in slices.items():
        ordered = sorted(several, key=lambda slicing: slicing.start)
        disjoint = all(a.dim == b.dim and a.stop <= b.start for a, b in pairwise(ordered))
        if disjoint and spec.uses[name] == len(several) > 1:
            starts[name] = tuple(sorted({0, *(x for slicing in several for x in (slicing.start, slicing.stop))}))
    return starts

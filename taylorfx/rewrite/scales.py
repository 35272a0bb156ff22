"""A pass: norms by running statistics become one product and one sum per channel.

Those that could be folded are gone already. Torch's operator keeps its input, and goes over it once more for the
derivatives of weights, which scoring does not ask for; a product with constants keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from taylorfx.layers import Layer, Leaves, Shape
from taylorfx.layers.roles import ChannelAffine, Memory, Role
from taylorfx.network.spec import Node
from taylorfx.rewrite.draft import Draft

__all__ = ["Scale", "norms_as_scales"]


@dataclass(frozen=True)
class Scale(Layer):
    """A product and a sum for every channel of ``(N, channels, ...)``."""

    channels: int

    def signature(self, *shapes: Shape) -> str:
        return "B c ..., scale: c, shift: c -> B c ..."

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"channels": "c"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"scale": torch.ones(self.channels), "shift": torch.zeros(self.channels)}

    def roles(self) -> tuple[Role, ...]:
        return (Memory(keeps_input=False, new_value=True),)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        scale, shift = (params[leaf].reshape(-1, *[1] * (x.ndim - 2)) for leaf in ("scale", "shift"))
        return (x * scale).add_(shift).to(x.dtype)  # the numbers per channel are single precision or better


def norms_as_scales(draft: Draft) -> Draft:
    """Replace every layer that is affine in each channel, as norms by running statistics are, by a `Scale`.

        x --> bn(mean, var, weight, bias) --> y        x --> bn(scale, shift) --> y
                                                       scale = weight / sqrt(var + eps)
                                                       shift = bias - mean * scale

    The node keeps its name. It stays as it is where ``bn.scale`` or ``bn.shift`` is a parameter of another node.
    """
    nodes: list[Node] = []
    new: dict[str, Tensor] = {}
    for node in draft.spec.nodes:
        affine = node.layer.role(ChannelAffine)
        if affine is not None:
            scale, shift = affine.numbers(draft.parameters(node))
            scaled = Node(node.name, Scale(len(scale)), node.inputs)
            if not any(path in draft.leaves for path in scaled.paths.values()):
                new |= {scaled.path("scale"): scale, scaled.path("shift"): shift}
                node = scaled
        nodes.append(node)
    return draft.rewritten(nodes, new)

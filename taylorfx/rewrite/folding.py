"""Folding: a product and a sum per channel move into the linear layer or convolution before them.

In inference a batch norm (or a product or sum with a parameter per channel) is ``s * y + t`` for each channel. Where it
alone consumes the value of a layer ``y = W a + b``, at most through a permutation of the axes, that layer computes the
same as ``(s W) a + (s b + t)`` (Jacob et al. 2018, arXiv 1712.05877, eq. 14)::

    a --> conv --> norm --> relu        becomes        a --> conv --> relu

Every node that is left reads what it read before, and the gates lie at the reads, so no gate derivative changes. That
is also why a norm *before* a layer stays: the layer would read something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from taylorfx.layers import Shape
from taylorfx.layers.roles import ChannelAffine, Constant, Mixing, Product, Sum, Viewing
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties
from taylorfx.network.parameters import check
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["fold"]


def fold(params: Params, spec: Spec) -> tuple[Params, Spec]:
    """Fold batch norms, and products and sums with a parameter per channel, into the layers whose values they consume.

    The new network computes the same in inference, with fewer operations and less memory. The convolution (dense,
    grouped, depthwise, transposed) or linear layer keeps its name and gains a bias; the folded node is removed. So is
    done with every layer that states the roles for it: `Mixing`, and `ChannelAffine`, `Sum` or `Product`. Not folded
    are norms without running statistics, layers that share their parameters or whose value something else consumes,
    too, and, where inputs declare no shape, what cannot be told to run along the channels. A network without anything
    to fold is returned as it is; the arguments are not changed. Differentiable.

    For inference only: in training a batch norm normalizes by its batch.

    Raises:
        SpecError: if the parameters do not fit the network.

    >>> import torch, taylorfx as tfx
    >>> from taylorfx import layers as L
    >>> spec = tfx.serial(tfx.Input((3, 5, 5)), conv=L.Conv2d(3, 4, 3, bias=False), norm=L.BatchNorm2d(4))
    >>> params, spec = tfx.fold(tfx.init(spec, torch.Generator()), spec)
    >>> [node.name for node in spec], sorted(params["conv"])
    (['input', 'conv'], ['bias', 'weight'])
    """
    check(params, spec)
    folding = _Folding(params, spec)
    for name in spec.by_name:
        folding.visit(name)
    return (params, spec) if not folding.moved else folding.result()


@dataclass(frozen=True)
class _Affine:
    """``scale * x + shift``, each a number per channel or one for all; ``None`` where it does nothing."""

    scale: Tensor | None = None
    shift: Tensor | None = None


class _Folding:
    """The nodes and leaves of a network as they are after the folds until now.

    Attributes:
        moved: for a folded node the node that has its value now.
        uses, owners: how often a value is used, and how many nodes have a parameter, as in `Spec`.
        shapes: of all values, if the inputs declare theirs.
    """

    def __init__(self, params: Params, spec: Spec) -> None:
        self.spec, self.leaves, self.nodes = spec, flatten(params), dict(spec.by_name)
        self.moved: dict[str, str] = {}
        self.uses = dict(spec.uses)
        self.owners = {path: len(nodes) for path, nodes in spec.owners.items()}
        known = all(layer.shape is not None for layer in spec.input_layers.values())
        bounds = propagate(spec, Ties(labeled=False)) if known else {}
        self.shapes: Mapping[str, Shape] = {name: bound.shape for name, bound in bounds.items()}

    def visit(self, name: str) -> None:
        """Fold this node into one whose value it consumes, if that can be."""
        node = self.nodes[name]
        node = self.nodes[name] = replace(node, inputs=tuple(self.moved.get(x, x) for x in node.inputs))
        for slot, source in enumerate(node.inputs):
            writer, role, axis = self._writer(source)
            if role is not None and self.uses[writer.name] == 1 and self._alone(writer, role):
                affine = self._affine(node, slot, axis)
                if affine is not None:
                    self._absorb(writer, role, affine)
                    self._drop(node, slot)
                    return

    def result(self) -> tuple[Params, Spec]:
        """The folded network; parameters that no node has any more are left out."""
        outputs = tuple(self.moved.get(x, x) for x in self.spec.outputs)
        spec = replace(self.spec, nodes=tuple(self.nodes.values()), outputs=outputs)
        return unflatten((path, self.leaves[path]) for path in spec.shapes), spec

    def _writer(self, name: str) -> tuple[Node, Mixing | None, int]:
        """The node that computes a value, perhaps before a permutation, its role, and the axis of its channels there.

        A linear layer's channels are axis 2 of ``(N, T, c)``, and axis 1 behind ``Permute((0, 2, 1))``. Which axis is
        the last is not known where the inputs declare no shape: then it is -1.
        """
        node = self.nodes[name]
        view = node.layer.role(Viewing) if self.uses[name] == 1 else None
        dims = None if view is None else view.dims
        writer = self.nodes[node.inputs[0]] if dims else node
        role = writer.layer.role(Mixing)
        axis, rank = -1 if role is None else role.axis, len(self.shapes.get(writer.name, ()))
        if role is None or (axis < 0 and not rank):
            return writer, role, axis
        axis = axis % rank if axis < 0 else axis
        return writer, role, [d % len(dims) for d in dims].index(axis) if dims else axis

    def _alone(self, writer: Node, role: Mixing) -> bool:
        """No other node has this one's parameters, or a parameter where its bias would lie."""
        owned = set(writer.paths.values())
        paths = {*owned, replace(writer, layer=role.with_bias()).path(role.bias)}
        return all(self.owners.get(path, 0) == (path in owned) for path in paths)

    def _affine(self, node: Node, slot: int, axis: int) -> _Affine | None:
        """What a node computes of each channel, along ``axis``, of its input ``slot``, if that is all that it does."""
        role = node.layer.role(ChannelAffine)
        if role is not None and axis == 1:
            return _Affine(*role.numbers({leaf: self.leaves[path] for leaf, path in node.paths.items()}))
        total, product = node.layer.role(Sum), node.layer.role(Product)
        if (total is None and product is None) or len(node.inputs) != 2 or not self.shapes:
            return None
        other, shape = self.nodes[node.inputs[1 - slot]], self.shapes[node.inputs[slot]]
        constant = other.layer.role(Constant)
        if constant is None:
            return None
        value = self.leaves[other.path(constant.parameter)]
        padded = (1,) * (len(shape) - value.ndim) + value.shape
        if self.shapes[node.name] != shape or any(n != 1 for k, n in enumerate(padded) if k != axis):
            return None
        return _Affine(shift=value.flatten()) if product is None else _Affine(scale=value.flatten())

    def _absorb(self, writer: Node, role: Mixing, affine: _Affine) -> None:
        """Give a layer the weight and the bias with which it computes ``scale * y + shift``."""
        path, biased = writer.path(role.weight), replace(writer, layer=role.with_bias())
        weight, channels = self.leaves[path], biased.shapes[role.bias]
        bias = self.leaves[writer.path(role.bias)] if role.has_bias else weight.new_zeros(channels)
        if affine.scale is not None:
            scale = affine.scale.expand(channels)
            self.leaves[path], bias = role.scaled(weight, scale).to(weight.dtype), bias * scale
        if affine.shift is not None:
            bias = bias + affine.shift
        self.nodes[writer.name] = biased
        self.leaves[biased.path(role.bias)] = bias.to(weight.dtype)
        self.owners[biased.path(role.bias)] = 1

    def _drop(self, node: Node, slot: int) -> None:
        """Remove a node, whose value is now its input ``slot``, and the other inputs that are not used any more."""
        source = node.inputs[slot]
        self.moved[node.name] = source
        self.uses[source] = self.uses[node.name]
        del self.nodes[node.name]
        for name in node.inputs[:slot] + node.inputs[slot + 1 :]:
            self.uses[name] -= 1
            if not self.uses[name]:
                del self.nodes[name]

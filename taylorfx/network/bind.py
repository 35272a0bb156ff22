"""Bind: find the axes that the letters of a layer's signature stand for; shapes and labels come out of one pass.

    signature       B i H W,        weight: o i K K,        bias: o   ->  B o H W
    input           labels of its second axis 0 1 2 3; the others are rigid
    letters         i = 0 1 2 3     from the input
                    o = 4 5 6       fresh, in the scope of the node: no input has this letter
    weight          (4 5 6) (0 1 2 3) rigid rigid
    output          B (4 5 6) H W

A letter that comes from several places ties their axes. A letter in upper case holds its axis.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import torch

from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.layers import axes as language
from taylorfx.network.labels import (
    EXAMPLE,
    STATE,
    Bound,
    Factor,
    Labeled,
    Site,
    Ties,
    examples,
    is_example,
    is_labeled,
    length,
    rigid,
    shape_of,
)

__all__ = ["propagate"]


def bind(layer: Layer, name: str, paths: Mapping[str, str], sources: Sequence[Bound], ties: Ties) -> Bound:
    """Bind a layer's signature to the axes of its inputs; what follows for the labels goes into ``ties``.

    Args:
        name: that of the node.
        paths: the paths of the layer's parameters, by their names in the layer.
        sources: the bound signatures of the nodes that the layer consumes.

    Raises:
        ShapeError: if the output's shape cannot be inferred (other errors are collected in ``ties.errors``).
    """
    inputs, shapes = [node.output for node in sources], tuple([node.shape for node in sources])
    try:
        text = layer.signature(*shapes)
        if text is None:
            return _unknown(layer, name, paths, inputs, ties)
        signature = language.expand(text, tuple(map(len, inputs)))
        return _Binder(layer, name, signature, dict(layer.letters(*shapes)), ties).run(paths, inputs, shapes)
    except language.SignatureError as error:
        raise ShapeError(f"{name}: {layer.title} {error}.") from None
    except ShapeError as error:
        raise ShapeError(f"{name}: {error}") from None


Position = tuple[str | int, ...]
"""An axis of a tensor, ``("input", 0, 1)`` or ``("conv.weight", 1)``: text is made of it only where it is shown."""


def _shown(place: Position) -> str:
    """An axis in words.

    >>> _shown(("input", 0, 1))
    'input 0, axis 1'
    """
    *tensor, axis = map(str, place)
    return f"{' '.join(tensor)}, axis {axis}"


class _Binder:
    """The state of binding one signature: what each letter stands for so far."""

    def __init__(
        self, layer: Layer, name: str, signature: language.Signature, sizes: dict[str, int], ties: Ties
    ) -> None:
        self.layer, self.name, self.signature, self.sizes, self.ties = layer, name, signature, sizes, ties
        self.bound: dict[str, Labeled] = {}
        created = [x for x in signature.written if sizes.get(x, 2) > 1]
        self.main = created[-1] if created else None

    def run(self, paths: Mapping[str, str], inputs: Sequence[tuple[Labeled, ...]], shapes: tuple[Shape, ...]) -> Bound:
        """Bind the inputs, the parameters and the output, in this order, and collect what is read and written."""
        signature, ties = self.signature, self.ties
        for k, (pattern, axes) in enumerate(zip(signature.inputs, inputs, strict=True)):
            self._unify(pattern, axes, ("input", k))
        self.sizes.update(self.layer.sizes(self.sizes))
        for again, letter in self.layer.recurrent.items():
            self.bound[again] = self._product((letter,))
        for leaf, pattern in signature.parameters.items():
            known = ties.parameters.get(paths[leaf])
            if known is None:
                ties.parameters[paths[leaf]] = self._tensor(pattern)
            elif len(known) != len(pattern):
                ties.errors.append(f"{self.name}: shares {paths[leaf]}, which has {len(known)} axes elsewhere")
            else:
                self._unify(pattern, known, (paths[leaf],))
        output = self._tensor(signature.output)
        for letter in self.layer.inexact:
            ties.inexact.extend(f.labels for f in self.bound.get(letter, ()) if f.labels is not None)
        result = Bound(output, self.bound, self.sizes, shapes)
        if ties.labeled:
            result.reads = self._sites(signature.read_places, signature.reads, inputs)
            result.writes = self._sites(signature.written_places, (signature.written,), (output,))
            for letter in {x for slot, _, _ in signature.read_places for x in signature.reads[slot]}:
                if is_example(self.bound.get(letter, ())):
                    ties.mixing.append(f"{self.name}: {self.layer.title} sums over the examples of a batch")
            for letter in self.layer.recurrent:
                state = self.bound["B"], self.bound[letter]
                result.state = shape_of(state)
                if is_labeled(state[1]):
                    site = Site(self.name, STATE, 1, state[1], examples(state))
                    result.reads.append(site)
                    result.writes.append(site)  # the output that others read is only a part of what the layer writes
        return result

    def _unify(self, pattern: language.Pattern, axes: Sequence[Labeled], tensor: Position) -> None:
        """Let the axes of a pattern be those of a tensor.

        Nearly every axis is a single letter of a matching size, which is handled here.
        """
        bound, sizes = self.bound, self.sizes
        for position, (letter, labeled) in enumerate(zip(pattern.singles, axes, strict=True)):
            if letter is not None:
                known = bound.get(letter)
                if known is labeled:
                    continue  # nothing new: axes that pass through are the same objects
                size = length(labeled)
                if sizes.setdefault(letter, size) == size:
                    if known is None and not letter.isupper():
                        bound[letter] = labeled
                    else:
                        self._assign(letter, labeled, (*tensor, position))
                    continue
            self._unify_axis(pattern[position], labeled, (*tensor, position))

    def _unify_axis(self, axis: language.Axis, labeled: Labeled, place: Position) -> None:
        """Let one axis of a pattern be one of a tensor. Of ``a + b`` each piece gets its part of the labels:

        a + b, of 2 and 3       0 1 2 3 4
        a                       0 1
        b                           2 3 4
        """
        if len(axis) == 1:
            self._unify_product(axis[0], labeled, place)
            return
        flat, start = self.ties.flat(labeled, self.name), 0
        for product in axis:
            size = math.prod(self.sizes[x] for x in product)
            piece = Factor(size, None if flat is None else flat[start : start + size])
            self._unify_product(product, (piece,), place)
            start += size

    def _unify_product(self, product: language.Product, labeled: Labeled, place: Position) -> None:
        """Let a product of letters be an axis of a tensor, which is split into them: ``(g i)`` of 2 and 3 is 6."""
        size = length(labeled)
        if len(product) == 1 and self.sizes.setdefault(product[0], size) == size:
            self._assign(product[0], labeled, place)
            return
        unknown = [x for x in product if x not in self.sizes]
        known = math.prod(self.sizes[x] for x in product if x in self.sizes)
        if len(unknown) > 1 or (size % known if unknown else size != known):
            rule = f"a multiple of {known}" if unknown else str(known)
            self.ties.errors.append(f"{self.name}: {self.layer.title} takes {rule} at {_shown(place)}; received {size}")
            return
        for letter in unknown:
            self.sizes[letter] = size // known
        self._split(product, labeled, place)

    def _split(self, product: language.Product, labeled: Labeled, place: Position) -> None:
        """Split an axis into letters of known sizes. Those of size one are rigid; the others share its labels."""
        wide = [x for x in product if self.sizes[x] > 1 or (x in ("B", "N") and is_example(labeled))]
        for letter in product:
            if letter not in wide:
                self.bound.setdefault(letter, rigid(1))
        if len(wide) == 1:
            self._assign(wide[0], labeled, place)
        elif wide:
            parts = [(self.sizes[x], x.islower()) for x in wide]
            scopes = [self._scope(x) for x in wide]
            for letter, part in zip(wide, self.ties.split(labeled, parts, scopes), strict=True):
                self._assign(letter, part, place)
        elif not product:
            if is_example(labeled):
                self.ties.mixing.append(f"{self.name} broadcasts the examples against another axis")
            self.ties.freeze(labeled, f"broadcast at {self.name}")

    def _assign(self, letter: str, labeled: Labeled, place: Position) -> None:
        """Let a letter be an axis, which is tied to what the letter is already. A rigid letter holds the axis."""
        known = self.bound.get(letter)
        if letter.isupper() and any([factor.labels is not None for factor in labeled]):  # noqa: C419, lists are faster
            if letter != "B" and is_example(labeled):
                self.ties.mixing.append(f"{self.name}: {self.layer.title} mixes the examples of a batch")
            if is_labeled(labeled):
                what = f"{self.name}: {self.layer.title} holds {_shown(place)} rigid"
                labeled = self.ties.freeze(labeled, what)
        self.bound[letter] = labeled if known is None else self.ties.tie(known, labeled, self.name)

    def _tensor(self, pattern: language.Pattern) -> tuple[Labeled, ...]:
        """The axes of a tensor that a pattern describes; letters that are new get fresh labels."""
        return tuple([self._product(axis[0]) if len(axis) == 1 else self._joined(axis) for axis in pattern])

    def _product(self, product: language.Product) -> Labeled:
        """The axis that a product of letters stands for: their factors, one after the other."""
        for letter in product:
            if letter not in self.bound:
                if letter not in self.sizes:
                    raise ShapeError(f"the size of axis {letter!r} follows from no input and no field of the layer")
                size = self.sizes[letter]
                self.bound[letter] = self.ties.fresh(size, self._scope(letter)) if letter.islower() else rigid(size)
        known = self.bound[product[0]] if len(product) == 1 else ()
        if len(known) == 1 and (known[0].size > 1 or known[0].labels is EXAMPLE):
            return known
        return tuple([f for x in product for f in self.bound[x] if f.size > 1 or f.labels is EXAMPLE]) or rigid(1)

    def _joined(self, axis: language.Axis) -> Labeled:
        """The axis that ``a + b`` stands for: the labels of the pieces end to end, -1 where a piece is rigid."""
        flats = [(length(part), self.ties.flat(part, self.name)) for part in map(self._product, axis)]
        if all(labels is None for _, labels in flats):
            return rigid(sum(n for n, _ in flats))
        self.ties.room.take(sum(n for n, _ in flats))
        labels = np.concatenate([np.full(n, -1) if labels is None else labels for n, labels in flats])
        return (Factor(len(labels), labels),)

    def _sites(
        self,
        places: Sequence[language.Place],
        letters: Sequence[Sequence[str]],
        tensors: Sequence[tuple[Labeled, ...]],
    ) -> list[Site]:
        """The sites at these places of a signature. Each has the labels of the wanted letters alone.

        Where ``c`` of an axis ``(c H)`` of 2 and 3 is read, the site has the factors ``c`` and rigid 3.

        Args:
            letters: for every slot the wanted letters.
            tensors: for every slot the axes of its tensor.
        """
        sites: list[Site] = []
        for slot, position, product in places:
            factors: Labeled = ()
            for letter in product:
                part = self.bound.get(letter, ())
                factors += part if letter in letters[slot] else tuple([Factor(f.size) for f in part if f.size > 1])
            if any([f.labels is not None for f in factors]):  # noqa: C419
                sites.append(Site(self.name, slot, position, factors, examples(tensors[slot])))
        return sites

    def _scope(self, letter: str) -> str:
        """The scope of a letter's labels: the node's name, and the letter unless it is the last one that is created."""
        return self.name if letter == self.main else f"{self.name}.{letter}"


def _unknown(
    layer: Layer, name: str, paths: Mapping[str, str], inputs: Sequence[tuple[Labeled, ...]], ties: Ties
) -> Bound:
    """Bind a layer without a signature: it runs on tensors without data, and every axis that touches it has to stay."""
    reason = f"{name}: {layer.title} has no axis signature"
    ties.mixing.append(f"{reason}, so that it may mix the examples of a batch")
    for axes in inputs:
        for axis in axes:
            ties.freeze(axis, reason)
    leaves: dict[str, torch.Tensor] = {}
    for leaf, shape in layer.shapes().items():
        for axis in ties.parameters.get(paths[leaf], ()):
            ties.freeze(axis, reason)
        ties.parameters[paths[leaf]] = tuple(map(rigid, shape))
        leaves[leaf] = torch.empty(shape, device="meta")
    output = layer.apply(leaves, *(torch.empty(shape_of(axes), device="meta") for axes in inputs))
    batched = any(is_example(axes[0]) for axes in inputs if axes)
    sizes: Shape = tuple(output.shape)
    first: Labeled = (Factor(1, EXAMPLE),)
    bound = (first, *map(rigid, sizes[1:])) if batched else tuple(map(rigid, sizes))
    return Bound(bound, inputs=tuple(map(shape_of, inputs)))


class Part(Protocol):
    """What a `Node` is here."""

    @property
    def name(self) -> str:
        """Its name, which no other node has."""

    @property
    def layer(self) -> Layer:
        """What it computes."""

    @property
    def inputs(self) -> Sequence[str]:
        """The names of the nodes that it consumes."""

    @property
    def paths(self) -> Mapping[str, str]:
        """The paths of its parameters, by their names in the layer."""


class Network(Protocol):
    """What a `Spec` is here."""

    @property
    def nodes(self) -> Sequence[Part]:
        """The nodes; each comes after those that it consumes."""


def propagate(spec: Network, ties: Ties) -> dict[str, Bound]:
    """Carry shapes and labels through the network, from its inputs to its outputs.

    Returns:
        For every node its bound signature; what follows for the labels goes into ``ties``.

    Raises:
        ShapeError: if the declared inputs and the layers do not fit, or an input declares no shape; all at once.
    """
    bounds: dict[str, Bound] = {}
    for node in spec.nodes:
        if isinstance(node.layer, Input):
            declared = _declared(node.name, node.layer, ties)
            if declared is not None:
                bounds[node.name] = declared
        elif all([x in bounds for x in node.inputs]):  # noqa: C419
            try:
                bounds[node.name] = bind(node.layer, node.name, node.paths, [bounds[x] for x in node.inputs], ties)
            except ShapeError as error:
                ties.errors.append(str(error))
            except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
                shapes = ", ".join(str(bounds[x].shape) for x in node.inputs)
                ties.errors.append(f"{node.name}: {node.layer} does not take inputs of shape {shapes} ({error!r})")
        if node.name in bounds and not ties.room.holds(node.name, bounds[node.name].shape):
            del bounds[node.name]  # nothing of this size is computed with: nodes that consume it are left out
    ties.errors += [f"{name} gives {problem}" for name, problem in ties.room.wrong]
    if ties.errors:
        raise ShapeError("Layers and their inputs have to fit; received:\n  " + "\n  ".join(ties.errors))
    return bounds


def _declared(name: str, layer: Input, ties: Ties) -> Bound | None:
    """Bind an input to the shape that it declares; none, and an error in ``ties``, where it cannot be so."""
    if layer.shape is None:
        ties.errors.append(
            f"{name}: the shape of the input is not known; declare it, Input((channels, height, width)), "
            "or use spec.at(shape)"
        )
        return None
    sizes = layer.shape if isinstance(layer.shape, tuple) else (layer.shape,)
    if wrong := layer.refusal(sizes):
        ties.errors.append(f"{name}: {wrong}")
        return None
    if layer.alone:
        ties.mixing.append(f"{name}: the network takes one example at a time")
    return Bound((rigid(1) if layer.alone else (Factor(1, EXAMPLE),), *map(rigid, sizes)))

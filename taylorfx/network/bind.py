"""Bind: a layer's signature meets the labeled axes of its inputs; shapes and labels come out of one pass."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from taylorfx.layers import Input, Layer, Shape, ShapeError
from taylorfx.layers import axes as language
from taylorfx.network.labels import (
    EXAMPLE,
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


def bind(layer: Layer, name: str, paths: Mapping[str, str], heard: Sequence[Bound], ties: Ties) -> Bound:
    """Bind a layer's signature to the axes of what it hears; what follows for the labels goes into ``ties``.

    Raises:
        ShapeError: if the output's shape cannot be told (other errors are collected in ``ties.errors``).
    """
    inputs, shapes = [node.output for node in heard], tuple([node.shape for node in heard])
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
"""An axis of a tensor in words and numbers, put together where an error or a reason tells it."""


def _said(place: Position) -> str:
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
        signature, ties = self.signature, self.ties
        for k, (pattern, axes) in enumerate(zip(signature.inputs, inputs, strict=True)):
            self._unify(pattern, axes, ("input", k))
        self.sizes.update(self.layer.sizes(self.sizes))
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
        return result

    def _unify(self, pattern: language.Pattern, axes: Sequence[Labeled], tensor: Position) -> None:
        """The axes of a pattern are those of a tensor."""
        bound, sizes = self.bound, self.sizes
        for position, (letter, given) in enumerate(zip(pattern.singles, axes, strict=True)):
            if letter is not None:
                known = bound.get(letter)
                if known is given:
                    continue  # nothing new: axes that pass through are the same objects
                size = length(given)
                if sizes.setdefault(letter, size) == size:
                    if known is None and not letter.isupper():
                        bound[letter] = given
                    else:
                        self._assign(letter, given, (*tensor, position))
                    continue
            self._unify_axis(pattern[position], given, (*tensor, position))

    def _unify_axis(self, axis: language.Axis, given: Labeled, place: Position) -> None:
        if len(axis) == 1:
            self._unify_product(axis[0], given, place)
            return
        flat, start = self.ties.flat(given, self.name), 0
        for product in axis:
            size = math.prod(self.sizes[x] for x in product)
            piece = Factor(size, None if flat is None else flat[start : start + size])
            self._unify_product(product, (piece,), place)
            start += size

    def _unify_product(self, product: language.Product, given: Labeled, place: Position) -> None:
        size = length(given)
        if len(product) == 1 and self.sizes.setdefault(product[0], size) == size:
            self._assign(product[0], given, place)
            return
        unknown = [x for x in product if x not in self.sizes]
        known = math.prod(self.sizes[x] for x in product if x in self.sizes)
        if len(unknown) > 1 or (size % known if unknown else size != known):
            rule = f"a multiple of {known}" if unknown else str(known)
            self.ties.errors.append(f"{self.name}: {self.layer.title} takes {rule} at {_said(place)}; received {size}")
            return
        for letter in unknown:
            self.sizes[letter] = size // known
        wide = [x for x in product if self.sizes[x] > 1 or (x in ("B", "N") and is_example(given))]
        for letter in product:
            if letter not in wide:
                self.bound.setdefault(letter, rigid(1))
        if len(wide) == 1:
            self._assign(wide[0], given, place)
        elif wide:
            parts = [(self.sizes[x], x.islower()) for x in wide]
            scopes = [self._scope(x) for x in wide]
            for letter, part in zip(wide, self.ties.split(given, parts, scopes), strict=True):
                self._assign(letter, part, place)
        elif not product:
            if is_example(given):
                self.ties.mixing.append(f"{self.name} broadcasts the examples against another axis")
            self.ties.freeze(given, f"broadcast at {self.name}")

    def _assign(self, letter: str, given: Labeled, place: Position) -> None:
        known = self.bound.get(letter)
        if letter.isupper() and any([factor.labels is not None for factor in given]):  # noqa: C419, lists are faster
            if letter != "B" and is_example(given):
                self.ties.mixing.append(f"{self.name}: {self.layer.title} mixes the examples of a batch")
            if is_labeled(given):
                what = f"{self.name}: {self.layer.title} holds {_said(place)} rigid"
                given = self.ties.freeze(given, what)
        self.bound[letter] = given if known is None else self.ties.tie(known, given, self.name)

    def _tensor(self, pattern: language.Pattern) -> tuple[Labeled, ...]:
        """The axes of a tensor that a pattern describes; letters that are new get fresh labels."""
        return tuple([self._product(axis[0]) if len(axis) == 1 else self._joined(axis) for axis in pattern])

    def _product(self, product: language.Product) -> Labeled:
        for letter in product:
            if letter not in self.bound:
                if letter not in self.sizes:
                    raise ShapeError(f"the size of axis {letter!r} cannot be told")
                size = self.sizes[letter]
                self.bound[letter] = self.ties.fresh(size, self._scope(letter)) if letter.islower() else rigid(size)
        known = self.bound[product[0]] if len(product) == 1 else ()
        if len(known) == 1 and (known[0].size > 1 or known[0].labels is EXAMPLE):
            return known
        return tuple([f for x in product for f in self.bound[x] if f.size > 1 or f.labels is EXAMPLE]) or rigid(1)

    def _joined(self, axis: language.Axis) -> Labeled:
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
        """What stands at these places: the labels of these letters alone, laid out along the whole axis."""
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
        return self.name if letter == self.main else f"{self.name}.{letter}"


def _unknown(
    layer: Layer, name: str, paths: Mapping[str, str], inputs: Sequence[tuple[Labeled, ...]], ties: Ties
) -> Bound:
    """A layer without a rule: it runs, and nothing that touches it may leave."""
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
    made = [rigid(n) for n in output.shape]
    return Bound(tuple([(Factor(1, EXAMPLE),), *made[1:]] if batched else made), inputs=tuple(map(shape_of, inputs)))


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

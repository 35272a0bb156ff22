"""Labels: every axis of every tensor carries one label per index; layers tie, split and move them.

A label names what leaves together. A layer's signature is *bound* to the labeled axes of its inputs: letters that the
inputs share are tied, letters that are new get fresh labels, products are laid out, joined pieces are laid end to end.
Shapes come out of the same pass, so that shape and label can never disagree.

An axis is a tuple of factors, slowest first. Usually there is one; merging ``(c H W)`` yields three. Splitting a plain
axis ``x`` into ``(a b)`` records the equation "``x[i, j]`` leaves if ``a[i]`` or ``b[j]`` leaves", solved in
`taylorfx.coupling`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from taylorfx import axes as language
from taylorfx.layers import Layer, Shape, ShapeError
from taylorfx.limits import Room

__all__ = [
    "EXAMPLE", "Bound", "Factor", "Labeled", "Labels", "Site", "Ties", "bind", "is_example", "length", "rigid",
    "shape_of",
]  # fmt: skip

Labels = NDArray[np.int64]

EXAMPLE: Labels = np.full(1, -2)
"""Marks the factor that runs over the examples of a batch; told apart by identity."""


class Factor(NamedTuple):
    """A run of positions: how many, and their labels (none where the axis is rigid, -1 where one position is)."""

    size: int
    labels: Labels | None = None


Labeled = tuple[Factor, ...]
"""One axis: its factors, slowest first."""


@lru_cache(maxsize=4096)
def rigid(size: int) -> Labeled:
    """An axis of which nothing may leave."""
    return (Factor(size),)


def length(axis: Labeled) -> int:
    """The number of positions of an axis."""
    size = 1
    for factor in axis:
        size *= factor.size
    return size


def shape_of(axes: Sequence[Labeled]) -> Shape:
    """The sizes of a tensor's axes."""
    return tuple([length(axis) for axis in axes])


def is_example(axis: Labeled) -> bool:
    for factor in axis:  # noqa: SIM110, for every axis of every tensor: a generator takes longer
        if factor.labels is EXAMPLE:
            return True
    return False


def _is_labeled(axis: Labeled) -> bool:
    for factor in axis:  # noqa: SIM110
        if factor.labels is not None and factor.labels is not EXAMPLE:
            return True
    return False


def _examples(axes: Sequence[Labeled]) -> tuple[int, int] | None:
    """Where the examples run: the axis, and the size of its slower factors."""
    for k, axis in enumerate(axes):
        for j, factor in enumerate(axis):
            if factor.labels is EXAMPLE:
                return k, length(axis[:j])
    return None


class Site(NamedTuple):
    """A place in the network: along ``axis`` of input ``slot`` of a node, or of its output (slot -1)."""

    node: str
    slot: int
    axis: int
    labels: Labeled
    example: tuple[int, int] | None
    """The axis that runs over the examples, and how many positions its slower factors have; none: all share it."""


@dataclass
class Bound:
    """A layer's signature, bound to its tensors."""

    output: tuple[Labeled, ...]
    letters: dict[str, Labeled] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    inputs: tuple[Shape, ...] = ()
    reads: list[Site] = field(default_factory=list)
    writes: list[Site] = field(default_factory=list)
    shape: Shape = field(init=False)
    """The sizes of the output's axes."""

    def __post_init__(self) -> None:
        self.shape = shape_of(self.output)


@dataclass
class Ties:
    """What a pass over a network finds out: ties, splits, what must not move, and every error."""

    labeled: bool = True
    count: int = 0
    equal: list[tuple[Labels, Labels]] = field(default_factory=list)
    products: list[tuple[Labels, Labels, Labels]] = field(default_factory=list)
    frozen: list[tuple[Labels, str]] = field(default_factory=list)
    inexact: list[Labels] = field(default_factory=list)
    origins: list[tuple[int, str]] = field(default_factory=list)
    mixing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    room: Room = field(default_factory=Room)
    parameters: dict[str, tuple[Labeled, ...]] = field(default_factory=dict)

    def fresh(self, size: int, scope: str) -> Labeled:
        """New labels. A single position gets none: a network cannot lose the last of an axis."""
        if size == 1 or not self.labeled:
            return rigid(size)
        self.room.take(size)
        self.origins.append((self.count, scope))
        self.count += size
        return (Factor(size, np.arange(self.count - size, self.count)),)

    def freeze(self, axis: Labeled, reason: str) -> Labeled:
        """Nothing of this axis may leave; returns the axis without labels."""
        if not _is_labeled(axis):
            return axis
        for factor in axis:
            if factor.labels is not None and factor.labels is not EXAMPLE:
                self.frozen.append((factor.labels, reason))
        return tuple(f if f.labels is EXAMPLE else Factor(f.size) for f in axis)

    def flat(self, axis: Labeled, scope: str) -> Labels | None:
        """The labels of an axis as one vector, or none if it is rigid."""
        axis = tuple([f for f in axis if f.size > 1 and f.labels is not EXAMPLE])
        if len(axis) == 1:
            return axis[0].labels
        if all(factor.labels is None for factor in axis):
            return None
        (size, head), rest = axis[0], axis[1:]
        size_of_rest, tail = length(rest), self.flat(rest, scope)
        (joint,) = self.fresh(size * size_of_rest, scope)
        if joint.labels is not None:
            self._product(joint.labels, _repeat(head, size_of_rest), _tile(tail, size))
        return joint.labels

    def tie(self, one: Labeled, other: Labeled, where: str) -> Labeled:
        """Two axes of the same length leave together, position by position."""
        if one is other:
            return one
        if is_example(other):
            one, other = other, one
        if [f.size for f in one] == [f.size for f in other]:
            pairs = [(a.labels, b.labels) for a, b in zip(one, other, strict=True) if a.labels is not EXAMPLE]
        else:
            pairs = [(self.flat(one, where), self.flat(other, where))]
        for a, b in pairs:
            if a is not None and b is not None:
                self._equal(a, b, where)
            elif a is not None or b is not None:
                labels = a if a is not None else b
                assert labels is not None
                self.frozen.append((labels, f"tied at {where} to an axis that cannot shrink"))
        return one

    def split(self, axis: Labeled, parts: Sequence[tuple[int, bool]], scope: Sequence[str]) -> list[Labeled]:
        """Lay an axis out as a product; ``parts`` are the sizes and whether each may shrink. Size one: the examples."""
        grouped = _regroup(axis, [size for size, _ in parts])
        if grouped is not None:
            return grouped
        if parts[0][0] == 1:
            rest = tuple(factor for factor in axis if factor.labels is not EXAMPLE)
            return [(Factor(1, EXAMPLE),), *([rest] if len(parts) == 2 else self.split(rest, parts[1:], scope[1:]))]
        flat = self.flat(axis, scope[0])
        if flat is None:
            return [(Factor(1, EXAMPLE),) if size == 1 else rigid(size) for size, _ in parts]
        (size, movable), remaining = parts[0], parts[1:]
        size_of_rest = math.prod(n for n, _ in remaining)
        head = self.fresh(size, scope[0]) if movable else rigid(size)
        tail = self.fresh(size_of_rest, scope[1]) if any(m for _, m in remaining) else rigid(size_of_rest)
        self._product(flat, _repeat(head[0].labels, size_of_rest), _tile(tail[0].labels, size))
        return [head, *([tail] if len(remaining) == 1 else self.split(tail, remaining, scope[1:]))]

    def _equal(self, a: Labels, b: Labels, where: str) -> None:
        if a is b:
            return
        loose = (a < 0) != (b < 0)
        if loose.any():
            self.frozen.append((np.maximum(a, b)[loose], f"tied at {where} to positions that cannot leave"))
        both = (a >= 0) & (b >= 0)
        self.equal.append((a, b) if both.all() else (a[both], b[both]))

    def _product(self, x: Labels, a: Labels | None, b: Labels | None) -> None:
        if a is None and b is None:
            self.frozen.append((x, "an axis is laid out as rigid ones"))
        elif a is None or b is None:
            labels = a if a is not None else b
            assert labels is not None
            self._equal(x, labels, "a product with a rigid axis")
        else:
            keep = (x >= 0) & (a >= 0) & (b >= 0)
            self.products.append((x[keep], a[keep], b[keep]))
            for held in (x < 0, x >= 0):  # a position that cannot leave holds both of its factors, and they hold it
                chosen = ~keep & held
                if chosen.any():
                    self.frozen.append((np.concatenate([x[chosen], a[chosen], b[chosen]]), "tied to a rigid position"))


def _repeat(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.repeat(labels, times)


def _tile(labels: Labels | None, times: int) -> Labels | None:
    return None if labels is None else np.tile(labels, times)


def _regroup(axis: Labeled, sizes: Sequence[int]) -> list[Labeled] | None:
    """Deal the factors out to axes of the given sizes, if they divide that way."""
    factors, groups = [f for f in axis if f.size > 1 or f.labels is EXAMPLE], []
    for size in sizes:
        group: list[Factor] = []
        while factors and (length(tuple(group)) < size or (factors[0].labels is EXAMPLE and 1 not in sizes)):
            group.append(factors.pop(0))
        if size == 1 and factors and factors[0].labels is EXAMPLE:
            group.append(factors.pop(0))
        if length(tuple(group)) != size:
            return None
        groups.append(tuple(group) or rigid(size))
    return None if factors else groups


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
        wide = [x for x in product if self.sizes[x] > 1 or (x == "B" and is_example(given))]
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
            if _is_labeled(given):
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
                sites.append(Site(self.name, slot, position, factors, _examples(tensors[slot])))
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

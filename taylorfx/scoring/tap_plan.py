"""What the taps of a network do, at every input and output of a node: found out once, from the spec alone.

A tap keeps the activation ``a`` for the backward pass, unless ``a`` can be made again with little work from a tensor
that is kept anyway. Here a GELU keeps its input ``x`` for its own derivative, so that the tap keeps ``x`` as well, and
a `Recipe` by which the activation is made of it. No tensor lives on for ``a``:

    stop (node, slot)       what the plan says there
    ("gelu", 0)             keep x
    ("down", 0)             tap a, recipe: gelu(x), slope: gelu'(x); let go of x
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

from torch import Tensor

from taylorfx.coupling.units import Place
from taylorfx.layers.roles import Memory, Pointwise, Product, Recomputed, Viewing
from taylorfx.network.labels import STATE, Bound, is_example
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.draft import StandIn
from taylorfx.rewrite.fused import Fused
from taylorfx.rewrite.gated import Gated
from taylorfx.rewrite.in_place import Over
from taylorfx.rewrite.unused import Only, Sliced
from taylorfx.scoring.gates import Gates
from taylorfx.tree import Params, flatten

__all__ = ["KEPT", "Read", "Recipe", "Stop", "TapPlan", "Where"]

Slope = Callable[[Tensor, Tensor, bool], Tensor]
"""That of the role `Pointwise`: of what is kept and the gradient by an activation, the gradient by what is kept."""


@dataclass(frozen=True)
class Recipe:
    """How an activation is made from what is kept.

    Attributes:
        steps: applied one after the other to what is kept; without any, it is the activation.
        rows: the steps leave the examples where they are, first, and treat each alone.
        new: what the steps make is a new tensor, which may be written over.
        slope: set where no other gradient comes back to the activation. The tap then also does the work of the steps'
            backward pass: in place, and part by part while these are in the processor's cache.
    """

    steps: tuple[Callable[..., Tensor], ...] = ()
    rows: bool = True
    new: bool = False
    slope: Slope | None = None

    def then(self, step: Callable[..., Tensor], *, view: bool, slope: Slope | None = None) -> Recipe:
        """This recipe and one step more, whose result is a view of its input or new."""
        return Recipe((*self.steps, step), self.rows and not view, self.new or not view, slope)

    def __call__(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


KEPT = Recipe()
"""The activation itself is kept."""

Where = tuple[str, int]
"""A stop: a node's name, and the number of one of its inputs, -1 for its output, or -2 for the state that it reads."""


class Origin(NamedTuple):
    """What a value can be made from: the tensor that passes at a stop, and how."""

    where: Where
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class Read:
    """One tap.

    Attributes:
        place: along which axis derivatives are wanted, and where the examples are.
        source: where the tensor passes that the activation is made from; none if the activation itself is kept.
        recipe: how it is made.
        center: what the activation is measured from, if not from zero.
        position: the axis along which derivatives are not summed up either, where positions are observations; of the
            place's shape.
        twin: reads of one number tap the same value the same way (queries, keys and values): one tap serves all.
        only: the node, if any, that leaves out positions of the network itself before this read.
        tapped, counted: what happens here. A tap of a product may lie at one of its factors, see `_at_factors`; what is
            read is counted where it is read.
    """

    place: Place
    source: Where | None = None
    recipe: Recipe = KEPT
    center: Tensor | None = None
    position: int | None = None
    twin: int | None = None
    only: str | None = None
    tapped: bool = True
    counted: bool = True

    @property
    def key(self) -> str:
        """The name of its gate."""
        return str(self.place.key)


@dataclass
class Stop:
    """What is done with the tensor at one input or output of a node, in this order.

    Attributes:
        reads: the taps that it goes through.
        kept: it is kept, after its taps, for reads at later stops.
        only: set at the input of a node that leaves out positions.
        sources, twins: what is let go, as no later stop needs it: tensors kept at other stops, and taps of twins.
    """

    reads: list[Read] = field(default_factory=list)
    kept: bool = False
    only: Only | None = None
    sources: list[Where] = field(default_factory=list)
    twins: list[int] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class TapPlan:
    """The taps of a network: what is done at each stop; nothing is done where there is none.

    It is of the spec, the parameters and the places, and holds for batches of any size. `taylorfx.scoring.taps.Taps`
    is the state of one pass.
    """

    stops: Mapping[Where, Stop]
    moments: bool

    @staticmethod
    def of(
        params: Params,
        spec: Spec,
        places: Sequence[Place],
        around: Gates | None = None,
        *,
        moments: bool = False,
        bounds: Mapping[str, Bound] | None = None,
        positions: Mapping[tuple[str, int, int], int] | None = None,
    ) -> TapPlan:
        """Plan the taps at these places.

        Args:
            around: what activations are measured from, by place.
            moments: also sum what is read.
            bounds: the shapes of the network's nodes; without them taps stay where the network reads.
            positions: for every place the axis of positions that are observations, if any are.
        """
        stops = _Stops()
        reads = _with_twins(spec, _reads(spec, places, _origins(spec, flatten(params)), around or {}, positions or {}))
        for where, read in _at_factors(spec, reads, bounds or {}):
            stops[where].reads.append(read)
        for node in spec.nodes:
            if isinstance(node.layer, Only):
                stops[node.name, 0].only = node.layer
        _keep(stops)
        return TapPlan(dict(stops), moments)


class _Stops(dict[Where, Stop]):
    """Stops in the order in which they are first asked for."""

    def __missing__(self, where: Where) -> Stop:
        stop = self[where] = Stop()
        return stop


def _origins(spec: Spec, leaves: Mapping[str, Tensor]) -> dict[str, Origin]:
    """For every value that can be made again with little work, from what.

    x --> gelu --> a --> view --> b         a: gelu(x), b: view(gelu(x)), with x kept at ("gelu", 0)
    """
    origins: dict[str, Origin] = {}
    for node in spec.nodes:
        layer = node.layer.layer if isinstance(node.layer, StandIn) else node.layer
        pointwise = layer.role(Pointwise)
        slope = None if pointwise is None else pointwise.slope
        step = partial(layer.apply, {leaf: leaves[path] for leaf, path in node.paths.items()})
        if isinstance(node.layer, Fused):  # keeps what it gives out, of which the layer behind it reads another view
            origins[node.name] = Origin((node.name, -1), KEPT)
        elif isinstance(node.layer, Over):
            if slope is not None:  # what is kept at the input is the activation when the backward pass comes
                origins[node.name] = Origin((node.name, 0), replace(KEPT, slope=slope))
        elif layer.role(Recomputed) is not None:
            origins[node.name] = Origin((node.name, 0), KEPT.then(step, view=False, slope=slope))
        elif layer.role(Viewing) is not None and node.inputs[0] in origins:
            where, recipe = origins[node.inputs[0]]
            origins[node.name] = Origin(where, recipe.then(step, view=True))
    return origins


def _reads(
    spec: Spec,
    places: Sequence[Place],
    origins: Mapping[str, Origin],
    around: Gates,
    positions: Mapping[tuple[str, int, int], int],
) -> Iterator[tuple[Where, Read]]:
    """The taps in the order of a pass."""
    at: dict[Where, list[Place]] = {}
    for place in places:
        at.setdefault((place.node, place.slot), []).append(place)
    only = _only(spec)
    for node in spec.nodes:
        for slot in (*range(len(node.inputs)), STATE, -1):
            value = node.name if slot < 0 else node.inputs[slot]
            here = at.get((node.name, slot), ())
            for place in here:
                source, recipe = None, KEPT
                if slot >= 0 and value in origins and _remakes(node, origins[value].recipe):
                    source, recipe = origins[value]
                    if spec.uses[value] > 1 or len(here) > 1 or not _alone(node):
                        recipe = replace(recipe, slope=None)
                center, position = around.get(place.key), positions.get(place.key)
                yield (node.name, slot), Read(place, source, recipe, center, position, only=only.get(value))


def _remakes(node: Node, recipe: Recipe) -> bool:
    """What a node reads is to be made again: it is not kept anyway."""
    memory = node.layer.role(Memory)
    return memory is not None and not (memory.keeps_input and recipe.steps)


def _alone(node: Node) -> bool:
    """The gradient by what a node reads may be written over."""
    memory = node.layer.role(Memory)
    return memory is not None and memory.new_gradient


def _only(spec: Spec) -> dict[str, str]:
    """For every value of fewer positions than the network itself has, the node that leaves them out."""
    only: dict[str, str] = {}
    for node in spec.nodes:
        if isinstance(node.layer, Only):
            only[node.name] = node.name
        elif not isinstance(node.layer, Sliced):
            only.update((node.name, only[x]) for x in node.inputs if x in only)
    return only


def _with_twins(spec: Spec, reads: Iterator[tuple[Where, Read]]) -> list[tuple[Where, Read]]:
    """The reads, numbered where several tap the same value the same way, after the same other taps.

    q_proj(x), k_proj(x), v_proj(x)         one number for the three reads of x
    """
    listed, keys = list(reads), list[object]()
    before: dict[Where, tuple[object, ...]] = {}
    for (name, slot), read in listed:
        place, value = read.place, spec[name].inputs[slot] if slot >= 0 else name
        same = (place.axis, place.units.shape, place.units.tobytes()) if read.center is None else place.key
        before[name, slot] = (*before.get((name, slot), ()), same)
        keys.append((value, before[name, slot]) if slot >= 0 and read.center is None else place.key)
    numbers = {key: k for k, key in enumerate(dict.fromkeys(key for key in keys if keys.count(key) > 1))}
    return [(where, replace(read, twin=numbers.get(key))) for (where, read), key in zip(listed, keys, strict=True)]


def _at_factors(
    spec: Spec, reads: Sequence[tuple[Where, Read]], bounds: Mapping[str, Bound]
) -> list[tuple[Where, Read]]:
    """The reads in the order of a pass, where taps of products lie at a factor that is kept anyway.

    ``y = a b`` has ``y dL/dy = a b dL/dy = a dL/da``. For the derivative by ``b`` torch keeps ``a``, but not ``y``.
    """
    by_value: dict[str, list[int]] = {}
    for k, ((name, slot), _) in enumerate(reads):
        if slot >= 0:
            by_value.setdefault(spec[name].inputs[slot], []).append(k)
    factors = _Factors(spec, bounds, spec.downstream(name for (name, _), _ in reads))
    moved, listed = list[tuple[Where, Read]](), list(reads)
    for value, here in by_value.items():
        first, stops = reads[here[0]][1], {reads[k][0] for k in here}
        alone = spec.uses[value] == len(here) == len(stops) and len({reads[k][1].twin for k in here}) == 1
        kept = alone and first.source is None and first.center is None and (len(here) == 1 or first.twin is not None)
        where = factors.kept(value) if kept else None
        if where is not None:
            moved.append((where, replace(first, twin=None, counted=False)))
            for k in here:
                listed[k] = reads[k][0], replace(reads[k][1], twin=None, tapped=False)
    order = {node.name: k for k, node in enumerate(spec.nodes)}
    return sorted([*moved, *listed], key=lambda pair: order[pair[0][0]])


class _Factors(NamedTuple):
    """Where the factors of products pass."""

    spec: Spec
    bounds: Mapping[str, Bound]
    differentiated: set[str]

    def kept(self, value: str) -> Where | None:
        """The stop of a factor that has the axes of this value and is kept for the derivative, if there is one."""
        node = self.spec[value]
        product = node.layer.role(Product) is not None
        for slot in (1,) if isinstance(node.layer, Gated) else range(len(node.inputs)) if product else ():
            factor = node.inputs[slot]
            if factor in self.differentiated and self._alike(factor, value):
                if not self.differentiated.isdisjoint((*node.inputs[:slot], *node.inputs[slot + 1 :])):
                    return value, slot
                further = self.kept(factor) if self.spec.uses[factor] == 1 else None
                if further is not None:
                    return further
        return None

    def _alike(self, one: str, other: str) -> bool:
        """Two values have the same axes, and the examples along the same one."""
        if one not in self.bounds or other not in self.bounds:
            return False
        pair = self.bounds[one], self.bounds[other]
        return pair[0].shape == pair[1].shape and all(
            is_example(a) == is_example(b) for a, b in zip(pair[0].output, pair[1].output, strict=True)
        )


def _keep(stops: _Stops) -> None:
    """Say where tensors and taps are kept for later stops, and where they are let go: at the last that needs them."""
    sources: dict[Where, Where] = {}
    twins: dict[int, Where] = {}
    for where, stop in stops.items():
        for read in (read for read in stop.reads if read.tapped):
            if read.source is not None and read.twin not in twins:
                sources[read.source] = where
            if read.twin is not None:
                twins[read.twin] = where
    for source, where in sources.items():
        stops[source].kept = True
        stops[where].sources.append(source)
    for number, where in twins.items():
        stops[where].twins.append(number)

"""A network that is run on one batch from layer to layer, as its parameters are repaired."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from taylorfx.network.run import Inputs, apply, bind_inputs, fitted
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, flatten, restrict, unflatten

__all__ = ["Pair", "Run"]


class Run:
    """A network on one batch, as far as it has been asked for; what no later node consumes is not kept."""

    def __init__(self, spec: Spec, inputs: Inputs) -> None:
        self.inputs = inputs
        self.values: dict[str, Tensor] = bind_inputs(spec, (inputs,))
        self.done = 0

    def value(self, params: Params, spec: Spec, name: str) -> Tensor:
        """What a node gives out, without derivatives; nodes are asked for in their order."""
        place = [*spec.by_name].index(name) + 1
        if place > self.done:
            names = [node.name for node in spec.nodes[self.done : place]]
            later = {name, *(x for node in spec.nodes[place:] for x in node.inputs)}
            new = self._computed(params, spec, names, [x for x in names if x in later])
            self.values = {x: value for x, value in self.values.items() if x in later} | new
            self.done = place
        return self.values[name]

    def ahead(self, params: Params, spec: Spec, name: str) -> Tensor:
        """What a node gives out that has perhaps not been run yet. Nothing that is computed for it is kept."""
        if name in self.values:
            return self.values[name]
        needed = spec.upstream([name])
        names = [node.name for node in spec.nodes[self.done :] if node.name in needed]
        return self._computed(params, spec, names, [name])[name]

    def _computed(self, params: Params, spec: Spec, names: Sequence[str], wanted: Sequence[str]) -> dict[str, Tensor]:
        """What the ``wanted`` of these nodes give out."""
        part = fitted(spec, self.inputs).part(names, wanted, keys=wanted)
        leaves = restrict(params, part.shapes)
        detached = unflatten((path, leaf.detach()) for path, leaf in flatten(leaves).items())
        values: dict[str, Tensor] = apply(detached, part, {x: self.values[x] for x in part.input_layers})
        return values


Pair = tuple[Run, Run, Tensor | None]
"""The original and the small network on a batch, and which of its positions count."""

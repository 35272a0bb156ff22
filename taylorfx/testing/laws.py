"""`check_layer`: what a layer states is what it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.cut import cut
from taylorfx.layers import Input, Layer, Leaves, Shape
from taylorfx.network.run import apply
from taylorfx.network.spec import Node, Spec
from taylorfx.rewrite.unused import way
from taylorfx.scoring.gates import gates
from taylorfx.scoring.measure import derivatives
from taylorfx.store import from_json, to_json
from taylorfx.testing.roles import check_roles
from taylorfx.testing.strategies import random_params, random_plan
from taylorfx.tree import Params, flatten

__all__ = ["assert_trees_equal", "check_layer"]


def assert_trees_equal(one: Params, other: Params, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Two trees have the same paths, in whatever order, and equal tensors."""
    a, b = flatten(one), flatten(other)
    assert a.keys() == b.keys(), f"paths differ: {sorted(a.keys() ^ b.keys())}"
    for path, leaf in a.items():
        torch.testing.assert_close(leaf, b[path], rtol=rtol, atol=atol, msg=partial("{}: {}".format, path))


# One check for one layer.
@dataclass(frozen=True)
class _Write(Layer):
    """Mixes every axis with itself, so that every axis after it may shrink."""

    given: Shape
    shape: Shape

    def _names(self, letter: str) -> list[str]:
        return [f"{letter}{k}" for k in range(len(self.shape))]

    def signature(self, *shapes: Shape) -> str:
        before, after = self._names("A"), self._names("a")
        mixes = ", ".join(f"w{k}: {a} {b}" for k, (a, b) in enumerate(zip(after, before, strict=True)))
        return f"B {' '.join(before)}, {mixes} -> B {' '.join(after)}"

    def fields(self, *shapes: Shape) -> dict[str, str]:
        return {"given": " ".join(self._names("A")), "shape": " ".join(self._names("a"))}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes().items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        for k in range(len(self.shape)):
            x = torch.tensordot(x, params[f"w{k}"], dims=([k + 1], [1])).movedim(-1, k + 1)
        return x


@dataclass(frozen=True)
class _Read(Layer):
    """Mixes all axes into two numbers."""

    shape: Shape
    outputs: int = 2

    def _names(self) -> str:
        return " ".join(f"a{k}" for k in range(len(self.shape)))

    def signature(self, *shapes: Shape) -> str:
        return f"B {self._names()}, weight: O {self._names()} -> B O"

    def fields(self, *shapes: Shape) -> dict[str, str]:
        return {"shape": self._names(), "outputs": "O"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"weight": torch.randn(self.outputs, *self.shape, generator=generator)}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1) @ params["weight"].flatten(1).T


def check_layer(layer: Layer, *inputs: Shape | Tensor, seeds: Sequence[int] = range(8)) -> Coupling:
    """Prove a layer's rules: whatever leaves before or after it, what is cut computes what is gated.

    The layer stands between layers that mix every axis, so that all axes may shrink that its signature lets shrink.
    Checked are the inferred shapes, cutting against gating under random plans, the gate derivatives against automatic
    differentiation of the gates, one example at a time against the batch, ``vmap`` and ``jvp``, JSON, that each
    position along these axes is treated alone, and every role that the layer states (`taylorfx.layers.roles`).

    Args:
        layer: the layer.
        inputs: the shape of one example of every input, or a tensor of examples where it has to be one (integers).

    Returns:
        The coupling of the little network, to look at what may leave and what is frozen.

    Raises:
        AssertionError: saying what does not hold.
    """
    nodes: list[Node] = []
    sources: list[str] = []
    for k, x in enumerate(inputs):
        shape = tuple(x.shape[1:]) if isinstance(x, Tensor) else tuple(x)
        nodes.append(Node(f"input{k}", Input(shape)))
        if not isinstance(x, Tensor):
            nodes.append(Node(f"write{k}", _Write(shape, shape), (f"input{k}",)))
        sources.append(nodes[-1].name)
    nodes.append(Node("layer", layer, tuple(sources)))
    generator = torch.Generator().manual_seed(0)
    bare = Spec(tuple(nodes), ("layer",))
    given = {
        f"input{k}": x if isinstance(x, Tensor) else torch.randn(3, *x, generator=generator, dtype=torch.float64)
        for k, x in enumerate(inputs)
    }
    shape = tuple(apply(random_params(bare, generator), bare, given).shape[1:])
    spec = Spec((*nodes, Node("read", _Read(shape), ("layer",))), ("read",))
    assert from_json(to_json(spec)) == spec, f"{layer} does not come back from JSON"
    params = random_params(spec, generator)
    coupling = couple(params, spec)
    inferred = coupling.bounds["read"].inputs[0][1:]
    assert inferred == shape, f"{layer} infers the shape {inferred}, but computes {shape}"
    for seed in seeds:
        generator.manual_seed(seed)
        plan = random_plan(coupling, generator, exact=True)
        small, large = apply(cut(params, plan), plan.spec, given), apply(params, spec, given, gates=plan.gates)
        torch.testing.assert_close(small, large, rtol=1e-9, atol=1e-9, msg="cut differs from gated: {}".format)
    _check_transforms(params, spec, given, coupling, generator)
    _check_values(params, spec["layer"], given, coupling)
    return coupling


def _check_values(params: Params, node: Node, given: dict[str, Tensor], coupling: Coupling) -> None:
    """The layer's roles, and each position alone along the axes where it states that."""
    values: Any = apply(params, Spec(coupling.spec.nodes, (*node.inputs, node.name)), given)
    values = values if node.inputs else (values,)
    tree, bound = flatten(params), coupling.bounds[node.name]
    leaves = {leaf: tree[path] for leaf, path in node.paths.items()}
    check_roles(node.layer, leaves, values[:-1])
    for axis in range(1, len(bound.shape)):
        through = way(coupling, node, axis)
        if through is not None:
            letter, axes = through
            last = [
                x if k is None else x.narrow(k, x.shape[k] - 1, 1) for x, k in zip(values, (*axes, axis), strict=True)
            ]
            alone = node.layer.resize({**bound.sizes, letter: 1}, *bound.inputs)
            value = alone.apply(leaves, *last[:-1])
            message = f"positions along {letter} depend on each other: {{}}".format
            torch.testing.assert_close(value, last[-1], rtol=1e-9, atol=1e-9, msg=message)


def _check_transforms(
    params: Params, spec: Spec, given: dict[str, Tensor], coupling: Coupling, generator: torch.Generator
) -> None:
    targets = torch.randint(2, (3,), generator=generator)
    values = torch.rand(4, len(coupling), generator=generator, dtype=torch.float64)

    def run(gate: Tensor) -> Tensor:
        output: Tensor = apply(params, spec, given, gates=gates(coupling, gate))
        return output

    one_by_one = torch.stack([run(gate) for gate in values])
    torch.testing.assert_close(torch.func.vmap(run)(values), one_by_one, msg=lambda text: f"vmap over gates: {text}")
    ones = torch.ones(len(coupling), dtype=torch.float64)

    def losses(gate: Tensor) -> Tensor:
        return torch.nn.functional.cross_entropy(run(gate), targets, reduction="none")

    slopes = torch.func.jacfwd(losses)(ones) if len(coupling) else ones.expand(3, 0)
    if not coupling.mixing:
        rows = derivatives(params, spec, given, targets, coupling)[1]
        torch.testing.assert_close(rows, slopes, rtol=1e-7, atol=1e-9, msg=lambda text: f"gate derivatives: {text}")
        alone = [apply(params, spec, {name: x[k : k + 1] for name, x in given.items()}) for k in range(3)]
        torch.testing.assert_close(
            torch.cat(alone), run(ones), rtol=1e-7, atol=1e-9, msg=lambda text: f"examples depend on each other: {text}"
        )
    assert np.isfinite(slopes.numpy()).all()

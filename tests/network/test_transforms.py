"""Networks are pure functions: grad, jvp, vmap and compile work on them, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import CAN_BUILD, convolutional, transformer
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.testing import assert_close
from twins import Case, Leaves, every_case, every_twin, is_trained

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import batch_for, random_params

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


NETWORKS = [convolutional(), transformer()]
every_network = pytest.mark.parametrize("spec", NETWORKS, ids=["convolutional", "transformer"])


def draw(spec: tfx.Spec, count: int = 4, seed: int = 0) -> tuple[tfx.Params, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    params = random_params(spec, generator)
    return params, torch.randn(count, *spec.inputs[0].layer.shape, generator=generator, dtype=torch.float64)


def scalar(value: Tensor) -> Tensor:
    """A generic smooth function of logits ``(..., N, 3)``."""
    return (value.tanh() * torch.tensor([1.0, -2.0, 0.5], dtype=value.dtype)).sum((-2, -1))


def tangent(leaves: Leaves, seed: int = 1) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for path, leaf in leaves.items()}


def moved(leaves: Leaves, direction: Leaves, step: float) -> Leaves:
    return {path: leaf + step * direction[path] for path, leaf in leaves.items()}


def difference(function: Callable[[Leaves], Any], leaves: Leaves, direction: Leaves, step: float = 1e-5) -> Any:
    """The central difference quotient of a function of leaves along a direction."""
    return (function(moved(leaves, direction, step)) - function(moved(leaves, direction, -step))) / (2 * step)


def stack(*trees: Leaves) -> Leaves:
    return {path: torch.stack([tree[path] for tree in trees]) for path in trees[0]}


def dot(one: Leaves, other: Leaves) -> Tensor:
    return sum((one[path] * other[path]).sum() for path in one)


def backward(function: Callable[[Leaves], Tensor], leaves: Leaves) -> Leaves:
    """The gradient by plain autograd."""
    leaves = {path: leaf.clone().requires_grad_() for path, leaf in leaves.items()}
    return dict(zip(leaves, torch.autograd.grad(function(leaves), list(leaves.values())), strict=True))


def loss_of(spec: tfx.Spec) -> tuple[Callable[..., Tensor], Leaves, Tensor]:
    """The loss as a function of the trained leaves (and the inputs), these leaves, and inputs."""
    params, x = draw(spec)
    trained, rest = tfx.partition(params, spec)

    def loss(leaves: Leaves, x: Tensor = x) -> Tensor:
        return scalar(tfx.apply(tfx.tree.combine(tfx.tree.unflatten(leaves), rest), spec, x))

    return loss, tfx.tree.flatten(trained), x


@every_network
def test_grad_over_the_trained_parameters_is_the_gradient(spec: tfx.Spec) -> None:
    loss, leaves, _ = loss_of(spec)
    gradient = grad(loss)(leaves)
    assert_close(gradient, backward(loss, leaves))
    direction = tangent(leaves)
    assert_close(dot(gradient, direction), difference(loss, leaves, direction), rtol=1e-6, atol=1e-6)
    assert all(leaf.any() for path, leaf in gradient.items() if "attend.k_proj.bias" not in path)


@every_network
def test_jvp_and_its_composition_with_grad_are_difference_quotients(spec: tfx.Spec) -> None:
    loss, leaves, x = loss_of(spec)
    direction, step = tangent(leaves), tangent({"x": x})["x"]
    _, slope = jvp(loss, (leaves,), (direction,))
    assert_close(slope, difference(loss, leaves, direction), rtol=1e-6, atol=1e-6)
    _, slope = jvp(lambda x: loss(leaves, x), (x,), (step,))
    assert_close(slope, (step * grad(lambda x: loss(leaves, x))(x)).sum())
    _, curvature = jvp(lambda leaves: dot(grad(loss)(leaves), direction), (leaves,), (direction,))
    quotient = difference(lambda leaves: dot(grad(loss)(leaves), direction), leaves, direction)
    assert_close(curvature, quotient, rtol=1e-5, atol=1e-5)


@every_network
@pytest.mark.parametrize("transform", [
    lambda f, x: jvp(f, (x,), (x,)), lambda f, x: grad(f)(x), lambda f, x: vmap(grad(f))(torch.stack([x, x])),
], ids=["jvp", "grad", "vmap of grad"])  # fmt: skip
def test_what_is_measured_refuses_to_be_differentiated(spec: tfx.Spec, transform: Callable[..., object]) -> None:
    """What it writes over, a transform around it would not see: its result would be wrong."""
    params = random_params(spec, torch.Generator().manual_seed(0))
    coupling, (x, y) = tfx.couple(params, spec), batch_for(spec, torch.Generator().manual_seed(0))
    (name, x), *_ = x.items()

    def measured(x: Tensor) -> Tensor:
        return tfx.derivatives(params, spec, {name: x}, y, coupling)[1].sum()

    with pytest.raises(ValueError, match="cannot be differentiated; received parameters or inputs inside of"):
        transform(measured, x)


@every_network
def test_vmap_over_stacked_parameters_is_an_ensemble(spec: tfx.Spec) -> None:
    members, x = [draw(spec, seed=seed)[0] for seed in range(3)], draw(spec)[1]
    stacked = tfx.tree.unflatten(stack(*map(tfx.tree.flatten, members)))
    values = vmap(lambda params: tfx.apply(params, spec, x))(stacked)
    assert_close(values, torch.stack([tfx.apply(params, spec, x) for params in members]))


@every_network
def test_vmap_over_gates_is_a_loop_over_masks(spec: tfx.Spec) -> None:
    params, x = draw(spec)
    coupling = tfx.couple(params, spec)
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(7, len(coupling), generator=generator, dtype=torch.float64).round(decimals=1)

    def gated(values: Tensor) -> Tensor:
        return tfx.apply(params, spec, x, gates=tfx.gates(coupling, values))

    assert_close(vmap(gated)(values), torch.stack([gated(row) for row in values]))
    slopes = vmap(grad(lambda row: scalar(gated(row))))(values)
    assert_close(slopes, torch.stack([backward(lambda v: scalar(gated(v["m"])), {"m": row})["m"] for row in values]))


@every_network
def test_vmap_over_inputs_is_the_batch_and_its_grad_is_per_example(spec: tfx.Spec) -> None:
    loss, leaves, x = loss_of(spec)
    params, _ = draw(spec)
    assert_close(vmap(lambda one: tfx.apply(params, spec, one[None])[0])(x), tfx.apply(params, spec, x))
    gradients = vmap(grad(lambda leaves, one: loss(leaves, one[None])), (None, 0))(leaves, x)
    assert_close(gradients, stack(*(backward(lambda leaves, one=one: loss(leaves, one[None]), leaves) for one in x)))


@every_network
def test_training_under_grad_moves_running_statistics_that_require_none(spec: tfx.Spec) -> None:
    params, x = draw(spec)
    trained, rest = tfx.partition(params, spec)
    leaves = tfx.tree.flatten(trained)

    def loss(leaves: Leaves) -> tuple[Tensor, tfx.Params]:
        value, params = tfx.train(tfx.tree.combine(tfx.tree.unflatten(leaves), rest), spec, x)
        return scalar(value), tfx.partition(params, spec)[1]

    gradient, after = grad(loss, has_aux=True)(leaves)
    assert_close(gradient, backward(lambda leaves: loss(leaves)[0], leaves))
    direction = tangent(leaves)
    slope = difference(lambda leaves: loss(leaves)[0], leaves, direction)
    assert_close(dot(gradient, direction), slope, rtol=1e-6, atol=1e-6)
    assert_close(tfx.tree.flatten(after), tfx.tree.flatten(loss(leaves)[1]))
    everything = tfx.tree.flatten(params)
    for leaf in everything.values():
        leaf.requires_grad_(leaf.is_floating_point())
    _, new = tfx.train(tfx.tree.unflatten(everything), spec, x)
    for path, leaf in tfx.tree.flatten(tfx.partition(new, spec)[1]).items():
        assert not leaf.requires_grad
        assert not torch.equal(leaf, everything[path]), f"{path} did not move"


@every_network
def test_training_an_ensemble_is_a_loop_over_its_members(spec: tfx.Spec) -> None:
    members, x = [tfx.tree.flatten(draw(spec, seed=seed)[0]) for seed in range(3)], draw(spec)[1]

    def step(leaves: Leaves) -> tuple[Leaves, Leaves]:
        fixed = {path: leaf for path, leaf in leaves.items() if not is_trained(path)}
        moving = {path: leaf for path, leaf in leaves.items() if is_trained(path)}

        def loss(moving: Leaves) -> tuple[Tensor, Leaves]:
            value, params = tfx.train(tfx.tree.unflatten({**moving, **fixed}), spec, x)
            return scalar(value), tfx.tree.flatten(params)

        return grad(loss, has_aux=True)(moving)

    gradients, after = vmap(step)(stack(*members))
    single = [step(member) for member in members]
    assert_close(gradients, stack(*(gradient for gradient, _ in single)))
    assert_close(after, stack(*(new for _, new in single)))


def gated_network(spec: tfx.Spec) -> tuple[Callable[..., Tensor], tfx.Params, Tensor, Any]:
    params, x = draw(spec)
    coupling = tfx.couple(params, spec)
    gates = tfx.gates(coupling, torch.linspace(0.2, 1.2, len(coupling), dtype=torch.float64))
    return lambda params, x, gates: tfx.apply(params, spec, x, gates=gates), params, x, gates


@pytest.mark.parametrize(
    ("spec", "backend"),
    [(NETWORKS[0], "aot_eager"), (NETWORKS[1], "inductor" if CAN_BUILD else "aot_eager")],  # half a minute each
    ids=["convolutional", "transformer"],
)
def test_a_compiled_network_is_the_network_in_one_graph(spec: tfx.Spec, backend: str) -> None:
    torch.compiler.reset()
    network, *arguments = gated_network(spec)
    compiled = torch.compile(network, fullgraph=True, backend=backend)
    assert_close(compiled(*arguments), network(*arguments))


@every_network
def test_gradients_of_a_compiled_network_are_its_gradients_in_one_graph(spec: tfx.Spec) -> None:
    torch.compiler.reset()
    network, params, x, gates = gated_network(spec)
    trained, rest = tfx.partition(params, spec)

    def step(leaves: Leaves, x: Tensor, gates: Any) -> Any:
        def loss(leaves: Leaves, gates: Any) -> Tensor:
            return scalar(network(tfx.tree.combine(tfx.tree.unflatten(leaves), rest), x, gates))

        return grad(loss, (0, 1))(leaves, gates)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_close(compiled(tfx.tree.flatten(trained), x, gates), step(tfx.tree.flatten(trained), x, gates))


@every_network
def test_a_compiled_training_step_is_the_training_step_in_one_graph(spec: tfx.Spec) -> None:
    torch.compiler.reset()
    params, x = draw(spec)
    compiled = torch.compile(lambda params, x: tfx.train(params, spec, x), fullgraph=True, backend="aot_eager")
    (value, after), (expected, new) = compiled(params, x), tfx.train(params, spec, x)
    assert_close((value, tfx.tree.flatten(after)), (expected, tfx.tree.flatten(new)))


# The same laws, layer by layer.


@every_case
def test_vmap_over_the_parameters_and_inputs_of_a_layer_is_a_loop(case: Case) -> None:
    leaves = case.leaves()
    members = [{path: (1 + k) * leaf for path, leaf in leaves.items()} for k in range(3)]
    inputs = [torch.stack([x, x.flip(0), x.roll(1, 0)]) for x in case.inputs()]

    def call(leaves: Leaves, *inputs: Tensor) -> Tensor:
        return tfx.apply(tfx.tree.unflatten(leaves), case.spec, *inputs)

    if leaves:
        expected = torch.stack([call(member, *(x[k] for x in inputs)) for k, member in enumerate(members)])
        assert_close(vmap(call)(stack(*members), *inputs), expected)
    if inputs:
        expected = torch.stack([call(leaves, *(x[k] for x in inputs)) for k in range(3)])
        assert_close(vmap(lambda *inputs: call(leaves, *inputs))(*inputs), expected)


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@every_case
def test_jvp_of_a_layer_is_its_difference_quotient(case: Case, training: bool) -> None:
    names = {path: leaf for path, leaf in case.leaves().items() if is_trained(path)}
    given = {f"x{k}": x for k, x in enumerate(case.inputs())}
    primals = {**names, **{name: x for name, x in given.items() if x.is_floating_point()}}
    direction = tangent(primals)

    def call(leaves: Leaves) -> Tensor:
        params = tfx.tree.unflatten({path: leaves.get(path, leaf) for path, leaf in case.leaves().items()})
        inputs = [leaves.get(name, x) for name, x in given.items()]
        if training:
            return tfx.train(params, case.spec, *inputs, generator=torch.Generator().manual_seed(0))[0]
        return tfx.apply(params, case.spec, *inputs)

    if training and case.name == "spectral norm":
        pytest.skip("torch's power iteration takes the weight for a constant, which a quotient does not")
    _, slope = jvp(call, (primals,), (direction,))
    assert_close(slope, difference(call, primals, direction, 1e-6), rtol=1e-5, atol=1e-5)


@every_twin
def test_vmap_over_training_inputs_gives_every_batch_its_own_statistics(case: Case) -> None:
    leaves = case.leaves()
    inputs = [torch.stack([x, x.flip(-1), x.roll(1, 0) // 2]) for x in case.inputs()]
    if isinstance(case.part, (L.Dropout, L.RReLU)):
        pytest.skip("randomness differs between vmap and a loop")

    def step(*inputs: Tensor) -> tuple[Tensor, Leaves]:
        value, params = tfx.train(tfx.tree.unflatten(leaves), case.spec, *inputs)
        return value, tfx.tree.flatten(params)

    values, after = vmap(step)(*inputs)
    single = [step(*(x[k] for x in inputs)) for k in range(3)]
    assert_close(values, torch.stack([value for value, _ in single]))
    assert_close(after, stack(*(new for _, new in single)) if leaves else {})


def test_dropout_under_vmap_draws_from_its_generator() -> None:
    spec, x = tfx.serial(L.Dropout(0.5)), torch.ones(4, 100)

    def call(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return vmap(lambda x: tfx.train({}, spec, x, generator=generator)[0], randomness="different")(x)

    assert torch.equal(call(0), call(0))
    assert not torch.equal(call(0), call(1))
    assert not torch.equal(call(0)[0], call(0)[1])

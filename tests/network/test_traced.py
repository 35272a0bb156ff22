"""A network is a constant of torch.compile: what a compiled module checks at a call does not grow with its layers."""

from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.network.traced import _program, traced_steps

X = torch.randn(2, 3, 8, 8)


def convolutions(count: int) -> nn.Module:
    blocks = [nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.GELU()) for _ in range(count)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()


def checked(module: nn.Module, *inputs: torch.Tensor) -> list[str]:
    """What torch.compile checks at every call of a module, whose value it does not change."""
    names: list[str] = []

    def note(guards):
        names.extend(guard.name for guard in guards)
        return [True] * len(guards)

    torch.compiler.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True, options={"guard_filter_fn": note})
    assert_close(compiled(*inputs), module(*inputs))
    return names


def test_a_compiled_plain_module_checks_no_more_per_layer_than_the_users_own():
    more = {}
    for count in (2, 6):
        own = convolutions(count)
        plain = tfx.to_torch(*tfx.from_torch(own, X))
        names = checked(plain, X)
        assert not any(".steps" in name or ".nodes" in name for name in names)
        more[count] = len(names), len(checked(own, X))
    (few, few_own), (many, many_own) = more.values()
    assert 0 < many - few <= many_own - few_own


def test_a_compiled_module_follows_the_network_that_it_is_given():
    spec = tfx.serial(tfx.Input((3,)), a=L.Linear(3, 4), act=L.ReLU(), b=L.Linear(4, 2))
    other = tfx.serial(tfx.Input((3,)), a=L.Linear(3, 4), act=L.Sigmoid(), b=L.Linear(4, 2))
    params, x = tfx.init(spec, torch.Generator().manual_seed(0)), torch.randn(5, 3)
    torch.compiler.reset()
    module = tfx.to_torch(params, spec)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for network in (spec, other, spec):
        module.spec = network
        assert_close(compiled(x), tfx.apply(params, network, x))
    again = torch.compile(tfx.to_torch(params, other), backend="eager", fullgraph=True)  # of the same class
    assert_close(again(x), tfx.apply(params, other, x))


@pytest.mark.parametrize("sizes", [(8, 8), (12, 10)])
def test_layers_that_are_taken_apart_are_put_together_for_the_sizes_of_the_inputs(sizes):
    flatten = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(2), nn.Softmax(-1), nn.AdaptiveAvgPool1d(2)).eval()
    _, spec = tfx.from_torch(flatten, X)
    assert spec.sized
    assert _program(spec)
    axes = spec.axes({spec.inputs[0].name: (3, *sizes)})
    for step, expected in zip(traced_steps(spec, axes), spec.fitted_anew(axes), strict=True):
        assert (step.node.name, step.node.layer, step.node.inputs) == (
            expected.node.name, expected.node.layer, expected.node.inputs,
        )  # fmt: skip
        assert (step.leaves, step.unused) == (expected.leaves, expected.unused)


@dataclass(frozen=True)
class Cast(tfx.Layer):
    """A layer with a field that is no constant of torch.compile."""

    dtype: torch.dtype
    by: float

    def apply(self, params, *inputs):
        return (inputs[0].to(self.dtype) * self.by).float()


def test_a_layer_with_a_field_of_another_kind_is_compiled_as_it_is():
    spec = tfx.serial(tfx.Input((3,)), a=L.Linear(3, 4), cast=Cast(torch.float64, 2.0), b=L.Linear(4, 2))
    params, x = tfx.init(spec, torch.Generator().manual_seed(0)), torch.randn(5, 3)
    assert _program(spec) == ()
    module = tfx.to_torch(params, spec)
    assert any(".steps" in name for name in checked(module, x))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    nodes = [replace(node, layer=Cast(torch.float64, 3.0)) if node.name == "cast" else node for node in spec]
    module.spec = tfx.Spec(tuple(nodes))
    assert_close(compiled(x), tfx.apply(params, module.spec, x))

"""What is known of a layer is not taken for true of a subclass that computes something else."""

from dataclasses import dataclass

import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers.roles import Mixing
from taylorfx.testing.strategies import random_params

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(16, 4, 5, 5, generator=GENERATOR, dtype=torch.float64), torch.arange(16) % 3


@dataclass(frozen=True)
class Squared(L.Conv2d):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs).square()


@dataclass(frozen=True)
class Shifting(L.BatchNorm2d):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs) + 3


@dataclass(frozen=True)
class Tenfold(L.Linear):
    def apply(self, params, *inputs):
        return 10 * super().apply(params, *inputs).tanh()


@dataclass(frozen=True)
class Reversed(L.Permute):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs).flip(-1)


@dataclass(frozen=True)
class Last(L.Slice):
    """Another part of as many positions."""

    def apply(self, params, *inputs):
        return inputs[0].flip(self.dim).narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Renamed(L.Conv2d):
    """The same arithmetic; `__str__` and a field of its own change nothing of it."""

    note: str = ""

    def tell(self):
        return self.note


@dataclass(frozen=True)
class Linear(L.Linear):
    pass


def test_a_subclass_has_the_roles_of_its_base_until_it_overrides_something():
    assert L.Conv2d(4, 6, 3).role(Mixing)
    assert Renamed(4, 6, 3).role(Mixing)
    assert Linear(4, 6).role(Mixing)
    assert not Squared(4, 6, 3).role(Mixing)
    assert not Tenfold(4, 6).role(Mixing)
    assert not L.ReLU().role(Mixing)
    for name in ("apply", "train", "signature", "init", "multiplies", "inexact", "_anything"):
        kind = type("Own", (L.Linear,), {name: getattr(L.Linear, name, None)})
        assert bool(kind(4, 6).role(Mixing)) == (name == "_anything")
        again = type("Again", (kind,), {"roles": L.Linear.roles})  # it states them anew
        below = type("Below", (again,), {})
        assert again(4, 6).role(Mixing)
        assert below(4, 6).role(Mixing)


def spec_of(conv=L.Conv2d, norm=L.BatchNorm2d, linear=L.Linear):
    return tfx.serial(
        tfx.Input((4, 5, 5)), conv1=L.Conv2d(4, 8, 3), relu=L.ReLU(), conv2=conv(8, 6, 1, bias=False),
        norm=norm(6), relu2=L.ReLU(), flat=L.Flatten(), hidden=linear(54, 7), out=L.Linear(7, 3),
    )  # fmt: skip


KINDS = {"convolution": {"conv": Squared}, "norm": {"norm": Shifting}, "linear layer": {"linear": Tenfold}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["compensate", "reconstruct"])
def test_a_repair_of_nothing_that_is_lost_changes_nothing(kind, name):
    """Units that are silent: what the smaller network computes is right as cut, so any repair has to leave it."""
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    params["conv1"]["weight"][:3] = 0
    params["conv1"]["bias"][:3] = -1  # silent behind the ReLU
    coupling = tfx.couple(params, spec)
    scores = torch.tensor([float(n not in {"conv1[0]", "conv1[1]", "conv1[2]"}) for n in coupling.names])
    plan = tfx.select(scores, coupling, budget=tfx.Remove(3))
    small, smaller = getattr(tfx, name)(params, plan, BATCH)
    expected = tfx.apply(params, spec, BATCH[0])
    assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, BATCH[0]), expected)
    assert_close(tfx.apply(small, smaller, BATCH[0]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["compensate", "reconstruct"])
def test_a_layer_that_computes_something_else_keeps_its_parameters(kind, name):
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    coupling = tfx.couple(params, spec)
    plan = tfx.select(torch.rand(len(coupling), generator=GENERATOR), coupling, budget=tfx.Units(0.6))
    small, _ = getattr(tfx, name)(params, plan, BATCH)
    nodes = {"convolution": ("conv2", "norm"), "norm": ("norm",), "linear layer": ("hidden",)}[kind]
    cut = tfx.cut(params, plan)
    assert all(torch.equal(small[node][leaf], tensor) for node in nodes for leaf, tensor in cut[node].items())
    plain, _ = getattr(tfx, name)(params, tfx.Plan(tfx.couple(params, spec_of()), plan.keep), BATCH)
    moved = [not torch.equal(plain[node][leaf], tensor) for node in nodes for leaf, tensor in cut[node].items()]
    assert any(moved) or (kind, name) == ("norm", "reconstruct")  # the control: the layer itself is repaired


def test_a_norm_that_computes_something_else_is_not_recalibrated():
    for norm, kept in ((Shifting, True), (L.BatchNorm2d, False)):
        spec = spec_of(norm=norm)
        params = random_params(spec, GENERATOR)
        new = tfx.recalibrate(params, spec, BATCH)
        assert torch.equal(new["norm"]["running_mean"], params["norm"]["running_mean"]) == kept


def test_a_norm_that_computes_something_else_has_no_scale_to_score():
    spec = spec_of(norm=Shifting)
    params = random_params(spec, GENERATOR)
    with pytest.raises(ValueError, match="units of conv1, conv2, hidden pass none"):
        tfx.criteria.batchnorm_scale(params, tfx.couple(params, spec))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_leaves_the_outputs_of_what_computes_something_else(kind):
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    assert_close(tfx.apply(*tfx.fold(params, spec), BATCH[0]), tfx.apply(params, spec, BATCH[0]))


def test_folding_and_scoring_see_through_no_permutation_that_does_more():
    spec = tfx.serial(
        tfx.Input((5, 4)), a=L.Linear(4, 6), turn=Reversed((0, 2, 1)), norm=L.BatchNorm1d(6), b=L.Linear(5, 3),
    )  # fmt: skip
    params, x = random_params(spec, GENERATOR), torch.randn(7, 5, 4, dtype=torch.float64)
    assert_close(tfx.apply(*tfx.fold(params, spec), x), tfx.apply(params, spec, x))


@pytest.mark.parametrize("cut", [Last(1, 0, 2), L.Slice(1, 0, 2)])
def test_scores_are_those_of_the_network_as_it_is(cut):
    """The private copy takes no other slice earlier than the real one."""
    spec = tfx.serial(
        tfx.Input((6, 4)), a=L.Linear(4, 6), act=L.ReLU(), b=L.Linear(6, 5), cut=cut, flat=L.Flatten(),
        out=L.Linear(10, 3),
    )  # fmt: skip
    params, batch = random_params(spec, GENERATOR), (torch.randn(7, 6, 4, dtype=torch.float64), torch.arange(7) % 3)
    coupling = tfx.couple(params, spec)
    one, other = (tfx.measure(params, spec, batch, coupling, fold=fold) for fold in (True, False))
    assert_close(one.sum, other.sum)
    assert_close(one.sum_abs, other.sum_abs)

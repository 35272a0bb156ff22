"""What lives and dies together: the coupling of every construct, pinned."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS, classifier
from hypothesis import given

import taylorfx as tfx
from taylorfx import Input, Node, Spec, concat, serial
from taylorfx import layers as L
from taylorfx.coupling.expand import expand
from taylorfx.coupling.join import join
from taylorfx.network.labels import Ties
from taylorfx.testing.strategies import network

SCOPES = {
    "chain": {"0": 4, "3": 5},
    "residual stream": {"0": 4, "1.conv1": 3, "3.conv1": 3, "5.conv1": 3},
    "projection": {"0": 4, "1.0": 4},
    "dense": {"0": 4, "1.1": 2, "2.1": 3},
    "flatten": {"0": 4},
    "depthwise": {"0": 4, "1": 2, "3": 3},
    "grouped": {"1.g": 2, "1.i": 2, "1": 3, "3": 3},
    "grouped in a stream": {"1.0.g": 2, "1.0.i": 2},
    "excitation": {"0": 4, "1.gate.1": 3},
    "shared": {"0": 4},
    "group norm": {"1.g": 2, "1.c": 2},
    "instance norm": {"0": 4},
    "untracked batch norm": {"0": 4},
    "channel shuffle": {"1.g": 2, "1.c": 2},
    "shuffled groups": {"1.g": 2, "1.i": 2, "1": 2, "3": 2},
    "pixel shuffle": {"0": 4, "1": 3},
    "transposed": {"1.g": 2, "1.i": 2, "1": 3},
    "upsample": {"0": 4},
    "slices": {"0": 3, "1.conv": 5},  # the slice of one channel has to keep it
    "reshape": {"1.x4": 2, "1.x3": 2},
    "multi-head": {"embed": 4, "attn.1.attention.h": 2, "attn.1.attention.k": 2, "attn.1.attention.v": 2, "mlp.1.0": 5},
}


@pytest.mark.parametrize("name", SCOPES)
def test_every_construct_has_its_units(name):
    coupling = network(CONSTRUCTS[name]).coupling
    found = dict(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))
    assert found == SCOPES[name], str(coupling)
    assert len(coupling.names) == len(coupling) == sum(found.values())


def test_outputs_and_inputs_stay_and_say_why():
    coupling = network(CONSTRUCTS["chain"]).coupling
    assert coupling.frozen == {"5": "5 is an output of the network"}
    assert (coupling.unit_ids("0.weight", 1) == -1).all()


def test_a_flattened_map_has_one_column_per_position():
    coupling = network(CONSTRUCTS["flatten"]).coupling
    assert coupling.unit_ids("3.weight", 1).tolist() == [[u for u in range(4) for _ in range(4)]]


def test_rows_of_an_attention_head_leave_with_the_head_or_with_their_dimension():
    coupling = network(CONSTRUCTS["multi-head"]).coupling
    names = [[coupling.names[u] for u in column] for column in coupling.unit_ids("attn.1.q_proj.weight", 0).T]
    at = "attn.1.attention"
    assert names == [[f"{at}.h[{h}]", f"{at}.k[{k}]"] for h in range(2) for k in range(2)]
    assert coupling.unit_ids("attn.1.out_proj.weight", 1).shape == (2, 4)


def test_of_two_activations_that_are_contracted_with_each_other_one_carries_the_gate():
    coupling = network(CONSTRUCTS["multi-head"]).coupling
    assert [place.slot for place in coupling.reads if place.node == "attn.1.attention"] == [0]


def test_a_group_that_passes_a_grouped_convolution_is_counted_once():
    net = network(classifier(L.Conv2d(4, 4, 3, padding=1, groups=2, bias=False), L.ReLU(), channels=4))
    stats = tfx.measure(net.params, net.spec, net.batch, net.coupling)

    def loss(scale):  # of what the stem writes; the way from there to the reads is homogeneous
        rows = scale.repeat_interleave(2)
        stem = {"weight": net.params["0"]["weight"] * rows[:, None, None, None], "bias": net.params["0"]["bias"] * rows}
        output = tfx.apply({**net.params, "0": stem}, net.spec, net.batch[0])
        return torch.nn.functional.cross_entropy(output, net.batch[1], reduction="sum")

    groups = torch.tensor([net.coupling.scopes[k] == "1.g" for k in net.coupling.scope])
    torch.testing.assert_close(stats.sum[groups], torch.func.grad(loss)(torch.ones(2, dtype=torch.float64)))


def test_a_layer_norm_makes_its_units_inexact_and_a_batch_norm_does_not():
    coupling = network(CONSTRUCTS["layer norm"]).coupling
    inexact = {coupling.scopes[k] for k in coupling.scope[~coupling.exact]}
    assert inexact == {"embed"}
    assert network(CONSTRUCTS["chain"]).coupling.exact.all()
    coupling = network(CONSTRUCTS["group norm"]).coupling
    assert coupling.exact.tolist() == [True, True, False, False]


def test_a_softmax_over_channels_freezes_them_and_says_so():
    coupling = network(classifier(L.Softmax(1), channels=4)).coupling
    assert len(coupling) == 0
    assert coupling.frozen["0"] == "1: Softmax holds input 0, axis 1 rigid"
    assert "0: frozen, 1: Softmax" in str(coupling)


class Cumulative(tfx.Layer):
    """A layer of a user's who gave it no signature."""

    def apply(self, params, *inputs):
        return inputs[0].cumsum(1)


def test_a_layer_without_a_signature_runs_and_freezes_what_touches_it():
    net = network(classifier(Cumulative(), L.Conv2d(4, 3, 1), channels=3))
    assert net.coupling.scopes == ("2",)
    assert net.coupling.frozen["0"] == "1: Cumulative has no axis signature"
    stats = tfx.measure(net.params, net.spec, net.batch, net.coupling)
    assert stats.sum_abs.shape == (3,)


def test_an_axis_that_cannot_shrink_holds_the_groups_that_it_is_read_in():
    nodes = (
        Node("x", Input((2, 3, 3))),
        Node("a", L.Conv2d(2, 4, 1), ("x",)),
        Node("b", L.Conv2d(4, 6, 1, groups=2), ("a",)),
        Node("c", L.Conv2d(6, 2, 1), ("b",)),
    )
    coupling = network(Spec(nodes, ("a", "c"))).coupling
    assert coupling.scopes == ("b",), str(coupling)
    assert coupling.frozen["b.g"] == coupling.frozen["b.i"] == "a is an output of the network"


def test_adding_a_frozen_branch_freezes():
    nodes = (
        Node("x", Input((2, 4, 4))),
        Node("conv", L.Conv2d(2, 2, 1), ("x",)),
        Node("add", L.Add(), ("x", "conv")),
        Node("flat", L.Flatten(), ("add",)),
        Node("fc", L.Linear(32, 2), ("flat",)),
    )
    coupling = network(Spec(nodes)).coupling
    assert coupling.frozen["conv"] == "tied at add to an axis that cannot shrink"
    assert len(coupling) == 0


def test_reshapes_that_disagree_about_an_axis_freeze_it_rather_than_guess():
    twice = serial(L.Reshape((2, 2, 16)), L.Reshape((4, 16)), L.Reshape((4, 4, 4)))
    torn = serial(L.Conv2d(4, 6, 1), L.Reshape((4, 24)), L.Reshape((6, 4, 4)))
    assert len(network(classifier(twice, channels=4)).coupling) == 4
    coupling = network(classifier(torn, channels=6)).coupling
    assert coupling.scopes == ("0",), str(coupling)
    assert "1.0" in coupling.frozen


def test_a_unit_that_is_a_whole_axis_cannot_leave():
    coupling = network(classifier(L.Conv2d(4, 1, 1), L.ReLU(), L.Conv2d(1, 3, 1), channels=3)).coupling
    assert "1" not in coupling.scopes


def test_several_inputs_and_outputs():
    nodes = (
        Node("a", Input((2,))),
        Node("b", Input((3,))),
        Node("fa", L.Linear(2, 4), ("a",)),
        Node("fb", L.Linear(3, 4), ("b",)),
        Node("sum", L.Add(), ("fa", "fb")),
        Node("one", L.Linear(4, 2), ("sum",)),
        Node("two", L.Linear(4, 3), ("sum",)),
    )
    spec = Spec(nodes, ("one", "two"))
    net = network(spec)
    one, two = tfx.apply(net.params, spec, *net.batch[0].values())
    assert (one.shape, two.shape) == ((3, 2), (3, 3))
    assert net.coupling.scopes == ("fa",)

    def loss(outputs, targets):
        return torch.nn.functional.cross_entropy(outputs[0], targets) + outputs[1].square().mean()

    stats = tfx.measure(net.params, spec, net.batch, net.coupling, loss=loss)
    assert stats.sum_abs.shape == (4,)
    plan = tfx.select(tfx.taylor(stats, net.coupling), net.coupling, budget=0.5)
    for small, large in zip(
        tfx.apply(tfx.cut(net.params, plan), plan.spec, net.batch[0]),
        tfx.apply(net.params, spec, net.batch[0], gates=plan.gates),
        strict=True,
    ):
        torch.testing.assert_close(small, large)


def test_a_network_that_mixes_examples_is_measured_one_at_a_time():
    net = network(CONSTRUCTS["untracked batch norm"])
    assert net.coupling.mixing == ("1: BatchNorm2d mixes the examples of a batch",)
    stats = tfx.measure(net.params, net.spec, net.batch, net.coupling)
    inputs, targets = net.batch
    single = [
        tfx.measure(net.params, net.spec, ({"input": inputs["input"][k : k + 1]}, targets[k : k + 1]), net.coupling)
        for k in range(3)
    ]
    torch.testing.assert_close(stats.sum_abs, sum(single).sum_abs)


def test_equal_networks_couple_equally_whatever_the_values():
    spec = CONSTRUCTS["grouped"]
    one, two = network(spec, 0).coupling, network(spec, 1).coupling
    assert one.names == two.names
    assert all(np.array_equal(a, b) for a, b in zip(one.axes, two.axes, strict=True))


def test_half_of_the_channels_shuffled_again_leave_in_families():
    """ShuffleNet: a channel leaves with its place in the other group, twice as many with each shuffle."""
    parts = [Input((2, 3, 3)), L.Conv2d(2, 16, 1)]
    for _ in range(2):
        half = serial(L.Slice(1, 8, 16), L.Conv2d(8, 8, 1), L.ReLU())
        parts += [L.ChannelShuffle(2), concat(L.Slice(1, 0, 8), half)]
    net = network(serial(*parts, L.AdaptiveAvgPool2d(1), L.Flatten(), L.Linear(16, 2)))
    convolutions = [node.name for node in net.spec if isinstance(node.layer, L.Conv2d)]
    columns = [net.coupling.unit_ids(f"{name}.weight", 0) for name in convolutions]
    assert [len(set(column[0].tolist())) for column in columns] == [8, 4, 8], str(net.coupling)
    assert all((column >= 0).all() for column in columns)


def test_the_coupling_of_a_network_does_not_depend_on_what_was_coupled_before():
    """What is remembered between networks are values that nobody changes."""
    nets = {name: network(spec) for name, spec in CONSTRUCTS.items()}
    before = {name: str(net.coupling) for name, net in nets.items()}
    for name, net in reversed(nets.items()):
        again = tfx.couple(net.params, tfx.from_json(tfx.to_json(net.spec)))
        assert str(again) == before[name]
        assert again.parameters == net.coupling.parameters
        assert {x: bound.sizes for x, bound in again.bounds.items()} == {
            x: bound.sizes for x, bound in net.coupling.bounds.items()
        }
        assert all(np.array_equal(a, b) for a, b in zip(again.axes, net.coupling.axes, strict=True))


@given(st.lists(st.tuples(*[st.integers(0, 11)] * 3), min_size=1, max_size=8))
def test_a_product_leaves_with_any_of_its_factors_however_products_nest_or_lead_back_to_themselves(equations):
    ties = Ties(count=12, products=[tuple(np.array([label]) for label in equation) for equation in equations])
    classes = join(ties)
    factors = expand(classes)
    heads = {x: (a, b) for x, a, b in zip(*(column.tolist() for column in classes.products), strict=True)}

    def units(c: int) -> list[int]:
        return list(dict.fromkeys(u for factor in heads[c] for u in units(factor))) if c in heads else [c]

    for c in classes.of.tolist():
        assert [u for u in factors.table[:, c].tolist() if u >= 0] == units(c)
    for equation in equations:
        x, a, b = ({*units(classes.of[label])} for label in equation)
        assert x == a | b

"""Networks as values: building, comparing, printing."""

import pytest
import torch
from constructs import CONSTRUCTS

import taylorfx as tfx
from taylorfx import Input, Node, Spec, concat, inline, residual, serial
from taylorfx import layers as L
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network


def test_builders_name_parts_as_torch_names_children():
    block = residual(serial(conv1=L.Conv2d(2, 2, 1), bn1=L.BatchNorm2d(2)), serial(L.Conv2d(2, 2, 1)))
    spec = serial(L.Conv2d(1, 2, 1), block, head=concat(serial(), L.ReLU(), serial(L.Tanh())))
    names = ["0", "1.conv1", "1.bn1", "1.shortcut.0", "1.add", "head.1", "head.2.0", "head.concat"]
    assert [node.name for node in spec] == ["input", *names]
    assert spec["1.add"].inputs == ("1.bn1", "1.shortcut.0")
    assert spec["head.concat"].inputs == ("1.add", "head.1", "head.2.0")
    assert set(spec.shapes) == {"0.weight", "0.bias", "1.conv1.weight", "1.conv1.bias", "1.shortcut.0.weight",
                                "1.shortcut.0.bias", *(f"1.bn1.{x}" for x in ("weight", "bias", "running_mean",
                                "running_var", "num_batches_tracked"))}  # fmt: skip


def test_shared_parameters_stay_shared_inside_a_larger_network():
    conv = L.Conv2d(2, 2, 1)
    part = Spec((Node("x", Input()), Node("a", conv, ("x",), "tied"), Node("b", conv, ("a",), "tied")))
    spec = serial(part, part)
    assert set(spec.shapes) == {"0.tied.weight", "0.tied.bias", "1.tied.weight", "1.tied.bias"}
    single = Node("c", L.Linear(3, 5), ("x",), (("weight", "embed.weight"),))
    assert single.paths == {"weight": "embed.weight", "bias": "c.bias"}


@pytest.mark.parametrize("features", [0, -3])
def test_a_layer_of_no_size_is_refused(features):
    with pytest.raises(ValueError, match=f"needs in_features to be at least 1, not {features}"):
        serial(L.Linear(features, 4))


def test_a_tied_embedding_and_head_share_one_parameter():
    nodes = (
        Node("tokens", Input((4,))),
        Node("embed", L.Embedding(7, 3), ("tokens",)),
        Node("mix", L.Linear(3, 3), ("embed",)),
        Node("head", L.Linear(3, 7, bias=False), ("mix",), "embed"),
    )
    spec = Spec(nodes)
    assert set(spec.shapes) == {"embed.weight", "mix.weight", "mix.bias"}
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    coupling = tfx.couple(params, spec)
    assert coupling.scopes == ("embed",)  # what the embedding writes, the mix writes again, and the head reads
    plan = tfx.Plan(coupling, [True, False, True])
    tokens = torch.randint(7, (2, 4))
    torch.testing.assert_close(
        tfx.apply(tfx.cut(params, plan), plan.spec, tokens), tfx.apply(params, spec, tokens, gates=plan.gates)
    )


def test_nodes_may_come_in_any_order():
    nodes = (Node("b", L.ReLU(), ("a",)), Node("a", L.Linear(2, 2), ("x",)), Node("x", Input((2,))))
    assert [node.name for node in Spec(nodes, ("b",))] == ["x", "a", "b"]


def test_inputs_come_by_position_as_a_tuple_or_by_name():
    nodes = (Node("a", Input((2,))), Node("b", Input((2,))), Node("sum", L.Add(), ("a", "b")))
    spec, (a, b) = Spec(nodes), torch.randn(2, 3, 2)
    for given in ((a, b), ((a, b),), ({"b": b, "a": a},)):
        assert torch.equal(tfx.apply({}, spec, *given), a + b)


def test_inline_feeds_a_network_from_named_nodes():
    attention = tfx.multihead_attention(4, 2, cross=True)
    nodes = inline(attention, "cross", ("x", "memory", "memory"))
    assert nodes[-1].name == "cross.out_proj"
    assert nodes[1].inputs == ("memory",)
    with pytest.raises(tfx.SpecError, match="needs 1 inputs and one output"):
        inline(attention, "cross", ("x",))


def test_the_table_shows_shapes_parameters_and_flops():
    text = str(CONSTRUCTS["shared"]).splitlines()
    assert text[0].split() == ["name", "layer", "output", "parameters", "FLOPs"]
    assert text[3].split() == ["0", "Conv2d(2,", "4,", "3,", "padding=1)", "4x4x4", "76", "2,304"]
    assert text[6].split()[-3:] == ["4x4x4", "shared", "4,608"]
    assert text[-1].split() == ["total", "354", "11,776"]
    assert "-" in serial(L.Conv2d(1, 2, 3)).table()
    assert "2x6x6" in serial(L.Conv2d(1, 2, 3)).table((1, 8, 8))


def test_partition_separates_what_is_trained_and_combine_joins_it():
    net = network(CONSTRUCTS["chain"])
    trained, rest = tfx.partition(net.params, net.spec)
    assert set(tfx.tree.flatten(rest)) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert_trees_equal(tfx.tree.combine(trained, rest), net.params)


def test_a_plan_prints_what_was_asked_and_what_it_gives():
    net = network(CONSTRUCTS["chain"])
    scores = torch.arange(float(len(net.coupling)))
    plan = tfx.select(scores, net.coupling, budget=tfx.Parameters(0.8))
    lines = str(plan).splitlines()
    assert lines[0] == "asked for at most 80.0% of the parameters"
    assert lines[1].split() == ["before", "after", "kept"]
    assert [line.split()[0] for line in lines[3:]] == ["0", "3", "units", "parameters", "FLOPs"]
    kept = sum(
        leaf.numel() for leaf in tfx.tree.flatten(tfx.partition(tfx.cut(net.params, plan), plan.spec)[0]).values()
    )
    assert int(lines[-2].split()[2].replace(",", "")) == kept
    assert plan == tfx.Plan(net.coupling, plan.keep)
    assert hash(plan) == hash(tfx.Plan(net.coupling, plan.keep))


def test_cut_takes_any_tree_that_mirrors_the_parameters():
    net = network(CONSTRUCTS["chain"])
    plan = tfx.Plan(net.coupling, [True, False, True, True] + [True] * 5)
    momentum = tfx.partition(net.params, net.spec)[0]
    assert tfx.cut(momentum, plan)["0"]["weight"].shape == (3, 2, 3, 3)
    assert tfx.cut(momentum, plan)["5"]["bias"] is momentum["5"]["bias"]  # what loses nothing is not copied
    assert tfx.cut({"5": momentum["5"]}, plan)["5"] is momentum["5"]

"""Putting a group's channels in order changes nothing, and lets every group drop its own least."""

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from constructs import CONSTRUCTS
from hypothesis import example, given
from modules import MODULES, captured
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, serial
from taylorfx import layers as L
from taylorfx.cutting.reorder import Order
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import Network, network, networks

CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def grouped(norm: tfx.Layer) -> Spec:
    return serial(
        Input((3, 6, 6)), conv1=L.Conv2d(3, 16, 3), act1=L.SiLU(), conv2=L.Conv2d(16, 8, 3, groups=4),
        norm=norm, act2=L.SiLU(), flat=L.Flatten(), head=L.Linear(32, 5),
    )  # fmt: skip


GROUPED = grouped(L.Identity())


def shuffled(net: Network, seed: int) -> Order:
    """An order by random scores."""
    generator = torch.Generator().manual_seed(seed)
    return tfx.balance(
        net.params, net.spec, net.batch, criterion=lambda _, channels: torch.rand(len(channels), generator=generator)
    )


def contracted(equation: str, *shape: int) -> Spec:
    """Three tokens of two groups of four positions, contracted with themselves."""
    operands = equation.split("->")[0].count(",") + 1
    nodes = [
        Node("x", Input((3, 5))), Node("linear", L.Linear(5, 8), ("x",)),
        Node("apart", L.Reshape((3, 2, 4)), ("linear",)),
        Node("einsum", L.Einsum(equation), ("apart",) * operands),
        Node("flat", L.Flatten(), ("einsum",)), Node("head", L.Linear(math.prod(shape), 2), ("flat",)),
    ]  # fmt: skip
    return Spec(tuple(nodes))


def both_sums() -> Spec:
    """Sums over the groups and sums over the positions: neither may trade places."""
    nodes = contracted("btgp->btp", 3, 4).nodes[:4]
    rest = [
        Node("other", L.Einsum("btgp->btg"), ("apart",)), Node("joined", L.Concat(2), ("einsum", "other")),
        Node("flat", L.Flatten(), ("joined",)), Node("head", L.Linear(18, 2), ("flat",)),
    ]  # fmt: skip
    return Spec((*nodes, *rest))


def sliced(*cuts: tuple[int, int]) -> Spec:
    """Some positions of every group, by number, end to end."""
    nodes = contracted("btgp->btgp", 3, 2, 4).nodes[:3]
    parts = [Node(f"part{k}", L.Slice(3, *cut), ("apart",)) for k, cut in enumerate(cuts)]
    rest = [
        Node("joined", L.Concat(2), tuple(part.name for part in parts)), Node("flat", L.Flatten(), ("joined",)),
        Node("head", L.Linear(12 * len(cuts), 2), ("flat",)),
    ]  # fmt: skip
    return Spec((*nodes, *parts, *rest))


MIXER = serial(
    Input((3, 4)), channels=L.Linear(4, 5), turn=L.Permute((0, 2, 1)), tokens=L.Linear(3, 6),
    flat=L.Flatten(), head=L.Linear(30, 2),
)  # fmt: skip


# Networks, and the scopes that can be balanced; where groups and positions may trade places, the first of them.
PINNED: dict[str, tuple[Spec, set[str]]] = {
    "grouped": (GROUPED, {"conv2.i", "conv2"}),
    "normed in as many groups": (grouped(L.GroupNorm(4, 8)), {"conv2.i", "conv2"}),
    "normed in fewer groups": (grouped(L.GroupNorm(2, 8)), {"conv2.i", "conv2"}),
    "every group by itself": (contracted("btgp,btgp->btg", 3, 2), {"apart.x1"}),
    "every position by itself": (contracted("btgp->btp", 3, 4), {"apart.x2"}),
    "grouped queries": (
        CONSTRUCTS["grouped queries"], {"attn.1.attention.r", "attn.1.attention.k", "attn.1.attention.v"},
    ),
    "groups with groups": (contracted("btgp,bthp->btgh", 3, 2, 2), set()),
    "positions with positions": (contracted("btgp,btgq->btpq", 3, 4, 4), set()),
    "the same positions of all groups": (sliced((1, 3)), {"apart.x1"}),
    "one half of the positions, then the other": (sliced((0, 2), (2, 4)), set()),
    "sums of both": (both_sums(), set()),
    "channels and tokens": (MIXER, set()),
    "groups and positions summed": (contracted("btgp,btgp->bt", 3), {"apart.x2"}),
}  # fmt: skip


def pinned(law):
    for spec in [*CONSTRUCTS.values(), *(spec for spec, _ in PINNED.values())]:
        law = example(network(spec), 0)(law)
    return law


@pinned
@given(networks(), st.integers(0, 99))
def test_an_ordered_network_is_the_same_network(net: Network, seed: int):
    inputs, _ = net.batch
    whole = tfx.apply(net.params, net.spec, inputs)
    for k in range(3):
        order = shuffled(net, seed + k)
        assert_close(tfx.apply(tfx.reorder(net.params, order), net.spec, inputs), whole, **CLOSE)
        for name, table in order.ranks.items():
            assert [sorted(row) for row in table.tolist()] == [[*range(table.shape[1])]] * len(table), name


@pytest.mark.parametrize("name", PINNED)
def test_what_can_be_balanced(name: str):
    spec, scopes = PINNED[name]
    assert {*shuffled(network(spec), 0).ranks} == scopes


@pytest.mark.parametrize("name", MODULES)
def test_an_ordered_module_is_the_same_module(name: str):
    _, x, params, spec = captured(name)
    net = Network(spec, params, (x, torch.zeros(3, dtype=torch.long)), tfx.couple(params, spec))
    order = shuffled(net, 1)
    moved = tfx.apply(tfx.reorder(params, order), spec, x)
    assert_close(moved, tfx.apply(params, spec, x), **CLOSE)


@given(networks(), st.integers(0, 99))
@example(network(GROUPED), 0)
def test_gradients_are_ordered_like_their_parameters(net: Network, seed: int):
    def loss(params):
        return F.cross_entropy(tfx.apply(tfx.tree.combine(params, rest), net.spec, net.batch[0]), net.batch[1])

    learned, rest = tfx.partition(net.params, net.spec)
    order = shuffled(net, seed)
    gradient = torch.func.grad(loss)(learned)
    learned, rest = tfx.partition(tfx.reorder(net.params, order), net.spec)
    assert_trees_equal(torch.func.grad(loss)(learned), tfx.reorder(gradient, order), rtol=1e-9, atol=1e-11)


@given(st.integers(0, 2**16), st.sampled_from([tfx.fisher, tfx.taylor]))
def test_every_group_loses_its_own_least(seed: int, criterion):
    """Against autograd on torch's own functions, at the channels that the second convolution of `GROUPED` reads."""
    net = network(GROUPED, seed)
    moved = tfx.reorder(net.params, tfx.balance(net.params, net.spec, net.batch, criterion=criterion))
    inputs, targets = net.batch

    def scores(params):
        """Of four channels in each of four groups."""
        p = tfx.tree.flatten(params)
        gates = torch.ones(len(targets), 16, 1, 1, dtype=torch.float64, requires_grad=True)
        x = F.silu(F.conv2d(inputs["input"], p["conv1.weight"], p["conv1.bias"])) * gates
        x = F.silu(F.conv2d(x, p["conv2.weight"], p["conv2.bias"], groups=4)).flatten(1)
        loss = F.cross_entropy(F.linear(x, p["head.weight"], p["head.bias"]), targets, reduction="sum")
        (grad,) = torch.autograd.grad(loss, gates)
        return (grad.abs() if criterion is tfx.taylor else grad.square()).sum(0).reshape(4, 4)

    assert_close(scores(moved), scores(net.params).sort(dim=1, descending=True).values, **CLOSE)
    # So any number of positions, the last of them, costs no more than the same number of any one choice for all groups.
    last, alike = scores(moved).sum(0).flip(0).cumsum(0), scores(net.params).sum(0).sort().values.cumsum(0)
    assert (last <= alike + 1e-9).all()


def test_heads_have_their_own_least_last():
    """Dimensions of values are scored where they are read, those of queries and keys where they are made."""
    net = network(CONSTRUCTS["multi-head"], 1)
    moved = tfx.tree.flatten(tfx.reorder(net.params, tfx.balance(net.params, net.spec, net.batch)))
    order = tfx.balance(tfx.tree.unflatten(moved), net.spec, net.batch)
    assert order.ranks.keys() == {"attn.1.attention.k", "attn.1.attention.v"}
    for name, table in order.ranks.items():
        assert table.tolist() == [[0, 1], [0, 1]], f"{name} is in order after it was put in order"


def test_what_is_no_parameter_is_listed():
    net = network(GROUPED)
    tree = {"conv1": {"weight": torch.zeros(2)}, "other": {"bias": torch.zeros(1)}}
    with pytest.raises(tfx.PlanError, match=r"(?s)order.*conv1\.weight: expected \(16, 3, 3, 3\).*other\.bias"):
        tfx.reorder(tree, shuffled(net, 0))

"""Rows of embeddings leave exactly, with the outputs that stand for them, or are refused by what holds them."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import keep_rows

WORDS = 9
SEEDS = st.integers(0, 2**16)
KEPT = st.sets(st.integers(0, WORDS - 1), min_size=1)


def network(*, tied=False, bias=True, head=True, padding=None):
    """Words to scores of words."""
    nodes = [
        tfx.Node("words", L.Input((4,), dtype="int64")),
        tfx.Node("embed", L.Embedding(WORDS, 6, padding), "words"),
        tfx.Node("inner", L.Linear(6, 6), "embed"),
        tfx.Node("act", L.ReLU(), "inner"),
    ]
    if head:
        nodes.append(tfx.Node("head", L.Linear(6, WORDS, bias and not tied), "act", "embed" if tied else ""))
    return tfx.Spec(tuple(nodes))


def whole_numbers(spec, seed):
    """Parameters in whole numbers, with which sums are exact in any order."""
    generator = torch.Generator().manual_seed(seed)
    params = tfx.init(spec, generator)
    return tfx.tree.map_paths(lambda _, x: torch.randint(-4, 5, x.shape, generator=generator).double(), params)


@given(st.booleans(), st.booleans(), st.booleans(), KEPT, SEEDS)
@example(True, False, True, {0, 3}, 0)
@example(False, True, True, {*range(WORDS)}, 0)
def test_kept_outputs_of_inputs_that_are_numbered_anew_are_those_of_before(tied, bias, head, kept, seed):
    spec = network(tied=tied, bias=bias, head=head)
    params = whole_numbers(spec, seed)
    rows = keep_rows(params, spec, kept, inputs="words")
    stay = torch.tensor(sorted(kept))
    assert rows.numbers[stay].tolist() == [*range(len(kept))]
    assert int((rows.numbers < 0).sum()) == WORDS - len(kept)
    words = stay[torch.randint(len(stay), (3, 4), generator=torch.Generator().manual_seed(seed))]
    expected = tfx.apply(params, spec, words)
    received = tfx.apply(rows.params, rows.spec, rows.numbers[words])
    assert torch.equal(received, expected[..., stay] if head else expected)

    assert rows.spec["embed"].layer.num_embeddings == len(kept)
    assert [node.name for node in rows.spec] == [node.name for node in spec]
    leaves = tfx.tree.flatten(rows.params)
    assert leaves.keys() == tfx.tree.flatten(params).keys(), "tied is tied"
    momentum = tfx.cut(tfx.tree.map_paths(lambda _, x: 2 * x, params), rows.plan)
    assert all(torch.equal(x, 2 * leaves[path]) for path, x in tfx.tree.flatten(momentum).items())


def test_a_network_with_fewer_rows_is_pruned_like_any_other():
    spec = network(tied=True)
    params = tfx.init(spec, torch.Generator().manual_seed(0))
    rows = keep_rows(params, spec, [5, 1, 2], inputs="words")
    coupling = tfx.couple(rows.params, rows.spec)
    assert rows.numbers[[1, 2, 5]].tolist() == [0, 1, 2], "in the order of the table"
    assert set(coupling.scopes) == set(tfx.couple(params, spec).scopes)
    plan = tfx.select(tfx.criteria.weight_l2(rows.params, coupling), coupling, budget=tfx.Units(len(coupling) - 2))
    assert tfx.apply(tfx.cut(rows.params, plan), plan.spec, torch.tensor([[0, 1, 2, 2]])).shape == (1, 4, 3)


@pytest.mark.parametrize(("padding", "kept", "expected"), [(None, [1, 4], None), (4, [1, 4], 1), (0, [1, 4], None)])
def test_the_row_that_is_not_trained_has_its_new_number(padding, kept, expected):
    spec = network(padding=padding)
    rows = keep_rows(tfx.init(spec, torch.Generator()), spec, kept, inputs="words")
    assert rows.spec["embed"].layer.padding_idx == expected


class Masked(nn.Module):
    """It looks for the number 1, as RoBERTa does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)

    def forward(self, words):
        words = words.view(-1, words.shape[-1])
        return self.embed(words) * (words != 1)[..., None]


def test_what_looks_at_the_numbers_is_refused_by_name_unless_they_stay():
    module = Masked().eval()
    words = torch.tensor([[1, 3, 0, 1], [0, 1, 3, 3]])
    params, spec = tfx.from_torch(module, words)
    with pytest.raises(tfx.PlanError, match=r"others do: ne \(Elementwise"):
        keep_rows(params, spec, [1, 3], inputs="words")
    rows = keep_rows(params, spec, [0, 1, 3], inputs="words")
    assert_close(tfx.apply(rows.params, rows.spec, rows.numbers[words]), module(words))


class Placed(nn.Module):
    """It adds positions, which follow from the shape of the numbers."""

    def __init__(self):
        super().__init__()
        self.embed, self.places = nn.Embedding(WORDS, 6), nn.Embedding(12, 6)

    def forward(self, words):
        return self.embed(words) + self.places(torch.arange(words.shape[1], device=words.device))


def test_a_table_of_positions_stays():
    module, words = Placed().eval(), torch.tensor([[1, 3, 0, 1], [0, 1, 3, 3]])
    params, spec = tfx.from_torch(module, words)
    rows = keep_rows(params, spec, [0, 1, 3], inputs="words")
    assert torch.equal(rows.params["places"]["weight"], module.places.weight)
    assert_close(tfx.apply(rows.params, rows.spec, rows.numbers[words]), module(words))


def test_what_depends_on_how_many_rows_there_are_is_refused_by_name():
    spec = tfx.serial(tfx.Input((4,), dtype="int64"), embed=L.Embedding(5, 6), head=L.Linear(6, 5), end=L.Softmax(-1))
    params = tfx.init(spec, torch.Generator())
    with pytest.raises(tfx.PlanError, match=r"held are those of the output end.*Softmax"):
        keep_rows(params, spec, [0, 1], inputs="input")


@pytest.mark.parametrize(
    ("kept", "options", "words"),
    [
        ([0, WORDS], {}, "from 0 to 8; received: outside are 9"),
        ([], {}, "none, or some twice"),
        ([2, 2], {}, "none, or some twice"),
        ([0], {"inputs": "tokens"}, "inputs of the network, words; received tokens"),
        ([0], {"outputs": ["logits"]}, "outputs of the network are head; received logits"),
    ],
)
def test_errors_say_what_to_do(kept, options, words):
    spec = network()
    with pytest.raises(ValueError, match=words):
        keep_rows(tfx.init(spec, torch.Generator()), spec, kept, **{"inputs": "words", **options})


def test_inputs_that_pick_from_no_table_are_refused():
    spec = tfx.serial(tfx.Input((4,)), head=L.Linear(4, 5))
    with pytest.raises(ValueError, match="tables of one length; received none"):
        keep_rows(tfx.init(spec, torch.Generator()), spec, [0], inputs="input")

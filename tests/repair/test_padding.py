"""Padding: repairs that are told which positions count are those of the sequences without it."""

from functools import partial

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import nn

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.testing.laws import assert_trees_equal

LENGTH, WIDTH = 6, 4


class Encoder(nn.Module):
    """Layers at every position, a convolution's among them, attention that is masked, and layers of what is pooled."""

    def __init__(self, convolution: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 8), nn.Linear(8, 6)
        self.third = nn.Conv1d(6, 7, 1) if convolution else nn.Linear(6, 7)
        self.query, self.key = nn.Linear(7, 5), nn.Linear(7, 5)
        self.pooled, self.head = nn.Linear(7, 6), nn.Linear(6, 3)

    def forward(self, x, attention_mask):
        flat = torch.tanh(self.first(x).reshape(-1, 8))
        x = torch.tanh(self.second(flat)).reshape(x.shape[0], -1, 6)
        if isinstance(self.third, nn.Conv1d):
            x = torch.tanh(self.third(x.transpose(1, 2))).transpose(1, 2)
        else:
            x = torch.tanh(self.third(x))
        scores = self.query(x) @ self.key(x).transpose(1, 2)
        x = torch.softmax(scores + (1 - attention_mask[:, None]) * -1e9, -1) @ x
        return self.head(torch.tanh(self.pooled((x * attention_mask[..., None]).sum(1))))


REPAIRS = {"reconstruct": partial(tfx.reconstruct, ridge=0.1), "compensate": tfx.compensate}


@pytest.fixture(scope="module", params=REPAIRS)
def repaired(request):
    """A repair, and a network with a plan; of a convolution, `compensate` takes all positions."""
    torch.manual_seed(0)
    example = padded([3, 2, 5], 0)
    params, spec = tfx.from_torch(Encoder(request.param == "reconstruct").double(), example)
    coupling = tfx.couple(params, spec)
    return partial(REPAIRS[request.param], params, tfx.Plan(coupling, coupling.index % 3 > 0))


def padded(lengths, seed):
    """Sequences of these lengths, on the left or right of what is no sequence."""
    generator = np.random.default_rng(seed)
    x = torch.from_numpy(generator.normal(size=(len(lengths), LENGTH, WIDTH)))
    mask = torch.zeros(len(lengths), LENGTH, dtype=torch.double)
    for row, length in zip(mask, lengths, strict=True):
        row[slice(0, length) if generator.random() < 0.5 else slice(LENGTH - length, None)] = 1
    return {"x": x, "attention_mask": mask}


def one_by_one(inputs):
    """The sequences alone."""
    for x, mask in zip(inputs["x"], inputs["attention_mask"] > 0, strict=True):
        yield {"x": x[mask][None], "attention_mask": torch.ones(1, int(mask.sum()), dtype=torch.double)}, None


@given(lengths=st.lists(st.integers(1, LENGTH), min_size=2, max_size=5), seed=st.integers(0, 2**16))
def test_repairs_of_padded_sequences_are_those_of_the_sequences_one_by_one(repaired, lengths, seed):
    inputs = padded(lengths, seed)
    left_out = repaired((inputs, None), positions=huggingface.attended)
    alone = repaired([*one_by_one(inputs)])
    assert left_out[1] == alone[1]
    assert_trees_equal(left_out[0], alone[0], rtol=1e-6, atol=1e-8)
    if min(lengths) < LENGTH:
        other = {**inputs, "x": inputs["x"] + 5 * (1 - inputs["attention_mask"])[..., None]}
        again = repaired((other, None), positions=huggingface.attended)
        assert_trees_equal(left_out[0], again[0], rtol=1e-6, atol=1e-8)
        counted = repaired((other, None))
        assert not torch.equal(counted[0]["second"]["bias"], left_out[0]["second"]["bias"]), "padding counts otherwise"


def test_without_a_mask_all_positions_count(repaired):
    inputs = padded([LENGTH] * 3, 0)
    whole = repaired((inputs, None))
    for positions in (huggingface.attended, lambda _: None):
        assert_trees_equal(repaired((inputs, None), positions=positions)[0], whole[0])
    assert huggingface.attended(inputs["x"]) is None


def test_what_is_no_mask_is_refused(repaired):
    inputs = padded([3, 4], 0)
    for positions in (lambda x: x["attention_mask"] * -1e9, lambda x: x["attention_mask"][0], lambda _: [1, 0]):
        with pytest.raises(ValueError, match=r"a mask \(N, T\).*received"):
            repaired((inputs, None), positions=positions)
    nothing = {**inputs, "attention_mask": torch.zeros(2, LENGTH, dtype=torch.double)}
    with pytest.raises(ValueError, match="none with a position that counts"):
        repaired((nothing, None), positions=huggingface.attended)

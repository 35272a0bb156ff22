"""Losses of language models, against those of the library and of torch."""

import importlib.util
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from taylorfx.interop import huggingface

pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

SEEDS = st.integers(0, 2**16)


def drawn(seed, count=3, length=5, vocabulary=7):
    """Scores and labels, of which some do not count."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, length, vocabulary, generator=generator, dtype=torch.float64)
    labels = torch.randint(vocabulary, (count, length), generator=generator)
    return scores, torch.where(torch.rand(count, length, generator=generator) < 0.3, -100, labels)


@given(SEEDS)
def test_of_one_example_the_loss_is_that_of_the_library(seed):
    from transformers.loss.loss_utils import ForCausalLMLoss

    scores, labels = drawn(seed)
    losses = huggingface.next_token({"logits": scores}, labels)
    for k in range(3):
        if (labels[k, 1:] != -100).any():
            expected = ForCausalLMLoss(scores[k : k + 1].double(), labels[k : k + 1], 7)
            assert_close(losses[k].float(), expected.float())
        else:
            assert losses[k] == 0


@given(SEEDS)
def test_perplexity_is_that_of_all_tokens_that_count(seed):
    scores, labels = drawn(seed)
    if not (labels[:, 1:] != -100).any():
        return
    batches = [({"k": torch.tensor([k])}, labels[k : k + 1]) for k in range(3)]
    expected = math.exp(F.cross_entropy(scores[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item())
    assert huggingface.perplexity(lambda k: scores[k], batches) == pytest.approx(expected)


@given(SEEDS)
def test_distillation_is_the_divergence_and_zero_at_the_teacher(seed):
    (one, _), (other, _) = drawn(seed), drawn(seed + 1)
    expected = F.kl_div(one.log_softmax(-1), other.softmax(-1), reduction="none").sum(-1).mean(1)
    assert_close(huggingface.distillation(one, {"logits": other}), expected)
    assert_close(huggingface.distillation(one, one), torch.zeros(3, dtype=torch.float64))


def test_outputs_without_scores_are_refused():
    with pytest.raises(ValueError, match="received a dict of hidden"):
        huggingface.next_token({"hidden": torch.ones(1, 2, 3)}, torch.zeros(1, 2, dtype=torch.long))

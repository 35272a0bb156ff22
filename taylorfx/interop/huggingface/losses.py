"""Losses of language models for `taylorfx.measure`, `taylorfx.prune` and training: by labels, or by another network."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["distillation", "next_token", "perplexity"]

IGNORED = -100
"""The label that transformers gives to positions that do not count, as padding."""


def next_token(outputs: Any, labels: Tensor, *, reduction: str = "mean") -> Tensor:
    """The cross entropy of each position's scores with the label of the next one, the mean of each example, ``(N,)``.

    Of a batch of one it is the ``loss`` that models of transformers return for ``labels=``. `joint` weighs first
    against second derivatives, which are in proportion for the logarithm of a probability: that of an example is the
    sum. A mean makes the second as many times too small as there are tokens.

    Args:
        outputs: scores ``(N, T, vocabulary)``, or a dict that has them as ``"logits"``.
        labels: ``(N, T)``: the tokens themselves, with -100 where one does not count. The shift is made here.
        reduction: ``"mean"`` or ``"sum"``, over the tokens of an example that count.

    Raises:
        ValueError: for another reduction.

    >>> scores = torch.zeros(1, 4, 4)  # nothing is known of four tokens
    >>> labels = torch.tensor([[2, 0, 1, -100]])
    >>> next_token(scores, labels), next_token(scores, labels, reduction="sum")
    (tensor([1.3863]), tensor([2.7726]))
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f'The losses of an example\'s tokens are added up, "sum", or "mean"; received {reduction!r}.')
    scores = logits_of(outputs)
    nats = F.cross_entropy(scores[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=IGNORED, reduction="none")
    counted = (labels[:, 1:] != IGNORED).sum(1)
    return nats.sum(1) if reduction == "sum" else nats.sum(1) / counted.clamp(min=1)


def distillation(outputs: Any, targets: Any) -> Tensor:
    """How far the distributions of a network are from those of another, the mean over positions of each, ``(N,)``.

    It is the Kullback-Leibler divergence of the softmax of ``outputs`` from that of ``targets`` in nats (Hinton et al.
    2015, arXiv 1503.02531, at temperature 1). At the other network's own outputs it is zero, and so are its
    derivatives: it trains a smaller network, and does not score the one that gave the targets.

    Args:
        outputs: scores ``(N, ..., classes)``, or a dict that has them as ``"logits"``.
        targets: the same of the other network.

    >>> distillation(torch.zeros(1, 2), torch.tensor([[0.0, 1e9]]))
    tensor([0.6931])
    """
    student, teacher = (F.log_softmax(logits_of(x), -1) for x in (outputs, targets))
    each = (teacher.exp() * (teacher - student)).sum(-1)
    return each.flatten(1).mean(1) if each.ndim > 1 else each


@torch.no_grad()
def perplexity(network: Callable[..., Any], batches: Iterable[tuple[Mapping[str, Tensor], Tensor]]) -> float:
    """The exponential of the mean cross entropy of all tokens that count.

    Args:
        network: called with the tensors of a batch by name: a model, or what `taylorfx.to_torch` gives.
        batches: pairs of inputs by name and labels, as of `next_token`.
    """
    nats, tokens = 0.0, 0
    for inputs, labels in batches:
        counted = (labels[:, 1:] != IGNORED).sum(1)
        nats += float((next_token(network(**inputs), labels).double() * counted).sum())
        tokens += int(counted.sum())
    return math.exp(nats / tokens) if tokens else math.nan


def logits_of(outputs: Any) -> Tensor:
    """The scores among a network's outputs.

    Raises:
        ValueError: if there are none.
    """
    scores = outputs.get("logits") if isinstance(outputs, Mapping) else outputs
    if not isinstance(scores, Tensor) or scores.ndim < 2:
        received = f"a dict of {', '.join(outputs)}" if isinstance(outputs, Mapping) else f"{type(outputs).__name__}"
        raise ValueError(
            f"Scores are a tensor of two axes or more, or the entry 'logits' of a dict; received {received}."
        )
    return scores

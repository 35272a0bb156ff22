"""Mixtures of experts: at every position a router chooses a few of many linear maps (Shazeer et al. 2017, 1701.06538).

Here are three experts, of which two are chosen at each of two positions:

    logits       2.0  0.5  1.0      the router's, one row per position
                 0.1  0.7  0.3
    ones         1    1    1        which experts may be chosen
                 1    1    1
    chosen       0  2
                 1  2
    weights      0.63  0.23         of `TopKWeights`: the largest numbers of the softmax over all three
                 0.45  0.30

An expert leaves with its row of the router and with its matrices. Its gate does not multiply a logit: a logit of zero
is not small. It multiplies the *ones*, which multiply the exponentials of the softmax, so that a gate ``m`` adds
``log m`` to the logit. At one this is the network; at zero the logit is minus infinity, and the router chooses among
the others, just as the router without this expert. The derivative at one is that of the loss by the logit.

Which experts are chosen is no value of the network: numbers of experts would be others when some leave. Each layer
finds them from the ones and the logits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import vectorized
from taylorfx.layers.base import Layer, Leaves, Shape, names, uniform
from taylorfx.layers.roles import Experts, Role

__all__ = ["ExpertLinear", "Ones", "TopKWeights"]


@dataclass(frozen=True)
class Ones(Layer):
    """As many ones as the input has numbers: before a router, which experts may be chosen.

    Whatever consumes them carries the gates of their positions.
    """

    def signature(self, *shapes: Shape) -> str:
        letters = " ".join(names(len(shapes[0])))
        return f"{letters} -> {letters}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.ones_like(inputs[0])


@dataclass(frozen=True)
class TopKWeights(Layer):
    """The ``top_k`` largest numbers of a softmax over the last axis: of ones and logits ``(..., e)``, ``(..., top_k)``.

    The ones multiply the exponentials; of other numbers, the magnitudes do. Where fewer than ``top_k`` experts are
    left, the rest of the weights are zero.

    >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.1, 0.7, 0.3]])
    >>> TopKWeights(2).apply({}, torch.ones(2, 3), logits)
    tensor([[0.6285, 0.2312],
            [0.4506, 0.3021]])
    >>> TopKWeights(2).apply({}, torch.tensor([[0.0, 1.0, 1.0]]), logits[:1])  # without the first expert
    tensor([[0.6225, 0.3775]])
    """

    top_k: int

    def signature(self, *shapes: Shape) -> str:
        return "... e, ... e -> ... K"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {"K": self.top_k}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        weights, _ = _chosen(*inputs, top_k=self.top_k)
        return F.pad(weights, (0, self.top_k - weights.shape[-1]))


def _chosen(ones: Tensor, logits: Tensor, *, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest weights and the numbers of their experts, ``top_k`` of them if there are as many.

    The softmax subtracts the largest logit of those that may be chosen: an expert that may not be could have one
    beside which all others vanish. Its own exponential is kept finite, since it is multiplied by zero.
    """
    most = math.log(torch.finfo(logits.dtype).max) - 1
    largest = logits.detach().masked_fill(ones.detach() == 0, -math.inf).amax(-1, keepdim=True)
    magnitudes = ones.where(ones >= 0, -ones)  # whose derivative at zero is that from above
    parts = magnitudes * (logits - largest).clamp(max=most).exp()
    total = parts.sum(-1, keepdim=True)
    weights, experts = (parts / total.where(total > 0, 1)).topk(min(top_k, logits.shape[-1]), -1)
    return weights, experts


@dataclass(frozen=True)
class ExpertLinear(Layer):
    """A linear map for every expert, without bias; each position goes through the ``top_k`` that are chosen there.

    The inputs, in this order::

        ones      (..., num_experts), as for `TopKWeights`
        logits    (..., num_experts)
        x         (..., top_k, in_features): what is given to each of the chosen experts

    The output is ``(..., top_k, out_features)``, in the order of `TopKWeights`. An expert that is chosen nowhere
    computes nothing. Where fewer than ``top_k`` experts are left, the rest of the rows are zero.
    """

    num_experts: int
    in_features: int
    out_features: int
    top_k: int

    multiplies: ClassVar[tuple[str, ...]] = ("... K o i",)

    def signature(self, *shapes: Shape) -> str:
        return "... e, ... e, ... K i, weight: e o i -> ... K o"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_experts": "e", "in_features": "i", "out_features": "o", "top_k": "K"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, weight, numbers = inputs[2], params["weight"], self._numbers(*inputs)
        if torch.compiler.is_compiling() or weight.is_meta or any(map(vectorized, inputs)):
            # How many positions an expert has is not known: a matrix for every position.
            y = (weight[numbers.clamp(min=0)] @ x.unsqueeze(-1)).squeeze(-1)
            return y.masked_fill((numbers < 0).unsqueeze(-1), 0)
        order = numbers.flatten().argsort()
        counts = (numbers.flatten() + 1).bincount(minlength=self.num_experts + 1).tolist()
        none, *parts = torch.split(x.flatten(0, -2)[order], counts)
        rows = [F.linear(part, one) for part, one in zip(parts, weight, strict=True)]
        y = torch.cat([none.new_zeros(len(none), self.out_features), *rows])
        return torch.unflatten(y[order.argsort()], 0, numbers.shape)

    def roles(self) -> tuple[Role, ...]:
        return (Experts("e", self._numbers),)

    def _numbers(self, *inputs: Tensor) -> Tensor:
        """The number of the expert of each row, ``(..., top_k)``; -1 for none, whose weight is zero."""
        weights, experts = _chosen(*inputs[:2], top_k=self.top_k)
        return F.pad(experts.masked_fill(weights == 0, -1), (0, self.top_k - experts.shape[-1]), value=-1)

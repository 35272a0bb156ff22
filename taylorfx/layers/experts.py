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
is not small. It multiplies the *ones*, and these the expert's number ``p`` of the softmax, of which the others get the
rest: a gate ``m`` adds ``log(m (1 - p) / (1 - m p))`` to the logit. At one this is the network; at zero the logit is
minus infinity, and the router chooses among the others, just as the router without this expert. The derivative at one
is that of the loss by the logit, divided by ``1 - p``. By the logit alone, an expert that gets a whole position would
seem to matter least, as its number of the softmax hardly changes.

Other routers have sigmoids instead of the softmax, and choose by these and a bias that the weights do not get
(DeepSeek-V3, 2412.19437, eq. 16). There a gate multiplies the sigmoid, in the same way; at zero the expert is not
chosen, whatever its bias.

Which experts are chosen is no value of the network: numbers of experts would be others when some leave. Each layer
finds them from the ones and the logits, and from the bias where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import vectorized
from taylorfx.layers.base import Layer, Leaves, Shape, names, uniform
from taylorfx.layers.roles import Experts, Role

__all__ = ["ExpertBias", "ExpertLinear", "Ones", "TopKWeights"]

Score = Literal["softmax", "sigmoid"]
"""What a router makes of its logits."""


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

    The ones multiply these numbers, and the others of the softmax share the rest; of other numbers, the magnitudes do.
    Where fewer than ``top_k`` experts are left, the rest of the weights are zero. A third input ``(e,)`` is added where
    experts are chosen, and not to their weights.

    Attributes:
        score: ``"sigmoid"`` of every logit in place of the softmax of all.

    >>> logits = torch.tensor([[2.0, 0.5, 1.0], [0.1, 0.7, 0.3]])
    >>> TopKWeights(2).apply({}, torch.ones(2, 3), logits)
    tensor([[0.6285, 0.2312],
            [0.4506, 0.3021]])
    >>> TopKWeights(2).apply({}, torch.tensor([[0.0, 1.0, 1.0]]), logits[:1])  # without the first expert
    tensor([[0.6225, 0.3775]])
    """

    top_k: int
    score: Score = "softmax"

    def signature(self, *shapes: Shape) -> str:
        return f"... e, ... e{', e' * (len(shapes) > 2)} -> ... K"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {"K": self.top_k}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        weights, _ = _chosen(*inputs, top_k=self.top_k, score=self.score)
        return F.pad(weights, (0, self.top_k - weights.shape[-1]))


def _chosen(
    ones: Tensor, logits: Tensor, bias: Tensor | None = None, *, top_k: int, score: Score
) -> tuple[Tensor, Tensor]:
    """The weights of the best experts and their numbers, ``top_k`` of them if there are as many."""
    magnitudes = ones.where(ones >= 0, -ones)  # whose derivative at zero is that from above
    scores = _softmax(magnitudes, logits) if score == "softmax" else magnitudes * logits.sigmoid()
    rank = (scores if bias is None else scores + bias).detach().masked_fill(ones.detach() == 0, -math.inf)
    experts = rank.topk(min(top_k, logits.shape[-1]), -1)[1]
    return scores.gather(-1, experts), experts


LEAST = 1e-6
"""What others have of a softmax at least, as a share of what an expert has, where its gate is not one."""


def _softmax(magnitudes: Tensor, logits: Tensor) -> Tensor:
    """The softmax with each number multiplied by its magnitude, of which the others share what it loses.

    The largest logit of those that may be chosen is subtracted: an expert that may not be could have one beside which
    all others vanish. Its own exponential is kept finite, since it is multiplied by zero.
    """
    most = math.log(torch.finfo(logits.dtype).max) - 1
    largest = logits.detach().masked_fill(magnitudes.detach() == 0, -math.inf).amax(-1, keepdim=True)
    own = (logits - largest).clamp(max=most).exp()
    parts = magnitudes * own
    rest = torch.maximum(parts.sum(-1, keepdim=True) - parts, LEAST * own)
    parts = parts * (rest / (rest + (1 - magnitudes) * own))  # a factor of one where the magnitude is
    total = parts.sum(-1, keepdim=True)
    return parts / total.where(total > 0, 1)


@dataclass(frozen=True)
class ExpertLinear(Layer):
    """A linear map for every expert, without bias; each position goes through the ``top_k`` that are chosen there.

    The inputs, in this order::

        ones      (..., num_experts), as for `TopKWeights`
        logits    (..., num_experts)
        x         (..., top_k, in_features): what is given to each of the chosen experts
        bias      (num_experts,), of the router, as for `TopKWeights`; may be missing

    The output is ``(..., top_k, out_features)``, in the order of `TopKWeights`. An expert that is chosen nowhere
    computes nothing. Where fewer than ``top_k`` experts are left, the rest of the rows are zero.

    Attributes:
        score: as for `TopKWeights`.
        transposed: matrices lie as ``(in_features, out_features)``.
    """

    num_experts: int
    in_features: int
    out_features: int
    top_k: int
    score: Score = "softmax"
    transposed: bool = False

    multiplies: ClassVar[tuple[str, ...]] = ("... K o i",)

    def signature(self, *shapes: Shape) -> str:
        bias, matrix = ", e" * (len(shapes) > 3), "i o" if self.transposed else "o i"
        return f"... e, ... e, ... K i{bias}, weight: e {matrix} -> ... K o"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_experts": "e", "in_features": "i", "out_features": "o", "top_k": "K"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, numbers = inputs[2], self._numbers(*inputs)
        weight = params["weight"].mT if self.transposed else params["weight"]
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
        return (Experts("e", self._numbers, slot=2, transposed=self.transposed),)

    def _numbers(self, *inputs: Tensor) -> Tensor:
        return _numbers(*inputs[:2], *inputs[3:], top_k=self.top_k, score=self.score)


@dataclass(frozen=True)
class ExpertBias(Layer):
    """A vector for every expert, ``(..., top_k, out_features)``: at each position those of the chosen ones.

    The inputs are those of `TopKWeights`: ones, logits, and the router's bias where it has one. Where fewer than
    ``top_k`` experts are left, the rest of the rows are zero.
    """

    num_experts: int
    out_features: int
    top_k: int
    score: Score = "softmax"

    def signature(self, *shapes: Shape) -> str:
        return f"... e, ... e{', e' * (len(shapes) > 2)}, bias: e o -> ... K o"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_experts": "e", "out_features": "o", "top_k": "K"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        return {"bias": torch.zeros(self.num_experts, self.out_features)}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        numbers = _numbers(*inputs, top_k=self.top_k, score=self.score)
        return params["bias"][numbers.clamp(min=0)].masked_fill((numbers < 0).unsqueeze(-1), 0)


def _numbers(*inputs: Tensor, top_k: int, score: Score) -> Tensor:
    """The number of the expert of each row, ``(..., top_k)``; -1 for none, whose weight is zero."""
    weights, experts = _chosen(*inputs, top_k=top_k, score=score)
    return F.pad(experts.masked_fill(weights == 0, -1), (0, top_k - experts.shape[-1]), value=-1)

"""Linear maps, lookup tables and free-standing parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, as_tuple, known_dtype, names, uniform
from taylorfx.layers.roles import Constant, Memory, Mixing, Role

__all__ = ["Buffer", "Embedding", "Linear", "Parameter"]


@dataclass(frozen=True)
class Linear(Layer):
    """``torch.nn.Linear``: ``(N, ..., in_features)`` to ``(N, ..., out_features)``."""

    in_features: int
    out_features: int
    bias: bool = True

    multiplies: ClassVar[tuple[str, ...]] = ("... o i",)

    def signature(self, *shapes: Shape) -> str:
        return f"... i, weight: o i{', bias: o' if self.bias else ''} -> ... o"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"in_features": "i", "out_features": "o"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.in_features)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        # One product for all positions: of axes that cannot be joined torch makes a batch of them, and a copy of the
        # weight for each of the batch.
        x = inputs[0] if inputs[0].ndim < 3 else inputs[0].contiguous()
        return F.linear(x, params["weight"], params["bias"] if self.bias else None)

    def roles(self) -> tuple[Role, ...]:
        return Mixing(self), Memory(keeps_input=False, new_gradient=True)


@dataclass(frozen=True)
class Embedding(Layer):
    """``torch.nn.Embedding``: integers ``(N, ...)`` to ``(N, ..., embedding_dim)``.

    Row ``padding_idx``, if any, is not trained.
    """

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None = None

    def signature(self, *shapes: Shape) -> str:
        return "..., weight: V e -> ... e"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_embeddings": "V", "embedding_dim": "e"}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        shape = (self.num_embeddings, self.embedding_dim)
        weight = torch.empty(shape, device=generator.device).normal_(generator=generator)
        if self.padding_idx is not None:
            weight[self.padding_idx] = 0
        return {"weight": weight}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        try:
            return F.embedding(inputs[0], params["weight"], self.padding_idx)
        except IndexError as error:
            raise ValueError(
                f"Embedding picks rows by numbers from 0 to {self.num_embeddings - 1:,}; some of the "
                f"{tuple(inputs[0].shape)} lie outside: a sequence longer than the positions, or a token that the "
                "vocabulary does not have"
            ) from error


@dataclass(frozen=True)
class Parameter(Layer):
    """A tensor of its own: a class token, a position embedding, a layer scale.

    Without an input it is the tensor itself, ``shape``, to be broadcast. With one input it is repeated for each of
    that input's examples: ``(N, *shape)``. It starts as ``fill`` plus normal noise of standard deviation ``std``.
    """

    shape: Shape | int
    fill: float = 0.0
    std: float = 0.0
    expand: bool = False

    leaf: ClassVar[bool] = True

    def __post_init__(self) -> None:
        as_tuple(self, 1 if isinstance(self.shape, int) else len(self.shape), "shape")

    def _letters(self) -> str:
        return " ".join(names(len(self._shape)))

    @property
    def _shape(self) -> Shape:
        assert isinstance(self.shape, tuple)
        return self.shape

    def signature(self, *shapes: Shape) -> str:
        letters = self._letters()
        return f"B ..., value: {letters} -> B {letters}" if self.expand else f"value: {letters} -> {letters}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"shape": self._letters()}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        noise = torch.empty(self._shape, device=generator.device).normal_(generator=generator)
        return {"value": self.fill + self.std * noise}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        value = params["value"]
        return value.expand(inputs[0].shape[0], *value.shape) if self.expand else value

    def roles(self) -> tuple[Role, ...]:
        return () if self.expand else (Constant(),)


@dataclass(frozen=True)
class Buffer(Parameter):
    """A `Parameter` that is not trained: a table of numbers.

    ``dtype`` is torch's name of its dtype where that is not the parameters': ``"int64"`` for positions, ``"bool"`` for
    a mask.
    """

    dtype: str | None = None

    buffers: ClassVar[tuple[str, ...]] = ("value",)
    roles = Parameter.roles

    def __post_init__(self) -> None:
        super().__post_init__()
        known_dtype(self, self.dtype)

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        leaves = super().init(generator)
        return {"value": leaves["value"].to(getattr(torch, self.dtype))} if self.dtype else leaves

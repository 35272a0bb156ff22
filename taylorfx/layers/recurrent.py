"""Recurrent layers. What they hear may shrink; their own state is rigid, since it hears itself at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, uniform

__all__ = ["GRU", "LSTM", "RNN"]


@dataclass(frozen=True)
class _Recurrent(Layer):
    """What the recurrent layers share: ``(N, T, input_size)`` (with ``batch_first``) to ``(N, T, D hidden_size)``.

    The value is the sequence of states (torch's first result), which start at zero; ``D`` is 2 if bidirectional.
    Between layers there is no dropout.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    bidirectional: bool = False

    multiplies: ClassVar[tuple[str, ...]] = ("T D G H i", "T D G H J", "T D G H E M", "T D G H J M")
    parts: ClassVar[int] = 1
    """How many matrices of ``hidden_size`` rows lie above each other: one per gate."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_layers <= 1000:
            raise ShapeError(f"{type(self).__name__} has 1 to 1,000 layers; received num_layers={self.num_layers}.")

    def _suffixes(self, *layers: int) -> list[str]:
        ways = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{way}" for k in layers or range(self.num_layers) for way in ways]

    def signature(self, *shapes: Shape) -> str:
        leaves: list[str] = []
        for suffix in self._suffixes():
            heard = "i" if suffix.startswith("l0") else "E"
            leaves += [f"weight_ih_{suffix}: R {heard}", f"weight_hh_{suffix}: R J"]
            leaves += [f"bias_ih_{suffix}: R", f"bias_hh_{suffix}: R"] if self.bias else []
        order = "B T" if self.batch_first else "T B"
        return f"{order} i, {', '.join(leaves)} -> {order} E"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"input_size": "i", "hidden_size": "J"}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        ways = 2 if self.bidirectional else 1
        sizes = {"E": ways * self.hidden_size, "R": self.parts * self.hidden_size, "M": self.num_layers - 1}
        return {**super().letters(*shapes), **sizes, "D": ways, "G": self.parts, "H": self.hidden_size}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.hidden_size)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def _function(self) -> Any:
        raise NotImplementedError

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state, from what the input and the last state contribute to the gates."""
        raise NotImplementedError

    def _unrolled(self, x: Tensor, params: Leaves) -> Tensor:
        """The same step by step, which ``torch.func.vmap`` can vectorize: ``(T, N, ...)``."""
        for layer in range(self.num_layers):
            ways: list[Tensor] = []
            for suffix in self._suffixes(layer):
                ih, hh = params[f"weight_ih_{suffix}"], params[f"weight_hh_{suffix}"]
                biases = [params[f"bias_{way}_{suffix}"] if self.bias else None for way in ("ih", "hh")]
                heard = F.linear(x, ih, biases[0])
                zero = heard[0, :, : self.hidden_size] * 0
                state: tuple[Tensor, ...] = (zero, zero)
                states: list[Tensor] = []
                for one in heard.flip(0) if suffix.endswith("reverse") else heard:
                    state = self._step(one, F.linear(state[0], hh, biases[1]), state)
                    states.append(state[0])
                ways.append(torch.stack(states[::-1] if suffix.endswith("reverse") else states))
            x = torch.cat(ways, -1)
        return x

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if any(torch._C._functorch.is_batchedtensor(t) for t in (x, *params.values())):
            made = self._unrolled(x.transpose(0, 1) if self.batch_first else x, params)
            return made.transpose(0, 1) if self.batch_first else made
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        weights = [params[f"{name}_{suffix}"] for suffix in self._suffixes() for name in names]
        start: Any = x.new_zeros(len(self._suffixes()), x.shape[0 if self.batch_first else 1], self.hidden_size)
        start = (start, start) if isinstance(self, LSTM) else start
        options = (self.bias, self.num_layers, 0.0, False, self.bidirectional, self.batch_first)
        states: Tensor = self._function()(x, start, weights, *options)[0]
        return states


@dataclass(frozen=True)
class LSTM(_Recurrent):
    """``torch.nn.LSTM``: its sequence of states."""

    parts: ClassVar[int] = 4

    def _function(self) -> Any:
        return torch.lstm

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        let_in, keep, new, let_out = (heard + said).chunk(4, -1)
        cell = keep.sigmoid() * state[1] + let_in.sigmoid() * new.tanh()
        return let_out.sigmoid() * cell.tanh(), cell


@dataclass(frozen=True)
class GRU(_Recurrent):
    """``torch.nn.GRU``: its sequence of states."""

    parts: ClassVar[int] = 3

    def _function(self) -> Any:
        return torch.gru

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (reset, keep, new), (also_reset, also_keep, remembered) = heard.chunk(3, -1), said.chunk(3, -1)
        keep = (keep + also_keep).sigmoid()
        new = (new + (reset + also_reset).sigmoid() * remembered).tanh()
        return (keep * state[0] + (1 - keep) * new,)


@dataclass(frozen=True)
class RNN(_Recurrent):
    """``torch.nn.RNN``: its sequence of states."""

    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in ("tanh", "relu"):
            raise ShapeError(f"RNN has the nonlinearity 'tanh' or 'relu'; received {self.nonlinearity!r}.")

    def _function(self) -> Any:
        return {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[self.nonlinearity]

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.relu(heard + said) if self.nonlinearity == "relu" else torch.tanh(heard + said),)

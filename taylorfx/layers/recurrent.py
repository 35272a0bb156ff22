"""Recurrent layers. What they hear may shrink; their own state is rigid, since it hears itself at every step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import vectorized
from taylorfx.layers.activation import Dropout
from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, uniform

__all__ = ["GRU", "LSTM", "RNN"]


@dataclass(frozen=True)
class _Recurrent(Layer):
    """What the recurrent layers share: ``(N, T, input_size)`` (with ``batch_first``) to ``(N, T, D hidden_size)``.

    ``D`` is 2 if bidirectional. ``result`` chooses one of torch's results: the ``"sequence"`` of states, the last
    ``"hidden"`` state or, of an LSTM, the last ``"cell"`` state, ``(D num_layers, N, hidden_size)``. States start at
    zero; further inputs, shaped as the last states, are those to start from. In training what goes from layer to layer
    drops out with probability ``dropout``.
    """

    input_size: int
    hidden_size: int
    num_layers: int = 1
    bias: bool = True
    batch_first: bool = False
    dropout: float = 0.0
    bidirectional: bool = False
    result: str = "sequence"

    multiplies: ClassVar[tuple[str, ...]] = ("T D G H i", "T D G H J", "T D G H E M", "T D G H J M")
    parts: ClassVar[int] = 1
    """How many matrices of ``hidden_size`` rows lie above each other: one per gate."""
    results: ClassVar[tuple[str, ...]] = ("sequence", "hidden")

    def __post_init__(self) -> None:
        Dropout(self.dropout)
        if not 1 <= self.num_layers <= 1000:
            raise ShapeError(f"{type(self).__name__} has 1 to 1,000 layers; received num_layers={self.num_layers}.")
        if self.result not in self.results:
            raise ShapeError(f"{type(self).__name__} gives out one of {self.results}; received {self.result!r}.")

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
        start = ", Y B J" * (len(shapes) - 1)
        made = f"{order} E" if self.result == "sequence" else "Y B J"
        return f"{order} i{start}, {', '.join(leaves)} -> {made}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"input_size": "i", "hidden_size": "J"}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        ways = 2 if self.bidirectional else 1
        sizes = {"E": ways * self.hidden_size, "R": self.parts * self.hidden_size, "M": self.num_layers - 1}
        sizes["Y"] = ways * self.num_layers
        return {**super().letters(*shapes), **sizes, "D": ways, "G": self.parts, "H": self.hidden_size}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.hidden_size)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def _function(self) -> Any:
        raise NotImplementedError

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state, from what the input and the last state contribute to the gates."""
        raise NotImplementedError

    def _leaves(self, params: Leaves, suffix: str) -> list[Tensor]:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [params[f"{name}_{suffix}"] for name in names]

    def _start(self, x: Tensor, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states to start from, ``(D num_layers, N, hidden_size)``, of ``x``, ``(T, N, input_size)``."""
        zeros = x.new_zeros(len(self._suffixes()), x.shape[1], self.hidden_size)
        return given or (zeros,) * (len(self.results) - 1)

    def _unrolled(self, x: Tensor, start: tuple[Tensor, ...], params: Leaves) -> tuple[Tensor, ...]:
        """All results step by step, which ``torch.func.vmap`` can vectorize: ``x`` is ``(T, N, input_size)``."""
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            ways: list[Tensor] = []
            for suffix in self._suffixes(layer):
                ih, hh, *biases = self._leaves(params, suffix)
                heard = F.linear(x, ih, *biases[:1])
                state = tuple(one[len(last)] for one in start)
                states: list[Tensor] = []
                for one in heard.flip(0) if suffix.endswith("reverse") else heard:
                    state = self._step(one, F.linear(state[0], hh, *biases[1:]), state)
                    states.append(state[0])
                last.append(state)
                ways.append(torch.stack(states[::-1] if suffix.endswith("reverse") else states))
            x = torch.cat(ways, -1)
        return x, *map(torch.stack, zip(*last, strict=True))

    def _layers(
        self, x: Tensor, start: tuple[Tensor, ...], params: Leaves, layers: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """All results of some of the layers by torch's own operator: ``x`` is ``(T, N, ...)``."""
        weights = [leaf for suffix in self._suffixes(*layers) for leaf in self._leaves(params, suffix)]
        state: Any = start if len(start) > 1 else start[0]
        options = (self.bias, len(layers), 0.0, False, self.bidirectional, False)
        made: tuple[Tensor, ...] = self._function()(x, state, weights, *options)
        return made

    def _chosen(self, results: tuple[Tensor, ...]) -> Tensor:
        result = results[self.results.index(self.result)]
        return result.transpose(0, 1) if self.batch_first and self.result == "sequence" else result

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x = inputs[0].transpose(0, 1) if self.batch_first else inputs[0]
        start = self._start(x, inputs[1:])
        if any(map(vectorized, (*inputs, *params.values()))):
            return self._chosen(self._unrolled(x, start, params))
        return self._chosen(self._layers(x, start, params, range(self.num_layers)))

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        if self.dropout == 0 or self.num_layers == 1:
            return self.apply(params, *inputs), {}
        x = inputs[0].transpose(0, 1) if self.batch_first else inputs[0]
        start, ways = self._start(x, inputs[1:]), 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer:
                x, _ = Dropout(self.dropout).train({}, x, generator=generator)
            own = tuple(one[ways * layer : ways * (layer + 1)] for one in start)
            x, *state = self._layers(x, own, params, [layer])
            last.append(tuple(state))
        return self._chosen((x, *map(torch.cat, zip(*last, strict=True)))), {}


@dataclass(frozen=True)
class LSTM(_Recurrent):
    """``torch.nn.LSTM``: one of its results."""

    parts: ClassVar[int] = 4
    results: ClassVar[tuple[str, ...]] = ("sequence", "hidden", "cell")

    def _function(self) -> Any:
        return torch.lstm

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        let_in, keep, new, let_out = (heard + said).chunk(4, -1)
        cell = keep.sigmoid() * state[1] + let_in.sigmoid() * new.tanh()
        return let_out.sigmoid() * cell.tanh(), cell


@dataclass(frozen=True)
class GRU(_Recurrent):
    """``torch.nn.GRU``: one of its results."""

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
    """``torch.nn.RNN``: one of its results."""

    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in ("tanh", "relu"):
            raise ShapeError(f"RNN has the nonlinearity 'tanh' or 'relu'; received {self.nonlinearity!r}.")

    def _function(self) -> Any:
        return {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[self.nonlinearity]

    def _step(self, heard: Tensor, said: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.relu(heard + said) if self.nonlinearity == "relu" else torch.tanh(heard + said),)

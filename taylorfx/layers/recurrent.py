"""Recurrent layers. Their input may shrink; their state is rigid, because the layer reads it again at every step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.internals import vectorized
from taylorfx.layers.activation import Dropout
from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, uniform

__all__ = ["GRU", "LSTM", "RNN"]


@dataclass(frozen=True)
class _Recurrent(Layer):
    """What the recurrent layers have in common.

    The first input is a sequence, ``(N, T, input_size)`` with ``batch_first``, else ``(T, N, input_size)``. Further
    inputs are the states to start from, ``(D * num_layers, N, hidden_size)``, where ``D`` is 2 if the layer is
    bidirectional, and otherwise 1; by default states start at zero.

    The output is one of torch's results, which ``result`` chooses: the ``"sequence"`` of states
    ``(N, T, D * hidden_size)``, the last ``"hidden"`` state, or the last ``"cell"`` state of an LSTM, shaped as the
    states to start from. In training, values drop out between the layers with probability ``dropout``.
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
    """How many matrices of ``hidden_size`` rows a weight is the stack of: one for each gate of the layer."""
    results: ClassVar[tuple[str, ...]] = ("sequence", "hidden")

    def __post_init__(self) -> None:
        Dropout(self.dropout)
        if not 1 <= self.num_layers <= 1000:
            raise ShapeError(f"{type(self).__name__} has 1 to 1,000 layers; received num_layers={self.num_layers}.")
        if self.result not in self.results:
            raise ShapeError(f"{type(self).__name__} has the results {self.results}; received {self.result!r}.")

    def _suffixes(self, *layers: int) -> list[str]:
        """The ends of torch's names of parameters: ``l0``, ``l0_reverse``, ``l1``, ...; by default of all layers."""
        directions = ("", "_reverse") if self.bidirectional else ("",)
        return [f"l{k}{direction}" for k in layers or range(self.num_layers) for direction in directions]

    def signature(self, *shapes: Shape) -> str:
        leaves: list[str] = []
        for suffix in self._suffixes():
            features = "i" if suffix.startswith("l0") else "E"
            leaves += [f"weight_ih_{suffix}: R {features}", f"weight_hh_{suffix}: R J"]
            leaves += [f"bias_ih_{suffix}: R", f"bias_hh_{suffix}: R"] if self.bias else []
        order = "B T" if self.batch_first else "T B"
        start = ", Y B J" * (len(shapes) - 1)
        output = f"{order} E" if self.result == "sequence" else "Y B J"
        return f"{order} i{start}, {', '.join(leaves)} -> {output}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"input_size": "i", "hidden_size": "J"}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        directions = 2 if self.bidirectional else 1
        sizes = {"E": directions * self.hidden_size, "R": self.parts * self.hidden_size, "M": self.num_layers - 1}
        sizes["Y"] = directions * self.num_layers
        return {**super().letters(*shapes), **sizes, "D": directions, "G": self.parts, "H": self.hidden_size}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        bound = 1 / math.sqrt(self.hidden_size)
        return {name: uniform(shape, bound, generator) for name, shape in self.shapes().items()}

    def _function(self) -> Callable[..., tuple[Tensor, ...]]:
        """torch's operator for all layers and steps."""
        raise NotImplementedError

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The next state. ``x`` and ``h`` are what the input and the last state contribute to the gates."""
        raise NotImplementedError

    def _leaves(self, params: Leaves, suffix: str) -> list[Tensor]:
        """The weights and biases of one direction of one layer, in the order in which torch's operator takes them."""
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")[: 4 if self.bias else 2]
        return [params[f"{name}_{suffix}"] for name in names]

    def _start(self, x: Tensor, states: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The states to start from: ``states``, or zeros for ``x``, ``(T, N, input_size)``."""
        zeros = x.new_zeros(len(self._suffixes()), x.shape[1], self.hidden_size)
        return states or (zeros,) * (len(self.results) - 1)

    def _unrolled(self, x: Tensor, start: tuple[Tensor, ...], params: Leaves) -> tuple[Tensor, ...]:
        """All results, computed step by step, as ``torch.func.vmap`` needs it; ``x`` is ``(T, N, input_size)``."""
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            directions: list[Tensor] = []
            for suffix in self._suffixes(layer):
                ih, hh, *biases = self._leaves(params, suffix)
                inputs = F.linear(x, ih, *biases[:1])
                state = tuple(one[len(last)] for one in start)
                states: list[Tensor] = []
                for one in inputs.flip(0) if suffix.endswith("reverse") else inputs:
                    state = self._step(one, F.linear(state[0], hh, *biases[1:]), state)
                    states.append(state[0])
                last.append(state)
                directions.append(torch.stack(states[::-1] if suffix.endswith("reverse") else states))
            x = torch.cat(directions, -1)
        return x, *map(torch.stack, zip(*last, strict=True))

    def _layers(
        self, x: Tensor, start: tuple[Tensor, ...], params: Leaves, layers: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """All results of some of the layers, computed by torch's own operator; ``x`` is ``(T, N, ...)``."""
        weights = [leaf for suffix in self._suffixes(*layers) for leaf in self._leaves(params, suffix)]
        options = (self.bias, len(layers), 0.0, False, self.bidirectional, False)
        return self._function()(x, start if len(start) > 1 else start[0], weights, *options)

    def _chosen(self, results: tuple[Tensor, ...]) -> Tensor:
        """The result that ``result`` names, with the examples first if ``batch_first``."""
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
        start, directions = self._start(x, inputs[1:]), 2 if self.bidirectional else 1
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer:
                x, _ = Dropout(self.dropout).train({}, x, generator=generator)
            part = tuple(one[directions * layer : directions * (layer + 1)] for one in start)
            x, *state = self._layers(x, part, params, [layer])
            last.append(tuple(state))
        return self._chosen((x, *map(torch.cat, zip(*last, strict=True)))), {}


@dataclass(frozen=True)
class LSTM(_Recurrent):
    """``torch.nn.LSTM``; the output is one of its results."""

    parts: ClassVar[int] = 4
    results: ClassVar[tuple[str, ...]] = ("sequence", "hidden", "cell")

    def _function(self) -> Callable[..., tuple[Tensor, ...]]:
        return torch.lstm

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        admit, keep, new, emit = (x + h).chunk(4, -1)
        cell = keep.sigmoid() * state[1] + admit.sigmoid() * new.tanh()
        return emit.sigmoid() * cell.tanh(), cell


@dataclass(frozen=True)
class GRU(_Recurrent):
    """``torch.nn.GRU``; the output is one of its results."""

    parts: ClassVar[int] = 3

    def _function(self) -> Callable[..., tuple[Tensor, ...]]:
        return torch.gru

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        (x_reset, x_keep, x_new), (h_reset, h_keep, h_new) = x.chunk(3, -1), h.chunk(3, -1)
        keep = (x_keep + h_keep).sigmoid()
        new = (x_new + (x_reset + h_reset).sigmoid() * h_new).tanh()
        return (keep * state[0] + (1 - keep) * new,)


@dataclass(frozen=True)
class RNN(_Recurrent):
    """``torch.nn.RNN``; the output is one of its results."""

    nonlinearity: str = "tanh"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nonlinearity not in ("tanh", "relu"):
            raise ShapeError(f"RNN has the nonlinearity 'tanh' or 'relu'; received {self.nonlinearity!r}.")

    def _function(self) -> Callable[..., tuple[Tensor, ...]]:
        return {"tanh": torch.rnn_tanh, "relu": torch.rnn_relu}[self.nonlinearity]

    def _step(self, x: Tensor, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.relu(x + h) if self.nonlinearity == "relu" else torch.tanh(x + h),)

"""Recurrent layers. A hidden unit is one number of the state, which the layer itself reads again at every step.

    h_t = step(W_ih x_t, W_hh h_{t-1})          ``weight_hh: (G h) j``, where ``j`` is ``h``

A hidden unit leaves with its rows of every gate (``G`` of them), with its column of the recurrent weight, and with the
columns of whatever reads the layer's output. Its gate lies at all of these reads: at zero, nothing mixes the unit's
numbers any more, not even its own next step. So such units are exact. What a cell carries from step to step, ``c_t`` of
an LSTM and ``z h_{t-1}`` of a GRU, stays within the unit and has no gate.

Torch's layers have one ``hidden_size``: a unit is the same position in every layer and in both directions.
"""

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

    multiplies: ClassVar[tuple[str, ...]] = ("T D G h i", "T D G h j", "T D E G h j M", "T D G h j M")
    recurrent: ClassVar[Mapping[str, str]] = {"j": "h"}
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
            features = "i" if suffix.startswith("l0") else "(D j)"
            leaves += [f"weight_ih_{suffix}: (G h) {features}", f"weight_hh_{suffix}: (G h) j"]
            leaves += [f"bias_ih_{suffix}: (G h)", f"bias_hh_{suffix}: (G h)"] if self.bias else []
        order = "B T" if self.batch_first else "T B"
        start = ", Y B h" * (len(shapes) - 1)
        output = f"{order} (D h)" if self.result == "sequence" else "Y B h"
        return f"{order} i{start}, {', '.join(leaves)} -> {output}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"input_size": "i", "hidden_size": "h"}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        directions = 2 if self.bidirectional else 1
        sizes = {"D": directions, "E": directions, "G": self.parts, "M": self.num_layers - 1}
        return {**super().letters(*shapes), **sizes, "Y": directions * self.num_layers, "j": self.hidden_size}

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

    def _unrolled(
        self,
        x: Tensor,
        start: tuple[Tensor, ...],
        params: Leaves,
        read: Callable[[Tensor], Tensor],
        drop: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, ...]:
        """All results, step by step, as gates and ``torch.func.vmap`` need it; ``x`` is ``(T, N, input_size)``.

        Every state is ``read`` by the next step, and by the next layer, before which values ``drop`` out.
        """
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            x, directions = drop(x) if layer else x, list[Tensor]()
            for suffix in self._suffixes(layer):
                ih, hh, *biases = self._leaves(params, suffix)
                inputs = F.linear(x, ih, *biases[:1])
                state = tuple(one[len(last)] for one in start)
                states: list[Tensor] = []
                for one in inputs.flip(0) if suffix.endswith("reverse") else inputs:
                    state = self._step(one, F.linear(read(state[0]), hh, *biases[1:]), state)
                    states.append(state[0] if layer == self.num_layers - 1 else read(state[0]))
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
            return self.recur(params, *inputs, read=lambda state: state)
        return self._chosen(self._layers(x, start, params, range(self.num_layers)))

    def recur(
        self,
        params: Leaves,
        *inputs: Tensor,
        read: Callable[[Tensor], Tensor],
        training: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        def drop(x: Tensor) -> Tensor:
            return Dropout(self.dropout).train({}, x, generator=generator)[0] if training else x

        x = inputs[0].transpose(0, 1) if self.batch_first else inputs[0]
        return self._chosen(self._unrolled(x, self._start(x, inputs[1:]), params, read, drop))

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

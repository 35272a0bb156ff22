"""Tensor operations as they are captured from modules: views, expansions, products, reductions, elementwise maps.

A captured operator is named as ATen names it and runs as it was captured. Its static arguments are a template:
``Slot(k)`` stands for input ``k``. Sizes that were baked into the graph are fields here, so that they follow when axes
shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, broadcast, names
from taylorfx.layers.operators import COUNT, DTYPE, DTYPES, SLOT, check_arguments, operator
from taylorfx.layers.roles import Role, Viewing
from taylorfx.layers.shape import refine

__all__ = [
    "Along", "Captured", "Einsum", "Elementwise", "Expand", "Gather", "Maps", "MatMul", "Pad", "Reduce",
    "View",
]  # fmt: skip

STATISTICS = ("var", "std", "var_mean", "std_mean", "cosine_similarity")
"""Operators along axes that may shrink: what they say of the rest then changes."""

SUMS = ("linalg_vector_norm",)
"""Operators along axes that may shrink, to whose value what is silenced adds nothing."""


def fill(template: Any, inputs: tuple[Tensor, ...]) -> Any:
    """The arguments that a template stands for."""
    if isinstance(template, tuple):
        if len(template) == 2 and template[0] == SLOT:
            return inputs[template[1]]
        if len(template) == 2 and template[0] == DTYPE:
            return DTYPES[template[1]]
        if len(template) == 2 and template[0] == COUNT:
            return len(inputs[-1]) * template[1]
        return [fill(item, inputs) for item in template]
    return template


@dataclass(frozen=True)
class _Operator(Layer):
    """An ATen operator with the arguments that it was captured with; ``item`` chooses one of several results.

    Raises:
        ShapeError: if the operator is none that a network may name, or takes other arguments.
    """

    op: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    item: int | None = None

    @property
    def title(self) -> str:
        return self.op.removesuffix(".default")

    def __post_init__(self) -> None:
        check_arguments(self.op, self.args, self.kwargs, self.item)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Out of a pickle: the operator is looked up now, since torch.compile cannot follow how."""
        self.__dict__.update(state)
        operator(self.op)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        function = operator(self.op)
        kwargs = {name: fill(value, inputs) for name, value in self.kwargs}
        result: Any = function(*(fill(value, inputs) for value in self.args), **kwargs)
        chosen: Tensor = result if self.item is None else result[self.item]
        return chosen

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.title})"


@dataclass(frozen=True)
class Captured(_Operator):
    """An operator without a rule: it runs as it was captured, and what touches it is frozen.

    ``shape`` is the output's for one example. Examples run along axis ``made`` of it, and along the axes ``given`` of
    the inputs (-1: there are none); ``apart`` says that it is known to treat each of them alone.
    """

    shape: Shape = ()
    made: int = -1
    given: tuple[int, ...] = ()
    apart: bool = False

    def signature(self, *shapes: Shape) -> str | None:
        inputs = [[f"U{k}_{j}" for j in range(len(shape))] for k, shape in enumerate(shapes)]
        made = [f"M{j}" for j in range(len(self.shape))]
        whole = "B" if self.apart else "N"
        for letters, shape, axis in zip([*inputs, made], [*shapes, self.shape], [*self.given, self.made], strict=True):
            if axis >= 0:  # where an example has several positions, as tokens that experts share out, they are a factor
                letters[axis] = whole if shape[axis] == 1 else f"({whole} {letters[axis]})"
        return f"{', '.join(map(' '.join, inputs))} -> {' '.join(made)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        given = {f"U{k}_{j}": n for k, shape in enumerate(shapes) for j, n in enumerate(shape)}
        return {"B" if self.apart else "N": 1, **given, **{f"M{j}": n for j, n in enumerate(self.shape)}}


@dataclass(frozen=True)
class Elementwise(_Operator):
    """A pointwise operator: its inputs broadcast against each other, and every axis passes through."""

    def signature(self, *shapes: Shape) -> str | None:
        return broadcast(*shapes)


@dataclass(frozen=True)
class Along(_Operator):
    """An operator that works along ``dims``, which it holds rigid, and passes the other axes.

    Statistics (variance, standard deviation) do not hold them: they are then of the positions that stay. Norms do not
    either, and zeros do not change them, except those of negative order, which are small where an entry is.
    ``lengths`` are the new sizes along ``dims`` where they change; 0 where the axis is gone. Several inputs have the
    same axes.
    """

    dims: tuple[int, ...] = ()
    lengths: tuple[int, ...] | None = None

    @property
    def inexact(self) -> tuple[str, ...]:  # type: ignore[override]
        name = self.op.split(".")[0]
        order: Any = dict(self.kwargs).get("ord", self.args[1] if self.args[1:] else 2)
        moves = name in STATISTICS or (name == "linalg_vector_norm" and order < 0)
        return tuple(f"g{k}" for k in range(len(self.dims))) if moves else ()

    def signature(self, *shapes: Shape) -> str | None:
        given = names(len(shapes[0]))
        made = list(given)
        free = self.op.split(".")[0] in (*STATISTICS, *SUMS)
        for k, dim in enumerate(self.dims):
            given[dim] = made[dim] = f"g{k}" if free else f"G{k}"
            if self.lengths is not None:
                made[dim] = f"M{k}" if self.lengths[k] else ""
        return f"{', '.join([' '.join(given)] * len(shapes))} -> {' '.join(made)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"M{k}": n for k, n in enumerate(self.lengths or ()) if n}


@dataclass(frozen=True)
class Maps(_Operator):
    """An operator on every map alone, ``(N, C, ...)`` to ``(N, C, *space)``: resampling, unusual pooling.

    Of several inputs, each has a map for every channel.
    """

    space: Shape = ()

    def signature(self, *shapes: Shape) -> str | None:
        given = [f"B c {' '.join(f'G{j}_{k}' for k in range(len(shape) - 2))}" for j, shape in enumerate(shapes)]
        return f"{', '.join(given)} -> B c {' '.join(f'M{k}' for k in range(len(self.space)))}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"M{k}": n for k, n in enumerate(self.space)}


@dataclass(frozen=True)
class View(Layer):
    """The same numbers in another shape; ``shape`` is that for one example, with the example axis counted as one.

    The examples run along axis ``given`` of the input and axis ``made`` of the output (-1: the tensor has none); they
    may be one factor of that axis, as when windows or heads are folded into the batch.
    """

    shape: Shape
    given: int = 0
    made: int = 0

    def _pieces(self, shape: Shape) -> tuple[str, str, dict[str, int]]:
        if math.prod(shape) != math.prod(self.shape):
            raise ShapeError(f"{self} takes {math.prod(self.shape)} numbers per example; received {shape}.")
        return refine(shape, self.shape, self.given, self.made)

    def signature(self, *shapes: Shape) -> str | None:
        before, after, _ = self._pieces(shapes[0])
        return f"{before} -> {after}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"shape": self._pieces(shapes[0])[1]} if shapes else {}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return self._pieces(shapes[0])[2] if shapes else {}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        shape = list(self.shape)
        if self.made >= 0:
            shape[self.made] = -1
        return inputs[0].reshape(shape)

    def roles(self) -> tuple[Role, ...]:
        return (Viewing(),)


@dataclass(frozen=True)
class Expand(Layer):
    """``Tensor.expand``: axes of size one repeated to ``shape``, -1 where an axis keeps its size.

    The copies may leave like any position. With a second input, the new axis ``example`` runs over that input's
    examples (its axis 0).
    """

    shape: Shape
    example: int = -1

    def signature(self, *shapes: Shape) -> str | None:
        (shape, *reference) = shapes
        made = names(len(self.shape))
        given = made[len(made) - len(shape) :]
        for k, n in enumerate(self.shape):
            j = k - (len(made) - len(shape))
            if n != -1:
                made[k] = f"n{k}" if k != self.example else "B"
                if j >= 0:
                    given[j] = "1"
        return f"{' '.join(given)}{', B ...' if reference else ''} -> {' '.join(made)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"n{k}": n for k, n in enumerate(self.shape) if n != -1 and k != self.example}

    def resize(self, sizes: Mapping[str, int], *shapes: Shape) -> Expand:
        return replace(self, shape=tuple(sizes.get(f"n{k}", n) for k, n in enumerate(self.shape)))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        shape = list(self.shape)
        if self.example >= 0:
            shape[self.example] = len(inputs[1])
        return inputs[0].expand(shape)


@dataclass(frozen=True)
class MatMul(Layer):
    """``torch.matmul`` of two activations of two or more axes: the inner axis is contracted, the others broadcast.

    The first one carries the gate.
    """

    multiplies: ClassVar[tuple[str, ...]] = ("x0 x1 x2 x3 x4 x5 m k n",)

    def signature(self, *shapes: Shape) -> str | None:
        one, other = shapes
        lead = broadcast(one[:-2], other[:-2]) if len(one) > 2 or len(other) > 2 else ", -> "
        inputs, output = lead.split("->")
        first, second = inputs.split(",")
        return f"{first} m k, {second} k n -> {output} m n"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.matmul(inputs[0], inputs[1])


@dataclass(frozen=True)
class Einsum(Layer):
    """``torch.einsum`` with every axis named: what the output lacks is contracted."""

    equation: str

    def _names(self) -> tuple[list[list[str]], list[str]]:
        left, _, right = self.equation.replace(" ", "").partition("->")
        inputs = [[_letter(x) for x in part] for part in left.split(",")]
        return inputs, [_letter(x) for x in right]

    @property
    def multiplies(self) -> tuple[str, ...]:  # type: ignore[override]
        inputs, _ = self._names()
        return (" ".join(dict.fromkeys(x for part in inputs for x in part)),) if len(inputs) > 1 else ()

    def signature(self, *shapes: Shape) -> str | None:
        inputs, output = self._names()
        return f"{', '.join(map(' '.join, inputs))} -> {' '.join(output)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.einsum(self.equation, *inputs)


def _letter(name: str) -> str:
    return name if name.islower() else f"{name.lower()}_"


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin
}  # fmt: skip
"""What `Reduce` may do, by name."""


@dataclass(frozen=True)
class Reduce(Layer):
    """A reduction over some axes (``mean``, ``sum``, ``amax``, ``amin``), whose positions it reads.

    A sum does not miss what is silenced. The other statistics are then of fewer positions: those are inexact.
    """

    op: str
    dims: tuple[int, ...]
    keepdim: bool = False

    def __post_init__(self) -> None:
        if self.op not in REDUCTIONS:
            raise ShapeError(f"Reduce takes one of {', '.join(REDUCTIONS)}; received {self.op!r}.")

    @property
    def inexact(self) -> tuple[str, ...]:  # type: ignore[override]
        return () if self.op == "sum" else tuple(f"s{k}" for k in range(8))

    def signature(self, *shapes: Shape) -> str | None:
        rank = len(shapes[0])
        letters, made = names(rank), names(rank)
        for dim in {d % rank for d in self.dims}:
            letters[dim] = f"s{dim}"
            made[dim] = "1" if self.keepdim else ""
        return f"{' '.join(letters)} -> {' '.join(made)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        result: Tensor = REDUCTIONS[self.op](inputs[0], self.dims, keepdim=self.keepdim)
        return result


@dataclass(frozen=True)
class Pad(Layer):
    """``torch.nn.functional.pad``; padded axes are rigid."""

    pad: tuple[int, ...]
    mode: str = "constant"
    value: float = 0.0

    def _axes(self, rank: int) -> dict[int, tuple[int, int]]:
        pairs = zip(self.pad[::2], self.pad[1::2], strict=True)  # the last axis first
        return {rank - 1 - k: pair for k, pair in enumerate(pairs) if any(pair)}

    def signature(self, *shapes: Shape) -> str | None:
        rank = len(shapes[0])
        given, made = names(rank), names(rank)
        for axis in self._axes(rank):
            given[axis], made[axis] = f"G{axis}", f"M{axis}"
        return f"{' '.join(given)} -> {' '.join(made)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        (shape,) = shapes
        return {f"M{axis}": shape[axis] + sum(pad) for axis, pad in self._axes(len(shape)).items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.pad(inputs[0], self.pad, self.mode, self.value if self.mode == "constant" else None)


@dataclass(frozen=True)
class Gather(Layer):
    """Positions of axis ``dim`` by a table of numbers (the second input, of any shape), which stands in its place.

    The axis itself is rigid: its positions are looked up by number.
    """

    dim: int

    def signature(self, *shapes: Shape) -> str | None:
        table, index = shapes
        given = names(len(table))
        made = [*given[: self.dim], *(f"y{k}" for k in range(len(index))), *given[self.dim + 1 :]]
        given[self.dim] = "V"
        return f"{' '.join(given)}, {' '.join(f'y{k}' for k in range(len(index)))} -> {' '.join(made)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        index: list[Tensor | None] = [None] * self.dim
        return torch.ops.aten.index(inputs[0], [*index, inputs[1]])  # type: ignore[no-any-return]


def runs_operator(cls: type[Layer]) -> bool:
    """Layers of this class run an operator that they name."""
    return issubclass(cls, _Operator)


def operator_of(layer: Layer) -> str | None:
    """The name of the operator that a layer runs, ``"add.Tensor"``; none where it runs code of its own."""
    return layer.op if isinstance(layer, _Operator) else None


def slots(layer: Layer) -> int:
    """How many inputs the arguments of an operator are filled with."""

    def highest(template: Any) -> int:
        if not isinstance(template, tuple):
            return 0
        if len(template) == 2 and template[0] == SLOT:
            return int(template[1]) + 1
        if len(template) == 2 and template[0] == COUNT:
            return 1
        return max(map(highest, template), default=0)

    return highest((layer.args, layer.kwargs)) if isinstance(layer, _Operator) else 0

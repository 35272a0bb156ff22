"""Tensor operations as captured from modules: views, expansions, products, reductions, pointwise operators.

A captured operator has its ATen name and runs as it was captured. Its constant arguments are a template, in which
``("$", k)`` stands for input ``k``. Sizes that the exported graph holds as numbers are fields of the layers here, so
that they change when axes shrink.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, broadcast, names
from taylorfx.layers.operators import COUNT, DEVICE, DTYPE, DTYPES, SLOT, check_arguments, operator
from taylorfx.layers.roles import Memory, Pointwise, Recomputed, Role, Summing, Viewing
from taylorfx.layers.shape import refine
from taylorfx.layers.sizes import Size, rescaled

__all__ = [
    "Along", "Captured", "Einsum", "Elementwise", "Expand", "Gather", "Maps", "MatMul", "Pad", "Reduce",
    "View",
]  # fmt: skip

STATISTICS = ("var", "std", "var_mean", "std_mean", "cosine_similarity")
"""Statistics along axes that may shrink. Their value for the other positions then changes."""

SUMS = ("linalg_vector_norm",)
"""Operators along axes that may shrink, to whose value a silenced position adds nothing."""


def fill(template: object, inputs: tuple[Tensor, ...]) -> object:
    """The argument that a template stands for; other tuples become lists.

    >>> fill((("$", 0), 2, ("dtype", "int64"), ("examples", 4)), (torch.ones(3),))
    [tensor([1., 1., 1.]), 2, torch.int64, 12]
    """
    if not isinstance(template, tuple):
        return template
    tag, value = template if len(template) == 2 else ("", None)
    if tag == SLOT and isinstance(value, int):
        return inputs[value]
    if tag == DTYPE and isinstance(value, str):
        return DTYPES[value]
    if tag == COUNT and isinstance(value, int):
        return inputs[-1].shape[0] * value
    if tag == DEVICE and isinstance(value, int):
        return inputs[value].device
    return [fill(item, inputs) for item in template]


@dataclass(frozen=True)
class _Operator(Layer):
    """An ATen operator with the arguments that it was captured with; ``item`` chooses one of several results.

    Raises:
        ShapeError: if a network may not name this operator, or if it takes other arguments.
    """

    op: str
    args: tuple[object, ...] = ()
    kwargs: tuple[tuple[str, object], ...] = ()
    item: int | None = None

    @property
    def title(self) -> str:
        return self.op.removesuffix(".default")

    def __post_init__(self) -> None:
        check_arguments(self.op, self.args, self.kwargs, self.item)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Unpickle. The operator is looked up here already, because torch.compile cannot trace the lookup."""
        self.__dict__.update(state)
        operator(self.op)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        function = operator(self.op)
        kwargs = {name: fill(value, inputs) for name, value in self.kwargs}
        result = function(*(fill(value, inputs) for value in self.args), **kwargs)
        value: Tensor = result if self.item is None else result[self.item]
        return value

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.title})"


@dataclass(frozen=True)
class Captured(_Operator):
    """An operator without a rule. It runs as it was captured, and units that touch it are frozen.

    Attributes:
        shape: that of the output for one example.
        made: the axis of the output along which the examples run; -1 if there is none.
        given: the same for each input.
        apart: whether the operator is known to treat every example alone.
    """

    shape: Shape = ()
    made: int = -1
    given: tuple[int, ...] = ()
    apart: bool = False

    def signature(self, *shapes: Shape) -> str | None:
        inputs = [[f"U{k}_{j}" for j in range(len(shape))] for k, shape in enumerate(shapes)]
        output = [f"M{j}" for j in range(len(self.shape))]
        whole = "B" if self.apart else "N"
        for letters, shape, axis in zip(
            [*inputs, output], [*shapes, self.shape], [*self.given, self.made], strict=True
        ):
            if (
                axis >= 0
            ):  # one example may have several positions there (tokens that share experts), which are a factor
                letters[axis] = whole if shape[axis] == 1 else f"({whole} {letters[axis]})"
        return f"{', '.join(map(' '.join, inputs))} -> {' '.join(output)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        inputs = {f"U{k}_{j}": n for k, shape in enumerate(shapes) for j, n in enumerate(shape)}
        return {"B" if self.apart else "N": 1, **inputs, **{f"M{j}": n for j, n in enumerate(self.shape)}}


@dataclass(frozen=True)
class Elementwise(_Operator):
    """A pointwise operator. Its inputs broadcast against each other, and it keeps every axis."""

    def signature(self, *shapes: Shape) -> str | None:
        return broadcast(*shapes)

    def roles(self) -> tuple[Role, ...]:
        square = self.op == "pow.Tensor_Scalar" and self.args == ((SLOT, 0), 2) and not self.kwargs
        return (Pointwise(_slope_of_square), Recomputed()) if square else ()


def _slope_of_square(kept: Tensor, gradient: Tensor, over: bool) -> Tensor:
    return (gradient.mul_(kept) if over else gradient * kept).mul_(2)


@dataclass(frozen=True)
class Along(_Operator):
    """An operator along the axes ``dims``, which treats all positions of the other axes alike.

    The axes ``dims`` are rigid, with two exceptions. Statistics (variance, standard deviation) may lose positions, and
    are then those of the positions that stay: inexact. Norms may lose positions, too, and do so exactly, because a
    silenced position adds nothing to a norm (unless its order is negative).

    ``lengths`` are the sizes of ``dims`` in the output, if they change; 0 if the axis is reduced. If there are several
    inputs, they have the same axes.
    """

    dims: tuple[int, ...] = ()
    lengths: tuple[int, ...] | None = None

    @property
    def inexact(self) -> tuple[str, ...]:  # type: ignore[override]
        name = self.op.split(".")[0]
        order = dict(self.kwargs).get("ord", self.args[1] if self.args[1:] else 2)
        negative = name in SUMS and isinstance(order, (int, float)) and order < 0
        return tuple(f"g{k}" for k in range(len(self.dims))) if name in STATISTICS or negative else ()

    def signature(self, *shapes: Shape) -> str | None:
        before, after = names(len(shapes[0])), names(len(shapes[0]))
        free = self.op.split(".")[0] in (*STATISTICS, *SUMS)
        for k, dim in enumerate(self.dims):
            before[dim] = after[dim] = f"g{k}" if free else f"G{k}"
            if self.lengths is not None:
                after[dim] = f"M{k}" if self.lengths[k] else ""
        return f"{', '.join([' '.join(before)] * len(shapes))} -> {' '.join(after)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"M{k}": n for k, n in enumerate(self.lengths or ()) if n}


@dataclass(frozen=True)
class Maps(_Operator):
    """An operator that treats every map alone, ``(N, C, ...)`` to ``(N, C, *space)``, such as resampling.

    If there are several inputs, each has a map for every channel.
    """

    space: Shape = ()

    def signature(self, *shapes: Shape) -> str | None:
        inputs = [f"B c {' '.join(f'G{j}_{k}' for k in range(len(shape) - 2))}" for j, shape in enumerate(shapes)]
        return f"{', '.join(inputs)} -> B c {' '.join(f'M{k}' for k in range(len(self.space)))}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"M{k}": n for k, n in enumerate(self.space)}


@dataclass(frozen=True)
class View(Layer):
    """The same numbers in another shape.

    Attributes:
        shape: that of the output for one example, in which the example axis counts as one.
        given: the axis of the input along which the examples run; -1 if there is none. The examples may be one factor
            of the axis, for example when windows or heads are folded into the batch.
        made: the same for the output.
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
    """``Tensor.expand``: axes of size one are repeated to the sizes in ``shape``; -1 keeps the size of an axis.

    The copies are positions that may leave like any others. With a second input, the new axis ``example`` runs over
    the examples of that input (its axis 0).
    """

    shape: Shape
    example: int = -1

    def signature(self, *shapes: Shape) -> str | None:
        (shape, *reference) = shapes
        after = names(len(self.shape))
        new = len(after) - len(shape)  # axes that the input does not have
        before = after[new:]
        for k, n in enumerate(self.shape):
            if n != -1:
                after[k] = f"{self._letter(k)}{k}" if k != self.example else "B"
                if k >= new:
                    before[k - new] = "1"
        return f"{' '.join(before)}{', B ...' if reference else ''} -> {' '.join(after)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {f"{self._letter(k)}{k}": n for k, n in enumerate(self.shape) if n != -1 and k != self.example}

    def _letter(self, k: int) -> str:
        """Copies may leave like any others; as many as an input has positions are rigid."""
        return "N" if isinstance(self.shape[k], Size) else "n"

    def resize(self, sizes: Mapping[str, int], *shapes: Shape) -> Expand:
        return replace(self, shape=tuple(rescaled(n, sizes.get(f"n{k}", n)) for k, n in enumerate(self.shape)))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        shape = list(self.shape)
        if self.example >= 0:
            shape[self.example] = inputs[1].shape[0]  # len() is a plain number, which an export would fix
        return inputs[0].expand(shape)


@dataclass(frozen=True)
class MatMul(Layer):
    """``torch.matmul`` of two activations of two or more axes. The inner axis is contracted, the others broadcast.

    The first activation carries the gate.
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
    """``torch.einsum`` with a letter for every axis. Axes that the output lacks are contracted."""

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
    """The lower-case letter of a signature for one of an equation: ``a`` for ``a``, ``a_`` for ``A``."""
    return name if name.islower() else f"{name.lower()}_"


REDUCTIONS: dict[str, Callable[..., Tensor]] = {
    "mean": torch.mean, "sum": torch.sum, "amax": torch.amax, "amin": torch.amin
}  # fmt: skip
"""The reductions that `Reduce` may name."""


@dataclass(frozen=True)
class Reduce(Layer):
    """A reduction over the axes ``dims``, whose positions it reads: ``mean``, ``sum``, ``amax`` or ``amin``.

    A silenced position adds nothing to a sum, so that it may leave exactly. The other reductions change with the number
    of positions: inexact.
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

    def roles(self) -> tuple[Role, ...]:
        linear = self.op in ("mean", "sum")  # the gradient by a sum's input is a view of that by the sum
        memory = (Memory(keeps_input=False, new_gradient=self.op == "mean"),) if linear else ()
        return (*memory, Summing(self.dims)) if self.op == "sum" else memory

    def signature(self, *shapes: Shape) -> str | None:
        rank = len(shapes[0])
        before, after = names(rank), names(rank)
        for dim in {d % rank for d in self.dims}:
            before[dim] = f"s{dim}"
            after[dim] = "1" if self.keepdim else ""
        return f"{' '.join(before)} -> {' '.join(after)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        result: Tensor = REDUCTIONS[self.op](inputs[0], self.dims, keepdim=self.keepdim)
        return result


@dataclass(frozen=True)
class Pad(Layer):
    """``torch.nn.functional.pad``. The axes that are padded are rigid."""

    pad: tuple[int, ...]
    mode: str = "constant"
    value: float = 0.0

    def _axes(self, rank: int) -> dict[int, tuple[int, int]]:
        pairs = zip(self.pad[::2], self.pad[1::2], strict=True)  # the last axis first
        return {rank - 1 - k: pair for k, pair in enumerate(pairs) if any(pair)}

    def signature(self, *shapes: Shape) -> str | None:
        rank = len(shapes[0])
        before, after = names(rank), names(rank)
        for axis in self._axes(rank):
            before[axis], after[axis] = f"G{axis}", f"M{axis}"
        return f"{' '.join(before)} -> {' '.join(after)}"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        (shape,) = shapes
        return {f"M{axis}": shape[axis] + sum(pad) for axis, pad in self._axes(len(shape)).items()}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.pad(inputs[0], self.pad, self.mode, self.value if self.mode == "constant" else None)


@dataclass(frozen=True)
class Gather(Layer):
    """Positions of axis ``dim``, looked up by their numbers in the second input, whose axes take the place of ``dim``.

    The axis itself is rigid, because its positions are known by number.

    Attributes:
        by_example: every example has one number of its own, ``x[torch.arange(N), index]``, and ``dim`` is 1; as where
            the last token of each text is taken.
    """

    dim: int
    by_example: bool = False

    def signature(self, *shapes: Shape) -> str | None:
        table, index = shapes
        if self.by_example:
            return "B V ..., B -> B ..."
        before, numbers = names(len(table)), [f"y{k}" for k in range(len(index))]
        after = [*before[: self.dim], *numbers, *before[self.dim + 1 :]]
        before[self.dim] = "V"
        return f"{' '.join(before)}, {' '.join(numbers)} -> {' '.join(after)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        x, numbers = inputs
        if self.by_example:
            return x[torch.arange(len(x), device=x.device), numbers]
        index: list[Tensor | None] = [None] * self.dim
        value: Tensor = torch.ops.aten.index(x, [*index, numbers])
        return value


def runs_operator(cls: type[Layer]) -> bool:
    """Whether layers of this class run an operator, which they name."""
    return issubclass(cls, _Operator)


def operator_of(layer: Layer) -> str | None:
    """The name of the operator that a layer runs, such as ``"add.Tensor"``; none if it runs its own code."""
    return layer.op if isinstance(layer, _Operator) else None


def slots(layer: Layer) -> int:
    """How many inputs the template of an operator's arguments uses."""

    def highest(template: object) -> int:
        if not isinstance(template, tuple):
            return 0
        if len(template) == 2 and template[0] in (SLOT, DEVICE) and isinstance(template[1], int):
            return template[1] + 1
        if len(template) == 2 and template[0] == COUNT:
            return 1
        return max(map(highest, template), default=0)

    return highest((layer.args, layer.kwargs)) if isinstance(layer, _Operator) else 0

"""Data movement, sums and products of branches: they move or tie the labels of axes, and mix nothing along an axis."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from taylorfx.layers.base import Layer, Leaves, Shape, ShapeError, as_tuple, broadcast, known_dtype, names
from taylorfx.layers.roles import Joining, Product, Role, Slicing, Sum, Viewing

__all__ = [
    "Add", "ChannelShuffle", "Choose", "Concat", "Flatten", "Input", "Multiply", "Permute", "PixelShuffle",
    "PixelUnshuffle", "Reshape", "Slice",
]  # fmt: skip


@dataclass(frozen=True)
class Input(Layer):
    """An input of a network.

    Attributes:
        shape: that of one example, without the example axis; none if it is not declared.
        alone: the network takes batches of one example, because it was captured from a module for a fixed number of
            examples.
        apart: that module treats every example alone, so that a batch may be run example by example.
        ranges: for each axis of ``shape`` the sizes that it may have: the least, the greatest (none: no bound), and the
            step between them. An empty tuple allows any size.
        dtype: torch's name of the dtype, if it is not that of the parameters: ``"int64"`` for tokens, ``"bool"`` for
            masks.
        calls: for each way in which the network may be called, whether this input is there. An empty tuple stands for
            an input that always is.
        causes: for each axis of ``shape`` what holds it at one size, where that is known: ``"net.py:31 in forward"``.
    """

    shape: Shape | int | None = None
    alone: bool = False
    apart: bool = False
    ranges: tuple[tuple[int, int | None, int], ...] = ()
    dtype: str | None = None
    calls: tuple[bool, ...] = ()
    causes: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        if self.shape is not None:
            as_tuple(self, 1 if isinstance(self.shape, int) else len(self.shape), "shape")
        if any(step < 1 for _, _, step in self.ranges):
            raise ShapeError(f"Sizes go in steps of at least 1; received ranges={self.ranges!r}.")
        known_dtype(self, self.dtype)

    def __str__(self) -> str:
        """The layer as it would be written, without ``ranges`` and ``causes``, which are long."""
        return super(Input, replace(self, ranges=(), causes=())).__str__()

    def refusal(self, shape: Shape) -> str:
        """Why an example of this shape is refused, axis by axis (axis 0 is that of the examples); empty if it is not.

        >>> Input((8,), ranges=((2, 16, 2),)).refusal((5,))
        'axis 1 takes size 2 to 16 in steps of 2, received 5'
        """
        wrong: list[str] = []
        for axis, (n, (least, most, step)) in enumerate(zip(shape, self.ranges, strict=False), 1):
            if n < least or (most is not None and n > most) or (n - least) % step:
                steps = f" in steps of {step}" * (step > 1)
                takes = f"{least} or more" if most is None else f"{least}" if least == most else f"{least} to {most}"
                cause = self.causes[axis - 1] if axis <= len(self.causes) else ""
                wrong.append(f"axis {axis} takes size {takes}{steps}, received {n}{cause and f' (held by {cause})'}")
        return "; ".join(wrong)


@dataclass(frozen=True)
class Add(Layer):
    """The sum of its inputs, which broadcast as in torch. Their channels are tied: they leave together."""

    def signature(self, *shapes: Shape) -> str:
        return broadcast(*shapes)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return reduce(torch.add, inputs)

    def roles(self) -> tuple[Role, ...]:
        return (Sum(),)


@dataclass(frozen=True)
class Multiply(Layer):
    """The product of its inputs, which broadcast as in torch (squeeze-and-excitation, gated units, layer scale)."""

    def signature(self, *shapes: Shape) -> str:
        return broadcast(*shapes)

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return reduce(torch.mul, inputs)

    def roles(self) -> tuple[Role, ...]:
        return (Product(),)


@dataclass(frozen=True)
class Choose(Layer):
    """One of its inputs, by the way in which the network is called: in call ``k`` the one of number ``of[k]``.

    A network with inputs that may be left out (`Input.calls`) computes with them or without them. Where the two come
    together again, this layer stands. Its inputs have one shape, and their channels are tied: they leave together.
    """

    of: tuple[int, ...]

    def __post_init__(self) -> None:
        if sorted({*self.of}) != [*range(max(self.of, default=-1) + 1)] or not self.of:
            raise ShapeError(f"Choose takes the number of an input for every call, from 0; received of={self.of!r}.")

    def signature(self, *shapes: Shape) -> str:
        if len({*shapes}) > 1:
            raise ShapeError(f"{self} takes inputs of one shape; received {', '.join(map(str, shapes))}.")
        axes = " ".join(names(len(shapes[0])))
        return f"{', '.join([axes] * len(shapes))} -> {axes}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        if len(inputs) > 1:
            raise ShapeError(
                f"{self} chooses by the inputs with which its network is called, and its network has none that may be "
                "left out. Take the network of one call, spec.called(...), before parts of it are used."
            )
        return inputs[0]


@dataclass(frozen=True)
class Concat(Layer):
    """``torch.cat`` along ``dim``."""

    dim: int = 1

    def roles(self) -> tuple[Role, ...]:
        return (Joining(self.dim),)

    def signature(self, *shapes: Shape) -> str:
        return _joined(self.dim, len(shapes[0]), len(shapes))

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)


@lru_cache(maxsize=4096)
def _joined(dim: int, rank: int, count: int) -> str:
    letters = [f"y{k}" for k in range(count)]
    patterns = [names(rank) for _ in range(count + 1)]
    for pattern, letter in zip(patterns, [*letters, " + ".join(letters)], strict=True):
        pattern[dim] = letter
    *inputs, output = map(" ".join, patterns)
    return f"{', '.join(inputs)} -> {output}"


@dataclass(frozen=True)
class Slice(Layer):
    """The positions from ``start`` to before ``stop`` of axis ``dim``. Several slices split an axis."""

    dim: int
    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ShapeError(f"Slice takes 0 <= start < stop; received start={self.start}, stop={self.stop}.")

    def signature(self, *shapes: Shape) -> str:
        before, after = names(len(shapes[0])), names(len(shapes[0]))
        pieces = {name: n for name, n in self.letters(*shapes).items() if n}
        before[self.dim], after[self.dim] = " + ".join(pieces), "b"
        return f"{' '.join(before)} -> {' '.join(after)}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"start": "a", "stop": "a + b"}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        (shape,) = shapes
        if self.stop > shape[self.dim]:
            raise ShapeError(f"{self} takes at least {self.stop} positions; received {shape[self.dim]}.")
        return {"a": self.start, "b": self.stop - self.start, "c": shape[self.dim] - self.stop}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0].narrow(self.dim, self.start, self.stop - self.start)

    def roles(self) -> tuple[Role, ...]:
        return (Slicing(self.dim, self.start, self.stop),)


@dataclass(frozen=True)
class Flatten(Layer):
    """``torch.nn.Flatten``."""

    start_dim: int = 1
    end_dim: int = -1

    def signature(self, *shapes: Shape) -> str:
        letters = names(len(shapes[0]))
        start, stop = self.start_dim % len(letters), self.end_dim % len(letters) + 1
        output = [*letters[:start], f"({' '.join(letters[start:stop])})", *letters[stop:]]
        return f"{' '.join(letters)} -> {' '.join(output)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(self.start_dim, self.end_dim)

    def roles(self) -> tuple[Role, ...]:
        return (Viewing(),)


@dataclass(frozen=True)
class Reshape(Layer):
    """``torch.reshape`` of every example to ``shape``, without the example axis. One entry may be -1.

    Axes that are merged or split keep their labels. Axes that are neither are rigid: see `refine`.
    """

    shape: Shape | int

    def __post_init__(self) -> None:
        as_tuple(self, 1 if isinstance(self.shape, int) else len(self.shape), "shape")

    def signature(self, *shapes: Shape) -> str:
        before, after, _ = refine(shapes[0][1:], self._target(*shapes))
        return f"B {before} -> B {after}"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"shape": refine(shapes[0][1:], self._target(*shapes))[1]}

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return refine(shapes[0][1:], self._target(*shapes))[2]

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        assert isinstance(self.shape, tuple)
        return inputs[0].reshape(inputs[0].shape[0], *self.shape)

    def roles(self) -> tuple[Role, ...]:
        return (Viewing(),)

    def _target(self, shape: Shape) -> Shape:
        assert isinstance(self.shape, tuple)
        total, known = math.prod(shape[1:]), math.prod(n for n in self.shape if n != -1)
        if self.shape.count(-1) > 1 or known == 0 or total % known or (-1 not in self.shape and total != known):
            raise ShapeError(f"{self} takes {known} numbers per example; received {shape[1:]}.")
        return tuple(total // known if n == -1 else n for n in self.shape)


_EXAMPLES = 2**31 - 1
"""Stands for the number of examples when axes are factored: a prime number that is no size of an axis."""


@lru_cache(maxsize=4096)
def refine(before: Shape, after: Shape, given: int = -1, made: int = -1) -> tuple[str, str, dict[str, int]]:
    """Name the axes of a reshape by the pieces that both sides consist of.

    A boundary between two axes lies at the number of elements to its right. The boundaries of both sides together cut
    the elements into pieces, and every axis is a product of pieces::

        boundaries      24          6        3        1
        before (4, 6)    |    4     |        6        |
        after  (8, 3)    |         8         |   3    |
        pieces           |  x3: 4   | x2: 2  | x1: 3  |

    A piece has to be a whole number of elements. Where it is not, the axes are torn, and rigid.

    >>> refine((4, 6), (8, 3))
    ('x3 (x2 x1)', '(x3 x2) x1', {'x3': 4, 'x1': 3, 'x2': 2})
    >>> refine((2, 6, 4), (2, 4, 6))[:2]  # 6 and 4 are torn
    ('x4 A1 A2', 'x4 C1 C2')
    >>> refine((6, 1, 4), (6, 4), 1, 0)[:2]  # positions and examples become one axis
    ('x3 B x1', '(x3 B) x1')

    Args:
        before, after: the shapes, in which the example axis counts as one.
        given, made: the axes along which the examples run before and after; -1 if there is none. They are named ``B``.

    Returns:
        The names before and after, and the size of every piece.
    """
    before = tuple(n * _EXAMPLES if k == given else n for k, n in enumerate(before))
    after = tuple(n * _EXAMPLES if k == made else n for k, n in enumerate(after))
    left, right = ([math.prod(shape[k:]) for k in range(len(shape) + 1)] for shape in (before, after))
    cuts, common = sorted({*left, *right}), sorted({*left} & {*right})
    pieces = list(itertools.pairwise(cuts))
    torn = [
        (low, high)
        for low, high in itertools.pairwise(common)
        if any(b % a for a, b in pieces if low <= a and b <= high)
    ]
    sizes: dict[str, int] = {}

    def named(name: str, size: int) -> str:
        name = "B" if size == _EXAMPLES else name
        sizes[name] = size // _EXAMPLES if size % _EXAMPLES == 0 else size
        return name

    def side(shape: Shape, bounds: list[int], rigid: str) -> str:
        axes: list[str] = []
        for k, n in enumerate(shape):
            high, low = bounds[k], bounds[k + 1]
            if any(a <= low and high <= b for a, b in torn) and n > 1:
                axes.append(named(f"{rigid}{k}", n))
            else:
                inside = [named(f"x{i + 1}", b // a) for i, (a, b) in enumerate(pieces) if low <= a and b <= high]
                axes.append(f"({' '.join(reversed(inside))})" if inside else "1")
        return re.sub(r"\((\w+)\)", r"\1", " ".join(axes))

    return side(before, left, "A"), side(after, right, "C"), sizes


@dataclass(frozen=True)
class Permute(Layer):
    """``torch.permute``: the axes in the order ``dims``, which counts the example axis as axis 0."""

    dims: Shape

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(self.dims))

    def signature(self, *shapes: Shape) -> str:
        letters = names(len(self.dims))
        return f"{' '.join(letters)} -> {' '.join(letters[d] for d in self.dims)}"

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return inputs[0].permute(self.dims)

    def roles(self) -> tuple[Role, ...]:
        return (Viewing(self.dims),)


@dataclass(frozen=True)
class PixelShuffle(Layer):
    """``torch.nn.PixelShuffle``: ``(N, C r r, H, W)`` to ``(N, C, H r, W r)``."""

    upscale_factor: int

    def signature(self, *shapes: Shape) -> str:
        return "B (c R S) H W -> B c (H R) (W S)"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {"R": self.upscale_factor, "S": self.upscale_factor}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.pixel_shuffle(inputs[0], self.upscale_factor)


@dataclass(frozen=True)
class PixelUnshuffle(Layer):
    """``torch.nn.PixelUnshuffle``: ``(N, C, H r, W r)`` to ``(N, C r r, H, W)``."""

    downscale_factor: int

    def signature(self, *shapes: Shape) -> str:
        return "B c (H R) (W S) -> B (c R S) H W"

    def letters(self, *shapes: Shape) -> dict[str, int]:
        return {"R": self.downscale_factor, "S": self.downscale_factor}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return F.pixel_unshuffle(inputs[0], self.downscale_factor)


@dataclass(frozen=True)
class ChannelShuffle(Layer):
    """``torch.nn.ChannelShuffle``: ``(N, (g c), ...)`` to ``(N, (c g), ...)``."""

    groups: int

    def signature(self, *shapes: Shape) -> str:
        return "B (g c) ... -> B (c g) ..."

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"groups": "g"}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        return torch.channel_shuffle(inputs[0], self.groups)

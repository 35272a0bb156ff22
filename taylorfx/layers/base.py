"""What every layer is: a frozen dataclass that states its axes once and computes a pure function."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from taylorfx.layers import axes
from taylorfx.layers.roles import Leaves, Role
from taylorfx.layers.sizes import rescaled

__all__ = [
    "Layer",
    "Leaves",
    "Shape",
    "ShapeError",
    "as_tuple",
    "broadcast",
    "names",
    "positive",
    "uniform",
]

Shape = tuple[int, ...]
"""The sizes of a tensor's axes; in layers the example axis counts as one, in `Input` it is left out."""

R = TypeVar("R", bound=Role)


class ShapeError(ValueError):
    """Tensors that a network cannot take; the message lists every offender."""


@dataclass(frozen=True)
class Layer:
    """One operation: immutable, hashable, comparable.

    A new layer is one frozen dataclass with `signature`, `fields` and `apply` (and `init` if it has parameters);
    coupling, cutting and counting follow from the signature; what other passes ask for are its `roles`.
    `taylorfx.testing.check_layer` proves all of it. A layer without a signature still runs: it freezes every unit that
    touches it.
    """

    buffers: ClassVar[tuple[str, ...]] = ()
    """Parameters that are not trained: running statistics."""
    inexact: ClassVar[tuple[str, ...]] = ()
    """Letters along which the layer computes statistics, so that removing is not the same as silencing."""
    separate: ClassVar[tuple[str, ...]] = ()
    """Rigid letters along which the layer treats every position alone, as it does along those that may shrink."""
    multiplies: ClassVar[tuple[str, ...]] = ()
    """One entry per matrix product: the letters whose sizes multiply to its multiply-adds."""
    recurrent: ClassVar[Mapping[str, str]] = {}
    """For a layer that reads its own output again at every step: the letter of the output, by the one along which it is
    read. The two are one axis. Such a layer has a method `recur`."""
    leaf: ClassVar[bool] = False
    """The layer is one tensor, stored at the node's own path rather than below it."""

    def __str__(self) -> str:
        """The layer as it would be written: fields at their defaults are left out."""
        shown: list[str] = []
        for k, field in enumerate(fields(self)):
            value = getattr(self, field.name)
            if field.name in _WINDOW and isinstance(value, tuple) and len(set(value)) == 1:
                value = value[0]
            if field.default is MISSING:
                shown.append(f"{value!r}" if k == len(shown) else f"{field.name}={value!r}")
            elif value != field.default:
                shown.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def title(self) -> str:
        """What errors and reasons call it."""
        return type(self).__name__

    def __init_subclass__(cls, **options: object) -> None:
        super().__init_subclass__(**options)
        overridden = [name for name in ("apply", "train") if name in vars(cls)]
        if cls.recurrent and overridden and "recur" not in vars(cls):
            raise TypeError(
                "A recurrent layer computes the same by `recur`, which gates and scores call; "
                f"{cls.__name__} overrides {' and '.join(overridden)} alone. Override recur as well."
            )
        LAYERS[kind(cls)] = cls

    def signature(self, *shapes: Shape) -> str | None:
        """The layer's axes in the language of `taylorfx.layers.axes`; ``None`` where no rule is known.

        ``shapes`` are those of the inputs, the example axis counted as one; the axes of parameters must not depend
        on them.
        """
        return None

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        """The axes that the layer's own fields hold the sizes of: ``{"in_features": "i"}``."""
        return {}

    def sizes(self, known: Mapping[str, int]) -> Mapping[str, int]:
        """The sizes of the output's rigid letters that no input has (a convolution's output height)."""
        return {}

    def init(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Fresh parameters, distributed as those of the layer's ``torch.nn`` counterpart."""
        return {}

    def apply(self, params: Leaves, *inputs: Tensor) -> Tensor:
        """The layer's value in inference."""
        raise TypeError(f"{type(self).__name__} does not say what it computes; give it an `apply`.")

    def train(
        self, params: Leaves, *inputs: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer's value in training, and its new buffers."""
        return self.apply(params, *inputs), {}

    def recur(
        self,
        params: Leaves,
        *inputs: Tensor,
        read: Callable[[Tensor], Tensor],
        training: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The value of a `recurrent` layer, step by step.

        ``read`` is called on the state, ``(N, size)``, wherever the layer reads it, and returns what the layer reads
        instead, which has passed a gate.
        """
        raise TypeError(f"{type(self).__name__} is recurrent and does not say how; give it a `recur`.")

    def roles(self) -> tuple[Role, ...]:
        """What the layer states of itself for the passes over networks (`taylorfx.layers.roles`); ask for it by `role`.

        A base class states roles for subclasses that override nothing that it defines. One that does states roles anew,
        as its own method or as ``roles = Base.roles``, or it has none.
        """
        return ()

    def role(self, kind: type[R]) -> R | None:
        """The role of this kind that the layer states, or ``None``.

        >>> from taylorfx import layers as L
        >>> from taylorfx.layers.roles import Slicing
        >>> L.Slice(1, 0, 3).role(Slicing), L.ReLU().role(Slicing)
        (Slicing(dim=1, start=0, stop=3), None)
        """
        cls: type = type(self)
        stated = self.roles() if _keeps_roles(cls) else ()
        return next((role for role in stated if isinstance(role, kind)), None)

    def letters(self, *shapes: Shape) -> dict[str, int]:
        """The sizes of the letters that the fields determine."""
        fields = self.fields(*shapes)
        try:
            return dict(axes.solve(fields, {name: getattr(self, name) for name in fields})) if fields else {}
        except axes.SignatureError as error:
            raise ShapeError(f"{self} {error}.") from None

    def shapes(self) -> dict[str, Shape]:
        """The shapes of the parameters, by name."""
        if type(self).init is Layer.init:
            return {}
        text = self.signature()
        if text is None:
            return {name: tuple(leaf.shape) for name, leaf in self.init(torch.Generator()).items()}
        sizes = self.letters()
        return {
            name: tuple([axes.size(axis, sizes) for axis in pattern])
            for name, pattern in axes.parse(text).parameters.items()
        }

    def resize(self, sizes: Mapping[str, int], *shapes: Shape) -> Layer:
        """The same layer with axes of other sizes; ``shapes`` are those that the inputs had."""
        changes: dict[str, object] = {}
        for field, text in self.fields(*shapes).items():
            new, old = tuple([axes.size(axis, sizes) for axis in axes.pattern(text)]), getattr(self, field)
            held = old if isinstance(old, tuple) else (old,)
            if new != held:
                new = tuple(map(rescaled, held, new))
                changes[field] = new if isinstance(old, tuple) else new[0]
        return replace(self, **changes) if changes else self


@cache
def _keeps_roles(cls: type) -> bool:
    """Whether nothing that the class with the statement of the roles defines is overridden below it.

    Be it a method or a class attribute: with another ``apply``, ``train`` or ``inexact``, what is stated may be wrong.
    """
    line = cls.__mro__
    k = next(k for k, kind in enumerate(line) if "roles" in vars(kind))
    below = {name for kind in line[:k] for name in vars(kind)}
    return not any(_computes(line[k], name) for name in below.intersection(dir(line[k])))


def _computes(cls: type[Layer], name: str) -> bool:
    """A name that says what a class computes: no field, and nothing that Python or ``dataclass`` writes."""
    return name == "__post_init__" or not (name.startswith("__") or name in {field.name for field in fields(cls)})


_WINDOW = ("kernel_size", "stride", "padding", "output_padding", "dilation", "output_size")
"""Fields of windows, in which one number stands for all axes."""

LAYERS: dict[str, type[Layer]] = {}
"""Every layer class by its name, for reading a spec back from JSON."""


def kind(cls: type[Layer]) -> str:
    """The name of a layer class in JSON: bare for our own, with its module for those from outside."""
    ours = cls.__module__.startswith("taylorfx.layers")
    return cls.__name__ if ours else f"{cls.__module__}.{cls.__qualname__}"


def as_tuple(layer: Layer, rank: int, *fields: str) -> None:
    """Store integer fields as tuples, as torch does, so that ``3`` and ``(3, 3)`` compare equal."""
    for field in fields:
        value = getattr(layer, field)
        try:
            numbers = tuple(map(operator.index, value if isinstance(value, (tuple, list)) else (value,) * rank))
        except TypeError:
            numbers = None
        if numbers is None or len(numbers) != rank:
            rule = f"{rank} whole numbers" if rank > 1 else "a whole number"
            raise ShapeError(f"{type(layer).__name__} takes {rule} for {field}; received {value!r}.")
        object.__setattr__(layer, field, numbers)


def known_dtype(layer: Layer, dtype: str | None) -> None:
    """Refuse what is no name of one of torch's dtypes."""
    if dtype is not None and not isinstance(getattr(torch, str(dtype), None), torch.dtype):
        name = type(layer).__name__
        raise ShapeError(f"{name} takes the name of one of torch's dtypes, such as 'int64'; received {dtype!r}.")


def positive(layer: Layer, sizes: Mapping[str, int]) -> Mapping[str, int]:
    """The sizes of an output, refused where a window does not fit into its input."""
    if min(sizes.values(), default=1) < 1:
        raise ShapeError(f"{layer} takes larger inputs: its output would be of size {tuple(sizes.values())}.")
    return sizes


def names(rank: int) -> list[str]:
    """Letters for the axes of a tensor whose rank is known only when it arrives."""
    return [f"x{k}" for k in range(rank)]


def broadcast(*shapes: Shape) -> str:
    """The signature of an elementwise operation on tensors that broadcast against each other, as torch's do.

    >>> broadcast((1, 8, 5, 5), (1, 8, 1, 1))
    'x0 x1 x2 x3, x0 x1 1 1 -> x0 x1 x2 x3'
    """
    rank = max(map(len, shapes))
    padded = [(1,) * (rank - len(shape)) + shape for shape in shapes]
    wide = [max(sizes) for sizes in zip(*padded, strict=True)]
    inputs: list[str] = []
    for shape in shapes:
        lead = rank - len(shape)
        inputs.append(" ".join("1" if n == 1 != wide[lead + k] else f"x{lead + k}" for k, n in enumerate(shape)))
    return f"{', '.join(inputs)} -> {' '.join(names(rank))}"


def uniform(shape: Shape, bound: float, generator: torch.Generator) -> Tensor:
    """Numbers uniform in ``[-bound, bound)``, drawn as ``torch.nn.init`` draws them."""
    return torch.empty(shape, device=generator.device).uniform_(-bound, bound, generator=generator)

"""Roles: what a pass needs to know of a layer beyond its axes. A layer states them, and a pass asks for them.

A pass asks ``layer.role(Mixing)`` and never for a class, so a layer from outside is treated like one of ours:

| role | the layer computes | asked for by |
| --- | --- | --- |
| `Mixing` | ``rows(y) = windows(x) @ matrix(weight) + bias`` | folding, repair, taps |
| `ChannelAffine` | ``scale * x + shift``, a number per channel | folding, the lean copy |
| `Normalizing` | a normalized channel times a parameter | the criterion `batchnorm_scale` |
| `RunningStatistics` | with estimates of mean and variance | `recalibrate`, repair of biases |
| `Pointwise` | a function of every number alone, with this derivative | taps, the lean copy |
| `Recomputed` | cheaply, from an input that torch keeps | taps |
| `Viewing`, `Slicing` | the same numbers along other axes; some positions of an axis | all rewrites |
| `Joining` | its inputs one after the other along an axis | the lean copy |
| `Noise` | its input; in training times random numbers | residual branches |
| `Sum`, `Product`, `Constant` | ``x + y``; ``x * y``; one of its parameters | folding, the lean copy |
| `Summing` | the sum over some axes | repair of experts |
| `Attending` | scaled dot-product attention | the lean copy |
| `Experts` | every row by the expert that was chosen for it | names of scopes, `reap`, repair of experts |
| `Memory` | (what torch allocates and keeps for it) | taps, the lean copy |

A role is stated by the method `Layer.roles` of one class. A subclass that overrides anything that this class defines
may compute something else: it has no role until it states its own. `taylorfx.testing.check_layer` runs every role that
a layer states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING

from torch import Tensor

from taylorfx.layers import axes

if TYPE_CHECKING:
    from taylorfx.layers.base import Layer

__all__ = [
    "Attending", "ChannelAffine", "Constant", "Experts", "Joining", "Memory", "Mixing", "Noise", "Normalizing",
    "Pointwise", "Product", "Recomputed", "Role", "RunningStatistics", "Slicing", "Sum", "Summing", "Viewing",
]  # fmt: skip

Leaves = Mapping[str, Tensor]
"""The tensors of one layer, by name: ``{"weight": ..., "bias": ...}``."""


@dataclass(frozen=True)
class Role:
    """One thing that a layer states of itself; the subclasses say what."""


@dataclass(frozen=True)
class Mixing(Role):
    """A matrix product of windows of the layer's only input, in ``g`` groups.

    ``rows(y) = windows(x) @ matrix(weight) + bias``: one row for every example and position of the output. Which axes
    are channels, and of what size, follows from the layer's signature and fields: in ``weight``, the letter that the
    input has and the output has not is that of the inputs (``i``), the reverse that of the outputs (``o``), one that
    both have counts groups (``g``), and all others are a window's.

    Attributes:
        layer: the layer itself.
        weight, bias: its parameters' names; it has no others.
        option: the layer's field that is true where it has a bias.
        unfold: the windows of an input, ``(rows, g, k)``, where they are more than its own rows (convolutions).

    >>> import torch
    >>> from taylorfx import layers as L
    >>> mixing = L.Conv2d(4, 6, 3, groups=2).role(Mixing)
    >>> x = torch.zeros(1, 4, 5, 5)
    >>> mixing.windows(x).shape, mixing.matrix(torch.zeros(6, 2, 3, 3)).shape  # 3 * 3 positions, 2 * 3 * 3 weights
    (torch.Size([9, 2, 18]), torch.Size([2, 18, 3]))
    """

    layer: Layer
    weight: str = "weight"
    bias: str = "bias"
    option: str = "bias"
    unfold: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def _signature(self) -> axes.Signature:
        text = self.layer.signature()
        assert text is not None, f"{self.layer.title} states that it mixes, so it has a signature"
        return axes.parse(text)

    @cached_property
    def letters(self) -> tuple[str, str, str | None]:
        """The letters of inputs and outputs, and of groups if there are any: ``("i", "o", "g")``."""
        source, target = (axes.letters(pattern) for pattern in (self._signature.inputs[0], self._signature.output))
        weight = axes.letters(self._signature.parameters[self.weight])
        (i,) = (x for x in weight if x in source and x not in target)
        (o,) = (x for x in weight if x in target and x not in source)
        return i, o, next((x for x in weight if x in target and x in source), None)

    @property
    def groups(self) -> int:
        """How many groups of channels there are that are mixed each alone."""
        group = self.letters[2]
        return 1 if group is None else self.layer.letters()[group]

    @property
    def input_axis(self) -> int:
        """The axis of the input's channels; counted from the end where the ones before it are not counted: ``-1``."""
        return _axis(self._signature.inputs[0], self.letters[0])

    @property
    def axis(self) -> int:
        """The axis of the output's channels, counted like `input_axis`."""
        return _axis(self._signature.output, self.letters[1])

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias, one number per channel of its output."""
        return self.bias in self._signature.parameters

    def with_bias(self) -> Layer:
        """The same layer with a bias."""
        return self.layer if self.has_bias else replace(self.layer, **{self.option: True})

    def rows(self, y: Tensor) -> Tensor:
        """The output as ``(rows, g, o)``: examples and positions, groups, channels of a group."""
        return _rows(y, self.axis, self.groups)

    def windows(self, x: Tensor) -> Tensor:
        """What the layer consumes for each row of its output, ``(rows, g, k)``."""
        return _rows(x, self.input_axis, self.groups) if self.unfold is None else self.unfold(x)

    def product(self, weight: Tensor, x: Tensor) -> Tensor:
        """``windows(x) @ matrix(weight)`` as the layer itself computes and shapes it: its value without a bias."""
        leaves = {self.weight: weight}
        if self.has_bias:
            leaves[self.bias] = weight.new_zeros(self.layer.shapes()[self.bias])
        return self.layer.apply(leaves, x)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as ``(g, k, o)``, where ``k`` runs over the inputs of a group, and the window of each.

        ::

            Conv2d   (g o) i K L  ->  g (i K L) o
            Linear       o i      ->  1    i    o
        """
        names, order, shape = self._layout
        split = weight.reshape([shape[name] for name in names])
        return split.permute([names.index(name) for name in order]).reshape(self.groups, -1, shape[self.letters[1]])

    def as_weight(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The reverse of `matrix`, in the shape, dtype and device of ``like``."""
        names, order, shape = self._layout
        split = matrix.reshape([shape[name] for name in order])
        return split.permute([order.index(name) for name in names]).reshape(like.shape).to(like)

    def scaled(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The weight with which every channel of the output is ``scale`` times what it was, ``scale`` ``(g o,)``.

        ::

            Linear            o i    scale  o    ->  o 1
            ConvTranspose1d  (g i) o K      (g o)    (g i) o 1
        """
        (names, _, shape), (_, o, g) = self._layout, self.letters
        outputs = [o] if g is None else [g, o]  # as they stand in the scale
        order = [outputs.index(name) for name in names if name in outputs]
        spread = scale.reshape([shape[name] for name in outputs]).permute(order)
        spread = spread.reshape([shape[name] if name in outputs else 1 for name in names])
        sizes: list[list[int]] = []  # of every axis of the weight its letters', where one of them is an output's
        for axis in self._signature.parameters[self.weight]:
            inside = axes.letters(axes.Pattern([axis]))
            sizes.append([1 if set(outputs).isdisjoint(inside) else shape[name] for name in inside])
        return weight * spread.expand([*chain.from_iterable(sizes)]).reshape([*map(math.prod, sizes)])

    @cached_property
    def _layout(self) -> tuple[list[str], list[str], Mapping[str, int]]:
        """The letters of the weight, those of `matrix` (groups, inputs, windows, outputs), and their sizes."""
        names = list(axes.letters(self._signature.parameters[self.weight]))
        i, o, g = self.letters
        window = [name for name in names if name not in self.letters]
        return names, [*([] if g is None else [g]), i, *window, o], self.layer.letters()


def _axis(pattern: axes.Pattern, letter: str) -> int:
    (axis,) = (k for k, products in enumerate(pattern) if any(letter in product for product in products))
    return axis - len(pattern) if axes.ELLIPSIS in pattern[:axis] else axis


def _rows(x: Tensor, axis: int, groups: int) -> Tensor:
    """``(N, (g c), ...)`` or ``(N, ..., (g c))`` as ``(rows, g, c)``."""
    return x.movedim(axis, -1).reshape(-1, groups, x.shape[axis] // groups)


@dataclass(frozen=True)
class ChannelAffine(Role):
    """``scale * x + shift`` in inference, a number per channel of axis 1.

    Attributes:
        numbers: scale and shift, ``(channels,)`` each, of the layer's parameters.

    >>> import torch
    >>> from taylorfx import layers as L
    >>> norm = L.BatchNorm2d(2, eps=0.0)
    >>> leaves = {"weight": torch.ones(2), "bias": torch.zeros(2), "running_mean": torch.ones(2),
    ...           "running_var": torch.tensor([4.0, 1.0]), "num_batches_tracked": torch.tensor(0)}
    >>> norm.role(ChannelAffine).numbers(leaves)
    (tensor([0.5000, 1.0000]), tensor([-0.5000, -1.0000]))
    """

    numbers: Callable[[Leaves], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Normalizing(Role):
    """Every channel of axis 1 is normalized and then multiplied by its own number in the parameter ``scale``.

    >>> from taylorfx import layers as L
    >>> L.BatchNorm2d(2).role(Normalizing), L.BatchNorm2d(2, affine=False).role(Normalizing)
    (Normalizing(scale='weight'), None)
    """

    scale: str = "weight"


@dataclass(frozen=True)
class RunningStatistics(Role):
    """The layer subtracts a mean per channel of axis 1 and divides by a deviation, both estimated in training.

    Attributes:
        average: the same layer whose training makes the estimates plain averages over all batches since they were zero
            (``momentum=None`` in torch).
        mean: the buffer of the means; a sum that is subtracted from it is added to the input.
        variance: the buffer of the variances.

    >>> from taylorfx import layers as L
    >>> L.BatchNorm2d(2).role(RunningStatistics).average
    BatchNorm2d(num_features=2, eps=1e-05, momentum=None, affine=True, track_running_stats=True)
    """

    average: Layer
    mean: str = "running_mean"
    variance: str = "running_var"


@dataclass(frozen=True)
class Pointwise(Role):
    """A function of every number of its only input alone.

    Attributes:
        slope: ``slope(kept, gradient, over)`` is the gradient by the input; with ``over`` it is written over
            ``gradient``. What is kept is the input, or, where the value can be written over it, the value as well.
        overwrite: writes the value over the input and returns it; ``None`` where the derivative needs the input.

    >>> import torch
    >>> from taylorfx import layers as L
    >>> relu = L.ReLU().role(Pointwise)
    >>> relu.slope(torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 3.0]), False)
    tensor([0., 3.])
    """

    slope: Callable[[Tensor, Tensor, bool], Tensor]
    overwrite: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class Recomputed(Role):
    """Torch keeps the layer's only input for the derivative, and `apply` makes the value again with little work.

    Axis 0 stays where it is, and its positions are treated each alone.

    >>> from taylorfx import layers as L
    >>> L.GELU().role(Recomputed), L.Linear(2, 2).role(Recomputed)
    (Recomputed(), None)
    """


@dataclass(frozen=True)
class Viewing(Role):
    """The numbers of its only input along other axes: a view of a contiguous one.

    Attributes:
        dims: the order of the input's axes, the example axis counted, if that is all that changes.

    >>> from taylorfx import layers as L
    >>> L.Permute((0, 2, 1)).role(Viewing), L.Flatten().role(Viewing)
    (Viewing(dims=(0, 2, 1)), Viewing(dims=None))
    """

    dims: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Slicing(Role):
    """The positions ``start`` to ``stop`` (not included) of axis ``dim`` of its only input.

    >>> from taylorfx import layers as L
    >>> L.Slice(1, 0, 3).role(Slicing)
    Slicing(dim=1, start=0, stop=3)
    """

    dim: int
    start: int
    stop: int


@dataclass(frozen=True)
class Joining(Role):
    """Its inputs one after the other along axis ``dim``.

    >>> from taylorfx import layers as L
    >>> L.Concat(1).role(Joining)
    Joining(dim=1)
    """

    dim: int


@dataclass(frozen=True)
class Noise(Role):
    """Its only input; in training perhaps times random numbers. So zero stays zero.

    >>> from taylorfx import layers as L
    >>> L.Dropout().role(Noise), L.Dropout(alpha=True).role(Noise)
    (Noise(), None)
    """


@dataclass(frozen=True)
class Sum(Role):
    """The sum of its inputs, broadcast against each other; its derivative needs none of them.

    >>> from taylorfx import layers as L
    >>> L.Add().role(Sum), L.Multiply().role(Sum)
    (Sum(), None)
    """


@dataclass(frozen=True)
class Summing(Role):
    """The sum over the axes ``dims`` of its only input, the example axis counted.

    >>> from taylorfx import layers as L
    >>> L.Reduce("sum", (2,)).role(Summing), L.Reduce("mean", (2,)).role(Summing)
    (Summing(dims=(2,)), None)
    """

    dims: tuple[int, ...]


@dataclass(frozen=True)
class Product(Role):
    """The product of its inputs, broadcast against each other.

    >>> from taylorfx import layers as L
    >>> L.Multiply().role(Product)
    Product()
    """


@dataclass(frozen=True)
class Constant(Role):
    """One of its parameters as it is, whatever the network's inputs.

    >>> from taylorfx import layers as L
    >>> L.Parameter((2, 3)).role(Constant), L.Parameter((2, 3), expand=True).role(Constant)
    (Constant(parameter='value'), None)
    """

    parameter: str = "value"


@dataclass(frozen=True)
class Attending(Role):
    """``torch.nn.functional.scaled_dot_product_attention`` of queries, keys, values and perhaps a mask.

    Attributes:
        scale: what the scores are multiplied by.
        causal: a query attends to no later position.
        grouped: a head of keys serves several of queries.

    >>> from taylorfx import layers as L
    >>> L.ScaledDotProduct(0.5, causal=True).role(Attending)
    Attending(scale=0.5, causal=True, grouped=False)
    """

    scale: float
    causal: bool = False
    grouped: bool = False


@dataclass(frozen=True)
class Experts(Role):
    """Each row of the output is made by one of several experts alone, which a router has chosen.

    Attributes:
        letter: along which the experts lie in the signature.
        numbers: of the layer's inputs, the number of the expert of each row, in the output's shape without its last
            axis; -1 for a row of zeros that none makes. The rows of one position lie along the second to last axis of
            the output.
        slot: the number of the input ``x`` ``(..., i)`` whose rows are multiplied by the matrices, where that is all
            that the experts do: ``y = x @ matrices(weight)[number]``. Otherwise ``None``.
        weight: the parameter of the matrices.
        transposed: it lies as ``(e, i, o)``, otherwise as ``(e, o, i)``.

    >>> import torch
    >>> from taylorfx import layers as L
    >>> experts = L.ExpertLinear(num_experts=3, in_features=4, out_features=5, top_k=2).role(Experts)
    >>> experts.numbers(torch.ones(1, 3), torch.tensor([[2.0, 0.5, 1.0]]), torch.zeros(1, 2, 4))
    tensor([[0, 2]])
    """

    letter: str
    numbers: Callable[..., Tensor]
    slot: int | None = None
    weight: str = "weight"
    transposed: bool = False

    def matrices(self, weight: Tensor) -> Tensor:
        """The matrices as ``(e, i, o)``, or these as they lie in the parameter: the same turn both ways."""
        return weight if self.transposed else weight.mT


@dataclass(frozen=True)
class Memory(Role):
    """What torch allocates and keeps where a layer is differentiated by its only input, and not by its parameters.

    Attributes:
        keeps_input: the derivative needs the input, or torch keeps it anyway.
        new_value: the value is no view of another tensor, and the derivative does not need it: it may be written over.
        new_gradient: the gradient by the input is a new tensor, which nothing else uses.
        channels_last: faster where input and weight have that memory format of images.

    >>> from taylorfx import layers as L
    >>> L.Linear(2, 2).role(Memory)
    Memory(keeps_input=False, new_value=False, new_gradient=True, channels_last=False)
    """

    keeps_input: bool = True
    new_value: bool = False
    new_gradient: bool = False
    channels_last: bool = False

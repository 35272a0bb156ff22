"""Which field of a config holds which axis of which parameter, found out by trying.

Nothing is known of a class of models or of its config. The class is built without memory (on the device ``meta``) from
the config, then from the config with one number changed, and the shapes of all parameters are compared:

    intermediate_size 24 -> 25      up.weight (24, 16) -> (25, 16), down.weight (16, 24) -> (16, 25), of all layers
    num_attention_heads 4 -> 5      q.weight (16, 16) -> (20, 16), o.weight (16, 16) -> (16, 20)
    head_dim 4 -> 5                 q.weight (16, 16) -> (20, 16), k.weight (8, 16) -> (10, 16), ...

So every axis is known to be a linear function of some fields, and smaller shapes are solved for the fields' values. A
shape says nothing but the product of heads and their dimensions: there may be several solutions.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, product
from typing import Any, NamedTuple

import torch
from torch import nn

from taylorfx.layers import Shape

__all__ = [
    "Axis", "Changes", "ConfigError", "Field", "Form", "Number", "Shapes", "check_model", "config_of", "library",
    "no_size", "numbers_of", "refusal", "set_fields", "shapes_of",
]  # fmt: skip

Key = tuple[str | int, ...]
"""The place of a number in a config, which may contain other configs and lists."""

Number = int | float

Changes = Mapping[Key, Number]
"""New values of fields."""

Axis = tuple[str, int]
"""An axis of a parameter: the parameter's path and the number of the axis."""

Line = tuple[float, float]
"""Slope and offset."""

Shapes = Mapping[str, Shape]

UNSET = (6, 12)
"""What is tried for fields that are not set, as ``n_inner`` of GPT-2."""

UNLISTED = ("head_dim",)
"""Fields that a config need not have, and that classes look for, as a ViT: ``getattr(config, "head_dim", ...)``."""

IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")
"""What a config says about how its model computes, and writes into no file."""

LIMIT = 500
"""How many solutions are built at most."""


class ConfigError(ValueError):
    """A network that no config of the model's class describes; the message names the fields."""


def library(name: str = "transformers") -> Any:
    """The library, which is imported only when it is needed.

    Raises:
        ImportError: says how to install it.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(
            "taylorfx.interop.huggingface needs the library transformers, which is not installed; "
            "pip install 'taylorfx[transformers]'."
        ) from error


def check_model(model: object) -> None:
    """Refuse what is no model of transformers, and so has no config.

    Raises:
        ConfigError: says what to do.
    """
    if isinstance(model, library().PreTrainedModel):
        return
    advice = "Use taylorfx.from_torch, and taylorfx.to_torch with like= or taylorfx.save."
    if hasattr(model, "merge_and_unload"):
        advice = (
            "Merge the adapter first, model.merge_and_unload(), which gives one; or prune it together with its "
            "adapter: taylorfx.from_torch, taylorfx.interop.holdable, and taylorfx.to_torch with like=."
        )
    raise ConfigError(
        f"A model of transformers has a config, by which it is saved; received a {type(model).__name__}. {advice}"
    )


class Field(NamedTuple):
    """A number of a config.

    Attributes:
        axes: for every axis that it sets, the slope and the offset: the axis has ``slope * value + offset`` positions.
    """

    key: Key
    value: Number
    axes: Mapping[Axis, Line]

    @property
    def name(self) -> str:
        """``text_config.hidden_size``."""
        return ".".join(map(str, self.key))

    def wanted(self, axis: Axis, size: int) -> list[Number]:
        """The values with which the axis has this size, if the other fields stay as they are.

        >>> heads = Field(("num_heads",), 4, {("q.weight", 0): (8.0, 0.0)})
        >>> heads.wanted(("q.weight", 0), 24), heads.wanted(("q.weight", 0), 20)
        ([3], [])
        """
        slope, offset = self.axes[axis]
        if isinstance(self.value, float):  # a share, of which the class takes the whole part
            return [(size - offset) / slope, (size - offset + 0.5) / slope]
        value = round((size - offset) / slope)
        return [value] if value > 0 and abs(slope * value + offset - size) < 1e-6 else []

    def proportional(self, axis: Axis) -> bool:
        """Whether the axis is the field times something."""
        return abs(self.axes[axis][1]) < 1e-6


@dataclass(eq=False)
class Form:
    """A class of models and a config of it.

    Attributes:
        cls: the class.
        config: a config, which is left as it is.
    """

    cls: Any
    config: Any
    _known: dict[tuple[tuple[Key, Number], ...], Shapes | None] = field(default_factory=dict)

    def changed(self, changes: Changes) -> Any:
        """A config with these fields, made as if it were read from a file."""
        data = self.config.to_dict()
        set_fields(data, changes)
        return config_of(self.config, data)

    def shapes(self, changes: Changes) -> Shapes | None:
        """The shapes of all tensors of a model with these fields, by path; None if the class refuses them."""
        key = tuple(sorted(changes.items(), key=str))
        if key not in self._known:
            try:
                self._known[key] = shapes_of(self.build(changes, "meta"))
            except Exception:  # whatever the class's own code raises
                self._known[key] = None
        return self._known[key]

    def build(self, changes: Changes, device: str) -> nn.Module:
        """A model of the class with these fields; its parameters have no values yet."""
        config, quiet = self.changed(changes), library("transformers.initialization")
        context: AbstractContextManager[object] = quiet.no_init_weights()
        with torch.device(device), context:
            model: nn.Module = self.cls(config)
        return model.eval()

    @cached_property
    def implied(self) -> Changes:
        """What the fields stand for that are not set, and that set an axis: ``n_inner`` of GPT-2 for ``4 * n_embd``.

        Raises:
            ConfigError: if the class cannot be built from its config.
        """
        usual = self.shapes({})
        if usual is None:
            raise ConfigError(f"{self.cls.__name__} cannot be built from its own config, {type(self.config).__name__}.")
        implied: dict[Key, Number] = {}
        data = self.config.to_dict()
        unset = [key for key, value in numbers_of(data) if value is None]
        for key in [*unset, *((name,) for name in UNLISTED if name not in data)]:
            points: dict[Number, Shapes] = {n: x for n in UNSET if (x := self.shapes({key: n})) is not None}
            lines = _lines(points) if len(points) > 1 else {}
            values = {(usual[path][k] - offset) / slope for (path, k), (slope, offset) in lines.items()}
            value = round(values.pop()) if len(values) == 1 else 0
            if value > 0 and self.shapes({**implied, key: value}) == usual:
                implied[key] = value
        return implied

    @cached_property
    def fields(self) -> Sequence[Field]:
        """The fields that set an axis, with what those stand for that are not set."""
        data = self.config.to_dict()
        set_fields(data, self.implied)
        tried = (self._field(key, value) for key, value in numbers_of(data) if value is not None)
        return [x for x in tried if x.axes]

    def _field(self, key: Key, value: Number) -> Field:
        """A field, and the axes that are linear in it."""

        def points(values: Iterable[Number]) -> dict[Number, Shapes]:
            return {n: x for n in values if (x := self.shapes({**self.implied, key: n})) is not None}

        lines = _lines(points((value, *_others(value))))
        if isinstance(value, int) and lines and min(slope for slope, _ in lines.values()) > 1:
            finer = points((value, value + 0.5))  # some take a share where they have a whole number
            if lines.keys() == _lines(finer).keys():
                value = float(value)
        return Field(key, value, lines)

    def solutions(self, target: Shapes) -> Iterator[Changes]:
        """New values of fields with which the class has these shapes, those that change the fewest fields first.

        Raises:
            ConfigError: if an axis that has to change is set by no field, or a field had to have several values.
        """
        usual = self.shapes({}) or {}
        wanted = {
            (path, k): size
            for path, shape in target.items()
            if path in usual
            for k, size in enumerate(shape)
            if len(shape) == len(usual[path])
        }
        sizes = {(path, k): n for path, shape in usual.items() for k, n in enumerate(shape)}
        changed = {axis for axis, size in wanted.items() if size != sizes[axis]}
        if not changed:
            yield {}
            return
        setters = {axis: [x for x in self.fields if axis in x.axes] for axis in wanted}
        self._refuse(changed, setters, wanted, sizes)
        options = [_options(x, setters, wanted, sizes) for x in self.fields]
        combined = sorted(
            islice((x for x in product(*options) if _plausible(self.fields, x, setters, wanted, sizes)), 20 * LIMIT),
            key=lambda values: sum(new != x.value for new, x in zip(values, self.fields, strict=True)),
        )
        for values in combined[:LIMIT]:
            new = {x.key: value for x, value in zip(self.fields, values, strict=True) if value != x.value}
            changes = {**self.implied, **new}
            shapes = self.shapes(changes)
            if shapes is not None and all(shapes.get(path) == tuple(shape) for path, shape in target.items()):
                yield changes

    def _refuse(
        self,
        changed: Iterable[Axis],
        setters: Mapping[Axis, Sequence[Field]],
        wanted: Mapping[Axis, int],
        sizes: Mapping[Axis, int],
    ) -> None:
        """Refuse what no values of the fields can be, with all of the causes."""
        lines = [
            f"{path} has {wanted[path, k]} along its axis {k} instead of {sizes[path, k]}, which no field sets"
            for path, k in sorted(changed)
            if not setters[path, k]
        ]
        for x in self.fields:
            alone = [axis for axis in wanted if setters[axis] == [x]]
            demands: dict[int, list[Axis]] = {}
            for axis in alone:
                slope, offset = x.axes[axis]
                demands.setdefault(round((wanted[axis] - offset) / slope * 1e4), []).append(axis)
            values = (
                {f"{v:g}" for axis in axes for v in x.wanted(axis, wanted[axis])[:1]} for axes in demands.values()
            )
            if len(demands) > 1 and not isinstance(x.value, float):
                said = "; ".join(
                    f"{' or '.join(sorted(numbers)) or f'{key / 1e4:g}'} for {axes[0][0]}"
                    for (key, axes), numbers in zip(demands.items(), values, strict=True)
                )
                lines.append(f"{x.name} is one number for {len(alone)} axes, and would have to be {said}")
        if lines:
            raise ConfigError(refusal(self.cls, self.config, lines))


def refusal(cls: Any, config: object, lines: Sequence[str]) -> str:
    """Why no config describes a network, and what to do."""
    shown = [*lines[:8], *[f"and {len(lines) - 8} more"] * (len(lines) > 8)]
    return (
        f"No {type(config).__name__} describes {cls.__name__} with these layers:\n  "
        + "\n  ".join(shown)
        + "\ntaylorfx.interop.huggingface.holdable(model, params, spec) gives constraints for `prune` under which "
        "there is one; with per_layer=True layers may differ. taylorfx.to_torch and taylorfx.save keep any network."
    )


def shapes_of(model: nn.Module) -> Shapes:
    """The shapes of what a model saves."""
    return {path: tuple(x.shape) for path, x in model.state_dict().items()}


def config_of(config: Any, data: Any) -> Any:
    """A config like this one, with other entries."""
    new = type(config).from_dict(data)
    for name in IMPLEMENTATIONS:
        if getattr(config, name, None) is not None:
            setattr(new, name, getattr(config, name))
    return new


def set_fields(data: Any, changes: Changes) -> None:
    """Write new values into a config that is a dict.

    >>> data = {"text_config": {"hidden_size": 8}, "depths": [2, 2]}
    >>> set_fields(data, {("text_config", "hidden_size"): 6, ("depths", 1): 3})
    >>> data
    {'text_config': {'hidden_size': 6}, 'depths': [2, 3]}
    """
    for (*parents, last), value in changes.items():
        place = data
        for name in parents:
            place = place[name]
        place[last] = value


def numbers_of(data: Any, prefix: Key = ()) -> Iterator[tuple[Key, Number | None]]:
    """The numbers of a config that is a dict, and what is not set.

    >>> [*numbers_of({"hidden_size": 8, "tie": True, "depths": [2, 3], "n_inner": None, "name": "x"})]
    [(('hidden_size',), 8), (('depths', 0), 2), (('depths', 1), 3), (('n_inner',), None)]
    """
    entries = data.items() if isinstance(data, Mapping) else enumerate(data)
    for name, value in entries:
        if no_size(name) or (isinstance(name, int) and isinstance(data, Mapping)):
            continue
        if isinstance(value, (Mapping, list)):
            yield from numbers_of(value, (*prefix, name))
        elif value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0):
            yield (*prefix, name), value


def no_size(name: str | int) -> bool:
    """Whether an entry of a config is known to be no size, nor to say anything of single layers."""
    return name in NO_SIZES or str(name).endswith("_token_id")


NO_SIZES = frozenset(
    {"architectures", "dtype", "problem_type", "id2label", "label2id", "transformers_version", "rope_parameters"}
)
"""Entries that every config has or may have, and that are no sizes."""


def _others(value: Number) -> tuple[Number, ...]:
    """Other values to try for a field."""
    if isinstance(value, float):
        return (2 * value,)
    return (value + 1, 2 * value, *((value // 2,) if value % 2 == 0 else ()))


def _lines(points: Mapping[Number, Shapes]) -> dict[Axis, Line]:
    """The axes that are linear in a field, by the shapes at some values of it.

    >>> _lines({4: {"q": (32, 16)}, 5: {"q": (40, 16)}, 8: {"q": (64, 16)}})
    {('q', 0): (8.0, 0.0)}
    >>> _lines({4: {"q": (32, 16)}, 5: {"q": (30, 16)}, 8: {"q": (32, 16)}})  # 32 // heads * heads
    {}
    """
    lines: dict[Axis, Line] = {}
    if len(points) < 2:
        return lines
    (a, first), (b, _), *_ = points.items()
    for path in first:
        shapes = [shapes.get(path, ()) for shapes in points.values()]
        if len({*map(len, shapes)}) > 1:
            continue
        for k, sizes in enumerate(zip(*shapes, strict=True)):
            slope = (sizes[1] - sizes[0]) / (b - a)
            offset = sizes[0] - slope * a
            if slope and all(abs(slope * n + offset - size) < 1 for n, size in zip(points, sizes, strict=True)):
                lines[path, k] = slope, offset
    return lines


def _options(
    x: Field, setters: Mapping[Axis, Sequence[Field]], wanted: Mapping[Axis, int], sizes: Mapping[Axis, int]
) -> list[Number]:
    """What a field may become: what an axis says that it alone sets, or anything that divides the axes."""
    axes = [axis for axis in x.axes if axis in wanted]
    alone = next((axis for axis in axes if len(setters[axis]) == 1), None)
    if alone is not None:
        if wanted[alone] == sizes[alone]:
            return [x.value]
        return [*x.wanted(alone, wanted[alone])]
    moving = [axis for axis in axes if wanted[axis] != sizes[axis]]
    numbers: dict[Number, None] = {x.value: None}
    for axis in moving:
        numbers.update(dict.fromkeys(x.wanted(axis, wanted[axis])))
    if isinstance(x.value, int):
        for n in range(x.value - 1, 0, -1):
            if any(wanted[axis] % n == 0 and x.proportional(axis) for axis in moving):
                numbers[n] = None
    return [*numbers][:32]


def _plausible(
    fields: Sequence[Field],
    values: Sequence[Number],
    setters: Mapping[Axis, Sequence[Field]],
    wanted: Mapping[Axis, int],
    sizes: Mapping[Axis, int],
) -> bool:
    """Whether axes that are products of fields have the sizes that are wanted, before anything is built."""
    new = {x.key: value for x, value in zip(fields, values, strict=True)}
    for axis, several in setters.items():
        if len(several) > 1 and all(x.proportional(axis) and isinstance(x.value, int) for x in several):
            factor = math.prod(new[x.key] / x.value for x in several)
            if abs(sizes[axis] * factor - wanted[axis]) > 1e-6:
                return False
    return True

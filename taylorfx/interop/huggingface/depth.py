"""Which field of a config counts which layers, found out by trying, and configs of fewer layers.

A model keeps its layers in numbered parts. The class is built without memory from the config with one layer less, and
those whose last part is gone are counted by that field::

    num_hidden_layers 3 -> 2      model.layers.2.mlp.up_proj.weight and all others of model.layers.2 are gone

Where layers in between leave, the others move up: of three without the second, ``model.layers.2`` becomes
``model.layers.1``. What a config says of every layer, in a list as ``layer_types`` or by its number, and of some, as
``mlp_only_layers`` and ``first_k_dense_replace`` do, is said of those that stay.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple

from taylorfx.interop.huggingface.fields import Form, Key, config_of, no_size, numbers_of

FIRST = {"first_k_dense_replace", "max_window_layers", "moe_layer_start_index", "num_dense_layers"}
"""Fields that say of how many of the first layers something is true."""

__all__ = ["Layers", "Stack", "shallower", "stacks_of"]


class Stack(NamedTuple):
    """Layers that one field counts.

    Attributes:
        key: the field.
        size: its value.
        homes: the paths of the modules whose numbered parts they are: ``model.layers``. Encoder and decoder, if they
            have one field together.
    """

    key: Key
    size: int
    homes: tuple[str, ...]

    def layer(self, path: str) -> int | None:
        """The number of the layer in which a parameter is.

        >>> Stack(("num_layers",), 3, ("model.layers",)).layer("model.layers.2.mlp.up_proj.weight")
        2
        """
        for home in self.homes:
            if path.startswith(f"{home}."):
                number = path.removeprefix(f"{home}.").partition(".")[0]
                return int(number) if number.isdecimal() else None
        return None

    def common(self, paths: Collection[str]) -> dict[int, list[str]]:
        """Of these paths by layer those of parameters that every layer has.

        Not so the table of relative positions of a T5, which its first layer has for all.

        >>> stack = Stack(("n_layer",), 2, ("h",))
        >>> stack.common(["h.0.up", "h.0.positions", "h.1.up", "head"])
        {0: ['h.0.up'], 1: ['h.1.up']}
        """
        by_layer: dict[int, dict[tuple[str, str], str]] = {k: {} for k in range(self.size)}
        for home in self.homes:
            for path in (path for path in paths if path.startswith(f"{home}.")):
                number, _, rest = path.removeprefix(f"{home}.").partition(".")
                if number.isdecimal():
                    by_layer[int(number)][home, rest] = path
        shared = set.intersection(*(set(names) for names in by_layer.values()))
        return {k: [path for name, path in names.items() if name in shared] for k, names in by_layer.items()}


@dataclass(frozen=True, eq=False)
class Layers:
    """A form of fewer layers.

    Attributes:
        form: the class and its config.
        stay: by stack, the old numbers of the layers that stay, in order; stacks that lose none are not in it.
    """

    form: Form
    stay: Mapping[Stack, Sequence[int]]

    def former(self, path: str, paths: Collection[str]) -> str:
        """The path that a parameter had among these paths of all layers.

        What a layer did not have keeps its path: the table of relative positions of a T5, that of the first layer.
        """
        old = path
        for stack, stay in self.stay.items():
            for home in stack.homes:
                if path.startswith(f"{home}."):
                    number, _, rest = path.removeprefix(f"{home}.").partition(".")
                    old = f"{home}.{stay[int(number)]}.{rest}"
        return old if old in paths else path


def stacks_of(form: Form) -> list[Stack]:
    """The layers of a model, by the fields that count them; single layers, which never leave, are left out."""
    usual, stacks = form.shapes({}) or {}, list[Stack]()
    for key, count in numbers_of(form.config.to_dict()):
        if not isinstance(count, int) or count < 2 or not (homes := _homes(usual, count)):
            continue
        for fewer in shallower(form, {Stack(key, count, ()): range(count - 1)}):
            gone = usual.keys() - (fewer.form.shapes({}) or usual).keys()
            there = usual.keys() - gone
            lost = [home for home in homes if not any(path.startswith(f"{home}.{count - 1}.") for path in there)]
            lost = [home for home in lost if not any(home.startswith(f"{other}.") for other in lost)]  # inside a layer
            if lost and all(any(path.startswith(f"{home}.{count - 1}.") for home in lost) for path in gone):
                stacks.append(Stack(key, count, tuple(lost)))
                break
    return stacks


def _homes(paths: Iterable[str], count: int) -> list[str]:
    """The paths of modules that have this many numbered parts.

    >>> _homes(["h.0.up", "h.1.up", "h.1.norms.0", "head"], 2)
    ['h']
    """
    parts: dict[str, set[int]] = {}
    for path in paths:
        names = path.split(".")
        for k, name in enumerate(names):
            if name.isdecimal():
                parts.setdefault(".".join(names[:k]), set()).add(int(name))
    return [home for home, numbers in parts.items() if numbers == {*range(count)}]


def shallower(form: Form, stay: Mapping[Stack, Sequence[int]]) -> Iterator[Layers]:
    """Configs with which the class has these layers only, if it is one of them: the more likely ones first.

    Lists of as many entries as there are layers say something of each, or happen to have that length.
    """
    data = [form.config.to_dict() for _ in range(2)]
    for one, by_layer in zip(data, (True, False), strict=True):
        for stack, layers in stay.items():
            _shorten(one, stack, layers, by_layer=by_layer)
    for one in data[: 1 if data[0] == data[1] else 2]:
        try:
            yield Layers(Form(form.cls, config_of(form.config, one)), stay)
        except Exception:  # whatever the config's own code raises
            continue


def _shorten(data: Any, stack: Stack, stay: Sequence[int], *, by_layer: bool) -> None:
    """Write the number of layers into a config that is a dict, and beside it what is said of those that stay.

    >>> data = {"num_layers": 3, "layer_types": ["full", "sliding", "full"], "eos_token_id": [3, 4, 5]}
    >>> _shorten(data, Stack(("num_layers",), 3, ()), (1, 2), by_layer=True)
    >>> data
    {'num_layers': 2, 'layer_types': ['sliding', 'full'], 'eos_token_id': [3, 4, 5]}
    >>> data = {"num_layers": 4, "mlp_only_layers": [3], "decoder_sparse_step": 2, "first_k_dense_replace": 2}
    >>> _shorten(data, Stack(("num_layers",), 4, ()), (1, 2, 3), by_layer=True)
    >>> data
    {'num_layers': 3, 'mlp_only_layers': [1, 2], 'decoder_sparse_step': 1, 'first_k_dense_replace': 1}
    """
    *parents, last = stack.key
    place = reduce(lambda inner, name: inner[name], parents, data)
    if by_layer and isinstance(place, dict):
        if place.get("mlp_only_layers") is not None and (step := place.get("decoder_sparse_step") or 1) > 1:
            dense = [k for k in range(stack.size) if k in place["mlp_only_layers"] or (k + 1) % step]
            place["mlp_only_layers"], place["decoder_sparse_step"] = dense, 1
        for name, value in place.items():
            if name in FIRST and isinstance(value, int) and value < stack.size:
                place[name] = sum(k < value for k in stay)
            elif name.endswith("_only_layers") and isinstance(value, list):
                place[name] = [n for n, k in enumerate(stay) if k in value]
            elif no_size(name):
                continue
            elif isinstance(value, (list, tuple)) and len(value) == stack.size:
                place[name] = [value[k] for k in stay]
            elif isinstance(value, dict) and value and all(str(k).isdecimal() for k in value):
                known = {int(k): x for k, x in value.items()}
                place[name] = {type(next(iter(value)))(n): known[k] for n, k in enumerate(stay) if k in known}
    place[last] = len(stay)

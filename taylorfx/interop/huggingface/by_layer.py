"""Configs of models whose layers differ, by ``per_layer_config``.

Each layer is solved as if it were the only one. What all of them want becomes the number of the whole model, and what
they want differently stands beside it, layer by layer:

    layer 0: hidden_size 14, intermediate_size 20        hidden_size 14, intermediate_size 24,
    layer 1: hidden_size 14, intermediate_size 24        per_layer_config {0: {intermediate_size: 20}}

A class that builds its layers by these configs is taken as it is; of any other, `unequal` makes one that does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache, reduce
from itertools import islice
from pathlib import Path
from typing import Any

from taylorfx.interop.huggingface import modeling_unequal
from taylorfx.interop.huggingface.depth import Stack
from taylorfx.interop.huggingface.fields import Changes, Form, Number, Shapes, config_of, library, set_fields

__all__ = ["add_code", "differing"]

SOLUTIONS = 8
"""How many solutions of a layer are looked at."""

unequal = cache(modeling_unequal.unequal)


def differing(form: Form, stack: Stack, target: Shapes) -> Iterator[Form]:
    """Forms with which a class has layers of these shapes, those in which the fewest fields differ first.

    Raises:
        ConfigError: if not even one layer by itself can have its shapes.
    """
    numbers = {path: stack.layer(path) for path in target}
    outside = {path: target[path] for path, k in numbers.items() if k is None}
    inside = {k: {path: target[path] for path, n in numbers.items() if n == k} for k in range(stack.size)}
    usual, known, solved = form.shapes({}) or {}, dict[object, list[Changes]](), dict[int, list[Changes]]()
    for k, own in inside.items():
        like = frozenset((path.replace(f".{k}.", ".", 1), shape, usual.get(path)) for path, shape in own.items())
        if like not in known:
            known[like] = [*islice(form.solutions({**outside, **own}), SOLUTIONS)]
        solved[k] = known[like]
    ways = {frozenset(changes) for several in solved.values() for changes in several}
    for keys in sorted({one | other for one in ways for other in ways}, key=lambda keys: (len(keys), sorted(keys))):
        chosen = {k: [x for x in several if x.keys() <= keys][:1] for k, several in solved.items()}
        if all(chosen.values()):
            yield from _forms(form, stack, {k: changes for k, (changes,) in chosen.items()}, target)


def _forms(form: Form, stack: Stack, by_layer: Mapping[int, Changes], target: Shapes) -> Iterator[Form]:
    """The class with these changes of each layer, if it has the shapes then: as it is, or built layer by layer."""
    shared: dict[Any, Number] = {}
    own: dict[int, dict[str, Number]] = {k: {} for k in by_layer}
    for x in form.fields:
        layers = {k for path, _ in x.axes if (k := stack.layer(path)) is not None and k in by_layer} or {*by_layer}
        values = {k: by_layer[k].get(x.key, x.value) for k in layers}
        shared[x.key] = max(values.values())
        if len({*values.values()}) > 1:
            if x.key[:-1] != stack.key[:-1]:
                return
            for k, value in values.items():
                own[k][str(x.key[-1])] = value
    data = form.config.to_dict()
    set_fields(data, {**form.implied, **shared})
    place = reduce(lambda inner, name: inner[name], stack.key[:-1], data)
    for k, known in place.get("per_layer_config", {}).items():
        own[int(k)] = {**known, **own[int(k)]}
    place["per_layer_config"] = {k: values for k, values in own.items() if values}
    config = _config(form, data, place)
    for cls in (form.cls, unequal(form.cls)) if config is not None else ():
        if (new := Form(cls, config)).shapes({}) == target:
            yield new
            return


def _config(form: Form, data: Any, place: Any) -> Any:
    """A config with these entries; None if there is none.

    Some look at the number of the whole model when they are made, as that of a Llama, and have to be allowed to.
    """
    for allowed in ({}, {"allow_global_per_layer_attribute_access": True}):
        place.update(allowed)
        try:
            return config_of(form.config, data)
        except Exception:  # whatever the config's own code raises
            continue
    return None


def add_code(model: Any, folder: Path) -> None:
    """Write the code of a class that `unequal` made beside where its config will be, and name it in the config."""
    cls, transformers = type(model), library()
    (base,) = cls.__bases__
    code = Path(modeling_unequal.__file__)
    kinds = [name for name in dir(transformers) if name.startswith("AutoModel")]
    maps = {name: getattr(getattr(transformers, name), "_model_mapping", {}) for name in kinds}
    several = {name: known.get(type(model.config), None) for name, known in maps.items()}
    autos = [name for name, x in several.items() if base in (x if isinstance(x, tuple) else (x,))]
    model.config.auto_map = dict.fromkeys(autos or ["AutoModel"], f"{code.stem}.{base.__name__}")
    whole = f"from {base.__module__} import {base.__name__} as Whole  # noqa: E402"
    lines = f"\n\n{whole}\n\n{base.__name__} = unequal(Whole)\n"
    (folder / code.name).write_text(code.read_text() + lines)

"""What a module has beyond what it computes: the arguments of its call, names that share a tensor, what is not trained.

A captured network keeps it beside its nodes, as names and plain values, so that the module that comes back is called,
trained and saved as the one that went in.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Argument", "Fixed", "Interface"]

Fixed = bool | int | float | str | None
"""A value that is part of the network: what is no plain value is held as its text."""

KINDS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


@dataclass(frozen=True)
class Argument:
    """One argument of ``forward``, with a place for every value in it: ``""`` is the argument itself, ``"0.mask"`` an
    entry of a container.

    Attributes:
        kind: that of ``inspect.Parameter``, by name.
        default: the default as a tuple of one, or nothing where there is none.
        inputs: ``(place, name of the Input node)`` of every tensor.
        fixed: ``(place, value)`` of everything else, as it was when the module was captured.
    """

    name: str
    kind: str = "POSITIONAL_OR_KEYWORD"
    default: tuple[()] | tuple[Fixed] = ()
    inputs: tuple[tuple[str, str], ...] = ()
    fixed: tuple[tuple[str, Fixed], ...] = ()


@dataclass(frozen=True)
class Interface:
    """How a network is called, saved and trained as a module.

    Attributes:
        arguments: those of ``forward``, in order.
        ties: ``(second name, name)`` where two names are one tensor, or one submodule.
        frozen: the parameters that are not trained, by path.
        transient: the buffers that a ``state_dict`` leaves out, by path.
    """

    arguments: tuple[Argument, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    frozen: tuple[str, ...] = ()
    transient: tuple[str, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> Interface:
        """The interface of a network that no module stands behind: one argument for every input, by its name.

        >>> [x.name for x in Interface.of(["tokens", "image.left", "lambda"]).arguments]
        ['tokens', 'image_left', 'lambda_']
        """
        arguments: dict[str, Argument] = {}
        for node in names:
            name = re.sub(r"\W|^(?=\d)", "_", node)
            while keyword.iskeyword(name) or name in arguments or name == "self":
                name += "_"
            arguments[name] = Argument(name, inputs=(("", node),))
        return cls(tuple(arguments.values()))

    @property
    def inputs(self) -> set[str]:
        """The Input nodes that the arguments fill."""
        return {node for argument in self.arguments for _, node in argument.inputs}

    def signature(self, *first: str) -> inspect.Signature:
        """The arguments as a function has them, behind ``first`` ones that are positional."""
        kinds = inspect.Parameter
        own = [kinds(name, kinds.POSITIONAL_ONLY) for name in first]
        for x in self.arguments:
            own.append(kinds(x.name, getattr(kinds, x.kind), default=x.default[0] if x.default else kinds.empty))
        return inspect.Signature(own)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Interface:
        """The interface that ``dataclasses.asdict`` wrote, read from JSON, where tuples are lists.

        Raises:
            ValueError: naming the first entry that is of another kind.
        """
        entries = {**data, "arguments": [_argument(entry) for entry in _list(data, "arguments")]}
        for name in ("ties", "frozen", "transient"):
            entries[name] = [tuple(x) if isinstance(x, list) else x for x in _list(data, name)]
        for name, size in (("ties", 2), ("frozen", None), ("transient", None)):
            for entry in entries[name]:
                if not (isinstance(entry, str) if size is None else _names(entry, size)):
                    raise ValueError(f"interface.{name} has names; received {entry!r}")
        _known(cls, entries, "interface")
        interface = cls(**{name: tuple(value) for name, value in entries.items()})
        try:
            interface.signature("self")
        except ValueError as error:
            raise ValueError(f"interface.arguments are those of a function of Python; {error}") from error
        return interface


def _argument(data: Any) -> Argument:
    where = "interface.arguments"
    if not isinstance(data, Mapping) or not isinstance(data.get("name"), str):
        raise ValueError(f"{where} has entries with a name; received {data!r}")
    _known(Argument, data, where)
    if data.get("kind", KINDS[1]) not in KINDS or not data["name"].isidentifier() or keyword.iskeyword(data["name"]):
        raise ValueError(f"{where} has names and kinds of Python's; received {data['name']!r}, {data.get('kind')!r}")
    pairs: dict[str, Any] = {}
    for field in ("inputs", "fixed"):
        pairs[field] = tuple(tuple(x) if isinstance(x, list) else x for x in _list(data, field))
        for pair in pairs[field]:
            plain = isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Fixed)
            if not plain or not isinstance(pair[0], str) or (field == "inputs" and not isinstance(pair[1], str)):
                raise ValueError(f"{where} has pairs of a place and a value in {field}; received {pair!r}")
    default = tuple(_list(data, "default"))
    if len(default) > 1 or not all(isinstance(x, Fixed) for x in default):
        raise ValueError(f"{where} has at most one plain value as a default; received {list(default)!r}")
    return Argument(**{**data, **pairs, "default": default})


def _known(cls: type[Any], data: Mapping[str, Any], where: str) -> None:
    if strange := data.keys() - {field.name for field in fields(cls)}:
        raise ValueError(f"{where} has no field {', '.join(map(repr, sorted(strange)))}")


def _list(data: Mapping[str, Any], name: str) -> list[Any]:
    value = data.get(name, [])
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"interface: {name} is a list; received {value!r}")
    return list(value)


def _names(entry: Any, size: int) -> bool:
    return isinstance(entry, tuple) and len(entry) == size and all(isinstance(x, str) for x in entry)

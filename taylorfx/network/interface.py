"""What a module has besides its computation: arguments of its call, names that share a tensor, frozen parameters.

A captured network keeps these beside its nodes, as names and plain values. So the module that `to_torch` builds is
called, trained and saved like the one that `from_torch` captured.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

__all__ = ["Argument", "Fixed", "Interface"]

Fixed = bool | int | float | str | None
"""The value of an argument that is no tensor, fixed when the module was captured; other objects are held as text."""

KINDS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY", "VAR_KEYWORD")


@dataclass(frozen=True)
class Argument:
    """One argument of ``forward``.

    An argument may be a container of several values. A *place* says which one is meant: ``""`` is the argument itself,
    ``"0.mask"`` is ``argument[0]["mask"]``.

    Attributes:
        kind: the name of a kind of ``inspect.Parameter``.
        default: the default as a tuple of one; empty if there is none.
        inputs: ``(place, name of the Input node)`` for every tensor.
        fixed: ``(place, value)`` for everything else, as it was when the module was captured.
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
        arguments: those of ``forward``, in their order.
        ties: ``(second name, first name)`` for every two names of the same tensor, or of the same submodule.
        frozen: the paths of the parameters that are not trained.
        transient: the paths of the buffers that a ``state_dict`` leaves out.
        results: which of the tensors that the module gives out without names the network gives out; empty for all.
    """

    arguments: tuple[Argument, ...] = ()
    ties: tuple[tuple[str, str], ...] = ()
    frozen: tuple[str, ...] = ()
    transient: tuple[str, ...] = ()
    results: tuple[int, ...] = ()

    @classmethod
    def of(cls, names: Iterable[str]) -> Interface:
        """The interface of a network that was not captured: one argument for every input, named after it.

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
        """The names of the Input nodes that the arguments fill."""
        return {node for argument in self.arguments for _, node in argument.inputs}

    def signature(self, *first: str) -> inspect.Signature:
        """The signature of a function with these arguments, after the positional ones that ``first`` names.

        >>> str(Interface.of(["tokens"]).signature("self"))
        '(self, /, tokens)'
        """
        kinds = inspect.Parameter
        parameters = [kinds(name, kinds.POSITIONAL_ONLY) for name in first]
        for x in self.arguments:
            default = x.default[0] if x.default else kinds.empty
            parameters.append(kinds(x.name, getattr(kinds, x.kind), default=default))
        return inspect.Signature(parameters)

    @classmethod
    def from_data(cls, data: Mapping[str, object]) -> Interface:
        """The interface that ``dataclasses.asdict`` wrote, read from JSON, where tuples are lists.

        Raises:
            ValueError: at the first entry of another kind; names it.
        """
        _check_fields(cls, data, "interface")
        interface = cls(
            arguments=tuple(_argument(entry) for entry in _list(data, "arguments")),
            ties=tuple(_tie(entry) for entry in _list(data, "ties")),
            frozen=tuple(_name(entry, "frozen") for entry in _list(data, "frozen")),
            transient=tuple(_name(entry, "transient") for entry in _list(data, "transient")),
            results=tuple(_number(entry) for entry in _list(data, "results")),
        )
        try:
            interface.signature("self")
        except ValueError as error:
            raise ValueError(f"interface.arguments are those of a Python function; {error}") from error
        return interface


def _argument(data: object) -> Argument:
    where = "interface.arguments"
    if not isinstance(data, Mapping) or not isinstance(name := data.get("name"), str):
        raise ValueError(f"{where} has entries with a name; received {data!r}")
    _check_fields(Argument, data, where)
    kind = data.get("kind", KINDS[1])
    if kind not in KINDS or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"{where} has names and kinds of Python's; received {name!r}, {kind!r}")
    default: tuple[()] | tuple[Fixed]
    match _list(data, "default"):
        case []:
            default = ()
        case [bool() | int() | float() | str() | None as value]:
            default = (value,)
        case values:
            raise ValueError(f"{where} has at most one plain value as a default; received {values!r}")
    inputs = tuple(_input(entry) for entry in _list(data, "inputs"))
    return Argument(name, kind, default, inputs, tuple(_fixed(entry) for entry in _list(data, "fixed")))


def _input(entry: object) -> tuple[str, str]:
    match entry:
        case [str() as place, str() as node]:
            return place, node
    raise ValueError(f"interface.arguments has pairs of a place and a node in inputs; received {entry!r}")


def _fixed(entry: object) -> tuple[str, Fixed]:
    match entry:
        case [str() as place, bool() | int() | float() | str() | None as value]:
            return place, value
    raise ValueError(f"interface.arguments has pairs of a place and a plain value in fixed; received {entry!r}")


def _tie(entry: object) -> tuple[str, str]:
    match entry:
        case [str() as second, str() as first]:
            return second, first
    raise ValueError(f"interface.ties has pairs of names; received {entry!r}")


def _name(entry: object, field: str) -> str:
    if isinstance(entry, str):
        return entry
    raise ValueError(f"interface.{field} has names; received {entry!r}")


def _number(entry: object) -> int:
    if isinstance(entry, int) and not isinstance(entry, bool) and entry >= 0:
        return entry
    raise ValueError(f"interface.results has numbers of outputs; received {entry!r}")


def _check_fields(cls: type[Argument] | type[Interface], data: Mapping[str, object], where: str) -> None:
    if unknown := data.keys() - {field.name for field in fields(cls)}:
        raise ValueError(f"{where} has no field {', '.join(map(repr, sorted(unknown)))}")


def _list(data: Mapping[str, object], name: str) -> list[object]:
    value = data.get(name, [])
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"interface: {name} is a list; received {value!r}")
    return list(value)

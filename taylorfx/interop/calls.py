"""The call of a module: its arguments as they were captured, and what a later call gives for them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, TensorArgument

from taylorfx.internals import pytree
from taylorfx.network.interface import Argument, Fixed, Interface
from taylorfx.network.spec import Spec

__all__ = ["bind", "dotted", "example_of", "generator_of", "interface_of", "off_path", "read_interface"]


def dotted(path: Sequence[pytree.KeyEntry]) -> str:
    """The place of a leaf in a tree: ``hidden_states.0``.

    >>> [dotted(path) for path, _ in pytree.tree_flatten_with_path({"hidden_states": (1, 2), "loss": 3})[0]]
    ['hidden_states.0', 'hidden_states.1', 'loss']
    """
    names = ("key", "idx", "name")  # of an entry of a dict, a sequence, a dataclass
    return ".".join(str(next(getattr(key, name) for name in names if hasattr(key, name))) for key in path)


# Capturing: what the module says about itself.


@dataclass(frozen=True)
class _Input:
    """The place of a tensor among the arguments of a captured call, by the name of its Input node."""

    name: str


def read_interface(module: nn.Module, program: ExportedProgram, inputs: Mapping[str, str], spec: Spec) -> Interface:
    """The interface of a captured module.

    Args:
        inputs: the names of the Input nodes, by the placeholders of the graph.
        spec: the network, whose parameters have the module's names.
    """
    leaves, transient = [], []
    for item in program.graph_signature.input_specs:
        if item.kind is InputKind.USER_INPUT:
            tensor = isinstance(item.arg, TensorArgument)
            leaves.append(_Input(inputs[item.arg.name]) if tensor else getattr(item.arg, "value", None))
        elif item.kind is InputKind.BUFFER and not item.persistent and item.target in spec.shapes:
            transient.append(str(item.target))
    args, kwargs = pytree.tree_unflatten(leaves, program.call_spec.in_spec)
    signature = inspect.signature(module.forward)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = tuple(_argument(signature.parameters[name], value) for name, value in bound.arguments.items())
    trained = dict(module.named_parameters(remove_duplicate=False))
    frozen = tuple(path for path in spec.shapes if path in trained and not trained[path].requires_grad)
    return Interface(arguments, tuple(_ties(module, spec)), frozen, tuple(transient))


def _argument(parameter: inspect.Parameter, value: object) -> Argument:
    """An argument of ``forward`` as it was captured: which of its leaves are inputs, and what the others are."""
    leaves = [(dotted(path), leaf) for path, leaf in pytree.tree_flatten_with_path(value)[0]]
    inputs = tuple((place, leaf.name) for place, leaf in leaves if isinstance(leaf, _Input))
    fixed = tuple((place, _plain(leaf)) for place, leaf in leaves if not isinstance(leaf, _Input))
    default: tuple[()] | tuple[Fixed] = () if parameter.default is parameter.empty else (_plain(parameter.default),)
    if default and len(fixed) == 1 and not fixed[0][0]:
        default = (fixed[0][1],)
    return Argument(parameter.name, parameter.kind.name, default, inputs, fixed)


def _plain(value: object) -> Fixed:
    return value if isinstance(value, Fixed) else str(value)


def _ties(module: nn.Module, spec: Spec) -> Iterator[tuple[str, str]]:
    """The second names of submodules and tensors that are in the network under another one."""
    aliased: list[str] = []
    for name, first in _seconds(module.named_modules(remove_duplicate=False), spec):
        if not any(name.startswith(f"{x}.") for x in aliased):
            aliased.append(name)
            yield name, first
    for table in (module.named_parameters, module.named_buffers):
        for name, first in _seconds(table(remove_duplicate=False), spec):
            if not any(name.startswith(f"{x}.") for x in aliased):
                yield name, first


def _seconds(named: Iterator[tuple[str, object]], spec: Spec) -> Iterator[tuple[str, str]]:
    """Pairs of a second name and the first one, of everything that has several names."""
    groups: dict[int, list[str]] = {}
    for name, value in named:
        groups.setdefault(id(value), []).append(name)
    homes = {path[:k] for path in spec.shapes for k in (*_dots(path), len(path))}
    for names in groups.values():
        first = next((name for name in names if name in homes), None)
        if first is not None:
            yield from ((name, first) for name in names if name not in homes)


def _dots(path: str) -> Iterator[int]:
    return (k for k, letter in enumerate(path) if letter == ".")


def stretched(x: Tensor, axis: int, n: int) -> Tensor:
    """A tensor of ``n`` positions along an axis: its own, over and over, so that its numbers are of the same kind.

    >>> stretched(torch.tensor([[5, 6, 7]]), 1, 5)
    tensor([[5, 6, 7, 5, 6]])
    """
    return x[(slice(None),) * axis + (torch.arange(n, device=x.device) % x.shape[axis],)]


def off_path(module: nn.Module, paths: Container[str]) -> list[str]:
    """The parameters of a module that are not in a network, under none of their names."""
    named = list(module.named_parameters(remove_duplicate=False))
    captured = {id(parameter) for name, parameter in named if name in paths}
    return list(dict.fromkeys(name for name, parameter in named if id(parameter) not in captured))


# Calling.


def interface_of(spec: Spec) -> Interface:
    """The interface of a network: what was captured with it, or an argument for every input."""
    names = [node.name for node in spec.inputs]
    interface = spec.interface or Interface()
    if interface.inputs == set(names):
        return interface
    return replace(interface, arguments=Interface.of(names).arguments)


def bind(
    interface: Interface,
    args: tuple[object, ...],
    kwargs: Mapping[str, object],
    calls: Collection[tuple[str, ...]] = (),
) -> dict[str, Tensor]:
    """The tensors of a call by the names of the Input nodes.

    Args:
        calls: the inputs of every call that was captured, if some inputs may be left out.

    Raises:
        TypeError: naming everything that was not captured, or that was captured as something else.
    """
    errors: list[str] = []
    values = _sort(interface, args, kwargs, errors)
    always = interface.inputs.intersection(*calls)
    inputs: dict[str, Tensor] = {}
    for x in interface.arguments:
        if x.name in values:
            inputs |= _bind_one(x, values[x.name], always, errors)
        elif not x.default or any(node in always for _, node in x.inputs):
            errors += [f"{_where(x, place)}: missing; it was captured as a tensor" for place, _ in x.inputs]
    if calls and not errors and not any({*inputs} == {*names} for names in calls):
        listed = "; ".join(", ".join(names) for names in calls)
        errors.append(f"tensors for {', '.join(inputs) or 'nothing'}; it was captured with those for {listed}")
    if errors:
        taken = interface.signature()
        raise TypeError(
            f"The network takes what was captured with it, forward{taken}; received:\n  "
            + "\n  ".join(errors)
            + "\nLeave it out, or capture the module with it: from_torch(module, example_inputs, example_kwargs=...), "
            "or both calls, from_torch(module, examples=[...])."
        )
    return inputs


def _bind_one(x: Argument, value: object, always: Container[str], errors: list[str]) -> dict[str, Tensor]:
    """The tensors of one argument."""
    inputs: dict[str, Tensor] = {}
    leaves, fixed = _leaves(value), dict(x.fixed)
    for place, node in x.inputs:
        leaf = leaves.get(place)
        if isinstance(leaf, Tensor):
            inputs[node] = leaf
        elif node in always or (place in leaves and place not in fixed):
            kind = type(leaf).__name__ if place in leaves else "none"
            errors.append(f"{_where(x, place)}: it was captured as a tensor; received {kind}")
    bound = {place for place, node in x.inputs if node in inputs or node in always}
    for place, leaf in leaves.items():
        if place in bound:
            continue
        if place not in fixed:
            if place not in dict(x.inputs):
                errors.append(f"{_where(x, place)}: it was not captured; received {_said(leaf)}")
        elif isinstance(leaf, Tensor) or _plain(leaf) != fixed[place]:
            errors.append(f"{_where(x, place)}: it was captured as {fixed[place]!r}; received {_said(leaf)}")
    return inputs


def _sort(
    interface: Interface, args: tuple[object, ...], kwargs: Mapping[str, object], errors: list[str]
) -> dict[str, object]:
    """The values of a call by argument, as Python itself sorts them."""
    values: dict[str, object] = {}
    rest = args
    for x in interface.arguments:
        if x.kind == "VAR_POSITIONAL":
            values[x.name], rest = tuple(rest), ()
        elif x.kind.startswith("POSITIONAL") and rest:
            values[x.name], rest = rest[0], rest[1:]
    errors += [f"argument {len(args) - len(rest) + k}: there is no such argument" for k in range(len(rest))]
    by_name = {x.name for x in interface.arguments if x.kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY")}
    others = [x.name for x in interface.arguments if x.kind == "VAR_KEYWORD"]
    extra: dict[str, object] = {}
    for name, value in kwargs.items():
        if name not in by_name:
            extra[name] = value
        elif name in values:
            errors.append(f"{name}: it is given by position and by name")
        else:
            values[name] = value
    if others:
        values[others[0]] = extra
    else:
        errors += [f"{name}: there is no such argument; received {_said(value)}" for name, value in extra.items()]
    return values


def _leaves(value: object) -> dict[str, object]:
    """The values of an argument by place."""
    if isinstance(value, (Tensor, bool, int, float, str)) or value is None:  # a compiler follows no pytree
        return {"": value}
    return {dotted(path): leaf for path, leaf in pytree.tree_flatten_with_path(value)[0]}


def _where(argument: Argument, place: str) -> str:
    if argument.kind == "VAR_KEYWORD":
        return place
    return f"{argument.name}.{place}" if place else argument.name


def _said(value: object) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(_plain(value))


def example_of(interface: Interface, inputs: Mapping[str, Tensor]) -> tuple[tuple[object, ...], dict[str, object]]:
    """The arguments and keywords of a module's own call that hand it these tensors: the inverse of `bind`."""
    args: list[object] = []
    kwargs: dict[str, object] = {}
    by_position = True
    by_name = all(x.kind in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY", "VAR_KEYWORD") for x in interface.arguments)
    for x in interface.arguments:
        places = {**dict(x.fixed), **{place: inputs[node] for place, node in x.inputs if node in inputs}}
        value = _nested(places)
        if x.kind == "VAR_POSITIONAL":
            args += value if isinstance(value, list) else []
        elif x.kind == "VAR_KEYWORD":
            kwargs |= value if isinstance(value, dict) else {}
        elif by_name and not x.inputs and x.default == tuple(places.values()):
            by_position = False  # left out
        elif by_position and x.kind != "KEYWORD_ONLY":
            args.append(value)
        else:
            kwargs[x.name] = value
    return tuple(args), kwargs


def _nested(places: Mapping[str, object]) -> object:
    """A value from its places: a list where they are numbers, a dict where they are names.

    >>> _nested({"mask.0": 1, "mask.1": 2, "scale": 3})
    {'mask': [1, 2], 'scale': 3}
    """
    if not places:
        return None
    if "" in places:
        return places[""]
    parts: dict[str, dict[str, object]] = {}
    for place, leaf in places.items():
        key, _, below = place.partition(".")
        parts.setdefault(key, {})[below] = leaf
    values = {key: _nested(part) for key, part in parts.items()}
    return list(values.values()) if all(key.isdigit() for key in values) else values


def generator_of(device: torch.device) -> torch.Generator:
    """The one that torch itself draws from on this device."""
    if device.type == "cpu":
        return torch.default_generator
    backend: Any = torch.get_device_module(device)
    generators = backend.default_generators
    generator: torch.Generator = generators[backend.current_device() if device.index is None else device.index]
    return generator

"""The user's own class with smaller layers."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from taylorfx.internals import pytree
from taylorfx.interop.attributes import Resized, groups_of, guesses, tensors_of
from taylorfx.interop.calls import bind, example_of, interface_of, off_path
from taylorfx.interop.nearness import apart, only_rounding
from taylorfx.interop.proof import Call, calls_of, copied, differs, truth
from taylorfx.interop.search import LikeError, settle
from taylorfx.layers import Embedding, Input, Layer
from taylorfx.network.interface import Interface
from taylorfx.network.spec import Spec
from taylorfx.progress import bar, told
from taylorfx.tree import Params, flatten

__all__ = ["LikeError", "Original", "UserModule", "renewed", "resized", "used"]

UserModule: TypeAlias = nn.Module
"""A module of a class of the user's own."""


class Original:
    """A module before anything was cut, and the calls on which smaller ones are compared with it.

    Args:
        module: the user's own; it is left as it is.
        params: its parameters, or some of smaller ones, by which random inputs are made.
        spec: a network of it, which may be smaller: its inputs and outputs are meant.
        network: the whole network; without one the module is captured when it is needed.
    """

    def __init__(
        self,
        module: nn.Module,
        params: Params,
        spec: Spec,
        example_inputs: object,
        example_kwargs: Mapping[str, object] | None,
        network: tuple[Params, Spec] | None = None,
    ) -> None:
        self.module = module
        self.tensors = tensors_of(module)
        self._network = network
        self._given = params, spec, example_inputs, example_kwargs
        self._certain: dict[tuple[str, str], bool] = {}

    def foreign(self, leaves: Iterable[str]) -> str:
        """Why these are not the module's own parameters, by path; empty if they are."""
        strange = [path for path in leaves if path not in self.tensors and not path.startswith("constants.")]
        if not strange:
            return ""
        return (
            f"The parameters are the module's own, by name; {type(self.module).__name__} has no {', '.join(strange)}. "
            "Give the module that was captured."
        )

    @cached_property
    def calls(self) -> list[Call]:
        """The calls, of which the first one is that of the example."""
        return list(calls_of(self.whole, self._given[1], self._base))

    @cached_property
    def whole(self) -> nn.Module:
        """A copy that shares the parameters."""
        return copied(self.module, {id(x): x for x in self.module.parameters()})

    @cached_property
    def _base(self) -> Call:
        (args, named), interface = _call(*self._given), interface_of(self._given[1])
        try:
            tensors = bind(interface, args, named, self._given[1].calls)
        except TypeError as error:
            kind = type(self.module).__name__
            raise LikeError(f"The example is a call of {kind} as it was captured. {error}") from error
        _fill(named, interface, inspect.signature(self.module.forward), args)
        return Call("as it was captured", (args, named), tensors)

    def certain(self, call: Call) -> bool:
        """The whole module gives on this call what its own network gives."""
        if call.extra or call.then:
            return True
        key = call.method, call.title
        if key not in self._certain:
            network = self._captured
            try:
                expected = truth(*network, call) if network else None
                results = call.outputs(self.whole)
                self._certain[key] = not expected or not differs(results, expected, call, network[1])
            except Exception:  # whatever the module's own code raises
                self._certain[key] = False
        return self._certain[key]

    @cached_property
    def _captured(self) -> tuple[Params, Spec]:
        if self._network:
            return self._network
        from taylorfx.interop.capture.export import from_torch

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            args, kwargs = self._base.arguments
            return from_torch(self.module, args, example_kwargs=kwargs)


def resized(
    original: Original, params: Params, spec: Spec, unchanged: Sequence[str], *, progress: bool = False
) -> nn.Module:
    """A copy of the module with these parameters, proven equal to the spec on all calls that the whole module takes."""
    module, leaves, tensors = original.module, flatten(params), original.tensors
    if foreign := original.foreign(leaves):
        raise LikeError(foreign)
    left = _left_over(module, leaves, tensors, unchanged)
    new = {id(tensors[path]): renewed(tensors[path], leaf) for path, leaf in leaves.items() if path in tensors}
    shapes = {path: tuple(x.shape) for path, x in tensors.items()}
    sizes = Resized(shapes, {path: tuple(new.get(id(x), x).shape) for path, x in tensors.items()})
    copy = copied(module, new)
    known = _set_fields(copy, spec)
    groups = groups_of(copy, sizes, known)
    for slot, number in guesses(copy, groups, sizes).items():
        slot.set(copy, number)
    calls = [call for call in original.calls if call.method == "forward"]
    with bar(progress, "to_torch", len(calls)) as advance:
        passed = settle(copy, params, spec, groups, told(calls, advance), original.certain)
    if left:
        _refuse_left_over(module, left - used(copy, replace(original.calls[0], training=True)))
    others = [call for call in original.calls if call.method not in ("forward", *unchanged)]
    settle(copy, params, spec, groups, others, original.certain, passed)
    fresh = copied(module, new)  # without what the module's own code keeps from call to call
    _set_fields(fresh, spec)
    for slot in (slot for group in groups for slot in group.slots):
        if slot.get(fresh) != (number := slot.get(copy)):
            slot.set(fresh, number)
    _refuse_near(copy, params, spec, calls[0])
    return fresh


def _refuse_near(module: nn.Module, params: Params, spec: Spec, example: Call) -> None:
    """Refuse a module that is near the network, but computes something else."""
    share = apart(module, params, spec, example)
    if share and not only_rounding(share, copied(module, {}), params, spec, example):
        raise LikeError(
            f"{type(module).__name__} with smaller layers computes nearly what the network does: outputs differ by "
            f"{share:.0e} of the largest, and do so in double precision, too. Give an example, or parameters, by which "
            "the sizes that fit are told from others: heads, where attention looks at all positions nearly alike."
        )


def renewed(old: Tensor, leaf: Tensor) -> Tensor:
    """A new tensor, a parameter or a buffer as the old one."""
    new = leaf.detach().clone()
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    vars(new).update(vars(old))
    return new


def _left_over(
    module: nn.Module, leaves: Mapping[str, Tensor], tensors: Mapping[str, Tensor], unchanged: Sequence[str]
) -> set[str]:
    """The parameters outside the network that would stay at their old sizes, while others change theirs."""
    names = [*tensors, *(name for name, _ in module.named_modules(remove_duplicate=False) if name), *dir(type(module))]
    if unknown := [name for name in unchanged if name not in names]:
        raise LikeError(
            f"Unchanged are parameters, submodules and methods of {type(module).__name__}, by name; it has no "
            f"{', '.join(map(repr, unknown))}."
        )
    if all(leaf.shape == tensors[path].shape for path, leaf in leaves.items() if path in tensors):
        return set()
    return {x for x in off_path(module, leaves) if not any(f"{x}.".startswith(f"{name}.") for name in unchanged)}


class _Uses(TorchFunctionMode):
    """Notes the tensors that functions of torch get."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tensors.update(id(x) for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor))
        return func(*args, **(kwargs or {}))


def used(module: nn.Module, call: Call) -> set[str]:
    """The parameters that the module uses in a call; none if it does not take it."""
    uses = _Uses()
    try:
        with uses:
            call.outputs(module)
    except Exception:  # whatever the module's own code raises
        return set()
    return {path for path, x in module.named_parameters(remove_duplicate=False) if id(x) in uses.tensors}


def _refuse_left_over(module: nn.Module, left: set[str]) -> None:
    """Refuse to leave parameters at their old sizes of which nothing says that they fit."""
    paths = [path for path, _ in module.named_parameters() if path in left]
    if paths:
        homes = list(dict.fromkeys(path.partition(".")[0] for path in paths))
        raise LikeError(
            f"Smaller layers of {type(module).__name__} would leave parameters that are not in the network at their "
            f"old sizes: {', '.join(paths)}. They are not used in training either, or do not fit there. Remove them "
            "from the module, capture a call that uses them, or say that what they consume keeps its size: "
            f"to_torch(..., like=..., unchanged={homes})."
        )


def _set_fields(module: nn.Module, spec: Spec) -> frozenset[str]:
    """Write the sizes of layers into the attributes of their modules that have the same names.

    Returns:
        The submodules that are torch's own for the very layer: all their sizes are known.
    """
    known: set[str] = set()
    for node in spec:
        homes = {path.rpartition(".")[0] for path in node.paths.values()}
        if len(homes) == 1 and not node.layer.leaf:
            part = module.get_submodule(home := homes.pop())
            _write(part, node.layer)
            if type(part).__module__.startswith("torch.nn") and type(part).__name__ == node.layer.title:
                known.add(home)
    return frozenset(known)


def _write(part: nn.Module, layer: Layer) -> None:
    for name in layer.fields():
        old, new = getattr(part, name, None), getattr(layer, name)
        if isinstance(old, (int, tuple)) and old != new and not isinstance(old, bool):
            setattr(part, name, new if isinstance(old, tuple) or not isinstance(new, tuple) else new[0])


def _call(
    params: Params, spec: Spec, inputs: object, kwargs: Mapping[str, object] | None
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call to compare on: the example, or random numbers without one."""
    if inputs is None and not kwargs:
        return example_of(interface_of(spec), _random(params, spec))
    if isinstance(inputs, Tensor):
        return (inputs,), dict(kwargs or {})
    if isinstance(inputs, Mapping):
        return (), {**inputs, **(kwargs or {})}
    return tuple(inputs) if isinstance(inputs, Iterable) else (), dict(kwargs or {})


def _fill(
    named: dict[str, object], interface: Interface, signature: inspect.Signature, args: tuple[object, ...]
) -> None:
    """Add what the network was captured with as a value, where that is not the module's default."""
    supplied = signature.bind(*args, **named).arguments
    for x in interface.arguments:
        if x.name in supplied or not x.default or x.kind not in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"):
            continue
        default = signature.parameters[x.name].default
        if x.default[0] not in (default, str(default)):  # what is no plain value is kept as text
            named[x.name] = x.default[0]


def _random(params: Params, spec: Spec) -> dict[str, Tensor]:
    """Two examples: normal numbers, tokens that every embedding of them has, and ones for masks."""
    real = next((x for x in flatten(params).values() if x.is_floating_point()), torch.empty(()))
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    for node in spec.inputs:
        assert isinstance(node.layer, Input)
        shape = (1 if node.layer.alone else 2, *(node.layer.shape if isinstance(node.layer.shape, tuple) else ()))
        readers = [x.layer for x in spec if node.name in x.inputs]
        rows = [layer.num_embeddings for layer in readers if isinstance(layer, Embedding)]
        if node.layer.dtype is None:
            x = torch.randn(shape, generator=generator).to(real)
        elif rows:
            x = torch.randint(min(rows), shape, generator=generator)
        else:
            x = torch.ones(shape)
        inputs[node.name] = x.to(real.device, getattr(torch, node.layer.dtype or "", real.dtype))
    return inputs

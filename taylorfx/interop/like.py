"""The user's own class with smaller layers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from taylorfx.internals import pytree
from taylorfx.interop.calls import bind, dotted, example_of, interface_of, off_path
from taylorfx.layers import Embedding, Input, Layer
from taylorfx.network.interface import Interface
from taylorfx.network.run import apply
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, flatten

__all__ = ["LikeError", "resized"]

M = TypeVar("M", bound=nn.Module)


class LikeError(ValueError):
    """A module whose own ``forward`` cannot work with smaller layers; the message says why."""


def resized(
    params: Params,
    spec: Spec,
    like: M,
    example_inputs: object,
    example_kwargs: Mapping[str, object] | None,
    unchanged: Sequence[str],
) -> M:
    """A copy of the module with these parameters, proven equal to the spec on the example."""
    module = copy.deepcopy(like)
    leaves = flatten(params)
    tensors: dict[str, Tensor] = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    strange = [path for path in leaves if path not in tensors and not path.startswith("constants.")]
    if strange:
        raise LikeError(
            f"The parameters are the module's own, by name; {type(like).__name__} has no {', '.join(strange)}. "
            "Give the module that was captured."
        )
    _refuse_left_over(module, leaves, tensors, unchanged)
    changed = {id(tensors[path]): leaf.detach().clone() for path, leaf in leaves.items() if path in tensors}
    for part in module.modules():
        for table in (part._parameters, part._buffers):
            for tensor in table.values():
                if tensor is not None and id(tensor) in changed:
                    tensor.data = changed[id(tensor)]
    for node in spec:
        homes = {path.rpartition(".")[0] for path in node.paths.values()}
        if len(homes) == 1 and not node.layer.leaf:
            _set_fields(module.get_submodule(homes.pop()), node.layer)
    _compare(module, params, spec, example_inputs, example_kwargs)
    return module


def _refuse_left_over(
    module: nn.Module, leaves: Mapping[str, Tensor], tensors: Mapping[str, Tensor], unchanged: Sequence[str]
) -> None:
    """Refuse to leave parameters outside the network at their old sizes, unless nothing else changes its size."""
    names = [*tensors, *(name for name, _ in module.named_modules(remove_duplicate=False) if name)]
    if unknown := [name for name in unchanged if name not in names]:
        raise LikeError(
            f"Unchanged are parameters and submodules of {type(module).__name__}, by name; it has no "
            f"{', '.join(map(repr, unknown))}."
        )
    if all(leaf.shape == tensors[path].shape for path, leaf in leaves.items() if path in tensors):
        return
    left = [x for x in off_path(module, leaves) if not any(f"{x}.".startswith(f"{name}.") for name in unchanged)]
    if left:
        homes = list(dict.fromkeys(path.partition(".")[0] for path in left))
        raise LikeError(
            f"Smaller layers of {type(module).__name__} would leave parameters that are not in the network at their "
            f"old sizes: {', '.join(left)}. Remove them from the module, capture a call that uses them, or say that "
            f"what they consume keeps its size: to_torch(..., like=..., unchanged={homes})."
        )


def _set_fields(part: nn.Module, layer: Layer) -> None:
    """Write the sizes of a layer into the attributes of its module that have the same names."""
    for name in layer.fields():
        old, new = getattr(part, name, None), getattr(layer, name)
        if isinstance(old, (int, tuple)) and old != new and not isinstance(old, bool):
            setattr(part, name, new if isinstance(old, tuple) or not isinstance(new, tuple) else new[0])


def _compare(
    module: nn.Module, params: Params, spec: Spec, inputs: object, kwargs: Mapping[str, object] | None
) -> None:
    """Refuse a module that does not compute what the network does."""
    kind, (args, named) = type(module).__name__, _call(params, spec, inputs, kwargs)
    interface = interface_of(spec)
    try:
        tensors = bind(interface, args, named, spec.calls)
    except TypeError as error:
        raise LikeError(f"The example is a call of {kind} as it was captured. {error}") from error
    _fill(named, interface, inspect.signature(module.forward), args)
    modes = {part: part.training for part in module.modules()}
    with torch.no_grad():
        expected = apply(params, spec, tensors)
        try:
            outputs = module.eval()(*args, **named)
        except Exception as error:  # whatever the module's own code raises
            raise LikeError(
                f"The forward of {kind} does not run with smaller layers: {error}. It has their old sizes written "
                "down; to_torch without `like` gives a module that has not."
            ) from error
    for part, mode in modes.items():
        part.training = mode
    leaves = {dotted(path): x for path, x in pytree.tree_flatten_with_path(outputs)[0] if isinstance(x, Tensor)}
    if not spec.keys:  # outputs in their order
        expected = dict(enumerate(expected if isinstance(expected, tuple) else (expected,)))
        results: dict[str | int, Tensor] = dict(enumerate(leaves.values()))
    else:  # another output of the module (a cache, where the network was captured without one) is left alone
        results = {key: x for key, x in leaves.items() if key in expected}
    largest = max((float(x.abs().max()) for x in expected.values() if x.numel()), default=0.0)
    try:
        assert_close(results, expected, rtol=1e-4, atol=1e-4 * largest)
    except AssertionError as error:
        raise LikeError(
            f"The forward of {kind} computes something else with smaller layers: {error} It has their old sizes "
            "written down; to_torch without `like` gives a module that has not."
        ) from error


def _call(
    params: Params, spec: Spec, inputs: object, kwargs: Mapping[str, object] | None
) -> tuple[tuple[object, ...], dict[str, object]]:
    """The call to compare on: the example, or random numbers without one."""
    if inputs is None and not kwargs:
        return example_of(interface_of(spec), _random(params, spec))
    if isinstance(inputs, Tensor):
        return (inputs,), dict(kwargs or {})
    return tuple(inputs) if isinstance(inputs, Iterable) else (), dict(kwargs or {})


def _fill(
    named: dict[str, object], interface: Interface, signature: inspect.Signature, args: tuple[object, ...]
) -> None:
    """Add what the network was captured with as a value, where that is not the module's default."""
    supplied = signature.bind(*args, **named).arguments
    for x in interface.arguments:
        if x.name in supplied or not x.default or x.kind not in ("POSITIONAL_OR_KEYWORD", "KEYWORD_ONLY"):
            continue
        if x.default[0] != signature.parameters[x.name].default:
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

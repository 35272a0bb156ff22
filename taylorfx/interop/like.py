"""The user's own class with smaller layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from taylorfx.layers import Input
from taylorfx.spec import Spec, apply
from taylorfx.tree import Params, flatten

__all__ = ["LikeError", "resized"]


class LikeError(ValueError):
    """A module whose own ``forward`` cannot work with smaller layers; the message says why."""


def resized(
    params: Params, spec: Spec, like: nn.Module, example_inputs: Any, example_kwargs: Mapping[str, Any] | None
) -> nn.Module:
    """A copy of the module with these parameters, proven equal to the spec on the example."""
    module = copy.deepcopy(like)
    leaves = flatten(params)
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    strange = [path for path in leaves if path not in own and not path.startswith("constants.")]
    if strange:
        raise LikeError(
            f"The parameters are the module's own, by name; {type(like).__name__} has no {', '.join(strange)}. "
            "Give the module that was captured."
        )
    changed = {id(own[path]): leaf.detach().clone() for path, leaf in leaves.items() if path in own}
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


def _set_fields(part: nn.Module, layer: Any) -> None:
    """The sizes that a layer and its module both write down."""
    for name in layer.fields():
        old, new = getattr(part, name, None), getattr(layer, name)
        if isinstance(old, (int, tuple)) and old != new and not isinstance(old, bool):
            setattr(part, name, new if isinstance(old, tuple) or not isinstance(new, tuple) else new[0])


def _compare(module: nn.Module, params: Params, spec: Spec, inputs: Any, kwargs: Mapping[str, Any] | None) -> None:
    if inputs is None and not kwargs:
        inputs = _random(params, spec)
    args = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs or ())
    named = dict(kwargs or {})
    modes = {part: part.training for part in module.modules()}
    tensors = [x for x in torch.utils._pytree.tree_leaves((args, named)) if isinstance(x, Tensor)]
    with torch.no_grad():
        expected = apply(params, spec, tensors)
        try:
            found = module.eval()(*args, **named)
        except Exception as error:  # whatever the module's own code raises
            raise LikeError(
                f"The forward of {type(module).__name__} does not run with smaller layers: {error}. It has their old "
                "sizes written down; to_torch without `like` gives a module that has not."
            ) from error
    for part, mode in modes.items():
        part.training = mode
    pair = (torch.utils._pytree.tree_leaves(x) for x in (found, expected))
    one, other = ([x for x in leaves if isinstance(x, Tensor)] for leaves in pair)
    try:
        assert_close(one, other, rtol=1e-4, atol=1e-4 * max(float(x.abs().max()) for x in other))
    except AssertionError as error:
        raise LikeError(
            f"The forward of {type(module).__name__} computes something else with smaller layers: {error} It has their "
            "old sizes written down; to_torch without `like` gives a module that has not."
        ) from error


def _random(params: Params, spec: Spec) -> tuple[Tensor, ...]:
    real = next(x for x in flatten(params).values() if x.is_floating_point())
    generator = torch.Generator().manual_seed(0)
    shapes = [node.layer.shape for node in spec.inputs if isinstance(node.layer, Input)]
    return tuple(torch.randn((2, *(s if isinstance(s, tuple) else ())), generator=generator).to(real) for s in shapes)

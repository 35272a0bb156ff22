"""Modules out: a plain ``torch.nn.Module`` that runs a spec and has the parameters' own names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from taylorfx.interop.like import resized
from taylorfx.spec import Spec, apply, check, partition, train
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["SpecModule", "to_torch"]


class SpecModule(nn.Module):
    """A network as a module: it trains, moves, copies, pickles, compiles and saves like any other.

    ``spec`` is the network; parameters and buffers lie in submodules by the paths that they have in the tree. In
    training mode it moves its running statistics and draws dropout from torch's own generator.
    """

    def __init__(self, params: Params, spec: Spec) -> None:
        super().__init__()
        check(params, spec)
        self.spec = spec
        trained = flatten(partition(params, spec)[0])
        self._paths = tuple(flatten(params))
        for path, leaf in flatten(params).items():
            owner, name = _owner(self, path, create=True)
            leaf = leaf.detach().clone()
            if path in trained and leaf.is_floating_point():
                owner.register_parameter(name, nn.Parameter(leaf))
            else:
                owner.register_buffer(name, leaf, persistent=not path.startswith("constants."))

    def tree(self) -> Params:
        """The parameters and buffers as they are now, as a tree."""
        return unflatten((path, getattr(*_owner(self, path))) for path in self._paths)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Any:
        given: Any = (dict(named),) if named and not inputs else inputs
        if not self.training:
            return apply(self.tree(), self.spec, *given)
        device = next((x.device for x in (*inputs, *named.values())), torch.device("cpu"))
        generator = None if torch.compiler.is_compiling() else _generator(device)
        outputs, new = train(self.tree(), self.spec, *given, generator=generator)
        with torch.no_grad():
            for path, leaf in flatten(partition(new, self.spec)[1]).items():
                buffer = getattr(*_owner(self, path))
                if leaf is not buffer:
                    buffer.copy_(leaf)
        return outputs


def to_torch(
    params: Params,
    spec: Spec,
    *,
    like: nn.Module | None = None,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A module that computes what the spec computes; its ``state_dict`` has the parameters' paths as names.

    Args:
        like: the module that was captured. The result is then of its own class, its layers made smaller (their tensors
            and the fields that say their sizes), if its ``forward`` computes with them what the spec does.
        example_inputs, example_kwargs: what to compare on, as for `from_torch`; by default random numbers of the
            shapes that the spec's inputs declare.

    Raises:
        SpecError: if the parameters do not fit the spec.
        LikeError: if the module's own ``forward`` fails with smaller layers, or computes something else: sizes that it
            has written down stay as they were. Without ``like`` there is always a module.
    """
    return SpecModule(params, spec) if like is None else resized(params, spec, like, example_inputs, example_kwargs)


def _generator(device: torch.device) -> torch.Generator:
    """The one that torch itself draws from on this device."""
    if device.type == "cpu":
        return torch.default_generator
    backend: Any = torch.get_device_module(device)
    generators = backend.default_generators
    found: torch.Generator = generators[backend.current_device() if device.index is None else device.index]
    return found


def _owner(module: nn.Module, path: str, *, create: bool = False) -> tuple[nn.Module, str]:
    """The submodule that holds a path, and the name under which it does."""
    *parents, name = path.split(".")
    for parent in parents:
        if create and parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    return module, name

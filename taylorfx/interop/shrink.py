"""Modules that become smaller in place, with their optimizers: for training loops that hold on to both.

A Trainer keeps one model and one optimizer for a whole run, and has them wrapped, scheduled and counted. They stay the
same objects here; what they consist of is replaced by what `to_torch` and `carry` give:

    model        the same object     its parts: those of the smaller module
    optimizer    the same object     its groups and states: those of the carried optimizer
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from taylorfx.coupling.couple import couple
from taylorfx.cutting.plan import Plan
from taylorfx.interop.attributes import tensors_of
from taylorfx.interop.huggingface.holding import holdable
from taylorfx.interop.huggingface.making import Source
from taylorfx.interop.like import LikeError, Original, resized
from taylorfx.interop.module import SpecModule
from taylorfx.interop.optim import carry
from taylorfx.interop.trials import constraints_of, some_of
from taylorfx.network.run import Inputs
from taylorfx.network.spec import Spec
from taylorfx.selection.constraints import Constraints
from taylorfx.tree import Params, flatten, map_paths, unflatten

__all__ = ["Trained"]


class Trained:
    """A module that a loop of someone else's trains, as it is now.

    Args:
        module: what was captured; it may have been trained and cut since.
        params, spec: its network. Of the parameters only constants are looked at, which no module holds.
        inputs: some examples, by which smaller modules are compared.
        names: by their paths in the module, what the spec calls parameters of layers that have moved up, since others
            have left.

    Raises:
        LikeError: if the parameters are not the module's own.
    """

    def __init__(
        self, module: nn.Module, params: Params, spec: Spec, inputs: Inputs, names: Mapping[str, str] | None = None
    ) -> None:
        self.module, self.plain, self.spec, self.names = module, _plain(module), spec, names or {}
        tensors = self._by_name(module)
        where = next(iter(tensors.values())).device
        self.params = map_paths(lambda path, x: tensors[path].detach() if path in tensors else x.to(where), params)
        self.example = some_of(spec, inputs)
        self.own = self._of_module(self.params, spec)
        self.original = Original(self.plain, *self.own, *self.example, self.own)
        if foreign := self.original.foreign(self.own[1].shapes):
            raise LikeError(foreign)

    def constraints(self, *, branches: bool = False) -> Constraints:
        """What the module can hold, as `taylorfx.interop.holdable` finds out.

        Raises:
            LikeError: for branches that would leave a class which has all of them.
        """
        if isinstance(self.module, SpecModule):
            return Constraints()
        if self._pretrained:
            return holdable(self.plain, *self.own, *self.example, branches=branches)
        if branches:
            raise LikeError(
                f"What a class can hold has all of its branches; received a {type(self.plain).__name__} and "
                "branches=True. Leave that out, or train taylorfx.to_torch(params, spec), which can lose branches. Of "
                "models of transformers whole layers may leave."
            )
        return constraints_of(self.original, self.params, couple(self.params, self.spec))

    def become(
        self,
        params: Params,
        spec: Spec,
        plan: Plan,
        optimizers: Sequence[Optimizer],
        others: Mapping[str, Tensor],
    ) -> Mapping[str, str]:
        """Make the module and its optimizers those of a smaller network. All is ready before anything changes.

        Args:
            plan: what led to the smaller network.
            others: what the optimizers hold besides, by name.

        Returns:
            The names for the smaller one, as ``names`` are for this.

        Raises:
            LikeError, ConfigError: if the class cannot hold the network.
            PlanError: if the optimizers have states that cannot be carried.
        """
        small, names = self._smaller(params, spec)
        old, new = ({**self._by_name(module, x), **others} for module, x in ((self.module, self.names), (small, names)))
        carried = [carry(optimizer, plan, new, old=old) for optimizer in optimizers]
        vars(self.module).update(vars(small))
        for optimizer, after in zip(optimizers, carried, strict=True):
            optimizer.state, optimizer.param_groups = after.state, after.param_groups
        return names

    def _by_name(self, module: nn.Module, names: Mapping[str, str] | None = None) -> dict[str, Tensor]:
        """The tensors of a module as the spec calls them."""
        names = self.names if names is None else names
        return {names.get(path, path): x for path, x in tensors_of(module).items()}

    def _of_module(self, params: Params, spec: Spec) -> tuple[Params, Spec]:
        """A network with the paths that its parameters have in the module."""
        if not self.names:
            return params, spec
        paths = {name: path for path, name in self.names.items()}
        places = [tuple((leaf, paths.get(path, path)) for leaf, path in node.paths.items()) for node in spec]
        nodes = tuple(replace(node, params=x) if x else node for node, x in zip(spec, places, strict=True))
        moved = {paths.get(path, path): x for path, x in flatten(params).items()}
        return unflatten(moved), replace(spec, nodes=nodes)

    def _smaller(self, params: Params, spec: Spec) -> tuple[nn.Module, Mapping[str, str]]:
        """A module of the same class, with the modes, hooks and frozen parameters of this one, and its names."""
        if isinstance(self.module, SpecModule):
            if gained := [path for path in spec.shapes if path not in self.spec.shapes]:
                raise LikeError(
                    f"A repair has added {', '.join(gained)} to the network, which no optimizer of this run would "
                    "train. Give these layers a bias before training, or repair=taylorfx.recalibrate, or none."
                )
            fresh, small = SpecModule(params, spec).train(self.module.training), copy.copy(self.module)
            frozen = {path for path, x in self.module.named_parameters() if not x.requires_grad}
            for path, x in fresh.named_parameters():
                x.requires_grad_(path not in frozen)
            vars(small).update({name: vars(fresh)[name] for name in ("_modules", "_parameters", "_buffers", "spec")})
            return small, self.names
        if self._pretrained:
            source = Source(self.plain, *self.own, *self.example, self.own)
            model, layers = source.resized(*self._of_module(params, spec))
            former = {path: layers.former(path, source.usual) for path in tensors_of(model)}
            return model, {path: self.names.get(old, old) for path, old in former.items()}
        return resized(self.original, params, spec, ()), self.names

    @property
    def _pretrained(self) -> bool:
        """The module is a model of transformers, with a config that it is saved by."""
        library = sys.modules.get("transformers")
        return library is not None and isinstance(self.plain, library.PreTrainedModel)


def _plain(module: nn.Module) -> nn.Module:
    """The module without the autocast that accelerate puts around its ``forward``; the parts are the same."""
    if "_original_forward" not in vars(module):
        return module
    plain = copy.copy(module)
    for name in ("forward", "_original_forward"):
        vars(plain).pop(name)
    return plain

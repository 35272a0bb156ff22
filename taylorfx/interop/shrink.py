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
from taylorfx.tree import Params, map_paths

__all__ = ["Trained"]


class Trained:
    """A module that a loop of someone else's trains, as it is now.

    Args:
        module: what was captured; it may have been trained and cut since.
        params, spec: its network. Of the parameters only constants are looked at, which no module holds.
        inputs: some examples, by which smaller modules are compared.

    Raises:
        LikeError: if the parameters are not the module's own.
    """

    def __init__(self, module: nn.Module, params: Params, spec: Spec, inputs: Inputs) -> None:
        self.module, self.plain, self.spec = module, _plain(module), spec
        tensors = tensors_of(module)
        where = next(iter(tensors.values())).device
        self.params = map_paths(lambda path, x: tensors[path].detach() if path in tensors else x.to(where), params)
        self.example = some_of(spec, inputs)
        self.original = Original(self.plain, self.params, spec, *self.example, (self.params, spec))
        if foreign := self.original.foreign(spec.shapes):
            raise LikeError(foreign)

    def constraints(self) -> Constraints:
        """What the module can hold, as `taylorfx.interop.holdable` finds out."""
        if isinstance(self.module, SpecModule):
            return Constraints()
        if self._pretrained:
            return holdable(self.plain, self.params, self.spec, *self.example)
        return constraints_of(self.original, self.params, couple(self.params, self.spec))

    def become(
        self,
        params: Params,
        spec: Spec,
        plan: Plan,
        optimizers: Sequence[Optimizer],
        others: Mapping[str, Tensor],
    ) -> None:
        """Make the module and its optimizers those of a smaller network. All is ready before anything changes.

        Args:
            plan: what led to the smaller network.
            others: what the optimizers hold besides, by name.

        Raises:
            LikeError, ConfigError: if the class cannot hold the network.
            PlanError: if the optimizers have states that cannot be carried.
        """
        small = self._smaller(params, spec)
        old, new = ({**tensors_of(module), **others} for module in (self.module, small))
        carried = [carry(optimizer, plan, new, old=old) for optimizer in optimizers]
        vars(self.module).update(vars(small))
        for optimizer, after in zip(optimizers, carried, strict=True):
            optimizer.state, optimizer.param_groups = after.state, after.param_groups

    def _smaller(self, params: Params, spec: Spec) -> nn.Module:
        """A module of the same class, with the modes, hooks and frozen parameters of this one."""
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
            return small
        if self._pretrained:
            source = Source(self.plain, self.params, self.spec, *self.example, (self.params, self.spec))
            model: nn.Module = source.resized(params, spec)
            return model
        return resized(self.original, params, spec, ())

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

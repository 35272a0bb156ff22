"""Pruning within a run of Lightning's Trainer, between its epochs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from taylorfx.callbacks.steps import Pruning, Steps
from taylorfx.network.spec import Spec
from taylorfx.repair.batches import Batches
from taylorfx.selection.budget import Budgets
from taylorfx.selection.constraints import Constraints
from taylorfx.tree import Params

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("This callback is of Lightning's Trainer; pip install lightning.") from error

__all__ = ["PruneCallback"]


class PruneCallback(Pruning, Callback):
    """Prunes a network within a ``LightningModule`` at the end of epochs; training goes on with what stays.

    ::

        params, spec = tfx.from_torch(lit.model, images)
        prune = PruneCallback(params, spec, batches, budgets=tfx.schedule.cubic(tfx.Flops(0.5), 3))
        lightning.Trainer(max_epochs=9, callbacks=[prune]).fit(lit, loader)

    The network and the optimizers stay the same objects and become smaller: by what the network's class can hold (which
    takes some seconds when training begins), with the state of what stays, as `taylorfx.interop.carry` has it. The
    schedules of learning rates go on. The law: training with the callback is training by hand with `taylorfx.iterate`
    and `carry`. Whatever else the ``LightningModule`` has, as the weights of a loss, stays as it is.

    A run goes on from a checkpoint as any other does, with a network of that checkpoint's sizes, captured anew, and
    budgets in numbers instead of shares. An average of weights that another callback keeps does not become smaller.

    Args:
        params, spec: the network as it was captured.
        batches: what is measured before every cut: ``(inputs, targets)``, or an iterable of such that can be gone
            through again and again.
        budgets: what may remain, one for every cut; shares are of the network when training begins.
        every: how many epochs there are before each cut.
        module: where the network is in the ``LightningModule``, the name of a submodule.
        constraints: what has to be respected; what the class can hold joins them.
        options: the other arguments of `taylorfx.iterate`: ``criterion=``, ``loss=``, ``repair=``, ...

    Raises:
        ValueError: when training begins, for fewer epochs than the budgets take, and for a Trainer on several devices
            or one that wraps the module (DDP, FSDP).
    """

    def __init__(
        self,
        params: Params,
        spec: Spec,
        batches: Batches,
        *,
        budgets: Iterable[Budgets],
        every: int = 1,
        module: str = "model",
        constraints: Constraints | None = None,
        **options: Any,
    ) -> None:
        self.module = module
        self._steps = Steps(
            params, spec, batches, budgets=budgets, every=every, constraints=constraints, options=options
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse what cannot be pruned, and find out what the network's class can hold."""
        if trainer.world_size > 1 or trainer.model is not pl_module:
            wrapper = type(trainer.model).__name__
            raise ValueError(
                "A network is pruned within a run of a Trainer on one device that holds its parameters as they are; "
                f"received one on {trainer.world_size}, with the module as {wrapper}. Prune between two runs instead, "
                "and carry the optimizer over: taylorfx.interop.carry."
            )
        epochs = trainer.max_epochs if trainer.max_epochs is not None and trainer.max_epochs >= 0 else None
        self._steps.begin(pl_module.get_submodule(self.module), trainer.current_epoch, epochs)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prune, if it is time."""
        network = pl_module.get_submodule(self.module)
        own = {id(x) for x in network.parameters()}
        others = {name: x for name, x in pl_module.named_parameters() if id(x) not in own}
        self._steps.end_of_epoch(trainer.current_epoch + 1, network, trainer.optimizers, others)

"""Pruning within a run of the Trainer of transformers, between its epochs."""

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
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError("This callback is of transformers' Trainer; pip install transformers accelerate.") from error

__all__ = ["PruneCallback"]


class PruneCallback(Pruning, TrainerCallback):
    """Prunes the model of a ``transformers.Trainer`` at the end of epochs; training goes on with what stays.

    ::

        model, params, spec = tfx.interop.huggingface.from_pretrained(folder, outputs="logits")
        prune = PruneCallback(
            params, spec, batches, budgets=tfx.schedule.cubic(tfx.Flops(0.5), 3),
            loss=tfx.interop.huggingface.next_token,
        )
        transformers.Trainer(model, arguments, train_dataset=data, callbacks=[prune]).train()

    The model and the optimizer stay the same objects and become smaller: by what its class and its config can hold
    (which takes some seconds when training begins), so that every checkpoint from then on is a folder that
    ``from_pretrained`` takes; with the state of what stays, as `taylorfx.interop.carry` has it. The schedule of
    learning rates goes on. The law: training with the callback is training by hand with `taylorfx.iterate` and `carry`.

    Any module will do that was captured by `taylorfx.from_torch` or made by `taylorfx.to_torch`, if the Trainer takes
    it. A run goes on from a checkpoint as any other does, with the model of that checkpoint, captured anew, and budgets
    in numbers instead of shares.

    Args:
        params, spec: the model as it was captured before the Trainer got it.
        batches: what is measured before every cut: ``(inputs, targets)``, or an iterable of such that can be gone
            through again and again.
        budgets: what may remain, one for every cut; shares are of the model when training begins.
        every: how many epochs there are before each cut.
        constraints: what has to be respected; what the class can hold joins them.
        options: the other arguments of `taylorfx.iterate`: ``criterion=``, ``loss=``, ``repair=``, ... With
            ``branches=True`` whole layers of a model of transformers leave, too, and the others move up.

    Attributes:
        plans: those of all cuts until now, each for the network that the one before left.
        params, spec: the network as the last cut left it, with the names that it was captured with.

    Raises:
        ValueError: when training begins, for fewer epochs than the budgets take, for a Trainer on several devices, with
            FSDP, DeepSpeed or ``torch_compile``, which hold the parameters in other ways, and for
            ``load_best_model_at_end``: the best model may be larger than the last one.
    """

    def __init__(
        self,
        params: Params,
        spec: Spec,
        batches: Batches,
        *,
        budgets: Iterable[Budgets],
        every: int = 1,
        constraints: Constraints | None = None,
        **options: Any,
    ) -> None:
        self._steps = Steps(
            params, spec, batches, budgets=budgets, every=every, constraints=constraints, options=options
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse what cannot be pruned, and find out what the model's class can hold."""
        mode = args.parallel_mode.value
        others = ("deepspeed", "fsdp", "torch_compile", "load_best_model_at_end")
        unfit = [f"parallel_mode is {mode!r}"] * (mode != "not_parallel") + [
            x for x in others if getattr(args, x, None)
        ]
        if unfit:
            raise ValueError(
                "A model is pruned within a run of a Trainer on one device that holds its parameters as they are, and "
                f"does not go back to an earlier one; received {', '.join(unfit)}. Prune between two runs instead, and "
                "carry the optimizer over: taylorfx.interop.carry."
            )
        self._steps.begin(kwargs["model"], round(state.epoch or 0), state.num_train_epochs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prune, if it is time and the epoch is whole."""
        epoch = state.epoch or 0.0
        if abs(epoch - round(epoch)) < 1e-6:
            self._steps.end_of_epoch(round(epoch), kwargs["model"], [kwargs["optimizer"]], {})

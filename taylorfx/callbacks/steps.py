"""What callbacks have in common: `taylorfx.iterate` on a module that a loop of someone else's trains."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any

import optree
import torch
from torch import Tensor
from torch.optim import Optimizer

from taylorfx.coupling.couple import couple
from taylorfx.cutting.plan import Plan
from taylorfx.interop.like import UserModule
from taylorfx.interop.shrink import Trained
from taylorfx.network.spec import Spec
from taylorfx.repair.batches import Batches
from taylorfx.scoring.batches import Batch, each_batch
from taylorfx.selection.budget import Budget, Budgets, each_budget
from taylorfx.selection.constraints import Constraints
from taylorfx.sentence import iterate
from taylorfx.tree import Params, flatten

__all__ = ["Pruning", "Steps"]


class Steps:
    """The steps of `iterate`, one at the end of every so many epochs.

    Args:
        params, spec: the module that is trained, as it was captured.
        batches: what is measured at every step, as for `iterate`; moved to where the module is.
        budgets: what may remain after each step, as for `iterate`.
        every: how many epochs there are before each step.
        constraints: they join what the module's class can hold.
        options: the other arguments of `iterate`, which are checked at once.

    Attributes:
        params, spec: the network as the last step left it.
        plans: those of all steps until now.

    Raises:
        ValueError: for an iterator of batches, a single budget, and for fewer epochs than one between steps.
    """

    def __init__(
        self, params: Params, spec: Spec, batches: Batches, *, budgets: Iterable[Budgets], every: int,
        constraints: Constraints | None, options: Mapping[str, Any],
    ) -> None:  # fmt: skip
        if isinstance(batches, Iterator):
            raise ValueError("Every step measures the batches; received an iterator. Give a list or a loader.")
        if every < 1:
            raise ValueError(f"There is at least one epoch before a step; received every={every}.")
        if isinstance(budgets, Budget):
            raise ValueError(f"There is a budget for every step, in a list or a schedule; received {budgets!r}.")
        self.params, self.spec, self.batches, self.every = params, spec, batches, every
        self.budgets = [each_budget(budget) for budget in budgets]
        self.asked, self.options = constraints or Constraints(), options
        self.plans: list[Plan] = []
        self._names: Mapping[str, str] = {}
        self._left: list[tuple[Budget, ...]] = []
        self._respected: Constraints | None = None
        self._steps: Generator[tuple[Params, Spec, Plan], Params | None, None] | None = None
        self._iterate(params, self.budgets, self.asked)  # which refuses at once what cannot be

    def begin(self, module: UserModule, done: int, epochs: int | None) -> None:
        """Look at what the module can hold, before it is trained.

        Args:
            done: how many epochs were trained before, by a run that goes on.
            epochs: how many there will be with those; unknown without.

        Raises:
            ValueError: for budgets that no epoch is left for, and shares where a run goes on.
            LikeError, ConfigError: for a module that was not captured, or not so.
        """
        self._left = self.budgets[done // self.every :]
        wanted = (done // self.every + len(self._left)) * self.every
        if epochs is not None and wanted > epochs:
            raise ValueError(
                f"{len(self.budgets)} budgets, one at the end of every {self.every} epochs, take {wanted} epochs; "
                f"there are {epochs}. Train longer, or give fewer budgets."
            )
        if done and any(isinstance(one.amount, float) for budget in self._left for one in budget):
            raise ValueError(
                "A share is of the network before anything was cut, and this run goes on after some epochs, maybe cut. "
                "Give numbers: Flops(1_000_000) instead of Flops(0.5)."
            )
        now = self._now(module)
        branches = bool(self.options.get("branches"))
        coupling, held = couple(now.params, self.spec, branches=branches), now.constraints(branches=branches)
        self._respected, self._steps = self.asked.also(held, coupling), None

    def end_of_epoch(
        self, done: int, module: UserModule, optimizers: Sequence[Optimizer], others: Mapping[str, Tensor]
    ) -> Plan | None:
        """Make the module and its optimizers smaller if it is time; the plan by which, if it is.

        Args:
            done: how many epochs were trained.
            others: what the optimizers hold besides the module, by name.
        """
        if done % self.every or not self._left:
            return None
        now = self._now(module)
        if self._steps is None:
            assert self._respected is not None, "begin comes first"
            self._steps = self._iterate(now.params, self._left, self._respected)
        else:
            self._steps.send(now.params)
        params, spec, plan = next(self._steps)
        self._names = now.become(params, spec, plan, optimizers, others)
        self._left = self._left[1:]
        self.params, self.spec = params, spec
        self.plans.append(plan)
        return plan

    def _now(self, module: UserModule) -> Trained:
        """The module as it is now."""
        batches = _Moved(self.batches, next(module.parameters()).device)
        return Trained(module, self.params, self.spec, next(iter(batches))[0], self._names)

    def _iterate(
        self, params: Params, budgets: Sequence[tuple[Budget, ...]], constraints: Constraints
    ) -> Generator[tuple[Params, Spec, Plan], Params | None, None]:
        batches = _Moved(self.batches, next(iter(flatten(params).values())).device)
        return iterate(params, self.spec, batches, budgets=budgets, constraints=constraints, **self.options)


class _Moved(Iterable[Batch]):
    """Batches on a device."""

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self.batches, self.device = batches, device

    def __iter__(self) -> Iterator[Batch]:
        for inputs, targets in each_batch(self.batches):
            yield self._moved(inputs), self._moved(targets)

    def _moved(self, value: Any) -> Any:
        return optree.tree_map(lambda x: x.to(self.device) if isinstance(x, Tensor) else x, value)


class Pruning:
    """What a callback shows of its steps."""

    _steps: Steps

    @property
    def plans(self) -> tuple[Plan, ...]:
        """The plans of all cuts until now, each for the network that the one before left."""
        return tuple(self._steps.plans)

    @property
    def params(self) -> Params:
        """The parameters as the last cut left them, before they were trained further."""
        return self._steps.params

    @property
    def spec(self) -> Spec:
        """The network as the last cut left it."""
        return self._steps.spec

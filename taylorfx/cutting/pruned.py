"""What pruning leaves, whole or interrupted: the smaller network, and the plans that led to it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property, reduce

from taylorfx.cutting.cut import compose
from taylorfx.cutting.plan import Plan
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["Interrupted", "Pruned"]


class Pruned(tuple[Params, Spec]):
    """The pair ``(params, spec)`` of a smaller network, with the plans that led to it. ::

        pruned = tfx.prune(params, spec, batch, budget=tfx.Flops(0.5))
        momentum = tfx.cut(momentum, pruned.plan)
        tfx.store.save_plan("plan.json", pruned.plan)
        params, spec = pruned

    Attributes:
        plans: of all steps in their order, each for the network that the one before left.

    >>> import numpy as np, torch
    >>> from taylorfx import Input, couple, cut, init, serial
    >>> from taylorfx.layers import Linear
    >>> spec = serial(Input((2,)), Linear(2, 4), Linear(4, 3))
    >>> params = init(spec, torch.Generator())
    >>> first = Plan(couple(params, spec), np.array([True, False, True, True]))
    >>> small = cut(params, first)
    >>> second = Plan(couple(small, first.spec), np.array([True, True, False]))
    >>> params, spec = pruned = Pruned(cut(small, second), second.spec, [first, second])
    >>> pruned.plan.keep
    array([ True, False,  True, False])
    """

    plans: tuple[Plan, ...]

    def __new__(cls, params: Params, spec: Spec, plans: Iterable[Plan]) -> Pruned:
        pruned = super().__new__(cls, (params, spec))
        pruned.plans = tuple(plans)
        return pruned

    def __getnewargs__(self) -> tuple[Params, Spec, tuple[Plan, ...]]:
        return self.params, self.spec, self.plans

    @property
    def params(self) -> Params:
        """The parameters that stay."""
        return self[0]

    @property
    def spec(self) -> Spec:
        """The smaller network."""
        return self[1]

    @cached_property
    def plan(self) -> Plan:
        """All steps as one plan of the original network. What a repair adds, new numbers and biases, is not in it.

        Raises:
            PlanError: where no one plan keeps what all steps keep. Then ``plans`` is applied one after the other.
        """
        return reduce(compose, self.plans)


class Interrupted(KeyboardInterrupt):
    """`prune` was interrupted; its steps until then are kept. ::

        try:
            params, spec = tfx.prune(params, spec, batches, budget=tfx.Flops(0.3))
        except taylorfx.sentence.Interrupted as stopped:
            params, spec = stopped.pruned

    Like ``KeyboardInterrupt``, it ends a program that does not catch it. With ``like=``, the class has not been tried
    with this network yet; ``to_torch(..., like=...)`` does that.

    Attributes:
        pruned: what the last whole step left, as `prune` would have returned it: its ``params``, its ``spec``, the
            ``plan`` of all steps until then.
        steps: how many steps were whole.
    """

    def __init__(self, pruned: Pruned) -> None:
        self.pruned, self.steps = pruned, len(pruned.plans)
        super().__init__(f"prune was interrupted after {self.steps} of its steps; pruned is what they left.")

    @property
    def params(self) -> Params:
        """The parameters of what is left."""
        return self.pruned.params

    @property
    def spec(self) -> Spec:
        """The network of what is left."""
        return self.pruned.spec

    @property
    def plan(self) -> Plan:
        """All whole steps as one plan of the original network."""
        return self.pruned.plan

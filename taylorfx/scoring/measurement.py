"""How a network is measured, as a value: `Measurement`, which functions take whole or by its keywords."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypedDict, TypeVar

import torch

from taylorfx.coupling.units import Coupling
from taylorfx.distributed import Same, Total, refuse_alone, sharing
from taylorfx.layers import sizes
from taylorfx.scoring.batches import Split
from taylorfx.scoring.fingerprint import fingerprint, plain
from taylorfx.scoring.gates import Gates
from taylorfx.scoring.losses import Loss, Objective, cross_entropy
from taylorfx.tree import Params

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Measurement", "MeasurementOptions", "ObjectiveOptions", "names_of", "objective_of", "one_of"]

T = TypeVar("T", bound="DataclassInstance")
M = TypeVar("M", bound="Measured")


class Measured(Protocol):
    """Sums over examples, of which it knows the number."""

    @property
    def n(self) -> int: ...


class ObjectiveOptions(TypedDict, total=False):
    """The keywords of a loss and of what it is a function of, for the type checker."""

    loss: Loss
    per_example: bool
    split: Split | None


class MeasurementOptions(ObjectiveOptions, total=False):
    """The keywords of `Measurement`, for the type checker."""

    per_position: str | None
    moments: bool
    rows: bool
    at_writes: bool
    training: bool
    around: Gates | None
    generator: torch.Generator | None
    fold: bool
    channels_last: bool | None
    micro_batch: int | None
    progress: bool
    total: Total | None


@dataclass(frozen=True)
class Measurement:
    """How a network is measured: the loss, what is summed, and how the network is run.

    `measure`, `derivatives`, `prune` and `iterate` take one as ``measurement=``, or its attributes as keywords.

    >>> alone = Measurement(rows=True, micro_batch=16)
    >>> alone.rows, alone.moments
    (True, False)

    Attributes:
        loss: called on each example as a batch of one, so that a mean and a sum over the batch mean the same: the
            derivative is that of the example's own loss. By ``torch.func.vmap``, or one example after the other where
            the loss looks at numbers (``item``, branches, numpy) or the targets are lists with one entry per example.
        per_example: otherwise the loss is called on each batch as it is, and the batch is one observation: for losses
            that compare examples. The derivatives are those of that number by gates that all examples share; of a
            mean over examples, therefore, the mean of the per-example ones.
        split: ``split(targets, k)`` gives the targets of example ``k`` as those of a batch of one, where they are
            neither tensors nor lists with one entry per example.
        per_position: an axis of an input, ``"input_ids.1"``: each of its positions is an observation, with gates of its
            own. So ``N`` examples of ``T`` tokens give ``N T`` derivatives of the examples' losses, and those of an
            example add up to its own. All reads have to have such an axis, and the network has to take other sizes of
            it, by which it is told from other axes. Padding without any effect has observations of zeros, which count.
            First and second order are in proportion if the loss of an example is the sum of its tokens'; then they are
            of the mean loss of a token. A pass holds as many derivatives as there are activations at the reads, which
            ``micro_batch`` bounds.
        moments: also sum the activations that are read (for `activation_mean`, `activation_std`, `apoz`).
        rows: also keep every observation's derivatives (for `joint`): four bytes for each observation and unit.
        at_writes: differentiate where activations are made instead of where they are read (for `compat`).
        training: run the network in training mode (for `compat`). Batch norm then lets examples depend on each other,
            so that only sums over a batch mean something.
        around: gate the deviation from these values at the reads instead of the activation itself, from
            `Means.centers`: ``m_u = 0`` then leaves the mean in the unit's place, and the derivative is ``(a - mean) *
            dL/da``. Reads that are not named are gated as ever.
        generator: what the network draws from in training mode, and the criterion `random` in `prune`.
        fold: score a private copy in which batch norms are folded (`taylorfx.fold`), activations written over each
            other, and unused positions left out: the reads and so the derivatives are the same up to rounding, with
            less time and memory. Not where activations are made, nor in training.
        channels_last: run images that convolutions read in ``torch.channels_last`` memory; by default the private copy
            does so on a CPU, where it is faster.
        micro_batch: run at most so many examples at a time, which bounds the memory; the statistics are the same.
        progress: draw a progress bar over the batches (needs rich); in `prune` and `iterate`, one for every step.
        total: adds up what several processes measure, each of which has batches of its own, perhaps none:
            `taylorfx.distributed.total`. They compare parameters, network and options first.

    Raises:
        ValueError: for micro-batches where a batch is more than its examples (in training, or with a loss of the whole
            batch), for positions that are none of an example's, and for a split of what a loss of the whole batch takes
            as it is.
    """

    loss: Loss = cross_entropy
    per_example: bool = True
    split: Split | None = None
    per_position: str | None = None
    moments: bool = False
    rows: bool = False
    at_writes: bool = False
    training: bool = False
    around: Gates | None = None
    generator: torch.Generator | None = None
    fold: bool = True
    channels_last: bool | None = None
    micro_batch: int | None = None
    progress: bool = False
    total: Total | None = None

    def __post_init__(self) -> None:
        Objective(self.loss, self.per_example, self.split)
        if self.micro_batch is not None and (self.micro_batch < 1 or self.training or not self.per_example):
            raise ValueError(
                "Micro-batches have one or more examples, and are not for training nor for a loss of the whole batch; "
                f"received micro_batch={self.micro_batch}, training={self.training}, per_example={self.per_example}."
            )
        axis = self.per_position
        if axis is not None and (not isinstance(axis, str) or sizes.fault(axis) or not self.per_example):
            raise ValueError(
                "Positions are those of an axis of an input, 'input_ids.1', of examples with a loss of each; received "
                f"per_position={axis!r}, per_example={self.per_example}."
            )

    @staticmethod
    def of(measurement: Measurement | None, options: Mapping[str, object]) -> Measurement:
        """The measurement, or one of these keywords.

        Raises:
            TypeError: for both at once, and for keywords that are none of its attributes.
        """
        return one_of(Measurement, measurement, options, "The options of a measurement", TypeError)

    def told(self) -> str:
        """What has to be the same in all processes, as text.

        >>> Measurement(rows=True, micro_batch=16).told()
        'cross_entropy by example with rows'
        """
        asked = [name for name in ("moments", "rows", "at_writes", "training", "around") if getattr(self, name)]
        of = "by example" if self.per_example else "of whole batches"
        of = f"by position of {self.per_position}" if self.per_position else of
        loss = getattr(self.loss, "__name__", None) or plain(self.loss)
        return f"{loss} {of}{' with ' * bool(asked)}{', '.join(asked)}"

    def of_all(self, params: Params, coupling: Coupling, one: Callable[[Params], M]) -> M:
        """What this process measures; with ``total`` the sum of what all do, once they know that they measure alike.

        Args:
            one: measures the batches of this process; parameters that are shared are gathered when it uses them.

        Raises:
            ValueError: if no process has a batch; for shared parameters without ``total``.
        """
        total = self.total
        if total is None:
            refuse_alone(params)
            return one(params)
        total(lambda: Same(f"{fingerprint(params, coupling)}, {self.told()}"))
        leaves = {node.path(leaf) for node in coupling.spec for leaf in node.paths if node.layer.leaf}

        def mine() -> M:
            with sharing(params, small=leaves) as own:
                return one(own)

        measured = total(mine)
        if not measured.n:
            raise ValueError("There is nothing to measure: none of the processes received a batch.")
        return measured

    @property
    def objective(self) -> Objective:
        """The loss, and what it is a function of."""
        return Objective(self.loss, self.per_example, self.split)


def objective_of(measurement: Measurement | None, options: Mapping[str, object]) -> Objective:
    """The loss of a measurement, or of ``loss``, ``per_example`` and ``split`` as keywords.

    Raises:
        TypeError: for both at once, and for other keywords.
        ValueError: for a measurement that is added up over processes.
    """
    known = names_of(Objective)
    if strange := [option for option in options if option not in known]:
        raise TypeError(f"The options of a loss are {', '.join(known)}; received {', '.join(strange)}.")
    how = Measurement.of(measurement, options)
    if how.total is not None:
        raise ValueError(
            "What is added up over processes are the sums of measure and of the repairs; received total= with "
            "something else. Leave it out, and give every process all batches."
        )
    return how.objective


def one_of(kind: type[T], value: T | None, options: Mapping[str, object], what: str, error: type[Exception]) -> T:
    """A value of this kind as it is, or made of its keywords; never of both, nor of keywords that it does not have."""
    known, keyword = names_of(kind), kind.__name__.lower()
    if strange := [option for option in options if option not in known]:
        raise error(f"{what} are {', '.join(known)}; received {', '.join(strange)}.")
    if value is None:
        return kind(**options)
    if not isinstance(value, kind) or options:
        raise error(
            f"{keyword}= takes a tfx.{kind.__name__}, with no such keyword beside it; received a "
            f"{' and '.join([type(value).__name__, *options])}. Put all of it into the value, or give keywords alone."
        )
    return value


def names_of(kind: type[DataclassInstance]) -> tuple[str, ...]:
    """The names of a value's attributes, which are its keywords."""
    return tuple(field.name for field in fields(kind))

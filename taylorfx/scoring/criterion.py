"""What a criterion is: how units are scored, and what that needs, as one value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Generic, Literal, NamedTuple, ParamSpec

import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.functions import filled_in, innermost, name_of, pickled, present_as, unfit
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batches
from taylorfx.scoring.measure import measure
from taylorfx.scoring.measurement import Measurement
from taylorfx.tree import Params

__all__ = ["Criterion", "Score", "as_criterion"]

P = ParamSpec("P")

Score = Callable[..., Tensor]
"""A `Criterion`, or a plain function of ``(statistics, coupling)``, which is taken as one."""

NEEDS = ("moments", "rows", "at_writes", "training")


class _Call(NamedTuple):
    """How a criterion is called: in words, with how many arguments by position, and with which keywords."""

    words: str
    arguments: int
    keywords: tuple[str, ...] = ()


_CALLS = {
    "statistics": _Call("(statistics, coupling)", 2),
    "weights": _Call("(params, coupling)", 2),
    "units": _Call("(coupling, generator)", 1, ("generator",)),
    "network": _Call("(params, spec, batches, coupling, loss=loss)", 4, ("loss",)),
}


@dataclass(frozen=True)
class Criterion(Generic[P]):
    """How units are scored, and what has to be there for it: a value that is called like its function.

    A plain function of ``(statistics, coupling)`` is a criterion by itself. A function of anything else, or one that
    needs more than `measure` sums by default, says so:

    >>> from functools import partial
    >>> import taylorfx as tfx
    >>> @partial(tfx.criteria.Criterion, of="weights")
    ... def both_norms(params, coupling):
    ...     return tfx.criteria.weight_l1(params, coupling) * tfx.criteria.weight_l2(params, coupling)
    >>> steepest = tfx.criteria.Criterion(lambda stats, coupling: stats.rows.abs().amax(0), rows=True)
    >>> both_norms.of, steepest.of, steepest.rows
    ('weights', 'statistics', True)

    A ``functools.partial`` of a criterion needs what the criterion needs.

    Attributes:
        score: the function; it gives one number per unit, ``(units,)``, higher means keep.
        of: what it is a function of,

            - ``"statistics"``: ``(statistics, coupling)``;
            - ``"weights"``: ``(params, coupling)``; nothing is measured;
            - ``"units"``: ``(coupling, generator)``;
            - ``"network"``: ``(params, spec, batches, coupling, loss=loss)``, and ``per_example=`` and ``split=`` where
              they are not the default.
        moments, rows, at_writes, training: what the statistics have to be, as `Measurement` says.

    Raises:
        ValueError: for another ``of``, for needs of statistics where nothing is measured, and for what cannot be called
            as ``of`` says.
    """

    score: Callable[P, Tensor]
    of: Literal["statistics", "weights", "units", "network"] = "statistics"
    moments: bool = False
    rows: bool = False
    at_writes: bool = False
    training: bool = False

    def __post_init__(self) -> None:
        asked = {name: getattr(self, name) for name in NEEDS}
        if self.of not in _CALLS or (self.of != "statistics" and any(asked.values())):
            raise ValueError(
                f"A criterion is of {', '.join(_CALLS)}; moments, rows, at_writes and training go with statistics; "
                f"received {name_of(self.score)}, of {self.of!r} with {asked}."
            )
        call = _CALLS[self.of]
        self._check(dict.fromkeys(call.keywords))
        present_as(self, self.score)

    def _check(self, keywords: Mapping[str, object]) -> None:
        """Refuse a function that cannot be called as ``of`` says, with these keywords."""
        function, call = self.score, _CALLS[self.of]
        called = callable(function) and not isinstance(function, (type, Tensor))
        blank = (None,) * call.arguments
        problem = unfit(function, *blank, **self._open(keywords)) if called else "it is not called"
        if problem:
            raise ValueError(
                f"A criterion of {self.of} is a function of {call.words}; received {name_of(function)}: {problem}. "
                "Fill other arguments in (functools.partial), or say by tfx.criteria.Criterion what it is a function "
                "of; scores that are there already go to `select`."
            )

    def __call__(self, *args: P.args, **keywords: P.kwargs) -> Tensor:
        return self.score(*args, **keywords)

    def __reduce__(self) -> str | tuple[object, ...]:
        return pickled(self)

    def measured(self, measurement: Measurement) -> Measurement:
        """The measurement, with what the criterion needs besides."""
        return replace(measurement, **{name: getattr(self, name) or getattr(measurement, name) for name in NEEDS})

    def on(
        self,
        params: Params,
        spec: Spec,
        batches: Batches,
        coupling: Coupling,
        measurement: Measurement,
    ) -> Tensor:
        """The scores of a network, ``(units,)``, with all that they need measured for them.

        `random` and passes in training mode draw from the measurement's generator, by default from one of seed 0.
        """
        score: Score = self.score
        draw = measurement.generator or torch.Generator().manual_seed(0)
        if self.of == "statistics":
            how = self.measured(replace(measurement, generator=draw))
            return score(measure(params, spec, batches, coupling, measurement=how), coupling)
        if self.of == "weights":
            return score(params, coupling)
        if self.of == "units":
            return score(coupling, **self._open({"generator": draw}))
        if measurement.per_position is not None:
            raise ValueError(
                f"What a criterion of the network sums up itself is of examples; received per_position= with "
                f"{name_of(self)}. Take a criterion of the statistics, or leave it out."
            )
        if measurement.total is not None:
            raise ValueError(
                f"What a criterion of the network sums up itself is not added up over processes; received total= with "
                f"{name_of(self)}. Take a criterion of the statistics, or give every process all batches, without it."
            )
        said: dict[str, object] = {"loss": measurement.loss}
        said |= {} if measurement.per_example else {"per_example": False}
        said |= {} if measurement.split is None else {"split": measurement.split}
        self._check(said)
        return score(params, spec, batches, coupling, **self._open(said))

    def _open(self, keywords: Mapping[str, object]) -> dict[str, object]:
        """The keywords that no ``functools.partial`` has filled in, by themselves or as a measurement."""
        filled = filled_in(self.score)
        return {name: value for name, value in keywords.items() if not filled & {name, "measurement"}}


def as_criterion(value: Score) -> Criterion[...]:
    """A criterion as it is; a plain function as one of the statistics.

    Raises:
        ValueError: for what cannot be called as its needs say.
    """
    inner = innermost(value)
    if isinstance(value, Criterion):
        return value
    return replace(inner, score=value) if isinstance(inner, Criterion) else Criterion(value)

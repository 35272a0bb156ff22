"""Criteria: what a unit is worth. One number per unit, ``(units,)``, higher means keep.

A criterion is a plain function of the statistics of gate derivatives ``g`` (or of the parameters) and the coupling:

| criterion | score | source |
| --- | --- | --- |
| `taylor` | ``E|g|`` | Molchanov et al. 2016, arXiv 1611.06440, eq. 8 |
| `taylor_squared` | ``E_batches[(E g)^2]`` | Molchanov et al. 2019, arXiv 1906.10771, eq. 8 |
| `fisher` | ``E[g^2] / 2`` | Theis et al. 2018, arXiv 1801.05787, eq. 8 |
| `signed` | ``-E[g]`` | the first-order change of the loss itself |
| `second_order` | ``-E[g] + E[g^2] / 2`` | the change to second order, with the Fisher for the Hessian |

What a criterion is called with and what has to be measured for it is its `Needs`, by which `prune` and `iterate` go.

`taylor` sums over a read's positions, so that scores are comparable across layers; ``spatial_mean=True`` takes the mean
as the paper prints it, which needs the paper's normalizer, `per_layer_l2`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.units import Coupling
from taylorfx.layers.roles import Normalizing
from taylorfx.network.parameters import check
from taylorfx.network.spec import Spec
from taylorfx.scoring.batches import Batch
from taylorfx.scoring.measure import measure
from taylorfx.scoring.statistics import Moments, Statistics
from taylorfx.tree import Params, flatten

__all__ = [
    "Criterion", "Needs", "Normalizer", "activation_mean", "activation_std", "apoz", "batchnorm_scale", "compat",
    "fisher", "of_weights", "per_layer_l2", "per_layer_max", "per_layer_mean", "random",
    "second_order", "signed", "taylor", "taylor_squared", "unnormalized", "weight_l1", "weight_l2",
]  # fmt: skip

Normalizer = Callable[[Tensor, Coupling], Tensor]
"""``normalizer(scores, coupling)``: the scores, ``(units,)``, made comparable across scopes."""

Criterion = Callable[..., Tensor]
"""A function that gives one number per unit, ``(units,)``; what it is called with is its `Needs`."""

F = TypeVar("F", bound=Callable[..., Tensor])


@dataclass(frozen=True)
class Needs:
    """What a criterion is called with, and what `prune` and `iterate` measure for it.

    A decorator: ``@tfx.criteria.Needs(rows=True)`` marks a function; an object that is called has a class attribute
    ``needs``. A ``functools.partial`` needs what its function needs. What is not marked is a function of
    the statistics.

    Attributes:
        of: what it is a function of,

            - ``"statistics"``: ``(statistics, coupling)``;
            - ``"weights"``: ``(params, coupling)``;
            - ``"units"``: ``(coupling, generator)``;
            - ``"network"``: ``(params, spec, batches, coupling, loss=loss)``.
        moments, rows, at_writes, training: what the statistics are, as `measure` takes it.

    Raises:
        ValueError: for another ``of``, and for options of `measure` where nothing is measured.
    """

    of: Literal["statistics", "weights", "units", "network"] = "statistics"
    moments: bool = False
    rows: bool = False
    at_writes: bool = False
    training: bool = False

    def __post_init__(self) -> None:
        measured = self.of == "statistics" or not any(self.options.values())
        if self.of not in _CALLS or not measured:
            raise ValueError(
                f"A criterion is of {', '.join(_CALLS)}; moments, rows, at_writes and training go with statistics; "
                f"received {self}."
            )

    def __call__(self, criterion: F) -> F:
        """The criterion, marked."""
        try:
            criterion.needs = self  # type: ignore[attr-defined]
        except AttributeError:
            raise ValueError(f"A function can be marked; received {criterion!r}. Mark what it is made of.") from None
        return criterion

    @property
    def options(self) -> dict[str, bool]:
        """As keywords of `measure`."""
        return {name: getattr(self, name) for name in ("moments", "rows", "at_writes", "training")}


_CALLS = {
    "statistics": "(statistics, coupling)",
    "weights": "(params, coupling)",
    "units": "(coupling, generator)",
    "network": "(params, spec, batches, coupling, loss=loss)",
}


def of_weights(criterion: F) -> F:
    """Mark a criterion as a function of ``(params, coupling)``: `prune` then measures nothing."""
    return Needs("weights")(criterion)


def needs(criterion: Any) -> Needs:
    """What a criterion needs: its own mark, or that of what a ``functools.partial`` or an object calls.

    Raises:
        ValueError: for what cannot be called as its needs say.
    """
    inner = criterion
    while isinstance(inner, partial) and not isinstance(getattr(inner, "needs", None), Needs):
        inner = inner.func
    called = callable(inner) and not isinstance(inner, (type, Tensor))
    mark = getattr(inner, "needs", getattr(inner.__call__, "needs", None)) if called else None
    found = mark if isinstance(mark, Needs) else Needs()
    blank: dict[str, Any] = dict.fromkeys(("stats", "params", "spec", "batches", "coupling", "draw"))
    args, named = _arguments(criterion, found, objective={"loss": None}, **blank) if called else ((), {})
    problem = unfit(criterion, *args, **named) if called else "it is not called"
    if problem:
        raise ValueError(
            f"A criterion of {found.of} is a function of {_CALLS[found.of]}; received {name_of(criterion)}: {problem}. "
            "Fill other arguments in (functools.partial), or say by tfx.criteria.Needs what it is a function of; "
            "scores that are there already go to `select`."
        )
    return found


def scores(
    criterion: Criterion, params: Params, spec: Spec, batches: Batch | Iterable[Batch], coupling: Coupling,
    *, generator: torch.Generator | None, moments: bool = False, **objective: Any,
) -> Tensor:  # fmt: skip
    """What a criterion says of a network, ``(units,)``, what it needs for that being measured.

    ``objective`` is the loss and how it is called: ``loss``, ``per_example``, ``split``, as far as they are said.
    """
    found, stats = needs(criterion), None
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    if found.of == "statistics":
        options: dict[str, Any] = {**found.options, "moments": moments or found.moments}
        drawn = generator if found.training else None
        stats = measure(params, spec, batches, coupling, generator=drawn, **objective, **options)
    args, named = _arguments(criterion, found, stats, params, spec, batches, coupling, objective, generator)
    return criterion(*args, **named)


def _arguments(
    criterion: Any,
    need: Needs,
    stats: Any,
    params: Any,
    spec: Any,
    batches: Any,
    coupling: Any,
    objective: Any,
    draw: Any,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a criterion is called with; keywords that a ``functools.partial`` has filled in stay its own."""
    args: tuple[Any, ...] = {
        "statistics": (stats, coupling),
        "weights": (params, coupling),
        "units": (coupling,),
        "network": (params, spec, batches, coupling),
    }[need.of]
    named: dict[str, Any] = {"units": {"generator": draw}, "network": objective}.get(need.of, {})
    while isinstance(criterion, partial):
        named = {name: value for name, value in named.items() if name not in criterion.keywords}
        criterion = criterion.func
    return args, named


def unfit(function: Any, *args: Any, **named: Any) -> str:
    """Why a function cannot be called with these arguments; empty if it can, or does not tell."""
    try:
        inspect.signature(function).bind(*args, **named)
    except TypeError as error:
        return str(error)
    except ValueError:  # a built-in function without a signature
        return ""
    return ""


def name_of(value: Any) -> str:
    """A function by its name, anything else by its type."""
    return getattr(value, "__name__", None) or f"{type(value).__name__} {value!r:.80}"


def unnormalized(scores: Tensor, coupling: Coupling) -> Tensor:
    """The scores as they are."""
    return scores


def per_layer_l2(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the L2 norm of their scope's scores (Molchanov et al. 2016, eq. 9)."""
    return _divided(scores, coupling, _per_scope(scores.square(), coupling).sqrt())


def per_layer_mean(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the mean magnitude of their scope's scores."""
    sizes = torch.as_tensor(coupling.sizes, device=scores.device)
    return _divided(scores, coupling, _per_scope(scores.abs(), coupling) / sizes)


def per_layer_max(scores: Tensor, coupling: Coupling) -> Tensor:
    """Divided by the largest magnitude among their scope's scores."""
    scope = torch.as_tensor(coupling.scope, device=scores.device)
    largest = scores.new_zeros(len(coupling.scopes)).scatter_reduce(0, scope, scores.abs(), "amax")
    return _divided(scores, coupling, largest)


def _per_scope(values: Tensor, coupling: Coupling) -> Tensor:
    scope = torch.as_tensor(coupling.scope, device=values.device)
    return values.new_zeros(len(coupling.scopes)).index_add(0, scope, values)


def _divided(scores: Tensor, coupling: Coupling, norms: Tensor) -> Tensor:
    norms = torch.where(norms > 0, norms, torch.ones_like(norms))  # a scope of zeros stays zero
    return scores / norms[torch.as_tensor(coupling.scope, device=scores.device)]


def _own(stats: Statistics, coupling: Coupling) -> None:
    if not isinstance(stats, Statistics):
        raise ValueError(
            f"This criterion is of the statistics that `measure` gives; received {type(stats).__name__}. A function "
            "that calls it is not marked by of_weights."
        )
    if stats.units != coupling.names:
        raise ValueError(
            f"Statistics are scored with the coupling that they were measured with; received those of "
            f"{len(stats.sum)} units and another coupling, of {len(coupling)}. Measure again with this one."
        )
    if not stats.n:
        raise ValueError("Statistics of no batch say nothing about any unit. Was the iterator already used up?")


def taylor(
    stats: Statistics, coupling: Coupling, *, spatial_mean: bool = False, normalizer: Normalizer = unnormalized
) -> Tensor:
    """``E|g|``: the mean over examples of the absolute gate derivative (Molchanov et al. 2016, eq. 8)."""
    _own(stats, coupling)
    return normalizer((stats.sum_abs_mean if spatial_mean else stats.sum_abs) / stats.n, coupling)


def taylor_squared(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``E_batches[(E g)^2]``: the squared derivative of each minibatch's mean loss (Molchanov et al. 2019, eq. 8).

    Squared per example instead, it is twice the `fisher`.
    """
    _own(stats, coupling)
    return normalizer(stats.sum_batch_sq / stats.batches, coupling)


def fisher(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``E[g^2] / 2``: the loss change if the network is at a minimum (Theis et al. 2018, eq. 8)."""
    _own(stats, coupling)
    return normalizer(stats.sum_sq / (2 * stats.n), coupling)


def signed(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``-E[g]``: the first-order change of the loss; units whose removal would lower it come out negative."""
    _own(stats, coupling)
    return normalizer(-stats.sum / stats.n, coupling)


def second_order(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """``-E[g] + E[g^2] / 2``: the change of the loss to second order, the Hessian approximated by the Fisher."""
    _own(stats, coupling)
    return normalizer(-stats.sum / stats.n + stats.sum_sq / (2 * stats.n), coupling)


@Needs(at_writes=True, training=True)
def compat(stats: Statistics, coupling: Coupling) -> Tensor:
    """The arithmetic of the original PyTorch implementation, for the record.

    Sums over the batch and space first, takes the absolute value after, and divides by the scope's L2 norm. Measure
    with ``measure(..., at_writes=True, training=True)``, as `prune` does: at the convolutions' outputs, in training
    mode. Behind such an output a batch norm ignores the scale, so that the sum is zero but for rounding: see the
    README.
    """
    _own(stats, coupling)
    return per_layer_l2(stats.sum_batch_abs, coupling)


def _moments(stats: Statistics, coupling: Coupling) -> Moments:
    _own(stats, coupling)
    if stats.moments is None:
        raise ValueError(
            "This criterion looks at activations, of which the statistics say nothing; measure(..., moments=True). A "
            "function of your own that `prune` calls and that looks at them is marked, "
            "tfx.criteria.Needs(moments=True)."
        )
    return stats.moments


@Needs(moments=True)
def activation_mean(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The mean activation at the reads."""
    moments = _moments(stats, coupling)
    return normalizer(moments.sum / moments.count.clamp(min=1), coupling)


@Needs(moments=True)
def activation_std(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The standard deviation of the activations at the reads."""
    moments = _moments(stats, coupling)
    count = moments.count.clamp(min=1)
    variance = moments.sum_sq / count - (moments.sum / count).square()
    return normalizer(variance.clamp(min=0).sqrt(), coupling)


@Needs(moments=True)
def apoz(stats: Statistics, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """One minus the share of zeros among the activations at the reads (Hu et al. 2016, arXiv 1607.03250, eq. 1)."""
    moments = _moments(stats, coupling)
    return normalizer(1 - moments.zeros / moments.count.clamp(min=1), coupling)


@of_weights
def weight_l1(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The L1 norm of the weights that write the unit (Li et al. 2017, arXiv 1608.08710)."""
    return normalizer(_weights(params, coupling, 1), coupling)


@of_weights
def weight_l2(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The L2 norm of the weights that write the unit."""
    return normalizer(_weights(params, coupling, 2).sqrt(), coupling)


def _weights(params: Params, coupling: Coupling, power: int) -> Tensor:
    _parameters(params, coupling)
    leaves = flatten(params)
    total: Tensor = next(iter(leaves.values())).new_zeros(len(coupling) + 1, dtype=torch.float64)
    seen: set[str] = set()
    for node in coupling.spec:
        signature = coupling.signature(node)
        if signature is None:
            continue
        for leaf, pattern in signature.parameters.items():
            path = node.path(leaf)
            for axis, named in enumerate(pattern):
                if len(pattern) > 1 and path not in seen and {*named[0]} & {*signature.written}:
                    weight = leaves[path].detach().to(torch.float64).abs().pow(power).movedim(axis, 0).flatten(1).sum(1)
                    for row in coupling.unit_ids(path, axis):
                        total.index_add_(0, torch.as_tensor(row % len(total), device=total.device), weight)
            seen.add(path)
    return total[:-1]


def _parameters(params: Params, coupling: Coupling) -> None:
    if isinstance(params, Statistics):
        raise ValueError(
            "This criterion is of the parameters; received statistics. Mark a function of your own that calls it by "
            "tfx.criteria.of_weights: it is then called with (params, coupling), and nothing is measured."
        )
    check(params, coupling.spec)


@of_weights
def batchnorm_scale(params: Params, coupling: Coupling, *, normalizer: Normalizer = unnormalized) -> Tensor:
    """The mean magnitude of the scales of the batch norms that a unit passes (Liu et al. 2017, arXiv 1708.06519).

    Raises:
        ValueError: if units pass no batch norm; all their scopes are listed.
    """
    _parameters(params, coupling)
    leaves = flatten(params)
    scales = [node.path(role.scale) for node in coupling.spec if (role := node.layer.role(Normalizing))]
    total = torch.zeros(2, len(coupling) + 1, dtype=torch.float64)
    for path in dict.fromkeys(scales):
        scale = leaves[path].detach().to("cpu", torch.float64).abs()
        for row in coupling.unit_ids(path, 0):
            index = torch.as_tensor(row % total.shape[1])
            total.index_add_(1, index, torch.stack([scale, torch.ones_like(scale)]))
    without = np.unique(coupling.scope[(total[1, :-1] == 0).numpy()])
    if len(without):
        named = ", ".join(coupling.scopes[k] for k in without)
        raise ValueError(
            f"Every unit has to pass a batch norm with a scale; units of {named} pass none. Take another criterion."
        )
    return normalizer(total[0, :-1] / total[1, :-1], coupling)


@Needs("units")
def random(coupling: Coupling, generator: torch.Generator) -> Tensor:
    """Uniform numbers: the control that every criterion has to beat."""
    return torch.rand(len(coupling), generator=generator, device=generator.device)

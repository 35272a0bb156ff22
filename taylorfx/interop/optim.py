"""Optimizers of torch through a cut: new ones on the smaller parameters, with the state of what stays.

An optimizer holds tensors of a module, and a state for each of them:

    parameter "fc.weight", (4, 3)      momentum_buffer (4, 3)    an entry for every entry: cut like the parameter
                                       step ()                   one number: copied
    of Adafactor                       row_var (4, 1)            means of squares along an axis: those of the
                                       col_var (1, 3)            estimate that they make up, of the entries that stay
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ConstantLR, LRScheduler
from torch.optim.swa_utils import AveragedModel

from taylorfx.cutting.cut import Scratch, take
from taylorfx.cutting.plan import Indices, Plan, PlanError
from taylorfx.internals import follow
from taylorfx.interop.attributes import tensors_of
from taylorfx.layers import Shape
from taylorfx.tree import Params, flatten

__all__ = ["carry", "reschedule"]

C = TypeVar("C", Optimizer, AveragedModel)
S = TypeVar("S", bound=LRScheduler)
T = TypeVar("T")

ELEMENTWISE = frozenset({
    "momentum_buffer",  # SGD, RMSprop, Muon
    "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf",  # Adam and its kin
    "square_avg", "grad_avg", "acc_delta", "sum",  # RMSprop, Adadelta, Adagrad
    "variance",  # Adafactor, of vectors
    "prev", "step_size", "ax",  # Rprop, ASGD
})  # fmt: skip
"""Names of states of ``torch.optim`` that have an entry for every entry of the parameter."""

NUMBERS = frozenset({"step", "mu_product", "eta", "mu"})
"""Names of states of ``torch.optim`` that are one number for the whole parameter, the same after a cut."""

FACTORS = frozenset({"row_var", "col_var"})
"""Names of the states with which `torch.optim.Adafactor` estimates the squares of a gradient of several axes."""


def carry(
    training: C, plan: Plan, new: nn.Module | Params, *, old: nn.Module | Params | None = None,
    elementwise: Collection[str] = (),
) -> C:  # fmt: skip
    """The optimizer, or the averaged model, with which training goes on after a cut. The one before is unchanged.

    ::

        small = tfx.to_torch(tfx.cut(params, plan), plan.spec, like=model)
        optimizer = tfx.interop.carry(optimizer, plan, small, old=model)
        scheduler = tfx.interop.reschedule(scheduler, optimizer)
        average = tfx.interop.carry(average, plan, small)

    A new optimizer is of the same class and has the groups, settings, flags and hooks of the one before. Its parameters
    are those of ``new`` by the same names, and their state is what the plan leaves: every step of an optimizer that
    treats entries alone (SGD, Adam, RMSprop, Adagrad, ...) then changes what stays as the gated network's step would.
    Two do not treat entries alone. Muon goes on with the momentum that stays, and orthogonalizes a smaller matrix.
    Adafactor goes on with the same estimate of every square that stays, and scales by other means. ``GradScaler``
    holds nothing of the parameters: the same one goes on.

    Args:
        training: an optimizer, or a `torch.optim.swa_utils.AveragedModel`: its averages are cut, ``new`` is copied for
            the rest. Of one that wraps another (accelerate's, and so that of a ``Trainer``), the inner one goes on.
        plan: what stays of the network that ``training`` was made for.
        new: the smaller module, or its parameters as a tree or by path.
        old: the module, or the parameters, that the optimizer holds. It tells their names, and is not needed for an
            optimizer that was made of ``named_parameters()``. What is in neither network (the weights of a loss) has
            to be named in both: ``old={**dict(model.named_parameters()), "margin": margin}``.
        elementwise: further names of states that have an entry for every entry of the parameter, in optimizers from
            elsewhere. Names of ``torch.optim`` are known.

    Parameters that the optimizer did not hold, such as a bias that a layer gains from a repair, are not added:
    ``add_param_group`` does that.

    Raises:
        PlanError: listing every parameter and state that cannot be carried: unknown states, other shapes, parameters
            without a name.

    >>> import numpy as np
    >>> from taylorfx import Input, couple, cut, serial
    >>> from taylorfx.layers import Linear
    >>> spec = serial(Input((2,)), a=Linear(2, 3, bias=False), b=Linear(3, 2, bias=False))
    >>> params = {"a": {"weight": torch.ones(3, 2)}, "b": {"weight": torch.ones(2, 3)}}
    >>> for leaf in flatten(params).values():
    ...     leaf.requires_grad_().grad = torch.arange(6.0).reshape(leaf.shape)
    >>> optimizer = torch.optim.SGD(flatten(params).values(), lr=0.1, momentum=0.9)
    >>> optimizer.step()
    >>> plan = Plan(couple(params, spec), np.array([True, False, True]))
    >>> small = {path: leaf.detach().requires_grad_() for path, leaf in flatten(cut(params, plan)).items()}
    >>> carried = carry(optimizer, plan, small, old=params)
    >>> carried.state[small["a.weight"]]["momentum_buffer"].tolist()
    [[0.0, 1.0], [4.0, 5.0]]
    """
    with torch.no_grad():
        if isinstance(training, AveragedModel):
            return _averaged(training, plan, new)
        training = _inner(training, "optimizer", Optimizer)
        if isinstance(training, Optimizer):
            return _optimizer(training, plan, new, old, frozenset(elementwise))
    raise PlanError(
        f"An optimizer of torch or an AveragedModel is carried over a cut; received a {type(training).__name__}. "
        "`taylorfx.cut` cuts trees, `reschedule` is for schedulers."
    )


def reschedule(scheduler: S, optimizer: Optimizer) -> S:
    """A copy of a scheduler of learning rates, or of several in one, that goes on with another optimizer.

    The optimizer is one that `carry` made: it has the learning rates of the moment. To make a scheduler anew would set
    them back to those of the start. Of a scheduler that wraps another (accelerate's), the inner one goes on.

    Raises:
        ValueError: if the optimizers have other numbers of groups.
    """
    scheduler = _inner(scheduler, "scheduler", LRScheduler)
    counts = [len(one.param_groups) for one in (scheduler.optimizer, optimizer)]
    if counts[0] != counts[1]:
        raise ValueError(
            f"A scheduler goes on with an optimizer of as many groups; received {counts[1]} groups after {counts[0]}. "
            "Give what `carry` made of its optimizer."
        )
    ConstantLR(optimizer, 1.0, 0)  # the optimizer counts its steps once a scheduler was made for it; rates times one
    return copy.deepcopy(scheduler, {id(scheduler.optimizer): optimizer})


def _inner(outer: T, name: str, kind: type[object]) -> T:
    """What a wrapper holds under this name, if it is of this kind; otherwise what was given."""
    while isinstance(held := vars(outer).get(name), kind):
        outer = cast("T", held)
    return outer


class _Parameter(NamedTuple):
    """A parameter of an optimizer: its name, the tensors before and after, and what stays of each axis."""

    name: str
    before: Tensor
    after: Tensor
    indices: Indices


class _Names:
    """The tensors of a module or a tree by their names; a tied tensor has several, of which a plan knows one."""

    def __init__(self, holder: nn.Module | Params, plan: Plan) -> None:
        if isinstance(holder, nn.Module):
            self.tensors = tensors_of(holder)
        else:
            self.tensors = flatten(holder)
        self._names: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            if name in plan.coupling.parameters or id(tensor) not in self._names:
                self._names[id(tensor)] = name

    def of(self, tensor: Tensor) -> str | None:
        """The name of a tensor, the plan's if it has one there."""
        return self._names.get(id(tensor))


# Optimizers.


def _optimizer(
    optimizer: Optimizer, plan: Plan, new: nn.Module | Params, old: nn.Module | Params | None, extra: frozenset[str]
) -> Optimizer:
    errors: list[str] = []
    groups = _parameters(optimizer, plan, _Names(new, plan), _paths(optimizer, plan, old), errors)
    kind, scratch = type(optimizer).__name__, Scratch()
    states: dict[Tensor, dict[str, object]] = {}
    for parameter in (parameter for group in groups for parameter in group):
        if parameter.before in optimizer.state:
            state = optimizer.state[parameter.before]
            errors += [
                f"{parameter.name}: no rule for the state {name!r} of {kind} ({_described(value)})"
                for name, value in state.items()
                if not _known(name, value, state, parameter.before.shape, extra)
            ]
            states[parameter.after] = state
    held = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    errors += [f"a state of what is in no group ({_described(x)})" for x in optimizer.state if id(x) not in held]
    if errors:
        raise PlanError(
            "An optimizer is carried over a cut with the parameters of the plan's network, and states with an entry "
            "for every entry of a parameter, or one number. If a state of another optimizer has such entries, name it: "
            "elementwise=[...]. Received:\n  " + "\n  ".join(errors)
        )
    carried = _rebuilt(optimizer, groups)
    for parameter in (parameter for group in groups for parameter in group):
        if parameter.after in states:
            carried.state[parameter.after] = _cut(states[parameter.after], parameter, scratch)
    return carried


def _paths(optimizer: Optimizer, plan: Plan, old: nn.Module | Params | None) -> list[list[str | None]]:
    """For every group the names of its parameters; none for a tensor that ``old`` does not have."""
    if old is not None:
        names = _Names(old, plan)
        return [[names.of(parameter) for parameter in group["params"]] for group in optimizer.param_groups]
    if not all("param_names" in group for group in optimizer.param_groups):
        raise PlanError(
            "Parameters are carried by their names; this optimizer was made of parameters without names. Pass the "
            "module that it trains, old=model, or make it of model.named_parameters()."
        )
    return [[*group["param_names"]] for group in optimizer.param_groups]


def _parameters(
    optimizer: Optimizer, plan: Plan, new: _Names, paths: list[list[str | None]], errors: list[str]
) -> list[list[_Parameter]]:
    """The parameters of every group, before and after; what cannot be carried is added to the errors."""
    groups: list[list[_Parameter]] = []
    for number, (group, names) in enumerate(zip(optimizer.param_groups, paths, strict=True)):
        groups.append([])
        for place, (before, name) in enumerate(zip(group["params"], names, strict=True)):
            if name is None:
                shape = tuple(before.shape)
                errors.append(f"parameter {place} of group {number}, {shape}: old has no such tensor")
                continue
            after = new.tensors.get(name)
            if after is None and name in plan.gone:
                continue
            if not isinstance(after, Tensor):
                errors.append(f"{name}: new has no parameter of this name")
                continue
            path = new.of(after) or name
            if problem := _misfit(path, before, after, plan) or _untrained(before, after):
                errors.append(f"{name}: {problem}")
            else:
                groups[-1].append(_Parameter(name, before, after, _indices(path, before, plan)))
    return groups


def _indices(path: str, before: Tensor, plan: Plan) -> Indices:
    """What stays of each axis of a tensor; all of one that is not in the plan's network."""
    return plan.indices.get(path, (None,) * before.ndim)


def _misfit(path: str, before: Tensor, after: Tensor, plan: Plan) -> str:
    """What is wrong with the shapes of a tensor before and after a cut; empty if nothing is."""
    if path not in plan.indices:
        problem = f"not in the plan's network and of shape {tuple(before.shape)}, then {tuple(after.shape)}"
        return "" if before.shape == after.shape else problem
    whole = plan.coupling.spec.shapes[path]
    if before.shape != whole:
        return f"expected {whole} before the cut, received {tuple(before.shape)}"
    indices = _indices(path, before, plan)
    kept = tuple(n if index is None else len(index) for n, index in zip(whole, indices, strict=True))
    return "" if after.shape == kept else f"expected {kept} after the cut, received {tuple(after.shape)}"


def _untrained(before: Tensor, after: Tensor) -> str:
    """Why an optimizer cannot train a tensor as it did the one before; empty if it can."""
    if not after.is_leaf:
        return "computed from other tensors: detach() it, then requires_grad_()"
    kinds = [f"{x.dtype} on {x.device}".removeprefix("torch.") for x in (before, after)]
    if kinds[0] != kinds[1]:
        return f"{kinds[0]} before the cut, {kinds[1]} after; carry to the same dtype and device"
    return "does not require a gradient any more" if before.requires_grad and not after.requires_grad else ""


def _rebuilt(optimizer: Optimizer, groups: Sequence[Sequence[_Parameter]]) -> Optimizer:
    """An optimizer of the same class, with the same settings and no state beyond what its constructor gives it."""
    kind = type(optimizer)
    accepted = inspect.signature(kind).parameters
    whole = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in accepted.values())
    options = {name: value for name, value in optimizer.defaults.items() if whole or name in accepted}
    entries: list[dict[str, object]] = []
    for group, parameters in zip(optimizer.param_groups, groups, strict=True):
        settings = {name: copy.deepcopy(x) for name, x in group.items() if name not in ("params", "param_names")}
        tensors = [parameter.after for parameter in parameters]
        named: Sequence[object] = tensors
        if "param_names" in group:
            names = {id(before): name for name, before in zip(group["param_names"], group["params"], strict=True)}
            named = [(names[id(parameter.before)], parameter.after) for parameter in parameters]
        entries.append({**settings, "params": named})
    try:
        carried = kind(entries, **copy.deepcopy(options))
    except (TypeError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise PlanError(
            f"An optimizer is made anew of its groups and its defaults; {kind.__name__} refuses them: {error}"
        ) from error
    follow(carried, optimizer)
    return carried


# States.


def _known(name: str, value: object, state: Mapping[str, object], shape: Shape, extra: frozenset[str]) -> bool:
    """Whether there is a rule for a state, and it is of the shape that the rule is for."""
    if name in NUMBERS:
        return value.numel() == 1 if isinstance(value, Tensor) else isinstance(value, (int, float))
    if name in FACTORS:
        return all(isinstance(x, Tensor) and x.shape == y for x, y in zip(_pair(state), _factors(shape), strict=True))
    if name in ELEMENTWISE | extra:
        return value is None or (isinstance(value, Tensor) and value.shape == shape)
    return False


def _pair(state: Mapping[str, object]) -> tuple[object, object]:
    """The two factors of Adafactor, where there are any."""
    return state.get("row_var"), state.get("col_var")


def _factors(shape: Shape) -> tuple[Shape, Shape]:
    """The shapes of the two factors of a tensor with several axes; of none otherwise."""
    return ((*shape[:-1], 1), (*shape[:-2], 1, *shape[-1:])) if len(shape) > 1 else ((-1,), (-1,))


def _described(value: object) -> str:
    """A value as errors show it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _cut(state: Mapping[str, object], parameter: _Parameter, scratch: Scratch) -> dict[str, object]:
    """The state of what stays, in memory of its own."""
    kept: dict[str, object] = {}
    for name, value in state.items():
        if isinstance(value, Tensor) and name not in NUMBERS | FACTORS:
            smaller = take(value, parameter.indices, scratch)
            kept[name] = smaller.clone() if smaller is value else smaller
        else:
            kept[name] = copy.deepcopy(value)
    row, col = _pair(state)
    if isinstance(row, Tensor) and isinstance(col, Tensor):
        kept["row_var"], kept["col_var"] = _factored(row, col, parameter.indices)
    return kept


def _factored(row: Tensor, col: Tensor, indices: Indices) -> tuple[Tensor, Tensor]:
    """The factors of the same estimate of what stays.

    Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) estimates squares from their means along the last two axes, as
    ``row * col / mean``, where ``mean`` is that of all. Means of the estimates that stay are factors of the same kind:

        estimates    row      the last two columns stay     row, scaled by the columns' means (3, 6, 9)
          2  4  6     4          4  6                         4 * 7.5 / 6 = 5
          4  8 12     8          8 12                         8 * 7.5 / 6 = 10
    """
    *batch, outer, inner = indices
    scratch = Scratch()
    rows, cols = (take(x, (*batch, None, None), scratch) for x in (row, col))
    last, before_last = (*[None] * (row.ndim - 1), inner), (*[None] * (row.ndim - 2), outer, None)
    row, col = take(rows, before_last, scratch), take(cols, last, scratch)
    return row * _ratio(col.mean(-1, True), cols.mean(-1, True)), col * _ratio(row.mean(-2, True), rows.mean(-2, True))


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """One number by another; one where both are zero."""
    return torch.where(whole == 0, torch.ones_like(whole), part / whole)


# Averages.


def _averaged(average: AveragedModel, plan: Plan, new: nn.Module | Params) -> AveragedModel:
    """A copy of an averaged model around a copy of the smaller module, with the averages of what stays."""
    if not isinstance(new, nn.Module):
        raise PlanError(f"An AveragedModel goes on around a smaller module; received a {type(new).__name__}.")
    before, after = _Names(average.module, plan), copy.deepcopy(new).train(average.module.training)
    names = _Names(after, plan)
    errors: list[str] = []
    averages: list[tuple[Tensor, Tensor]] = []
    for name, tensor in names.tensors.items():
        whole, path = before.tensors.get(name), names.of(tensor) or name
        if not isinstance(whole, Tensor):
            if isinstance(tensor, nn.Parameter):  # a buffer may be a constant, which the module before computed
                errors.append(f"{name}: the average has no parameter of this name")
        elif problem := _misfit(path, whole, tensor, plan):
            errors.append(f"{name}: {problem}")
        else:
            averages.append((tensor, take(whole, _indices(path, whole, plan), Scratch())))
    if errors:
        raise PlanError(
            "An average is cut by the plan of its own network, for the module that the plan leaves; received:\n  "
            + "\n  ".join(errors)
        )
    for tensor, value in averages:
        tensor.data = value.clone()
    return copy.deepcopy(average, {id(average.module): after})

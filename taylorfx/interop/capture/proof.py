"""The proof of a capture: a module and its network are run at the example, and where torch.export only reasons.

At the example both have to give the same, or the module is refused. torch.export takes every open axis for two or more
positions. A text of one word, an image of one row are taken as well if the network gives there what the module gives.
And at one more size it has to, or the sizes stay the example's.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from taylorfx.internals import pytree
from taylorfx.interop.calls import bind, interface_of, stretched
from taylorfx.interop.capture.programs import each_tensor, tensors
from taylorfx.interop.capture.reader import CaptureError
from taylorfx.interop.proof import close, rounding
from taylorfx.layers import ShapeError
from taylorfx.layers.roles import Experts
from taylorfx.layers.sizes import Formula, axes_of, value
from taylorfx.network.run import apply
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG
from taylorfx.tree import Params

__all__ = ["proven"]

Sizes = Mapping[str, int]
"""Sizes of axes by name, ``{"x.2": 48}``."""

_TRIES = 128
"""How many sizes are considered for the one that is tried."""


def proven(params: Params, spec: Spec, module: nn.Module, args: Sequence[object], kwargs: Mapping[str, object]) -> Spec:
    """The network with the sizes at which it gives what the module gives.

    Args:
        module: in inference mode.
        args, kwargs: the example.

    Raises:
        CaptureError: if it gives something else at the example itself.
    """
    open_axes = {
        f"{name}.{k}": least
        for name, layer in spec.input_layers.items()
        for k, (least, most, _) in enumerate(layer.ranges, 1)
        if least != most
    }
    # A tensor that is two arguments becomes two, which may then have sizes of their own.
    example = each_tensor(lambda x: x.view_as(x), (tuple(args), dict(kwargs)))
    trial = _Trial(params, module, example, bind(interface_of(spec), *example))
    state = torch.get_rng_state()
    try:
        if trial.agree(spec, {}) is False and trial.steady():
            raise CaptureError(
                f"A captured network gives at the example what its module gives; that of {type(module).__name__} gives "
                "something else. An operator that writes on what another one still uses may be the cause: have forward "
                "make new tensors there (`y = y + 1`, inplace=False)."
            )
        if not open_axes:
            return spec
        spec = _without_exceptions(trial, spec)
        if (other := _other(spec)) and trial.agree(spec, other) is False:
            LOG.warning(
                "%s: at %s the captured network differs; its sizes stay the example's", type(module).__name__, other
            )
            return _fixed(spec)
        single = {axis: 1 for axis, least in open_axes.items() if least == 2}
        for chosen in (single, *({axis: 1} for axis in single if len(single) > 1)):
            wider = _from_one(spec, chosen)
            if chosen and trial.agree(wider, chosen):
                return wider
    finally:
        torch.set_rng_state(state)
    return spec


def _without_exceptions(trial: _Trial, spec: Spec) -> Spec:
    """The network without the guards that leave sizes out at which it computes what the module does all the same.

    torch.export notes, for example, that a cut goes up to the end of an axis, which changes nothing.
    """
    for guard in [guard for guard in spec.guards if isinstance(guard, tuple) and guard[0] == "!="]:
        wider = replace(spec, guards=tuple(x for x in spec.guards if x != guard))
        left_out = _other(wider, violating=guard)
        if left_out and trial.agree(wider, left_out):
            spec = wider
    return spec


class _Trial(NamedTuple):
    """A module that is compared with its network.

    Attributes:
        module: in inference mode.
        example: the arguments it was captured with, by position and by name. What is no tensor stays as it is: a number
            is part of the network, also where it is not the default of ``forward``.
        inputs: the tensors among them by the names of the Input nodes.
    """

    params: Params
    module: nn.Module
    example: tuple[tuple[object, ...], dict[str, object]]
    inputs: Mapping[str, Tensor]

    def agree(self, spec: Spec, sizes: Sizes) -> bool | None:
        """Whether both give the same at these sizes; None where one of them does not take them."""
        inputs = _resized(self.inputs, sizes)
        new = {id(x): inputs[name] for name, x in self.inputs.items()}
        args, kwargs = pytree.tree_map(lambda x: new.get(id(x), x), self.example)
        try:
            expected = self._given_out(args, kwargs)
            with torch.no_grad():
                torch.manual_seed(0)
                received = tensors(apply(self.params, spec, inputs))
        except Exception:  # whatever the module's own code raises
            return None
        # The network may give out less, and in another order.
        alike = partial(_close, routed=any(node.layer.role(Experts) for node in spec))
        return all(any(alike(one, other) for one in expected) for other in received)

    def steady(self) -> bool:
        """The module gives the same at every seed."""
        one, other = (self._given_out(*self.example, seed=seed) for seed in (0, 1))
        return all(map(_close, one, other))

    def _given_out(self, args: tuple[object, ...], kwargs: dict[str, object], seed: int = 0) -> list[Tensor]:
        with torch.no_grad():
            torch.manual_seed(seed)
            return tensors(self.module(*args, **kwargs))


def _close(one: Tensor, other: Tensor, *, routed: bool = False) -> bool:
    """Equal up to rounding, measured by the largest of the numbers; without numbers, on ``meta``, of one shape."""
    if one.is_meta or other.is_meta:
        return one.shape == other.shape
    scale = float(one.nan_to_num().abs().max()) if one.numel() and one.is_floating_point() else 0.0
    return close(one, other, max(1e-3, rounding(one)), scale, routed=routed)


def _other(spec: Spec, violating: Formula | None = None) -> Sizes:
    """Sizes unlike the example's that the network takes; none where none are near.

    Args:
        violating: a guard that does not hold there.
    """
    here = spec.axes()
    ranges = {f"{n}.{k}": r for n, layer in spec.input_layers.items() for k, r in enumerate(layer.ranges, 1)}
    steps = {axis: step for axis, (least, most, step) in ranges.items() if least != most}
    changed = [{*steps}] if violating is None else [axes_of(violating) & {*steps}, {*steps}]
    for axes, rank, sign, apart in itertools.product(changed, range(1, _TRIES), (1, -1), (1, 0)):
        sizes = here | {axis: here[axis] + sign * rank * (1 + k * apart) * steps[axis] for k, axis in enumerate(axes)}
        try:
            spec.refuse(sizes)
        except ShapeError:
            continue
        if violating is None or not value(violating, sizes):
            return {axis: sizes[axis] for axis in axes}
    return {}


def _resized(inputs: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The example with axes of these sizes: its positions over and over."""
    resized = dict(inputs)
    for axis, n in sizes.items():
        name, _, k = axis.rpartition(".")
        resized[name] = stretched(resized[name], int(k), n)
    return resized


def _from_one(spec: Spec, axes: Sizes) -> Spec:
    """The network whose axes may also have one position."""
    fields = {
        name: {"ranges": tuple((axes.get(f"{name}.{k}", a), b, step) for k, (a, b, step) in enumerate(layer.ranges, 1))}
        for name, layer in spec.input_layers.items()
    }
    return spec.declared(fields)


def _fixed(spec: Spec) -> Spec:
    """The network at the example's sizes alone."""
    fields = {
        name: {"ranges": tuple((n, n, 1) for n in (layer.shape if isinstance(layer.shape, tuple) else ()))}
        for name, layer in spec.input_layers.items()
    }
    return replace(spec.declared(fields), guards=())

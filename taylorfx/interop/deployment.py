"""The last step: a network as it is going to run, made faster without changing what it computes."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from taylorfx.cost.runners import Pace, race
from taylorfx.distributed import refuse_shards
from taylorfx.internals import alike_sizes, pytree
from taylorfx.interop.calls import example_of, interface_of
from taylorfx.interop.capture.programs import tensors
from taylorfx.interop.module import to_torch
from taylorfx.interop.runners import in_onnx, session_of
from taylorfx.network.run import Inputs, bind_inputs
from taylorfx.network.spec import Spec
from taylorfx.network.tables import columns
from taylorfx.progress import LOG
from taylorfx.rewrite.folding import fold
from taylorfx.rewrite.lean import in_channels_last
from taylorfx.store.files import replacing, save
from taylorfx.tree import Params, flatten, merge

__all__ = ["Deployed", "Step", "deploy"]

Network = Callable[..., Any]


class Step(NamedTuple):
    """What one step gave.

    Attributes:
        name: of the step.
        time: of a run, as a share of the best network before it; the median of the rounds.
        low, high: the quartiles of these shares.
        difference: the largest to the network as it came in, at these inputs, as a share of its largest value.
        taken: it is faster by more than the rounds vary, and computes the same.
    """

    name: str
    time: float
    low: float
    high: float
    difference: float
    taken: bool


@dataclass(frozen=True, eq=False)
class Deployed:
    """A network ready to run, called as the module that `taylorfx.to_torch` gives; ``print`` shows what each step gave.

    Attributes:
        module: the fastest of what was tried.
        params, spec: the network that ``module`` runs, with the steps that are a matter of parameters and layers.
        steps: what was tried, in this order.
        time: of a run of ``module``, as a share of the network as it came in.
        path: the file, if one was asked for.
    """

    module: Network
    params: Params
    spec: Spec
    steps: tuple[Step, ...]
    time: float
    path: Path | None = None

    def __call__(self, *args: object, **kwargs: object) -> Any:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def __str__(self) -> str:
        rows = [("step", "time", "quartiles", "difference", "taken")]
        for step in self.steps:
            share = f"{step.low:.3f} to {step.high:.3f}"
            rows.append((step.name, f"{step.time:.3f}", share, f"{step.difference:.0e}", "yes" if step.taken else "no"))
        rows.append(("together", f"{self.time:.3f}", "", "", ""))
        return columns(rows, right=4)


def deploy(
    params: Params,
    spec: Spec,
    inputs: Inputs,
    *,
    path: str | PathLike[str] | None = None,
    compiled: bool = False,
    tolerance: float = 1e-3,
    pace: Pace | None = None,
) -> Deployed:
    """The network as it runs fastest on these inputs, here and with the threads that torch has now.

    ::

        deployed = tfx.interop.deploy(params, spec, x, path="network.onnx")
        print(deployed)
        y = deployed(x)

    Every step builds on the ones before, is timed against them by turns, and is taken if it is faster and computes the
    same: norms are folded (`taylorfx.fold`), weights laid out for images in ``channels_last``, the network exported as
    straight-line code by ``torch.export`` with sizes as free as the network has them, and compiled. What is asked for
    as a file is written whatever it gave. For inference only. Widths that hardware likes are chosen before the cut, by
    ``multiple=`` or a `Latency`.

    Args:
        inputs: a batch as it is going to come: its size, device and dtype are what is timed.
        path: a file of the network, by its ending: ``.onnx`` (needs onnx and onnxscript; timed with onnxruntime, where
            that is installed), ``.pt2`` (an archive of ``torch.export``), or ``.safetensors`` (`taylorfx.save`). An
            older file is replaced when the new one is complete.
        compiled: try ``torch.compile``, too, which takes seconds to minutes and needs a compiler. Where sizes are free,
            another size may compile again.
        tolerance: the largest difference that counts as the same, as a share of the network's largest value.
        pace: how precisely it is timed.

    Raises:
        ValueError: for a path with another ending, and parameters of which every process has a shard.
        ImportError: for an ONNX file without onnx and onnxscript.
        FileNotFoundError: for a path in a folder that does not exist.
        SpecError, ShapeError: if the parameters or the inputs do not fit the network.
    """
    target = _target(path)
    refuse_shards(params)
    args, kwargs = example_of(interface_of(spec), bind_inputs(spec, (inputs,)))
    trial = _Trial(to_torch(params, spec), args, kwargs, tolerance, pace or Pace())
    network, folded = (params, spec), fold(params, spec)
    if trial.take("folded", to_torch(*folded), changed=folded[1] is not spec):
        network = folded
    images = in_channels_last(flatten(network[0]), network[1])
    laid = merge(network[0], images), network[1]
    if trial.take("channels last", to_torch(*laid), changed=bool(images)):
        network = laid
    program = _exported(to_torch(*network), args, kwargs)
    straight = program.module()
    trial.take("exported", straight, changed=not spec.calls)  # an export has one call
    if compiled:
        trial.take("compiled", torch.compile(straight), changed=not spec.calls)
    if target is not None:
        WRITERS[target.suffix](target, network, program)
    if target is not None and target.suffix == ".onnx" and importlib.util.find_spec("onnxruntime"):
        trial.take("ONNX Runtime", _Session(target, program))
    LOG.info("deploy: %.3f of the time", trial.time)
    return Deployed(trial.best, *network, tuple(trial.steps), trial.time, target)


class _Trial:
    """What was tried until now, and the fastest of it."""

    def __init__(
        self, whole: Network, args: tuple[object, ...], kwargs: Mapping[str, object], tolerance: float, pace: Pace
    ) -> None:
        self.best, self.args, self.kwargs, self.tolerance, self.pace = whole, args, kwargs, tolerance, pace
        self.expected = tensors(self._run(whole))
        self.steps: list[Step] = []
        self.time = 1.0

    def take(self, name: str, network: Network, *, changed: bool = True) -> bool:
        """Time this network beside the best one, and make it the best if it is faster and computes the same."""
        if not changed:
            return False
        pairs = zip(tensors(self._run(network)), self.expected, strict=True)
        difference = max((_difference(y, expected) for y, expected in pairs), default=0.0)
        device = next((x.device for x in tensors((self.args, self.kwargs))), torch.device("cpu"))
        wait = partial(torch.accelerator.synchronize, device) if device.type != "cpu" else _nothing
        seconds = race([partial(self._run, network), partial(self._run, self.best)], self.pace, wait)
        low, share, high = np.quantile(seconds[:, 0] / seconds[:, 1], (0.25, 0.5, 0.75)).tolist()
        taken = share < 1 and difference <= self.tolerance
        self.steps.append(Step(name, share, low, high, difference, taken))
        LOG.info("deploy: %s takes %.3f of the time", name, share)
        if taken:
            self.best, self.time = network, self.time * share
        return taken

    def _run(self, network: Network) -> object:
        with torch.no_grad():
            return network(*self.args, **self.kwargs)


class _Session:
    """An ONNX file in ONNX Runtime, called as the network that was exported."""

    def __init__(self, path: Path, program: torch.export.ExportedProgram) -> None:
        self.session = session_of(str(path))
        self.taken = {x.name for x in self.session.get_inputs()}
        self.names, self.outputs = program.graph_signature.user_inputs, program.call_spec.out_spec

    def __call__(self, *args: object, **kwargs: object) -> object:
        inputs = zip(self.names, tensors((args, kwargs)), strict=True)
        values = self.session.run(None, {str(name): x.numpy() for name, x in inputs if name in self.taken})
        return pytree.tree_unflatten([torch.from_numpy(y) for y in values], self.outputs)


def _nothing() -> None:
    """The device is never behind."""


def _difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    one, other = one.double(), other.double()
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-30)) if other.numel() else 0.0


def _exported(module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> torch.export.ExportedProgram:
    """The module as a program, every axis of every tensor as free as it has them."""
    shapes = pytree.tree_map(
        lambda x: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) if isinstance(x, Tensor) else None,
        dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments),
    )
    with alike_sizes():
        return torch.export.export(module, args, kwargs, dynamic_shapes=shapes)


def _target(path: str | PathLike[str] | None) -> Path | None:
    """Where a file goes; what cannot be written is refused before the long work."""
    if path is None:
        return None
    target = Path(path)
    if target.suffix not in WRITERS:
        raise ValueError(f"A file of a network ends in {', '.join(WRITERS)}; received {target}.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"A file is written into a folder that exists; received {target}.")
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if target.suffix == ".onnx" and missing:
        raise ImportError(f"An ONNX file needs {' and '.join(missing)}: pip install {' '.join(missing)}.")
    return target


def _archive(path: Path, network: tuple[Params, Spec], program: torch.export.ExportedProgram) -> None:
    with replacing(path) as out:
        torch.export.save(program, out)


def _onnx(path: Path, network: tuple[Params, Spec], program: torch.export.ExportedProgram) -> None:
    with replacing(path) as out:
        in_onnx(program).save(out.name)


def _saved(path: Path, network: tuple[Params, Spec], program: torch.export.ExportedProgram) -> None:
    save(path, *network)


WRITERS = {".pt2": _archive, ".onnx": _onnx, ".safetensors": _saved}
"""What writes a file, by its ending."""

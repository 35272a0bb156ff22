"""The proof of a captured module, which the benchmark prints and the tests demand."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from _sizes import PATIENCE, Elsewhere, difference, elsewhere, others, tensors
from torch import Tensor, nn

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import random_plan

Case = tuple[nn.Module, dict[str, Tensor]]
"""A module and three examples of its keyword arguments."""

STEP = 1e-5
"""The share of its loss that a network gives up in its training step, to first order.

Some transformers compute norms in float32: much less would be lost in rounding."""


@dataclass(frozen=True)
class Proof:
    """What is known of a captured module. Times are CPU seconds; errors are shares of the largest difference
    between two examples' outputs.

    Attributes:
        parameters: how many there are.
        nodes: of the captured spec.
        units: how many there are.
        prunable: the share of the parameters that leave when all units do.
        staying: the trained parameters of which something stays then.
        exact: the share of the units whose removal changes no norm's statistics.
        frozen: for each reason, the scopes that it holds, but for those of buffers.
        unmapped: how often there is each operator without a rule.
        mixing: the nodes through which the examples of a batch depend on each other.
        captured: the error of the captured network, on other examples than it was captured with.
        cut: the error of the cut network against the gated one, half of its exact units removed at random.
        moved: how much those gates move the outputs.
        step: what one small training step gains, of a network that lost half of all its units; one by the gradient.
        export: the time of ``torch.export`` and of making its graph functional.
        total: the time of ``from_torch``, that of ``export`` included.
        couple: the time of ``couple``, the best of three.
        sizes: what the captured network and the cut one compute at other sizes.
        alike: captured at another size, it has the same units, scopes and plans; none if it takes no other size.
    """

    parameters: int
    nodes: int
    units: int
    prunable: float
    staying: list[str] = field(repr=False)
    exact: float
    frozen: Mapping[str, list[str]] = field(repr=False)
    unmapped: Mapping[str, int]
    mixing: list[str]
    captured: float
    cut: float
    moved: float
    step: float
    export: float
    total: float
    couple: float
    sizes: list[Elsewhere] = field(repr=False)
    alike: bool | None


def randomized(module: nn.Module, inputs: Mapping[str, Tensor], seed: int = 0) -> nn.Module:
    """In float64 and inference mode, all in general position, so that nothing hides behind zeros and ones.

    The running statistics are random around those of the inputs: in a deep network without a norm, what the inputs say
    would be lost among constants.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) - 0.5

    module = module.double().eval()
    for tensor in module.state_dict().values():
        constant = tensor.is_floating_point() and (tensor.ndim < 2 or tensor.min() == tensor.max())
        if constant:  # unlike weights, which are random
            tensor.add_(0.2 * noise(tensor))
    norms = [part for part in module.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        module(**inputs)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.eval().momentum = momentum
            norm.running_mean += norm.running_var.sqrt() * noise(norm.running_mean)
            norm.running_var *= 0.5 + 0.5 * noise(norm.running_var)  # small ones keep up the signal that pruning halves
            norm.running_var += 0.01
    return module


def prove(module: nn.Module, inputs: Mapping[str, Tensor], *, onnx: bool = False, patience: float = PATIENCE) -> Proof:
    """Capture a module with two of three examples; couple, cut, compare, train a step. `elsewhere` takes the rest."""
    with torch.no_grad():
        expected = tensors(module(**inputs))
    spent: list[float] = []
    whole: list[float] = []
    few = {name: x[:2] for name, x in inputs.items()}
    patched = _timed(torch.export, "export", spent), _timed(torch.export.ExportedProgram, "run_decompositions", spent)
    with patched[0], patched[1], _clock(whole):
        params, spec = tfx.from_torch(module, (), example_kwargs=few)
    joined: list[float] = []
    for _ in range(3):
        with _clock(joined):
            coupling = tfx.couple(params, spec)
    x = {node.name: inputs[node.name] for node in spec.inputs}
    plan = random_plan(coupling, torch.Generator().manual_seed(1), 0.5, exact=True)
    with torch.no_grad():
        found = tensors(tfx.apply(params, spec, x))
        cut = tensors(tfx.apply(tfx.cut(params, plan), plan.spec, x))
        gated = tensors(tfx.apply(params, spec, x, gates=plan.gates))
    cost, none = tfx.cost.parameters(coupling), np.zeros(len(coupling), bool)
    lengths = coupling.counts(none)
    frozen: dict[str, list[str]] = {}
    trained = tfx.tree.flatten(tfx.partition(params, spec)[0])
    buffers = {node.name for node in spec if isinstance(node.layer, L.Buffer)}
    for scope, reason in coupling.frozen.items():
        if scope not in buffers and scope.rpartition(".")[0] not in buffers:
            frozen.setdefault(reason, []).append(scope)
    sizes = elsewhere(module, params, spec, plan, inputs, onnx=onnx, patience=patience)
    return Proof(
        parameters=sum(p.numel() for p in module.parameters()),
        nodes=len(spec),
        units=len(coupling),
        prunable=1 - cost(none) / cost.total,
        staying=[path for path in trained if all(lengths[axis] for axis in coupling.parameters[path])],
        exact=float(coupling.exact.mean()) if len(coupling) else 1.0,
        frozen=frozen,
        unmapped=dict(Counter(node.layer.op for node in spec if isinstance(node.layer, L.Captured))),
        mixing=list(coupling.mixing),
        captured=difference(found, expected),
        cut=difference(cut, gated),
        moved=difference(expected, gated),
        step=_step(params, coupling, x),
        export=sum(spent),
        total=sum(whole),
        couple=min(joined),
        sizes=sizes,
        alike=_alike(module, inputs, coupling, sizes),
    )


def _alike(
    module: nn.Module, inputs: Mapping[str, Tensor], coupling: tfx.Coupling, sizes: list[Elsewhere]
) -> bool | None:
    """Whether a capture at the last of the other sizes couples in the same way."""
    taken = [run.size for run in sizes if run.captured is not None]
    if not taken:
        return None
    few = {name: x[:2] for name, x in others(inputs)[taken[-1]].items()}
    other = tfx.couple(*tfx.from_torch(module, (), example_kwargs=few))
    keeps = [random_plan(one, torch.Generator().manual_seed(1), 0.5).keep for one in (coupling, other)]
    same = (coupling.names, coupling.scopes, coupling.frozen.keys()) == (other.names, other.scopes, other.frozen.keys())
    return same and bool((keeps[0] == keeps[1]).all())


def _step(params: tfx.Params, coupling: tfx.Coupling, x: dict[str, Tensor]) -> float:
    """What a small step along the gradient gains, of a network that lost half of all its units, in training mode.

    To first order the loss becomes smaller by the share ``STEP``: that counts as one, so that any wrong gradient shows.
    """
    plan = random_plan(coupling, torch.Generator().manual_seed(2), 0.5)
    module = tfx.to_torch(tfx.cut(params, plan), plan.spec).train()

    def loss() -> Tensor:
        torch.manual_seed(0)  # the same dropout
        return sum((y / scale).square().mean() for y, scale in zip(tensors(module(**x)), scales, strict=True))

    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            scales = [y.abs().max() for y in tensors(module.eval()(**x))]
        module.train()
        before = loss()
        before.backward()
        grads = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
        silent = [name for name, grad in grads.items() if grad is None]
        assert not silent, f"without a gradient: {silent}"
        square = sum(grad.square().sum() for grad in grads.values())
        torch.optim.SGD(module.parameters(), lr=(STEP * before / square).item()).step()
        with torch.no_grad():
            return ((1 - loss() / before) / STEP).item()


@contextmanager
def _clock(spent: list[float]) -> Iterator[None]:
    start = time.process_time()
    yield
    spent.append(time.process_time() - start)


@contextmanager
def _timed(owner: Any, name: str, spent: list[float]) -> Iterator[None]:
    """Clock what is called under this name."""
    call: Callable[..., Any] = getattr(owner, name)

    def clocked(*args: Any, **kwargs: Any) -> Any:
        with _clock(spent):
            return call(*args, **kwargs)

    with patch.object(owner, name, clocked):
        yield

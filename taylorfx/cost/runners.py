"""Networks as they will run, and how long they take beside each other.

A runner is a function ``(params, spec, inputs)`` that gives a function of nothing: one run of the network on a batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taylorfx.network.run import apply
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["Pace", "Runner", "compiled", "eager", "race"]

Run = Callable[[], object]
"""One run of a network on a batch."""

Runner = Callable[[Params, Spec, tuple[Tensor, ...]], Run]
"""Makes a network ready to run on these inputs."""


def eager(params: Params, spec: Spec, inputs: tuple[Tensor, ...]) -> Run:
    """The network as `apply` and `to_torch` run it, layer by layer."""

    def run() -> object:
        with torch.inference_mode():
            return apply(params, spec, *inputs)

    return run


def compiled(params: Params, spec: Spec, inputs: tuple[Tensor, ...]) -> Run:
    """The network as one graph of ``torch.compile``, which takes seconds to build and needs a compiler."""

    def network(*inputs: Tensor) -> object:
        return apply(params, spec, *inputs)

    # torch.compile counts how often one code object is compiled, and goes without after a few: each has its own.
    network.__code__ = network.__code__.replace(co_name="network")
    built = torch.compile(network, fullgraph=True, dynamic=False)

    def run() -> object:
        with torch.no_grad():
            return built(*inputs)

    return run


class Pace(NamedTuple):
    """How precisely times are measured.

    Rounds are added until the standard error of every ratio is this small, or these seconds are over.
    """

    error: float = 0.005
    seconds: float = 10.0
    clock: Callable[[], float] = time.perf_counter
    """The seconds so far: of the wall by default. ``time.process_time`` is of this process alone, which on a machine
    that others use is steadier; it adds up the threads."""


LEAST, TURN = 9, 0.003
"""How many rounds there are at least; how long one turn takes at least, in seconds."""


def race(runs: Sequence[Run], pace: Pace, wait: Run = lambda: None) -> NDArray[np.float64]:
    """The seconds of each run, by turns, ``(rounds, runs)``: what slows the machine for a while slows all of them.

    The ratio of two is the median of their ratios in each round. A turn is as many runs as take a few milliseconds,
    after one that does not count where that warms caches.

    Args:
        wait: waits until the device has finished its work.
    """

    def turn(run: Run, times: int = 1, warm: bool = True) -> float:
        if warm:
            run()
        wait()
        start = pace.clock()
        for _ in range(times):
            run()
        wait()
        return (pace.clock() - start) / times

    first = [turn(run) for run in runs]
    times = [max(1, min(1000, math.ceil(TURN / max(seconds, 1e-9)))) for seconds in first]
    rounds: list[list[float]] = []
    start = pace.clock()
    while len(rounds) < LEAST or (pace.clock() - start < pace.seconds and _error(np.array(rounds)) > pace.error):
        rounds.append([turn(run, n, s < 5 * TURN) for run, n, s in zip(runs, times, first, strict=True)])
    return np.array(rounds)


def _error(seconds: NDArray[np.float64]) -> float:
    """The largest standard error of a median ratio to the first run: by the median deviation, which outliers spare.

    >>> _error(np.array([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]]))
    0.0
    """
    ratios = seconds / seconds[:, :1]
    middle = np.median(ratios, 0)
    deviations = 1.4826 * np.median(np.abs(ratios - middle), 0)  # that of a normal distribution is its sigma
    return float((1.2533 * deviations / middle).max() / math.sqrt(len(seconds)))

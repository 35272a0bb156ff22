"""What may stand in for the experts that a language model loses: nothing, constants, or the others' matrices.

The network always runs whole, with gates and with taps that put the constants in, so that all of it is exact and
nothing is built that may not be worth it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from _language import Case, repair
from torch import Tensor

import taylorfx as tfx
from taylorfx.coupling.mixtures import Mixture, mixtures
from taylorfx.interop import huggingface
from taylorfx.layers.roles import Experts
from taylorfx.network.run import evaluate

Network = Callable[..., Any]
"""Called with the tensors of a batch by name."""

Tap = Callable[[str, int, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Lost:
    """A case of which experts alone leave.

    Attributes:
        case: its constraints protect all other units.
        mixtures: those of its network.
    """

    case: Case
    mixtures: tuple[Mixture, ...]

    @staticmethod
    def of(case: Case) -> Lost:
        found = tuple(mixtures(case.coupling))
        ids = np.concatenate([mixture.units[0] for mixture in found])
        others = sorted({*case.coupling.scopes} - {case.coupling.scopes[scope] for scope in case.coupling.scope[ids]})
        rules = case.constraints.also(tfx.Constraints(protect=others), case.coupling)
        return Lost(replace(case, constraints=rules), found)

    def run(self, tap: Tap) -> Network:
        """The whole network with a tap."""
        return lambda **inputs: evaluate(self.case.params, self.case.spec, (inputs,), tap=tap)[0]

    def masked(self, keep: np.ndarray) -> Tap:
        """The routers choose among the others: what the smaller network computes."""
        gates = tfx.Plan(self.case.coupling, keep).gates

        def tap(name: str, slot: int, x: Tensor) -> Tensor:
            for (node, place, _), gate in gates.items():
                x = x * gate if (node, place) == (name, slot) else x
            return x

        return tap

    def constants(self, keep: np.ndarray) -> Tap:
        """The routers choose as before; in place of what a lost expert gives out stands its mean."""
        lost = {x.experts.name: torch.from_numpy(~keep[x.units[0]]) for x in self.mixtures}
        return self._at_experts(
            lambda name, numbers, y: torch.where(lost[name][numbers][..., None], self.means[name][numbers], y)
        )

    def bias(self, keep: np.ndarray) -> Tap:
        """The routers choose among the others; the mean of what is missing is added everywhere."""
        masked = self.masked(keep)
        shifts = {x.product: _shift(self, k, keep[x.units[0]].tobytes()) for k, x in enumerate(self.mixtures)}

        def tap(name: str, slot: int, x: Tensor) -> Tensor:
            return x + shifts[name] if slot == -1 and name in shifts else masked(name, slot, x)

        return tap

    @cached_property
    def means(self) -> dict[str, Tensor]:
        """By mixture, the mean of what every expert gives out where it is chosen ``(experts, width)``."""
        sums: dict[str, Tensor] = {}

        def add(name: str, numbers: Tensor, y: Tensor) -> Tensor:
            rows = torch.cat([y, y.new_ones(*y.shape[:-1], 1)], -1).flatten(0, -2)
            start = rows.new_zeros(len(self.mixtures[0].units[0]), rows.shape[-1])
            sums.setdefault(name, start).index_add_(0, numbers.flatten(), rows)
            return y

        self.through(self._at_experts(add))
        return {name: x[:, :-1] / x[:, -1:].clamp(min=1) for name, x in sums.items()}

    def _at_experts(self, change: Callable[[str, Tensor, Tensor], Tensor]) -> Tap:
        """Give what the experts give out, and their numbers, to a function."""
        layers, inputs = {x.experts.name: x.experts for x in self.mixtures}, dict[int, Tensor]()

        def tap(name: str, slot: int, x: Tensor) -> Tensor:
            if name not in layers:
                return x
            if slot >= 0:
                inputs[slot] = x
                return x
            role = layers[name].layer.role(Experts)
            assert role is not None
            return change(name, role.numbers(*(inputs[k] for k in range(len(layers[name].inputs)))), x)

        return tap

    def through(self, tap: Tap) -> None:
        """Run the scored sequences."""
        with torch.no_grad():
            for inputs, _ in self.case.batches:
                self.run(tap)(**inputs)


@cache
def _shift(lost: Lost, k: int, kept: bytes) -> Tensor:
    """What a row of a mixture is short of in the mean, where this mixture alone loses experts."""
    mixture, keep = lost.mixtures[k], np.ones(len(lost.case.coupling), bool)
    keep[mixture.units[0]] = np.frombuffer(kept, bool)
    means = []
    for mask in (lost.masked(np.ones_like(keep)), lost.masked(keep)):
        sums: list[Tensor] = []

        def tap(name: str, slot: int, x: Tensor, mask: Tap = mask, sums: list[Tensor] = sums) -> Tensor:
            if (name, slot) == (mixture.product, -1):
                sums.append(x.flatten(0, -2).mean(0))
            return mask(name, slot, x)

        lost.through(tap)
        means.append(torch.stack(sums).mean(0))
    return means[0] - means[1]


REPAIRS: dict[str, Callable[[Lost], Callable[[np.ndarray], Tap]]] = {
    "as cut": lambda lost: lost.masked,
    "constants": lambda lost: lost.constants,
    "a bias": lambda lost: lost.bias,
}

COLUMNS = ["parameters", "experts", "chosen by", *REPAIRS, "`reconstruct`"]


def by_loss(lost: Lost, repaired: Callable[[np.ndarray], Tap], left: Sequence[int]) -> dict[int, np.ndarray]:
    """In rounds, every mixture loses the expert without which the loss on half of the scored sequences is least."""
    keep, result = np.ones(len(lost.case.coupling), bool), {}
    for count in range(len(lost.mixtures[0].units[0]) - 1, min(left) - 1, -1):
        for mixture in lost.mixtures:
            trials = []
            for unit in mixture.units[0][keep[mixture.units[0]]]:
                trial = keep.copy()
                trial[unit] = False
                with torch.no_grad():
                    loss = huggingface.perplexity(lost.run(repaired(trial)), lost.case.batches[::2])
                trials.append((loss, unit))
            keep[min(trials)[1]] = False
        result[count] = keep.copy()
    return result


def rows(case: Case, shares: Sequence[float], test: list[Any]) -> list[list[str]]:
    """Perplexities by who has chosen what stays, and what stands in for the others."""
    lost = Lost.of(case)
    case = lost.case
    reap = tfx.criteria.reap(case.params, case.spec, case.batches, case.coupling, loss=huggingface.next_token)
    masks = {
        name: [choose(shares)[share].keep for share in shares]
        for name, choose in {"`reap`": case.ranked(reap), "`prune`": case.pruned()}.items()
    }
    first = lost.mixtures[0].units[0]
    left = [int(keep[first].sum()) for keep in masks["`reap`"]]
    for name, repaired in REPAIRS.items():
        found = by_loss(lost, repaired(lost), left)
        masks[f"the loss, {name}"] = [found[count] for count in left]
    result = []
    with torch.no_grad():
        for k, share in enumerate(shares):
            for name, each in masks.items():
                keep = each[k]
                networks = [lost.run(repaired(lost)(keep)) for repaired in REPAIRS.values()]
                small = repair(case.params, tfx.Plan(case.coupling, keep), case.batches)
                networks.append(lambda small=small, **inputs: tfx.apply(*small, inputs))
                numbers = [f"{huggingface.perplexity(network, test):.2f}" for network in networks]
                result.append([f"{share:.0%}", f"{int(keep[first].sum())} of {len(first)}", name, *numbers])
                print(*result[-1], flush=True)
    return result

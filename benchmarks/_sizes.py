"""What a captured network computes at other sizes than it was captured at, whole and cut."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import taylorfx as tfx


@dataclass(frozen=True)
class Elsewhere:
    """One run at another size.

    Attributes:
        size: the axes that differ, as a text.
        captured: the error of the captured network against the module; none where either refuses.
        cut: the error of the cut network against the gated one.
        fixed: what the module itself says, where it does not take this size.
        refused: what the captured network says, where it does not.
    """

    size: str
    captured: float | None = None
    cut: float | None = None
    fixed: str = ""
    refused: str = ""


def others(inputs: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Inputs of other sizes: of text one word, half and twice its length; of images and video other ones.

    Spectrograms stay as they are: the models that take them are made for thirty seconds.
    """
    sizes: dict[str, dict[str, Tensor]] = {}
    if texts := [x for x in inputs.values() if not x.is_floating_point()]:
        length = texts[0].shape[1]
        for new in (1, length // 2, 2 * length - 1):
            sizes[f"{new} of {length} words"] = {
                name: x if x.is_floating_point() else x.repeat(1, 2)[:, :new] for name, x in inputs.items()
            }
    elif all(x.ndim in (4, 5) for x in inputs.values()):
        moved = {name: larger(x) for name, x in inputs.items()}
        old, new = (" x ".join(map(str, next(iter(x.values())).shape[2:])) for x in (inputs, moved))
        sizes[f"{new} after {old}"] = moved
    return sizes


def larger(x: Tensor) -> Tensor:
    """Noise of another height and width, multiples of 32 larger, and for video of half as many frames again."""
    n, channels, *frames, h, w = x.shape
    shape = (n, channels, *(f + f // 2 for f in frames), h + 32, w + 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


@torch.no_grad()
def elsewhere(
    module: nn.Module, params: tfx.Params, spec: tfx.Spec, plan: tfx.Plan, inputs: Mapping[str, Tensor]
) -> list[Elsewhere]:
    """A run at every other size, of a plan that removes exact units only."""
    small = tfx.cut(params, plan)
    runs = []
    for size, given in others(inputs).items():
        try:
            expected = tensors(module(**given))
        except Exception as error:  # whatever the module's own code raises
            runs.append(Elsewhere(size, fixed=said(error)))
            continue
        x = {node.name: given[node.name] for node in spec.inputs}
        try:
            values = tensors(tfx.apply(params, spec, x))
            gated, cut = (
                tensors(tfx.apply(params, spec, x, gates=plan.gates)), tensors(tfx.apply(small, plan.spec, x))
            )  # fmt: skip
        except Exception as error:  # the table shows what fails, and goes on
            runs.append(Elsewhere(size, refused=said(error)))
            continue
        runs.append(Elsewhere(size, difference(values, expected), difference(cut, gated)))
    return runs


def said(error: Exception) -> str:
    """The kind of an error and what it says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:400]


def tensors(value: Any) -> list[Tensor]:
    """The tensors of an output, each once."""
    return list({id(leaf): leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)}.values())


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """The largest difference, as a share of the largest between two examples of the same output."""
    assert [y.shape for y in one] == [y.shape for y in other], "outputs of other shapes"
    return max(((x - y).abs().max() / (y - y.roll(1, 0)).abs().max()).item() for x, y in zip(one, other, strict=True))

"""What a captured network computes at other sizes than it was captured at, whole and cut."""

from __future__ import annotations

import copy
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

import taylorfx as tfx


@dataclass(frozen=True)
class Elsewhere:
    """One run at another size.

    Attributes:
        size: the axes that differ, as a text.
        captured: the error of the captured network against the module; none where either refuses.
        cut: the error of the cut network against the gated one.
        rounding: how far the gated network is from itself where every gate is rounded up or down; none where these
            errors are small.
        fixed: what the module itself says, where it does not take this size.
        refused: what the captured network says, where it does not.
        exported: the error of the cut network's plain module, exported again with free sizes, against the cut network.
        onnx: the same of its ONNX file in onnxruntime; none where that is not asked for.
        left: what is said where one of these fails; and whether the same happens to the module itself.
    """

    size: str
    captured: float | None = None
    cut: float | None = None
    rounding: float | None = None
    fixed: str = ""
    refused: str = ""
    exported: float | None = None
    onnx: float | None = None
    left: str = ""


Run = Callable[[dict[str, Tensor]], list[Tensor]]
"""A network from its inputs to its outputs."""


PATIENCE = 120.0
"""How many seconds of processor time an export may take: torch reasons for minutes about sizes with long formulas."""


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
        before, after = (" x ".join(map(str, next(iter(x.values())).shape[2:])) for x in (inputs, moved))
        sizes[f"{after} after {before}"] = moved
    return sizes


def larger(x: Tensor) -> Tensor:
    """Noise of another height and width, multiples of 32 larger, and for video of half as many frames again."""
    n, channels, *frames, h, w = x.shape
    shape = (n, channels, *(f + f // 2 for f in frames), h + 32, w + 64)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)


@torch.no_grad()
def elsewhere(
    module: nn.Module,
    params: tfx.Params,
    spec: tfx.Spec,
    plan: tfx.Plan,
    inputs: Mapping[str, Tensor],
    *,
    onnx: bool = False,
    patience: float = PATIENCE,
) -> list[Elsewhere]:
    """A run at every other size, of a plan that removes exact units only.

    Args:
        onnx: make an ONNX file, too.
        patience: how many seconds an export of the cut network may take; zero, that it is not made.
    """
    small = tfx.cut(params, plan)
    names = [node.name for node in spec.inputs]
    few = {name: inputs[name][:2].contiguous() for name in names}
    again: dict[str, Run | str] | None = None
    own: dict[str, Run | str] | None = None
    runs = []
    for size, given in others(inputs).items():
        try:
            expected = tensors(module(**given))
        except Exception as error:  # whatever the module's own code raises
            runs.append(Elsewhere(size, fixed=said(error)))
            continue
        x = {name: given[name] for name in names}
        try:
            values = tensors(tfx.apply(params, spec, x))
            gated, cut = (
                tensors(tfx.apply(params, spec, x, gates=plan.gates)), tensors(tfx.apply(small, plan.spec, x))
            )  # fmt: skip
        except Exception as error:  # the table shows what fails, and goes on
            runs.append(Elsewhere(size, refused=said(error)))
            continue
        if again is None:
            again = outside(tfx.to_torch(small, plan.spec).eval(), few, onnx=onnx, patience=patience)
        errors: dict[str, float | None] = {}
        left = []
        for way, limit in LIMITS.items():
            found = attempt(again[way], x, cut) if way in again else None
            errors[way] = found if isinstance(found, float) and found <= limit else None
            if found is not None and errors[way] is None:
                own = own or outside(module, few, onnx=onnx, patience=patience)
                other = attempt(own[way], x, expected)
                fails = isinstance(other, str) or not other <= limit
                left.append(f"{way}{', as the module itself' * fails}: {found}")
        found = difference(values, expected), difference(cut, gated)
        runs.append(
            Elsewhere(
                size,
                *found,
                rounding=None if max(found) <= TOLERANCE else rounding(params, spec, plan, x, gated),
                exported=errors["exported"],
                onnx=errors["onnx"],
                left="; ".join(left),
            )
        )
    return runs


TOLERANCE = 1e-11
"""How large an error may be that nobody asks about."""


def rounding(params: tfx.Params, spec: tfx.Spec, plan: tfx.Plan, x: dict[str, Tensor], expected: list[Tensor]) -> float:
    """What the last bit of every activation that is read does to the outputs of the gated network.

    A cut network sums in another order, which changes these bits. Deep networks make much of them.
    """
    generator = torch.Generator().manual_seed(1)

    def moved(gate: Tensor) -> Tensor:
        signs = torch.randint(2, gate.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return gate.double() * (1 + torch.finfo(torch.float64).eps * signs)

    return difference(tensors(tfx.apply(params, spec, x, gates=tree_map(moved, plan.gates))), expected)


LIMITS = {"exported": 1e-11, "onnx": 1e-3}
"""How far a network may be from itself as it was exported."""


def attempt(run: Run | str, x: dict[str, Tensor], expected: list[Tensor]) -> float | str:
    """The error of a run, or what it says."""
    try:
        return run if isinstance(run, str) else difference(run(x), expected)
    except Exception as error:  # whatever the exported network raises
        return said(error)


def outside(
    module: nn.Module, example: dict[str, Tensor], *, onnx: bool, patience: float = PATIENCE
) -> dict[str, Run | str]:
    """The module, exported with free sizes, and as an ONNX file; or why it is not."""
    runs: dict[str, Run | str] = {}
    ways = {"exported": exported, **({"onnx": in_onnx} if onnx else {})}
    for way, made in ways.items() if patience else ():
        try:
            with within(patience):
                runs[way] = made(module, example)
        except Exception as error:  # whatever the exporters raise
            runs[way] = said(error)
    return runs


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Stop what takes more processor time, by a TimeoutError."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {seconds:.0f} seconds")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)  # every second again, if torch takes it for an error of its own
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def free(example: dict[str, Tensor]) -> dict[str, Any]:
    """Every axis may differ."""
    return {name: dict.fromkeys(range(x.ndim), torch.export.Dim.AUTO) for name, x in example.items()}


def exported(module: nn.Module, example: dict[str, Tensor]) -> Run:
    """The module, exported with free sizes."""
    program = torch.export.export(module, (), example, dynamic_shapes=free(example)).module()
    return lambda inputs: tensors(program(**inputs))


def in_onnx(module: nn.Module, example: dict[str, Tensor]) -> Run:
    """The module as an ONNX file with free axes, run by onnxruntime: in float32, if it can be computed in that."""
    single = {name: x.float() if x.is_floating_point() else x for name, x in example.items()}
    try:  # in float64, onnxruntime has few operators
        return in_runtime(copy.deepcopy(module).float(), single)
    except Exception:  # where a captured operator makes float64
        return in_runtime(module, example)


def in_runtime(module: nn.Module, example: dict[str, Tensor]) -> Run:
    """The module as an ONNX file with free axes, run by onnxruntime in the dtypes of the example."""
    import onnxruntime

    dtypes = {name: x.dtype for name, x in example.items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(module, (), path, kwargs=example, dynamic_shapes=free(example), dynamo=True, verbose=False)
        session = onnxruntime.InferenceSession(str(path))
    return lambda inputs: [
        torch.from_numpy(y).double()
        for y in session.run(None, {name: inputs[name].to(dtype).numpy() for name, dtype in dtypes.items()})
    ]


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

"""Rows of embeddings: numbers that no input has any more leave, and with them the outputs that stand for them.

A vocabulary is two things: the rows of a table, which inputs pick by their numbers, and the outputs that score every
number. Neither shrinks by itself, as it would change what the network takes in and gives out. Here the user allows it:

    kept numbers        0  2  3             of 0 1 2 3 4
    table               rows 0 2 3          inputs are numbered anew: 0 -> 0, 2 -> 1, 3 -> 2
    outputs             columns 0 2 3

For a draft of the network, in which rows may leave and sums consume tables and outputs, rows and outputs are units like
others. The decision is a `Plan` of that draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.cut import cut
from taylorfx.cutting.plan import Plan, PlanError
from taylorfx.layers import Embedding, Parameter, Reduce, Shape
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Labels, Ties
from taylorfx.network.run import evaluate
from taylorfx.network.spec import Node, Spec
from taylorfx.tree import Params, flatten

__all__ = ["Rows", "keep_rows"]


class Rows(NamedTuple):
    """A network with fewer rows in its tables.

    Attributes:
        params, spec: the smaller network.
        numbers: ``(rows,)`` of 64-bit integers, the new number of every old one; -1 for those that are gone. On the
            table's device.
        plan: what left, to cut momentum and averages along: ``tfx.cut(momentum, rows.plan)``.
    """

    params: Params
    spec: Spec
    numbers: Tensor
    plan: Plan


def keep_rows(
    params: Params,
    spec: Spec,
    kept: Tensor | Iterable[int],
    *,
    inputs: str | Sequence[str] = "input_ids",
    outputs: Sequence[str] | None = None,
) -> Rows:
    """Keep some of the numbers that inputs may have: the rows of embeddings, and the outputs that stand for them.

    For inputs that are numbered anew, the smaller network gives what the network gave at the kept columns, but for
    rounding: ``apply(rows.params, rows.spec, rows.numbers[x]) == apply(params, spec, x)[..., kept]``. Tied tables and
    heads stay tied.

    Args:
        kept: the numbers that stay, in any order; they keep the order of the table.
        inputs: the inputs whose numbers pick the rows. Their tables have equally many rows.
        outputs: which outputs have a column for every row, by their keys or, where there are none, by the names of
            their nodes; by default all whose last axis is as long as the table.

    Raises:
        ValueError: for numbers that the tables do not have, none, or some twice; for inputs that pick from no table.
        PlanError: where something else depends on the number of rows or on the numbers themselves, by its name: a
            softmax over the outputs, a layer that looks for one number.

    >>> from taylorfx import Input, apply, init, serial
    >>> from taylorfx.layers import Embedding, Linear
    >>> spec = serial(Input((3,), dtype="int64"), embed=Embedding(5, 4), head=Linear(4, 5))
    >>> params, x = init(spec, torch.Generator()), torch.tensor([[0, 3, 2]])
    >>> rows = keep_rows(params, spec, [0, 2, 3], inputs="input")
    >>> rows.numbers
    tensor([ 0, -1,  1,  2, -1])
    >>> small = apply(rows.params, rows.spec, rows.numbers[x])
    >>> torch.allclose(small, apply(params, spec, x)[..., [0, 2, 3]])
    True
    """
    names = (inputs,) if isinstance(inputs, str) else tuple(inputs)
    tables = _tables(spec, names)
    size = tables[0].layer.num_embeddings  # type: ignore[attr-defined]
    numbers = _numbers(kept, size).to(flatten(params)[tables[0].path("weight")].device)
    _refuse_numbers(params, spec, names, {node.name for node in tables}, numbers)

    draft, sums = _draft(spec, tables, size, outputs)
    coupling = couple(params, draft)
    keep, gone = np.ones(len(coupling), bool), np.flatnonzero(numbers.cpu().numpy() < 0)
    axes = {path: coupling.unit_ids(path, 0) for path in dict.fromkeys(node.path("weight") for node in tables)}
    axes |= {f"the output {name}": coupling.axes[coupling.letters[summed][letter]] for name, summed, letter in sums}
    _refuse_frozen(coupling, axes)
    for units in axes.values():
        keep[units[0, gone]] = False
    plan = Plan(coupling, keep, f"{size - len(gone):,} of {size:,} rows")
    return Rows(cut(params, plan), _undone(plan.spec, spec, numbers), numbers, plan)


def _numbers(kept: Tensor | Iterable[int], size: int) -> Tensor:
    """The new number of every old one, -1 for those that are gone.

    >>> _numbers([3, 0], 5)
    tensor([ 0, -1, -1,  1, -1])
    """
    chosen = torch.as_tensor(kept if isinstance(kept, Tensor) else [*kept], dtype=torch.int64).flatten().cpu()
    wrong = sorted({k for k in chosen.tolist() if not 0 <= k < size})
    if wrong or not len(chosen) or len({*chosen.tolist()}) < len(chosen):
        said = f"outside are {', '.join(map(str, wrong[:8]))}" if wrong else "none, or some twice"
        raise ValueError(f"What is kept are different numbers of rows, from 0 to {size - 1:,}; received: {said}.")
    numbers = torch.full((size,), -1)
    numbers[chosen.sort().values] = torch.arange(len(chosen))
    return numbers


def _tables(spec: Spec, names: Sequence[str]) -> list[Node]:
    """The embeddings that these inputs pick rows of, and all others that share their weights."""
    if unknown := [name for name in names if name not in spec.input_layers]:
        raise ValueError(
            f"Rows are picked by inputs of the network, {', '.join(spec.input_layers)}; received {', '.join(unknown)}."
        )
    moved = {name: _example(spec, name) for name in names}  # by node, numbers that are all 0, and that are all 1
    direct: list[Node] = []
    for node in spec:
        if node.inputs and node.inputs[0] in moved and isinstance(node.layer, Embedding):
            direct.append(node)
        elif len(node.inputs) == 1 and node.inputs[0] in moved and not node.paths:
            zeros, ones = (node.layer.apply({}, x) for x in moved[node.inputs[0]])
            if not torch.equal(zeros, ones):  # otherwise it looks at the shape only, as positions do
                moved[node.name] = zeros, ones
    paths = {node.path("weight") for node in direct}
    several = {node.layer.num_embeddings for node in direct if isinstance(node.layer, Embedding)}
    if len(several) != 1:
        tables = ", ".join(f"{node.path('weight')} of {node.layer}" for node in direct) or "none"
        raise ValueError(f"The inputs {', '.join(names)} pick rows of tables of one length; received {tables}.")
    return [node for node in spec if isinstance(node.layer, Embedding) and node.path("weight") in paths]


def _example(spec: Spec, name: str) -> tuple[Tensor, Tensor]:
    """Zeros and ones as an input takes them."""
    layer = spec.input_layers[name]
    shape = (1 if layer.alone else 4, *(layer.shape if isinstance(layer.shape, tuple) else ()))
    kind = getattr(torch, layer.dtype) if layer.dtype else torch.get_default_dtype()
    return torch.zeros(shape, dtype=kind), torch.ones(shape, dtype=kind)


def _refuse_numbers(params: Params, spec: Spec, names: Sequence[str], tables: set[str], numbers: Tensor) -> None:
    """Refuse layers that look at the numbers: tried with those that stay, and with what they will be.

    Both times the tables give the same rows, so that nothing differs but what looks at the numbers.

    Raises:
        PlanError: with the layers that give something else.
    """
    generator, stay = torch.Generator().manual_seed(0), torch.nonzero(numbers >= 0).flatten()
    values: dict[str, Tensor] = {}
    for name in spec.input_layers:
        values[name] = _example(spec, name)[1].to(numbers.device)
        if name in names:  # every number where there is room for all, so that the first ones are among them
            picked = torch.randint(len(stay), values[name].shape, generator=generator).to(numbers.device)
            picked.view(-1)[: len(stay)] = torch.arange(min(len(stay), picked.numel())).to(picked)
            values[name] = stay[picked].to(values[name])
    first: dict[str, Tensor] = {}
    different: list[str] = []

    def remember(name: str, slot: int, x: Tensor) -> Tensor:
        if slot == -1:
            first[name] = x
        return x

    def compare(name: str, slot: int, x: Tensor) -> Tensor:
        if slot != -1 or name in names:
            return x
        if name not in tables and not torch.equal(x, first[name]):
            if _renamed(first[name], numbers, x):
                return x  # it moves numbers, and does not look at them
            different.append(name)
        return first[name]

    with torch.no_grad():
        evaluate(params, spec, (values,), tap=remember)
        renamed = {name: numbers[x.long()].to(x) if name in names else x for name, x in values.items()}
        evaluate(params, spec, (renamed,), tap=compare)
    if different:
        raise PlanError(
            f"Rows leave where nothing but tables looks at the numbers of {', '.join(names)}; received a network in "
            f"which others do: {', '.join(f'{name} ({spec[name].layer})' for name in different)}. Keep the rows in "
            "front of the one that is looked for, so that it has its number as before, or leave the tables as they are."
        )


def _renamed(old: Tensor, numbers: Tensor, new: Tensor) -> bool:
    """Whether these are the same numbers, renamed.

    >>> numbers = torch.tensor([0, -1, 1])
    >>> _renamed(torch.tensor([2, 0]), numbers, torch.tensor([1, 0])), _renamed(torch.tensor([2.5]), numbers, numbers)
    (True, False)
    """
    if old.is_floating_point() or old.dtype == torch.bool or not old.numel():
        return False
    if int(old.min()) < 0 or int(old.max()) >= len(numbers):
        return False
    return torch.equal(numbers[old.long()], new.long())


@dataclass(frozen=True)
class _Open(Embedding):
    """An embedding whose rows may leave."""

    def signature(self, *shapes: Shape) -> str:
        return "..., weight: v e -> ... e"

    def fields(self, *shapes: Shape) -> Mapping[str, str]:
        return {"num_embeddings": "v", "embedding_dim": "e"}


def _draft(
    spec: Spec, tables: Sequence[Node], size: int, outputs: Sequence[str] | None
) -> tuple[Spec, list[tuple[str, str, str]]]:
    """The network with open tables, and with sums in place of outputs; of these the output, the node and the letter."""
    keys, shapes = (
        spec.keys or spec.outputs,
        {name: x.shape for name, x in propagate(spec, Ties(labeled=False)).items()},
    )
    if outputs is not None and (unknown := [name for name in outputs if name not in keys]):
        raise ValueError(f"The outputs of the network are {', '.join(keys)}; received {', '.join(unknown)}.")
    sums: list[tuple[str, str, str]] = []
    summed: dict[str, Node] = {}
    for key, name in zip(keys, spec.outputs, strict=True):
        if shapes[name][-1] == size if outputs is None else key in outputs:
            node = summed.setdefault(name, Node(f"{name} summed", Reduce("sum", (-1,)), (name,)))
            sums.append((key, node.name, f"s{len(shapes[name]) - 1}"))
    opened = {node.name: _opened(node) for node in tables}
    read = [x for path in dict.fromkeys(node.path("weight") for node in tables) for x in _read(path, spec.shapes[path])]
    nodes = (*(opened.get(node.name, node) for node in spec), *read, *summed.values())
    given_out = tuple(summed[name].name if name in summed else name for name in spec.outputs)
    return replace(spec, nodes=nodes, outputs=given_out), sums


def _read(path: str, shape: Shape) -> tuple[Node, Node]:
    """Nodes that consume the rows of a table: what no layer consumes is no unit."""
    table = Node(f"{path} read", Parameter(shape), (), path)
    return table, Node(f"{path} summed", Reduce("sum", (0,)), (table.name,))


def _opened(node: Node) -> Node:
    """A table whose rows may leave."""
    layer = node.layer
    assert isinstance(layer, Embedding)
    return Node(
        node.name, _Open(layer.num_embeddings, layer.embedding_dim, layer.padding_idx), node.inputs, node.params
    )


def _refuse_frozen(coupling: Coupling, axes: Mapping[str, Labels]) -> None:
    """Refuse rows that are no units of their own.

    Raises:
        PlanError: with what holds them.
    """
    held = [name for name, units in axes.items() if len(units) > 1 or (units < 0).any()]
    if held:
        reasons = dict.fromkeys(coupling.frozen.values())
        raise PlanError(
            f"Rows leave where nothing else depends on how many there are; held are those of {', '.join(held)}. Frozen "
            f"in this network is what touches the following: {'; '.join(reasons) or 'nothing'}."
        )


def _undone(draft: Spec, spec: Spec, numbers: Tensor) -> Spec:
    """The network of a smaller draft."""

    def closed(node: Node) -> Node:
        layer = node.layer
        if not isinstance(layer, _Open):
            return node
        padding = -1 if layer.padding_idx is None else int(numbers[layer.padding_idx])
        table = Embedding(layer.num_embeddings, layer.embedding_dim, None if padding < 0 else padding)
        return Node(node.name, table, node.inputs, node.params)

    small = {node.name: closed(node) for node in draft}
    return replace(spec, nodes=tuple(small[node.name] for node in spec))

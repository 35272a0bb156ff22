"""Operators that move data along axes: views, slices, joints, look-ups."""

from __future__ import annotations

import math

import torch
from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture.arguments import (
    Unmapped,
    argument,
    measured,
    nothing,
    number,
    tensor_node,
    tensor_nodes,
    whole,
    wholes,
)
from taylorfx.interop.capture.convert import Convert, Converter

__all__ = [
    "along", "arange", "cat", "expand", "index", "pad", "parts", "permute", "repeat", "repeat_interleave",
    "select", "slice_axis", "slice_scatter", "stack", "view",
]  # fmt: skip


def view(c: Convert, node: fx.Node) -> None:
    x = tensor_node(node.args[0])
    (before, axis), (after, new_axis) = measured(x), measured(node)
    if (axis < 0) != (new_axis < 0):
        raise Unmapped
    if x.name in c.counting:
        c.counting.add(node.name)
    if (before, axis) == (after, new_axis):
        c.alias(node)
    else:
        c.add(node, L.View(after, axis, new_axis), (c.tensor(x),))


def permute(c: Convert, node: fx.Node) -> None:
    x = tensor_node(node.args[0])
    rank = len(measured(x)[0])
    dims = list(range(rank))
    if str(node.target) == "aten.permute.default":
        dims = [d % rank for d in wholes(node.args[1])]
    elif rank > 1:
        a, b = (0, 1) if str(node.target) == "aten.t.default" else (d % rank for d in wholes(node.args[1:]))
        dims[a], dims[b] = dims[b], dims[a]
    c.add(node, L.Permute(tuple(dims)), (c.tensor(x),))


def expand(c: Convert, node: fx.Node, position: int = 0) -> None:
    x = tensor_node(node.args[position])
    (before, axis), (after, new_axis) = measured(x), measured(node)
    lead = len(after) - len(before)
    same = [k >= lead and (before[k - lead] != 1 or n == 1) for k, n in enumerate(after)]
    kept = [same[k] and (k != new_axis or axis >= 0) for k in range(len(after))]
    sizes = tuple(-1 if keep else n for keep, n in zip(kept, after, strict=True))
    if axis >= 0 and axis + lead != new_axis:
        raise Unmapped
    if all(n == -1 for n in sizes):
        c.alias(node, position)
        return
    fresh = new_axis if axis < 0 and new_axis >= 0 else -1
    if fresh >= 0 and after[fresh] != 1:
        raise Unmapped
    c.add(node, L.Expand(sizes, fresh), (c.tensor(x), *([c.known_examples()] if fresh >= 0 else [])))


def repeat(c: Convert, node: fx.Node) -> None:
    """The whole tensor again along some axes: the copies are the slower factor of each."""
    x = tensor_node(node.args[0])
    shape, after = measured(x)[0], measured(node)[0]
    lead = len(after) - len(shape)
    axis = measured(node)[1]
    if measured(x)[1] < 0 <= axis and math.prod(after) == math.prod(shape):  # once for every example
        # The copies come first: with the heads in the axis of the examples, (4, T) is (1, 4, T), (N, 4, T), (N * 4, T).
        parted = (*after[:axis], 1, *after[axis + (after[axis] == 1) :])
        view = c.add(node, L.View(parted, -1, -1), (c.tensor(x),), tag="_view")
        sizes = tuple(1 if k == axis else -1 for k in range(len(parted)))
        tag = "" if parted == after else "_examples"
        name = c.add(node, L.Expand(sizes, axis), (view, c.known_examples()), tag=tag)
        if parted != after:
            c.add(node, L.View(after, axis, axis), (name,))
        return
    times = wholes(node.args[1])
    counts = (1,) * (len(after) - len(times)) + times
    _spread(c, node, [(counts[k], 1 if k < lead else shape[k - lead]) for k in range(len(after))], copies_first=True)


def repeat_interleave(c: Convert, node: fx.Node) -> None:
    """Every position again and again: the copies are the faster factor."""
    times, dim = whole(argument(node, 1, "repeats")), whole(argument(node, 2, "dim"))
    shape, _ = measured(tensor_node(node.args[0]))
    dims = [(times if k == dim % len(shape) else 1, n) for k, n in enumerate(shape)]
    _spread(c, node, dims, copies_first=False)


def _spread(c: Convert, node: fx.Node, dims: list[tuple[int, int]], *, copies_first: bool) -> None:
    """Axes of ``(copies, size)``: a view with an axis for the copies, expanded, and laid out again.

    Twice three channels, the copies first: ``(N, 3)`` is viewed as ``(N, 1, 3)``, expanded to ``(N, 2, 3)``, and viewed
    as ``(N, 6)``, which is ``0 1 2 0 1 2``. The copies last, ``(N, 3, 2)`` gives ``0 0 1 1 2 2``.
    """
    x = tensor_node(node.args[0])
    (before, axis), (after, new_axis) = measured(x), measured(node)
    thin: list[int] = []
    wide: list[int] = []
    example = -1
    for k, (times, n) in enumerate(dims):
        pair = [(1, times), (n, -1)] if copies_first else [(n, -1), (1, times)]
        for size, target in pair if times != 1 else [(n, -1)]:
            if k == new_axis and target == -1:
                example = len(thin)
            thin.append(size)
            wide.append(target)
    name = c.tensor(x)
    if tuple(thin) != before:
        name = c.add(node, L.View(tuple(thin), axis, example), (name,), tag="_thin")
    name = c.add(node, L.Expand(tuple(wide)), (name,), tag="_expand" if tuple(wide) != after else "")
    c.add(node, L.View(after, example, new_axis), (name,))


def arange(c: Convert, node: fx.Node) -> None:
    """The numbers of the examples, 0 to N - 1: each example has one."""
    start = argument(node, 0, "start") if str(node.target) != "aten.arange.default" else 0
    if start != 0 or measured(node) != ((1,), 0):
        raise Unmapped
    c.counting.add(node.name)
    c.captured(node, apart=True)


def slice_axis(c: Convert, node: fx.Node) -> None:
    x, dim = tensor_node(node.args[0]), whole(argument(node, 1, "dim", 0))
    shape, axis = measured(x)
    dim %= len(shape)
    start, step = argument(node, 2, "start"), argument(node, 4, "step", 1)
    if measured(node) == (shape, axis):
        c.alias(node)
        return
    if dim == axis:
        raise Unmapped
    begin = _start(start, shape[dim])
    if isinstance(step, int) and step > 1 and shape[dim] == step * measured(node)[0][dim]:
        _every(c, node, x, dim, step, begin)
        return
    if step != 1:
        along(1, "dim")(c, node)
        return
    c.slice(node, x, dim, begin, begin + measured(node)[0][dim])


def _every(c: Convert, node: fx.Node, x: fx.Node, dim: int, step: int, first: int) -> None:
    """``x[..., first::step]`` of an axis of pairs, triples, ...: the same place of each, as of interleaved halves."""
    shape, axis = measured(x)
    pairs = (*shape[:dim], shape[dim] // step, step, *shape[dim + 1 :])
    name = c.add(node, L.View(pairs, axis, axis + (axis > dim)), (c.tensor(x),), tag="_pairs")
    name = c.add(node, L.Slice(dim + 1, first, first + 1), (name,), tag="_slice")
    c.add(node, L.View(measured(node)[0], axis + (axis > dim), axis), (name,))


def _start(start: object, size: int) -> int:
    """Where a slice of an axis of this size starts: -2 of 5 is 3."""
    first = 0 if start is None else whole(start)
    if first < 0:
        first = size + first
    return size if first > size else first if first > 0 else 0


def select(c: Convert, node: fx.Node) -> None:
    x, dim, index = tensor_node(node.args[0]), whole(node.args[1]), whole(node.args[2])
    shape, _ = measured(x)
    dim %= len(shape)
    index = index if index >= 0 else shape[dim] + index
    c.slice(node, x, dim, index, index + 1, drop=True)


def parts(c: Convert, node: fx.Node) -> None:
    """Each piece is a slice, which `Convert.getitem` writes where the piece is taken."""


def cat(c: Convert, node: fx.Node) -> None:
    """All that has something in it."""
    tensors = [t for t in tensor_nodes(node.args[0]) if not nothing(t)]
    dim = whole(argument(node, 1, "dim", 0)) % len(measured(node)[0])
    if any(measured(t)[1] != measured(node)[1] for t in tensors) or dim == measured(node)[1]:
        raise Unmapped
    if len(tensors) == 1:
        c.names[node.name] = c.tensor(tensors[0])
    else:
        c.add(node, L.Concat(dim), [c.tensor(t) for t in tensors])


def stack(c: Convert, node: fx.Node) -> None:
    tensors = tensor_nodes(node.args[0])
    after, axis = measured(node)
    dim = whole(argument(node, 1, "dim", 0)) % len(after)
    one = (*after[:dim], 1, *after[dim + 1 :])
    if any(measured(t)[1] < 0 for t in tensors) and axis >= 0:
        raise Unmapped
    layers = [L.View(one, measured(t)[1], axis) for t in tensors]
    views = [c.add(node, v, (c.tensor(t),), tag=f"_{k}") for k, (t, v) in enumerate(zip(tensors, layers, strict=True))]
    c.add(node, L.Concat(dim), views)


def pad(c: Convert, node: fx.Node) -> None:
    x, pad = tensor_node(node.args[0]), wholes(node.args[1])
    constant = str(node.target) == "aten.constant_pad_nd.default"
    mode = "constant" if constant else argument(node, 2, "mode", "constant")
    value = number(argument(node, 2 if constant else 3, "value", 0.0) or 0.0)
    shape, axis = measured(x)
    if not isinstance(mode, str) or (axis >= 0 and len(shape) - 1 - axis < len(pad) // 2):
        raise Unmapped
    c.add(node, L.Pad(pad, mode, float(value)), (c.tensor(x),))


def index(c: Convert, node: fx.Node) -> None:
    x, entries = tensor_node(node.args[0]), node.args[1]
    if not isinstance(entries, (list, tuple)):
        raise Unmapped
    indices = {k: tensor_node(entry) for k, entry in enumerate(entries) if entry is not None}
    axis = measured(x)[1]
    if axis in indices and indices[axis].name in c.counting:  # each example looks at positions of its own
        single = axis == 0 and [*indices] == [0, 1] and all(measured(i) == ((1,), 0) for i in indices.values())
        if single and indices[1].meta["val"].dtype == torch.long:
            c.add(node, L.Gather(1, by_example=True), (c.tensor(x), c.tensor(indices[1])))
        else:
            c.captured(node, apart=True)
        return
    if len(indices) != 1 or axis in indices:
        raise Unmapped
    ((dim, index),) = indices.items()
    if index.meta["val"].dtype != torch.long:
        raise Unmapped
    c.add(node, L.Gather(dim), (c.tensor(x), c.tensor(index)))


def along(position: int, name: str) -> Converter:
    """An operator that works along some axes, and changes their sizes at most."""

    def convert(c: Convert, node: fx.Node) -> None:
        c.along(node, position, name)

    return convert


def slice_scatter(c: Convert, node: fx.Node) -> None:
    x, source = tensor_node(node.args[0]), tensor_node(node.args[1])
    shape, axis = measured(x)
    dim = whole(argument(node, 2, "dim", 0)) % len(shape)
    if nothing(source):
        c.alias(node)
        return
    if argument(node, 5, "step", 1) != 1 or measured(source)[1] != axis:
        raise Unmapped
    if measured(source) == measured(node):  # the whole axis
        c.alias(node, 1)
        return
    if dim == axis:
        raise Unmapped
    start = _start(argument(node, 3, "start"), shape[dim])
    stop = start + measured(source)[0][dim]
    name, pieces = c.tensor(x), [c.tensor(source)]
    if start > 0:
        pieces.insert(0, c.add(node, L.Slice(dim, 0, start), (name,), tag="_before"))
    if stop < shape[dim]:
        pieces.append(c.add(node, L.Slice(dim, stop, shape[dim]), (name,), tag="_after"))
    c.add(node, L.Concat(dim), pieces)

"""Mixtures of experts: from the operators of a router and of its experts to layers.

Of transformers' ``experts_implementation="batched_mm"``, and of modules that are written like it, the graph is

    probabilities = softmax(logits)                 (tokens, experts)
    weights, chosen = topk(probabilities, k)        (tokens, k)
    ids = chosen.view(-1)                           (tokens * k,)
    matrices = index(weight, [ids])                 (tokens * k, out, in): a matrix for every token
    y = bmm(matrices, x.unsqueeze(-1))              (tokens * k, out, 1)

or, with weights that add up to one,

    logits, chosen = topk(logits, k)
    weights = softmax(logits)                       (tokens, k)

The first two lines become `TopKWeights`, the last two `ExpertLinear`, which never makes a matrix for every token and
finds the chosen ones by itself. The axis of the experts may then shrink. What looks otherwise is captured operator by
operator; where it uses the numbers of experts in another way, the axis is rigid.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture.arguments import Unmapped, argument, measured, tensor_node, whole
from taylorfx.interop.capture.convert import Convert, Converter
from taylorfx.layers.operators import DTYPE, SLOT

__all__ = ["either", "matrices", "normalized", "product", "top_k"]

SOFTMAX = ("softmax", "_softmax")

SAME = ("view", "reshape", "_unsafe_view", "flatten", "clone", "contiguous", "alias", "detach")
"""Operators after which the numbers of experts are the same, in the same order."""


def either(one: Converter, other: Converter) -> Converter:
    """The first rule, or the second where the first does not hold."""

    def convert(c: Convert, node: fx.Node) -> None:
        try:
            one(c, node)
        except Unmapped:
            other(c, node)

    return convert


def top_k(c: Convert, node: fx.Node) -> None:
    """The largest numbers of a softmax, and where they are.

    The largest logits become their exponentials, where all that consumes them is a softmax, see `normalized`.
    """
    logits, k = _routed(node), whole(node.args[1])
    name, dtype = c.tensor(logits), tensor_node(node.args[0]).meta["val"].dtype
    if logits.meta["val"].dtype != dtype:
        options = (("dtype", (DTYPE, str(dtype).removeprefix("torch."))),)
        name = c.add(node, L.Elementwise("_to_copy.default", ((SLOT, 0),), options), (name,), tag="_logits")
    ones = c.add(node, L.Ones(), (name,), tag="_ones")
    c.routers[node.name] = ones, name
    for user in node.users:
        if user.args[1] == 0:  # the numbers of experts stay as they were captured: then their axis is rigid
            c.add(user, L.TopKWeights(k), (ones, name))


def normalized(c: Convert, node: fx.Node) -> None:
    """A softmax of the largest logits: their weights, divided by the sum."""
    largest = tensor_node(node.args[0])
    router = tensor_node(largest.args[0]) if largest.args else largest
    if router.name not in c.routers or _kind(tensor_node(router.args[0])) in SOFTMAX:
        raise Unmapped
    weights, last = c.tensor(largest), len(measured(node)[0]) - 1
    total = c.add(node, L.Reduce("sum", (last,), keepdim=True), (weights,), tag="_sum")
    c.add(node, L.Elementwise("div.Tensor", ((SLOT, 0), (SLOT, 1))), (weights, total))


def _routed(node: fx.Node) -> fx.Node:
    """The logits from which an operator takes the largest, after a softmax or before one."""
    scores = tensor_node(node.args[0])
    last = len(measured(scores)[0]) - 1
    # Unsorted, as in DeepSeek-V2, is any order: that of the largest, too.
    if argument(node, 2, "dim", -1) not in (-1, last) or not argument(node, 3, "largest", True):
        raise Unmapped
    logits = tensor_node(scores.args[0]) if _softmax(scores, last) else scores
    after = [user for value in node.users if value.args[1] == 0 for user in value.users]
    same = all(_softmax(x, last) and x.meta["val"].dtype == scores.meta["val"].dtype for x in after)
    if logits is scores and not (after and same):
        raise Unmapped
    if measured(logits)[1] == last:
        raise Unmapped
    return logits


def _softmax(node: fx.Node, last: int) -> bool:
    """A softmax over the last axis."""
    return _kind(node) in SOFTMAX and argument(node, 1, "dim") in (-1, last)


class _Chosen(NamedTuple):
    """The experts' matrices at every position.

    Attributes:
        weight: of all experts, a parameter.
        experts: the numbers of the chosen ones.
        router: what has chosen them.
    """

    weight: fx.Node
    experts: fx.Node
    router: fx.Node


def _chosen(c: Convert, node: fx.Node) -> _Chosen:
    """Matrices that are looked up by the numbers that a router gives."""
    weight, entries = tensor_node(node.args[0]), node.args[1]
    if _kind(node) != "index" or not isinstance(entries, (list, tuple)) or len(entries) != 1:
        raise Unmapped
    ids = experts = tensor_node(entries[0])
    while _kind(experts) in SAME:
        experts = tensor_node(experts.args[0])
    router = tensor_node(experts.args[0]) if experts.args else experts
    numbers = router.name in c.routers and experts.args[1] == 1
    if not numbers or len(measured(ids)[0]) != 1 or len(measured(weight)[0]) != 3:
        raise Unmapped
    return _Chosen(weight, experts, router)


def matrices(c: Convert, node: fx.Node) -> None:
    """The chosen matrices of a parameter: nothing by themselves, where all that consumes them is a product."""
    c.path(_chosen(c, node).weight)
    for user in node.users:
        _vectors(user, node)


def _vectors(node: fx.Node, matrices: fx.Node) -> fx.Node:
    """What a product multiplies the chosen matrices with: one vector each."""
    if _kind(node) != "bmm" or node.args[0] is not matrices:
        raise Unmapped
    column = tensor_node(node.args[1])
    if measured(column)[0][2] != 1:
        raise Unmapped
    return column


def product(c: Convert, node: fx.Node) -> None:
    """The product of every position's vector with the matrix of its expert."""
    looked_up = tensor_node(node.args[0])
    chosen, column = _chosen(c, looked_up), _vectors(node, looked_up)
    path = c.path(chosen.weight)
    count, features, inputs = c.tensors[path].shape
    rows, axis = measured(chosen.experts)  # (tokens, k)
    x = c.add(node, L.View((*rows, inputs), measured(column)[1], axis), (c.tensor(column),), tag="_rows")
    layer = L.ExpertLinear(count, inputs, features, rows[-1])
    y = c.add(node, layer, (*c.routers[chosen.router.name], x), leaves={"weight": path}, tag="_experts")
    c.add(node, L.View(measured(node)[0], axis, measured(node)[1]), (y,))


def _kind(node: fx.Node) -> str:
    """The name of an operator."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 2 else ""

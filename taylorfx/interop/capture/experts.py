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

or, with a bias that counts for the choice alone,

    scores = sigmoid(logits)
    _, chosen = topk(scores + bias, k)
    weights = gather(scores, -1, chosen)            (tokens, k)

The first lines become `TopKWeights`, the last two `ExpertLinear`, which never makes a matrix for every token and
finds the chosen ones by itself. The axis of the experts may then shrink. What looks otherwise is captured operator by
operator; where it uses the numbers of experts in another way, the axis is rigid.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import fx

from taylorfx import layers as L
from taylorfx.interop.capture.arguments import Unmapped, argument, measured, tensor_node, whole
from taylorfx.interop.capture.convert import Convert, Converter, Router
from taylorfx.layers.experts import Score
from taylorfx.layers.operators import DTYPE, SLOT

__all__ = ["biases", "either", "gathered", "matrices", "normalized", "product", "top_k"]

SOFTMAX = ("softmax", "_softmax")

SAME = ("view", "reshape", "_unsafe_view", "flatten", "clone", "contiguous", "alias", "detach")
"""Operators after which the numbers of experts are the same, in the same order."""

NEGATED = ("bitwise_not", "logical_not")


def either(one: Converter, other: Converter) -> Converter:
    """The first rule, or the second where the first does not hold."""

    def convert(c: Convert, node: fx.Node) -> None:
        try:
            one(c, node)
        except Unmapped:
            other(c, node)

    return convert


def top_k(c: Convert, node: fx.Node) -> None:
    """The largest numbers of a softmax or of sigmoids, and where they are.

    The largest logits become their exponentials, where all that consumes them is a softmax, see `normalized`.
    """
    score, logits, bias = _routed(node)
    k, name, dtype = whole(node.args[1]), c.tensor(logits), tensor_node(node.args[0]).meta["val"].dtype
    values = [user for user in node.users if user.args[1] == 0]
    if bias is not None and values:
        raise Unmapped  # the bias is in them
    if logits.meta["val"].dtype != dtype:
        options = (("dtype", (DTYPE, str(dtype).removeprefix("torch."))),)
        name = c.add(node, L.Elementwise("_to_copy.default", ((SLOT, 0),), options), (name,), tag="_logits")
    ones = c.add(node, L.Ones(), (name,), tag="_ones")
    router = Router((ones, name) if bias is None else (ones, name, c.tensor(bias)), score)
    c.routers[node.name] = router
    for user in values:  # the numbers of experts stay as they were captured: then their axis is rigid
        c.add(user, L.TopKWeights(k, score), router.inputs)


def gathered(c: Convert, node: fx.Node) -> None:
    """The scores of the experts that a router has chosen by something else."""
    scores, chosen = tensor_node(node.args[0]), tensor_node(node.args[2])
    router = _router(c, chosen)
    last = len(measured(scores)[0]) - 1
    same = _scored(scores, last)
    if node.args[1] not in (-1, last) or same is None or same != _routed(router)[:2]:
        raise Unmapped
    c.add(node, L.TopKWeights(whole(router.args[1]), same[0]), c.routers[router.name].inputs)


def _router(c: Convert, chosen: fx.Node) -> fx.Node:
    """The ``topk`` that numbers of experts are of."""
    router = tensor_node(chosen.args[0]) if chosen.args else chosen
    if router.name not in c.routers or chosen.args[1] != 1:
        raise Unmapped
    return router


def normalized(c: Convert, node: fx.Node) -> None:
    """A softmax of the largest logits: their weights, divided by the sum."""
    largest = tensor_node(node.args[0])
    router = tensor_node(largest.args[0]) if largest.args else largest
    if router.name not in c.routers or _scored(tensor_node(router.args[0]), len(measured(largest)[0]) - 1):
        raise Unmapped
    weights, last = c.tensor(largest), len(measured(node)[0]) - 1
    total = c.add(node, L.Reduce("sum", (last,), keepdim=True), (weights,), tag="_sum")
    c.add(node, L.Elementwise("div.Tensor", ((SLOT, 0), (SLOT, 1))), (weights, total))


class _Routed(NamedTuple):
    """What an operator takes the largest of.

    Attributes:
        score: what the logits become.
        logits: of a router.
        bias: what is added to the scores, and not to the weights.
    """

    score: Score
    logits: fx.Node
    bias: fx.Node | None = None


def _routed(node: fx.Node) -> _Routed:
    """The logits from which an operator takes the largest, after a softmax or sigmoids or before a softmax."""
    choice = tensor_node(node.args[0])
    last = len(measured(choice)[0]) - 1
    # Unsorted, as in DeepSeek-V2, is any order: that of the largest, too.
    if argument(node, 2, "dim", -1) not in (-1, last) or not argument(node, 3, "largest", True):
        raise Unmapped
    choice = _of_all_groups(choice)
    routed = _biased(choice, last) or _after(node, choice, last)
    if measured(routed.logits)[1] == last:
        raise Unmapped
    return routed


def _biased(choice: fx.Node, last: int) -> _Routed | None:
    """Scores of logits, to which a vector may have been added."""
    if scored := _scored(choice, last):
        return _Routed(*scored)
    pair = [x for x in choice.args if isinstance(x, fx.Node)]
    if _kind(choice) != "add" or len(pair) != 2 or choice.kwargs:
        return None
    for scores, bias in (pair, pair[::-1]):
        if (scored := _scored(scores, last)) and measured(bias) == (measured(scores)[0][-1:], -1):
            return _Routed(*scored, bias)
    return None


def _after(node: fx.Node, logits: fx.Node, last: int) -> _Routed:
    """Logits, whose largest all go through a softmax."""
    after = [user for value in node.users if value.args[1] == 0 for user in value.users]
    same = all(_softmax(x, last) and x.meta["val"].dtype == logits.meta["val"].dtype for x in after)
    if not (after and same):
        raise Unmapped
    return _Routed("softmax", logits)


def _scored(node: fx.Node, last: int) -> tuple[Score, fx.Node] | None:
    """What a softmax over the last axis, or a sigmoid, is of."""
    if _softmax(node, last):
        return "softmax", tensor_node(node.args[0])
    return ("sigmoid", tensor_node(node.args[0])) if _kind(node) == "sigmoid" else None


def _of_all_groups(choice: fx.Node) -> fx.Node:
    """The scores before those outside the best groups are left out, where as many groups are taken as there are.

    ::

        mask = scatter(zeros_like(groups), 1, topk(groups, topk_group)[1], 1)      (tokens, n_group)
        choice = masked_fill(scores, ~mask.unsqueeze(-1).expand(...).reshape(...).bool(), -inf)
    """
    if _kind(choice) != "masked_fill":
        return choice
    mask, turned = tensor_node(choice.args[1]), 0
    while _kind(mask) in (*SAME, *NEGATED, "_to_copy", "to", "expand", "unsqueeze"):
        turned += _kind(mask) in NEGATED
        mask = tensor_node(mask.args[0])
    if _kind(mask) != "scatter" or turned != 1 or mask.args[1] not in (-1, 1) or mask.args[3] != 1:
        raise Unmapped
    zeros, best = tensor_node(mask.args[0]), tensor_node(mask.args[2])
    groups = tensor_node(best.args[0]) if best.args else best
    if _kind(zeros) not in ("zeros_like", "zeros") or _kind(groups) != "topk" or best.args[1] != 1:
        raise Unmapped
    if groups.args[1] != measured(mask)[0][-1]:
        raise Unmapped  # experts of the other groups are not chosen: then their axis is rigid
    return tensor_node(choice.args[0])


def _softmax(node: fx.Node, last: int) -> bool:
    """A softmax over the last axis."""
    return _kind(node) in SOFTMAX and argument(node, 1, "dim") in (-1, last)


class _Chosen(NamedTuple):
    """The experts' matrices at every position, or their vectors.

    Attributes:
        weight: of all experts, a parameter.
        experts: the numbers of the chosen ones.
        router: what has chosen them.
    """

    weight: fx.Node
    experts: fx.Node
    router: fx.Node


def _chosen(c: Convert, node: fx.Node, rank: int) -> _Chosen:
    """Tensors of this rank that are looked up, experts and all, by the numbers that a router gives."""
    weight, entries = tensor_node(node.args[0]), node.args[1]
    if _kind(node) != "index" or not isinstance(entries, (list, tuple)) or len(entries) != 1:
        raise Unmapped
    ids = experts = tensor_node(entries[0])
    while _kind(experts) in SAME:
        experts = tensor_node(experts.args[0])
    if len(measured(ids)[0]) != 1 or len(measured(weight)[0]) != rank:
        raise Unmapped
    return _Chosen(weight, experts, _router(c, experts))


def matrices(c: Convert, node: fx.Node) -> None:
    """The chosen matrices of a parameter: nothing by themselves, where all that consumes them is a product."""
    c.path(_chosen(c, node, 3).weight)
    for user in node.users:
        _vectors(user, node)


def biases(c: Convert, node: fx.Node) -> None:
    """The chosen vectors of a parameter."""
    chosen = _chosen(c, node, 2)
    path, router = c.path(chosen.weight), c.routers[chosen.router.name]
    count, features = c.tensors[path].shape
    rows, axis = measured(chosen.experts)
    layer = L.ExpertBias(count, features, rows[-1], router.score)
    y = c.add(node, layer, router.inputs, leaves={"bias": path}, tag="_biases")
    c.add(node, L.View(measured(node)[0], axis, measured(node)[1]), (y,))


def _vectors(node: fx.Node, matrices: fx.Node) -> fx.Node:
    """What a product multiplies the chosen matrices with: one vector each, a column after them or a row before."""
    if _kind(node) != "bmm" or matrices not in node.args:
        raise Unmapped
    after = node.args[0] is matrices
    vector = tensor_node(node.args[after])
    if measured(vector)[0][2 if after else 1] != 1:
        raise Unmapped
    return vector


def product(c: Convert, node: fx.Node) -> None:
    """The product of every position's vector with the matrix of its expert."""
    transposed = _kind(tensor_node(node.args[1])) == "index"
    looked_up = tensor_node(node.args[transposed])
    chosen, vector = _chosen(c, looked_up, 3), _vectors(node, looked_up)
    path, router = c.path(chosen.weight), c.routers[chosen.router.name]
    count, *widths = c.tensors[path].shape
    inputs, features = widths if transposed else widths[::-1]
    rows, axis = measured(chosen.experts)  # (tokens, k)
    x = c.add(node, L.View((*rows, inputs), measured(vector)[1], axis), (c.tensor(vector),), tag="_rows")
    layer = L.ExpertLinear(count, inputs, features, rows[-1], router.score, transposed)
    given = (*router.inputs[:2], x, *router.inputs[2:])
    y = c.add(node, layer, given, leaves={"weight": path}, tag="_experts")
    c.add(node, L.View(measured(node)[0], axis, measured(node)[1]), (y,))


def _kind(node: fx.Node) -> str:
    """The name of an operator."""
    parts = str(node.target).split(".")
    return parts[1] if parts[0] == "aten" and len(parts) > 2 else ""

"""What scoring runs in the network's stead is invisible: lean copy, memory format, shared taps, precision."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import optree
import pytest
import torch
from constructs import CONSTRUCTS, SAME, classifier
from hypothesis import example, given
from hypothesis import strategies as st
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import taylorfx as tfx
from taylorfx import Input, Node, Spec, residual, serial
from taylorfx import layers as L
from taylorfx.layers.roles import Pointwise
from taylorfx.network.run import evaluate, gating
from taylorfx.rewrite import rotary
from taylorfx.rewrite.draft import Draft
from taylorfx.rewrite.lean import PASSES, lean
from taylorfx.rewrite.unused import Only, unused_positions
from taylorfx.scoring import taps
from taylorfx.testing.strategies import network, networks, specs, token_specs

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NORM = L.BatchNorm2d(4)


def after_conv(*nodes: Node) -> Spec:
    """A classifier whose nodes consume ``conv``, which depends on units."""
    return classifier(Spec((Node("x", Input()), Node("conv", SAME, ("x",)), *nodes)), channels=4)


def attention(causal: bool = False, masked: tuple[Node, ...] = ()) -> Spec:
    """Two heads of four, over three tokens; the last node of ``masked`` is the mask."""
    nodes = [Node("x", Input((3, 4))), Node("embed", L.Linear(4, 4), ("x",))]
    for name in "qkv":
        nodes.append(Node(name, L.Linear(4, 8), ("embed",)))
        nodes.append(Node(f"{name}_split", L.Reshape((3, 2, 4)), (name,)))
        nodes.append(Node(f"{name}_heads", L.Permute((0, 2, 1, 3)), (f"{name}_split",)))
    heads = [f"{name}_heads" for name in "qkv"]
    if masked:
        nodes += masked
        heads.append(masked[-1].name)
    nodes.append(Node("attention", L.ScaledDotProduct(0.5, causal=causal), tuple(heads)))
    nodes += [Node("flat", L.Flatten(), ("attention",)), Node("head", L.Linear(24, 2), ("flat",))]
    return Spec(tuple(nodes))


MASK = Node("mask", L.Parameter((3, 3), std=1.0))  # the same for all examples


def rotated(order: tuple[str, str] = ("neg", "low"), sin: tuple[int, ...] = (3, 4), also: str = "q_heads") -> Spec:
    """Attention with a rotary embedding of its queries, which are multiplied by ``also``."""
    x, low, high, neg = "q_heads", L.Slice(3, 0, 2), L.Slice(3, 2, 4), L.Elementwise("neg.default", (("$", 0),))
    nodes = [Node("cos", L.Parameter((3, 4), std=1.0)), Node("sin", L.Parameter(sin, std=1.0))]
    nodes += [Node("by_cos", L.Multiply(), ("cos", x)), Node("low", low, (x,)), Node("high", high, (x,))]
    nodes += [Node("neg", neg, ("high",)), Node("turned", L.Concat(3), order)]
    nodes += [Node("by_sin", L.Multiply(), ("turned", "sin")), Node("rotary", L.Add(), ("by_sin", "by_cos"))]
    nodes += [Node("query", L.Multiply(), ("rotary", also))]
    *before, last, flat, head = attention()
    return Spec((*before, *nodes, replace(last, inputs=("query", *last.inputs[1:])), flat, head))


def activated(layer: tfx.Layer) -> Spec:
    """Its value is consumed by one linear layer, by a linear layer and the sum behind it, and by one behind a view."""
    nodes = [Node("x", Input((3, 4))), Node("embed", L.Linear(4, 6), ("x",)), Node("one", layer, ("embed",))]
    nodes += [Node("up", L.Linear(6, 6), ("one",)), Node("two", layer, ("up",)), Node("on", L.Linear(6, 6), "two")]
    nodes += [Node("sum", L.Add(), ("on", "two")), Node("wide", L.Linear(6, 6), ("sum",))]
    nodes += [Node("three", layer, ("wide",)), Node("turned", L.Permute((1, 0, 2)), ("three",))]
    nodes += [Node("last", L.Linear(6, 4), ("turned",)), Node("back", L.Permute((1, 0, 2)), ("last",))]
    return Spec((*nodes, Node("flat", L.Flatten(), ("back",)), Node("head", L.Linear(12, 2), ("flat",))))


def parts(*bounds: tuple[int, int], dims: tuple[int, ...] = (1, 1, 1), whole: bool = False) -> Spec:
    """Slices of what a convolution gives out, pooled and joined; the whole of it, too."""
    nodes = []
    for k, ((start, stop), dim) in enumerate(zip(bounds, dims, strict=False)):
        nodes.append(Node(f"slice{k}", L.Slice(dim, start, stop), ("conv",)))
        nodes.append(Node(f"pool{k}", L.AdaptiveAvgPool2d(1), (f"slice{k}",)))
    if whole:
        nodes.append(Node("pool", L.AdaptiveAvgPool2d(1), ("conv",)))
    names = tuple(node.name for node in nodes if node.name.startswith("pool"))
    channels = (
        sum(stop - start if dim == 1 else 4 for (start, stop), dim in zip(bounds, dims, strict=False)) + 4 * whole
    )
    stem = (Node("x", Input((2, 4, 4))), Node("conv", L.Conv2d(2, 4, 1), ("x",)))
    tail = (Node("joined", L.Concat(), names), Node("flat", L.Flatten(), ("joined",)))
    return Spec((*stem, *nodes, *tail, Node("head", L.Linear(channels, 2), ("flat",))))


def stack(*nodes: Node, classes: int = 4, last: str = "") -> Spec:
    """Tokens, nodes behind them, and a classifier of what is left of the last one."""
    first = (Node("x", Input((3, 4))), Node("embed", L.Linear(4, 4), ("x",)))
    tail = Node("flat", L.Flatten(), (last or nodes[-1].name,)), Node("head", L.Linear(classes, 2), ("flat",))
    return Spec((*first, *nodes, *tail))


class Pairs(tfx.Layer):
    """Every token and the sum of two others."""

    def signature(self, *shapes):
        return "B t c, B (t P) c -> B t c"

    def letters(self, *shapes):
        return {"P": 2}

    def apply(self, params, *inputs):
        return inputs[0] + inputs[1].unflatten(1, (-1, 2)).sum(2)


UP = Node("up", L.Linear(4, 4), ("embed",))
FIRST = L.Slice(1, 0, 1)


def blocks(cut: tfx.Layer) -> tuple[Node, ...]:
    """Two blocks of a transformer, of which the first's sum is used twice, once with all its tokens."""
    nodes, stream = [], "embed"
    for k in "ab":
        nodes += [Node(f"{k}.keys", L.Linear(4, 4), (stream,)), Node(f"{k}.norm", L.LayerNorm(4), (stream,))]
        nodes += [Node(f"{k}.{x}", L.Linear(4, 4), (f"{k}.norm",)) for x in ("queries", "values")]
        nodes.append(Node(f"{k}.mixed", L.ScaledDotProduct(0.5), (f"{k}.queries", f"{k}.keys", f"{k}.values")))
        nodes.append(Node(f"{k}.out", L.Linear(4, 4), (f"{k}.mixed",)))
        nodes.append(Node(f"{k}.more", L.Add(), (f"{k}.out", stream)))
        nodes += [Node(f"{k}.up", L.Linear(4, 5), (f"{k}.more",)), Node(f"{k}.gelu", L.GELU(), (f"{k}.up",))]
        nodes.append(Node(f"{k}.down", L.Linear(5, 4), (f"{k}.gelu",)))
        nodes.append(Node(f"{k}.sum", L.Add(), (f"{k}.more", f"{k}.down")))
        stream = f"{k}.sum"
    return (*nodes, Node("cut", cut, (stream,)))


# Which slices are taken earlier, and where.
UNUSED: dict[str, tuple[Spec, list[str]]] = {
    "one token": (stack(*blocks(FIRST)), ["a.sum", "b.norm"]),
    "two of three tokens": (stack(*blocks(L.Slice(1, 1, 3)), classes=8), ["a.sum", "b.norm"]),
    "all tokens": (stack(*blocks(L.Slice(1, 0, 3)), classes=12), []),
    "behind no product": (stack(Node("gelu", L.GELU(), ("embed",)), Node("cut", FIRST, ("gelu",))), ["x"]),
    "behind nothing": (stack(Node("cut", L.Slice(1, 0, 2), ("x",)), UP, classes=4 * 3, last="up"), []),
    "used by another": (
        stack(UP, Node("cut", FIRST, ("up",)), Node("sum", L.Add(), ("up", "cut")), classes=12), [],
    ),
    "used by two slices": (
        stack(UP, Node("one", FIRST, ("up",)), Node("two", FIRST, ("up",)), Node("sum", L.Add(), ("one", "two"))), [],
    ),
    "moved": (
        stack(
            UP, Node("turned", L.Permute((0, 2, 1)), ("up",)), Node("split", L.View((1, 2, 2, 3)), ("turned",)),
            Node("cut", L.Slice(3, 1, 2), ("split",)),
        ), ["x"],
    ),
    "folded with another axis": (
        stack(UP, Node("folded", L.View((1, 12)), ("up",)), Node("cut", L.Slice(1, 2, 5), ("folded",)), classes=3),
        [],
    ),
    "folded with the examples": (
        stack(
            UP, Node("turned", L.Permute((1, 0, 2)), ("up",)), Node("flat_", L.View((3, 4), 1, 0), ("turned",)),
            Node("mix", L.Linear(4, 4), ("flat_",)), Node("split", L.View((3, 1, 4), 0, 1), ("mix",)),
            Node("cut", L.Slice(0, 0, 1), ("split",)), Node("back", L.Permute((1, 0, 2)), ("cut",)),
        ), [],
    ),
    "among the examples": (
        stack(
            UP, Node("turned", L.Permute((1, 0, 2)), ("up",)), Node("flat_", L.View((3, 4), 1, 0), ("turned",)),
            Node("mix", L.Linear(4, 4), ("flat_",)), Node("cut", L.Slice(0, 0, 1), ("mix",)),
        ), [],
    ),
    "in pairs": (
        stack(
            UP, Node("two", L.Linear(4, 8), ("embed",)), Node("pairs", L.View((1, 6, 4)), ("two",)),
            Node("sum", Pairs(), ("up", "pairs")), Node("cut", FIRST, ("sum",)),
        ), [],
    ),
    "used by two layers": (
        stack(
            UP, Node("mixed", L.ScaledDotProduct(0.5, causal=True), ("up", "up", "up")),
            Node("one", L.Linear(4, 4), ("mixed",)), Node("two", L.Linear(4, 4), ("mixed",)),
            Node("sum", L.Add(), ("one", "two")), Node("cut", FIRST, ("sum",)),
        ), ["mixed"],
    ),
    "turned in itself": (
        stack(
            Node("up", L.Linear(4, 3), ("embed",)), Node("turned", L.Permute((0, 2, 1)), ("up",)),
            Node("sum", L.Add(), ("up", "turned")), Node("cut", FIRST, ("sum",)), classes=3,
        ), [],
    ),
    "broadcast": (
        stack(
            Node("table", L.Parameter((1, 4), std=1.0)), UP, Node("sum", L.Add(), ("up", "table")),
            Node("cut", FIRST, ("sum",)),
        ), ["x"],
    ),
    "another table row for each": (
        stack(
            Node("table", L.Parameter((3, 4), std=1.0)), UP, Node("sum", L.Add(), ("up", "table")),
            Node("cut", FIRST, ("sum",)),
        ), ["x", "table"],
    ),
    "normalized over all": (
        stack(
            UP, Node("norm", L.LayerNorm((3, 4), elementwise_affine=False), ("up",)), Node("cut", FIRST, ("norm",)),
        ), [],
    ),
    "a slope for each": (
        stack(UP, Node("prelu", L.PReLU(3), ("up",)), Node("cut", FIRST, ("prelu",))), [],
    ),
    "behind another slice": (
        stack(UP, Node("some", L.Slice(2, 0, 3), ("up",)), Node("cut", FIRST, ("some",)), classes=3), [],
    ),
    "one after the other": (
        stack(
            UP, Node("some", L.Slice(1, 0, 2), ("up",)), Node("on", L.Linear(4, 4), ("some",)),
            Node("cut", FIRST, ("on",)),
        ), ["x", "some"],
    ),
}  # fmt: skip

# A network, and what is written over its input, fused, in parts, or no norm any more.
LEAN: dict[str, tuple[Spec, list[str]]] = {
    "norm before": (classifier(SAME, L.MaxPool2d(1), NORM, L.ReLU(), SAME, channels=4), ["BatchNorm2d", "ReLU"]),
    "tracked instance norm": (
        classifier(L.MaxPool2d(1), L.InstanceNorm2d(4, track_running_stats=True), channels=4), ["InstanceNorm2d"],
    ),
    "untracked": (classifier(L.BatchNorm2d(4, track_running_stats=False), channels=4), []),
    "rectified": (classifier(SAME, L.ReLU(), SAME, L.ReLU6(), channels=4), ["ReLU", "ReLU6"]),
    "not behind a gate": (classifier(L.ReLU(), channels=4), []),
    "needed by its derivative": (classifier(SAME, L.SiLU(), channels=4), []),
    "added": (classifier(residual(SAME), L.ReLU(), channels=4), ["Add", "ReLU"]),
    "added to what was rectified": (classifier(residual(serial(SAME, L.ReLU())), channels=4), ["ReLU"]),
    "added to a rectified other": (
        after_conv(
            Node("other", SAME, ("x",)), Node("relu", L.ReLU(), ("other",)), Node("sum", L.Add(), ("relu", "conv")),
        ), ["ReLU", "Add"],
    ),
    "three added": (
        after_conv(
            Node("a", SAME, ("x",)), Node("b", SAME, ("x",)), Node("sum", L.Add(), ("a", "conv", "b")),
        ), ["Add"],
    ),
    "used by another": (
        after_conv(Node("relu", L.ReLU(), ("conv",)), Node("sum", L.Add(), ("relu", "conv"))), [],
    ),
    "added to itself": (after_conv(Node("sum", L.Add(), ("conv", "conv"))), []),
    "one summand": (
        after_conv(
            Node("same", L.Add(), ("x",)), Node("relu", L.ReLU(), ("same",)),
            Node("sum", L.Add(), ("relu", "conv")),
        ), ["Add"],
    ),
    "broadcast": (
        after_conv(
            Node("pool", L.AdaptiveAvgPool2d(1), ("x",)), Node("small", L.Conv2d(4, 4, 1), ("pool",)),
            Node("sum", L.Add(), ("small", "x")), Node("all", L.Add(), ("sum", "conv")),
        ), ["Add", "Add"],
    ),
    "broadcast and read": (
        after_conv(
            Node("pool", L.AdaptiveAvgPool2d(1), ("x",)), Node("small", L.Conv2d(4, 4, 1), ("pool",)),
            Node("sum", L.Add(), ("small", "conv")),
        ), ["Add"],
    ),
    "a view between": (
        classifier(SAME, L.Identity(), L.ReLU(), channels=4), [],
    ),
    "attention": (attention(), ["ScaledDotProduct"]),
    "causal attention": (attention(causal=True), ["ScaledDotProduct"]),
    "masked attention": (attention(masked=(MASK,)), ["ScaledDotProduct"]),
    "masked and causal attention": (attention(causal=True, masked=(MASK,)), ["ScaledDotProduct"]),
    "attention masked by itself": (
        attention(masked=(Node("low", L.Linear(4, 3), ("embed",)), Node("mask", L.View((1, 1, 3, 3)), ("low",)))),
        [],
    ),
    "rotated": (rotated(), ["ScaledDotProduct", "Add"]),
    "rotated by one angle": (rotated(sin=(1,)), ["ScaledDotProduct", "Add"]),
    "halves in their order": (rotated(("low", "neg")), ["ScaledDotProduct"]),
    "rotated and used between": (rotated(also="by_cos"), ["ScaledDotProduct"]),
    "layer norms": (activated(L.LayerNorm(6)), []),
    "layer norms without bias": (activated(L.LayerNorm(6, bias=False)), []),
    "layer norms without parameters": (activated(L.LayerNorm(6, elementwise_affine=False)), []),
    "layer norm of two axes": (
        serial(
            Input((3, 4)), L.Linear(4, 4), L.LayerNorm((3, 4)), L.Linear(4, 4), L.Flatten(), L.Linear(12, 2),
        ), [],
    ),
    "rectified tokens": (activated(L.ReLU()), []),
    "gelu": (activated(L.GELU()), []),
    "gelu by tanh": (activated(L.GELU("tanh")), []),
    "silu": (activated(L.SiLU()), []),
    "mish": (activated(L.Mish()), []),
    "hardswish": (activated(L.Hardswish()), []),
    "softplus": (activated(L.Softplus(2.0)), []),
    "two parts": (parts((0, 1), (1, 4)), ["Slice"] * 2),
    "parts with gaps, in any order": (parts((3, 4), (1, 2)), ["Slice"] * 2),
    "slices that overlap": (parts((0, 2), (1, 4)), []),
    "slices of two axes": (parts((0, 2), (2, 4), dims=(1, 2)), []),
    "one slice": (parts((0, 2)), []),
    "slices and the whole": (parts((0, 2), (2, 4), whole=True), []),
    "depthwise": (
        classifier(L.Conv2d(4, 8, 3, padding=1, groups=4), L.ReLU6(), L.Conv2d(8, 3, 1), channels=3), [],
    ),
}  # fmt: skip


class Ramp(tfx.Layer):
    """An activation from outside that can be written over its input: twice what is positive."""

    def signature(self, *shapes):
        return "... -> ..."

    def apply(self, params, *inputs):
        return 2 * inputs[0].clamp(min=0)

    def roles(self):
        return (Pointwise(self._slope, lambda x: x.clamp_(min=0).mul_(2)),)

    def _slope(self, kept, gradient, over):
        slope = 2 * (kept > 0)
        return gradient.mul_(slope) if over else gradient * slope


class OwnConv(L.Conv2d):
    """A convolution from outside."""

    roles = L.Conv2d.roles

    def apply(self, params, *inputs):
        weight = params["weight"].clone(memory_format=torch.preserve_format)
        return F.conv2d(inputs[0], weight, params["bias"], padding=self.padding)


class OwnNorm(L.BatchNorm2d):
    """A norm from outside, and one that states no role, as it computes something else."""

    roles = L.BatchNorm2d.roles

    def apply(self, params, *inputs):
        return super().apply(params, *inputs) + 0


class OtherNorm(L.BatchNorm2d):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs).abs()


class OwnAttention(L.ScaledDotProduct):
    """Attention from outside."""

    roles = L.ScaledDotProduct.roles

    def apply(self, params, *inputs):
        q, k, v = inputs
        return (q @ k.mT * self.scale).softmax(-1) @ v


def replaced(spec: Spec, layer: tfx.Layer) -> Spec:
    """The network with a layer from outside in the place of attention."""
    return replace(spec, nodes=tuple(replace(n, layer=layer) if n.name == "attention" else n for n in spec))


OWN = OwnConv(4, 4, 3, padding=1)
OUTSIDE: dict[str, tuple[Spec, list[str]]] = {
    "activation": (classifier(SAME, Ramp(), SAME, channels=4), ["Ramp"]),
    "convolution": (classifier(OWN, L.ReLU(), OWN, residual(OWN), channels=4), ["ReLU", "Add"]),
    "norm": (classifier(L.MaxPool2d(1), OwnNorm(4), channels=4), ["OwnNorm"]),
    "norm that computes something else": (classifier(L.MaxPool2d(1), OtherNorm(4), channels=4), []),
    "attention": (replaced(attention(), OwnAttention(0.5)), ["OwnAttention"]),
}
"""Layers from outside that state roles are treated like ours."""

LEAN |= {f"{name} from outside": case for name, case in OUTSIDE.items()}


def copied(net):
    params, spec = lean(net.params, net.coupling)
    return params, spec, tfx.couple(params, spec)


def pinned(law):
    for spec in (*CONSTRUCTS.values(), *(spec for spec, _ in (*LEAN.values(), *UNUSED.values()))):
        law = example(network(spec))(law)
    return given(networks())(law)


@pytest.mark.parametrize("name", LEAN)
def test_what_can_be_lean_is(name):
    spec, changed = LEAN[name]
    net = network(spec)
    _, small, _ = copied(net)
    was = {node.name: type(node.layer).__name__ for node in spec}
    kinds = ("Over", "Scale", "Fused", "Part", "Rotary")
    changes = Counter(was[node.name] for node in small if type(node.layer).__name__ in kinds)
    assert changes == Counter(changed)


@pytest.mark.parametrize("name", UNUSED)
def test_slices_are_taken_as_early_as_they_can_be(name):
    spec, where = UNUSED[name]
    net = network(spec)
    slices = [node for node in copied(net)[1] if isinstance(node.layer, Only)]
    assert sorted(node.inputs[0] for node in slices) == sorted(where)


def test_what_is_given_out_is_used():
    nodes = stack(UP, Node("cut", FIRST, ("up",))).nodes
    net = network(Spec(nodes, ("up", "head")))
    assert copied(net)[1] == net.spec


@pytest.mark.parametrize("moments", [False, True])
def test_positions_are_those_of_the_batch(moments):
    """All are counted where they are averaged, also where there are more than declared."""
    spec = UNUSED["one token"][0]
    net = network(spec)
    x, y = torch.randn(5, 7, 4, dtype=torch.float64), torch.arange(5) % 2
    computed, expected = (
        tfx.derivatives(net.params, spec, x, y, net.coupling, fold=fold, moments=moments) for fold in (True, False)
    )
    assert_close(computed[:3], expected[:3], **CLOSE)
    if moments:
        assert_close(vars(computed[3]), vars(expected[3]), **CLOSE)


def test_what_activations_are_measured_from_may_differ_by_position():
    net = network(UNUSED["one token"][0])
    place = next(place for place in net.coupling.reads if place.node == "b.up")
    around = {place.key: torch.randn(1, 3, 4, dtype=torch.float64)}
    computed, expected = (
        tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, fold=fold, around=around)[:3]
        for fold in (True, False)
    )
    assert_close(computed, expected, **CLOSE)


@pinned
def test_a_lean_copy_has_the_same_derivatives(net):
    """Called itself, as `measure` would take the network where its copy fails."""
    expected = tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, fold=False, channels_last=False)
    assert_close(tfx.derivatives(net.params, net.spec, *net.batch, net.coupling)[:3], expected[:3], **CLOSE)
    params, spec, coupling = copied(net)
    if coupling.names == net.coupling.names:  # otherwise a norm that is gone alone tied them, or other layers name them
        computed = tfx.derivatives(params, spec, *net.batch, coupling, fold=False)
        assert_close(computed[:3], expected[:3], **CLOSE)


@given(st.integers(1, 40), *[st.integers(1, 3)] * 3, st.booleans(), st.sampled_from([(0, 1, 2, 3), (0, 2, 1, 3)]))
def test_a_rotation_in_pieces_is_its_formula(piece, heads, t, half, one_angle, order):
    """Value and derivative, in every order of memory; every position may have the same angle."""
    generator = torch.Generator().manual_seed(0)
    sizes = (2, heads, t, 2 * half)
    x = torch.randn([sizes[k] for k in order], dtype=torch.float64, generator=generator).permute(order)
    cos, sin = (torch.randn(1 if one_angle else t, 2 * half, dtype=torch.float64, generator=generator) for _ in "cs")

    def formula(x):
        one, other = x[..., :half], x[..., half:]
        return x * cos + torch.cat([-other, one], -1) * sin

    with patch.object(rotary, "PIECE", piece):
        computed, pull = torch.func.vjp(lambda x: rotary.Rotary(L.Add()).apply({}, x, cos, sin), x)
        (by_x,) = pull(x.flip(-1))
    expected, pull = torch.func.vjp(formula, x)
    assert_close((computed, by_x), (expected, *pull(x.flip(-1))), **CLOSE)


def at_the_gates(params, spec, net):
    """What the network gives out, and for every place what is read and the derivative of a number by its gate.

    Torch differentiates by gates that multiply what is read: nothing of scoring takes part.
    """
    values = {(place.node, place.slot): None for place in net.coupling.reads}
    gates = {p.key: torch.ones(p.units.shape[1], *[1] * (len(p.shape) - 1 - p.axis)) for p in net.coupling.reads}
    gates = {key: gate.double() for key, gate in gates.items()}

    def number(gates):
        apply_gates = gating(gates)

        def tap(name, slot, x):
            if (name, slot) in values:
                values[name, slot] = x.detach().clone()
            return apply_gates(name, slot, x)

        outputs, _ = evaluate(params, spec, (net.batch[0],), tap=tap)
        flat = torch.cat([x.reshape(-1) for x in optree.tree_leaves(outputs)])
        return flat @ torch.linspace(1, 2, len(flat), dtype=flat.dtype), outputs

    _, pull, outputs = torch.func.vjp(number, gates, has_aux=True)
    (slopes,) = pull(torch.ones((), dtype=torch.float64))
    return outputs, values, slopes


@pinned
def test_every_pass_alone_keeps_what_is_given_out_and_read_and_its_derivatives(net):
    draft = Draft.of(net.params, net.coupling)
    outputs, read, slopes = at_the_gates(draft.params, draft.spec, net)
    for rewrite in PASSES:
        rewritten = rewrite(draft)
        new_outputs, new_read, new_slopes = at_the_gates(rewritten.params, rewritten.spec, net)
        assert_close(new_outputs, outputs, **CLOSE)
        assert_close(new_slopes, slopes, **CLOSE)
        if rewrite is not unused_positions:  # of which the others are kept
            assert_close(new_read, read, **CLOSE)


@given(networks(specs()))
@example(network(CONSTRUCTS["chain"]))
@example(network(CONSTRUCTS["dense"]))
def test_derivatives_are_the_same_in_channels_last(net):
    computed, expected = (
        tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, channels_last=last)[:3]
        for last in (True, False)
    )
    assert_close(computed, expected, **CLOSE)


@pytest.mark.parametrize(("channels_last", "expected"), [(None, True), (True, True), (False, False)])
def test_images_are_laid_out_as_asked(channels_last, expected, monkeypatch):
    seen = []
    monkeypatch.setattr(
        taps,
        "contract",
        lambda x, y, axes, *rest: (seen.append(x.stride()[1] == 1), torch.ones(len(x), x.shape[axes[0]]))[1],
    )
    net = network(classifier(SAME, L.ReLU(), SAME, channels=4))
    tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, channels_last=channels_last)
    assert seen[-1] is expected


def test_what_several_layers_read_the_same_way_is_tapped_once(monkeypatch):
    made, contract = [], taps.contract
    monkeypatch.setattr(taps, "contract", lambda x, y, axes, *rest: (made.append(axes), contract(x, y, axes, *rest))[1])
    net = network(CONSTRUCTS["multi-head"])
    tfx.derivatives(net.params, net.spec, *net.batch, net.coupling)
    spec = copied(net)[1]
    values = Counter((spec[p.node].inputs[p.slot], p.axis) for p in net.coupling.reads)
    assert len(net.coupling.reads) > len(values) == len(made)


class Live(TorchDispatchMode):
    """The most bytes that lived at a time, of all that is made while it is on."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in optree.tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.made = {key: (ref, size) for key, (ref, size) in self.made.items() if not ref.expired()}
        self.peak = max(self.peak, sum(size for _, size in self.made.values()))
        return result


def tokens(*layers: tfx.Layer, depth: int) -> Spec:
    body = [layer for _ in range(depth) for layer in (*layers, L.Linear(16, 16))]
    return serial(Input((64, 16)), L.Linear(16, 16), *body, L.Flatten(), L.Linear(1024, 2))


@pytest.mark.parametrize(("layers", "kept"), [
    ((L.GELU(),), 1), ((L.LayerNorm(16),), 1), ((L.LayerNorm(16), L.Linear(16, 16), L.GELU()), 2), ((), 1),
])  # fmt: skip
def test_one_tensor_is_kept_for_each_linear_layer(layers, kept):
    """What it reads, or what that is made from; gradients are let go as soon as they were used."""
    peaks = []
    for depth in (4, 12):
        net = network(tokens(*layers, depth=depth))
        with Live() as live:
            tfx.derivatives(net.params, net.spec, *net.batch, net.coupling)
        peaks.append(live.peak)
    one = 3 * 64 * 16 * 8  # examples, positions, channels, bytes
    assert peaks[1] - peaks[0] < (kept + 0.5) * 8 * one


def test_transposed_tokens_take_one_product():
    """Of positions that cannot be joined torch would make a batch of products, each with a weight of its own."""
    x = torch.randn(3, 5, 4, dtype=torch.float64)
    layer = L.Linear(4, 6)
    params = {"weight": torch.randn(6, 4, dtype=torch.float64), "bias": torch.randn(6, dtype=torch.float64)}
    with torch.profiler.profile() as profile:
        torch.func.vjp(lambda x: layer.apply(params, x.transpose(0, 1)), x)[1](torch.ones(5, 3, 6, dtype=torch.float64))
    assert "aten::bmm" not in {event.key for event in profile.key_averages()}


def cast(tree, dtype):
    return {
        name: cast(x, dtype) if isinstance(x, dict) else x.to(dtype) if x.is_floating_point() else x
        for name, x in tree.items()
    }


def scores(net, dtype, rounded=torch.float64):
    """The scores in one precision, of parameters and inputs that were rounded to another."""
    params, inputs = (cast(cast(tree, rounded), dtype) for tree in (net.params, net.batch[0]))
    stats = tfx.measure(params, net.spec, (inputs, net.batch[1]), net.coupling)
    assert stats.sum_abs.dtype == torch.promote_types(dtype, torch.float32)
    return tfx.taylor(stats, net.coupling).double()


@given(networks().filter(lambda net: len(net.coupling)))
@example(network(CONSTRUCTS["chain"]))
@example(network(CONSTRUCTS["layer norm"]))
@example(network(CONSTRUCTS["excitation"]))
def test_single_precision_ranks_as_double_up_to_ties(net):
    """Scores tie that differ by less than a ten-thousandth of the largest."""
    single, double = scores(net, torch.float32, torch.float32), scores(net, torch.float64, torch.float32)
    tie = 1e-4 * double.max() + 1e-12
    above = double[:, None] > double + tie
    assert (single[:, None] > single)[above].all()


def amplifying(net):
    """Norms over the few positions of an example make much of little."""
    return any(isinstance(node.layer, (L.InstanceNorm2d, L.GroupNorm)) for node in net.spec)


def smooth(spec):
    """Without kinks, beyond which low precision takes some activations, and then derivatives anywhere."""
    layers = {node.name: node.layer for node in spec}
    for name, layer in layers.items():
        if isinstance(layer, (L.ReLU, L.LeakyReLU, L.PReLU)):
            layers[name] = L.Tanh()
        elif isinstance(layer, L.MaxPool2d):
            layers[name] = L.AvgPool2d(layer.kernel_size, layer.stride, layer.padding)
    return replace(spec, nodes=tuple(replace(node, layer=layers[node.name]) for node in spec))


LOW = 0.1
"""What bfloat16, of 0.004, may make of the norm of all scores."""

SMOOTH = networks(st.one_of(specs(), token_specs()).map(smooth)).filter(lambda net: not amplifying(net))


@given(SMOOTH)
@example(network(CONSTRUCTS["chain"]))
@example(network(CONSTRUCTS["layer norm"]))
@example(network(CONSTRUCTS["excitation"]))
def test_bfloat16_is_near_single_precision(net):
    low, single = scores(net, torch.bfloat16, torch.bfloat16), scores(net, torch.float32, torch.bfloat16)
    assert (low - single).norm() <= LOW * single.norm() + 1e-3


@given(SMOOTH)
@example(network(CONSTRUCTS["chain"]))
@example(network(CONSTRUCTS["residual stream"]))
def test_under_autocast_sums_are_single_precision(net):
    single = scores(net, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        low = scores(net, torch.float32)
    assert (low - single).norm() <= LOW * single.norm() + 1e-3


class Crossings(TorchDispatchMode):
    """Counts what a device is waited for: copies from the host to it. Values are not there to be looked at."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        found = {x.device.type for x in optree.tree_leaves((args, result)) if isinstance(x, torch.Tensor) and x.ndim}
        self.count += len(found) > 1
        return result


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("name", ["chain", "projection", "grouped", "multi-head", "dense"])
def test_nothing_waits_for_the_device_between_batches(name, moments):
    """On ``meta`` all operators run but those that look at values, as the last check, for finite losses, does."""
    net = network(CONSTRUCTS[name])
    params, batch = optree.tree_map(lambda x: x.to("meta"), (net.params, net.batch))
    counts = []

    def batches():
        for _ in range(3):
            counts.append(crossings.count)
            yield batch
        counts.append(crossings.count)

    with Crossings() as crossings, pytest.raises((NotImplementedError, RuntimeError), match=r"(?i)meta"):
        tfx.measure(params, net.spec, batches(), net.coupling, moments=moments)
    assert len(counts) == 4
    assert len({*counts}) == 1

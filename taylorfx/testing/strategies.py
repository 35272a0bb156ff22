"""Random networks and plans for tests, ours and our users': strategies of hypothesis.

Everything is drawn by hypothesis, so that a failure shrinks to a small network. Tensors come from a seed that is drawn.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from taylorfx import layers as L
from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.layers import Input, Layer
from taylorfx.network.build import concat, inline, multihead_attention, residual, serial
from taylorfx.network.parameters import init
from taylorfx.network.spec import Node, Spec
from taylorfx.scoring.batches import Batch
from taylorfx.tree import Params, flatten, unflatten

__all__ = [
    "Network",
    "batch_for",
    "homogeneous_specs",
    "network",
    "networks",
    "plans",
    "random_params",
    "random_plan",
    "specs",
    "token_specs",
    "trunks",
]


Part = Layer | Spec


class Network(NamedTuple):
    """A network with parameters and a batch to run it on."""

    spec: Spec
    params: Params
    batch: Batch
    coupling: Coupling

    def __repr__(self) -> str:
        return f"Network of\n{self.spec}\n"


def random_params(spec: Spec, generator: torch.Generator, dtype: torch.dtype = torch.float64) -> Params:
    """Random parameters, none of them exactly zero or one, and with positive running variances.

    With the parameters of `init`, a test would miss the loss of a bias of zero or of a weight of one.
    """
    leaves: dict[str, Tensor] = {}
    for path, leaf in flatten(init(spec, generator, dtype=dtype)).items():
        noise = torch.rand(leaf.shape, generator=generator, dtype=dtype)
        if path.endswith("running_var"):
            leaf = 0.5 + noise
        elif leaf.is_floating_point():
            leaf = leaf + 0.4 * (noise - 0.5)
        leaves[path] = leaf
    return unflatten(leaves)


def batch_for(spec: Spec, generator: torch.Generator, count: int = 3) -> Batch:
    """Random inputs of the declared shapes (integers for an `Embedding`), and random classes out of two as targets."""
    inputs: dict[str, Tensor] = {}
    for node in spec.inputs:
        assert isinstance(node.layer, Input)
        assert isinstance(node.layer.shape, tuple), "the input has no declared shape"
        shape = node.layer.shape
        readers = [n.layer for n in spec.nodes if node.name in n.inputs]
        tables = [r.num_embeddings for r in readers if isinstance(r, L.Embedding)]
        if tables:
            inputs[node.name] = torch.randint(min(tables), (count, *shape), generator=generator)
        else:
            inputs[node.name] = torch.randn(count, *shape, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(2, (count,), generator=generator)


def random_plan(coupling: Coupling, generator: torch.Generator, share: float = 0.5, *, exact: bool = False) -> Plan:
    """A plan that removes about ``share`` of the units at random, but no axis as a whole.

    With ``exact`` it removes exact units only.
    """
    keep = (torch.rand(len(coupling), generator=generator) >= share).numpy()
    if exact:
        keep |= ~coupling.exact
    alive = coupling.alive(keep)
    while not all(mask.any() for mask in alive):
        for axis, mask in zip(coupling.axes, alive, strict=True):
            if not mask.any():
                position = int(torch.randint(axis.shape[1], (), generator=generator))
                keep[axis[:, position][axis[:, position] >= 0]] = True
        alive = coupling.alive(keep)
    return Plan(coupling, keep)


# Random networks.


def _conv_block(draw: st.DrawFn, channels: int, homogeneous: bool) -> tuple[Part, int]:
    """A random part that keeps the spatial size, and the number of channels of its output."""
    kinds = ["plain", "residual", "parallel", "nested", "projected", "dense", "branches", "grouped", "depthwise"]
    kinds += ["pool"]
    if not homogeneous:
        kinds += ["norm", "groupnorm", "excite", "shuffle", "slices", "transposed", "shared", "pixels"]
    kind = draw(st.sampled_from(kinds))
    width = draw(st.sampled_from([2, 3, 4, 6]))
    acts = [L.ReLU(), L.LeakyReLU(0.1)] if homogeneous else [L.ReLU(), L.GELU(), L.Sigmoid(), L.PReLU(), L.Tanh()]
    act = draw(st.sampled_from(acts))
    bias = draw(st.booleans())
    if homogeneous and kind in ("grouped", "depthwise"):
        bias = False  # this convolution lies between a write and a read, where a bias is not homogeneous
    same = L.Conv2d(channels, channels, 3, padding=1, bias=bias)
    if kind == "plain":
        return serial(L.Conv2d(channels, width, draw(st.sampled_from([1, 3])), padding="same", bias=bias), act), width
    if kind in ("residual", "parallel", "nested"):
        inner = serial(L.Conv2d(channels, width, 3, padding=1), act, L.Conv2d(width, channels, 1, bias=bias))
        bodies = {"parallel": serial(residual(inner, same)), "nested": serial(residual(inner), same)}
        return serial(residual(bodies.get(kind, inner)), act), channels
    if kind == "projected":
        body = serial(L.Conv2d(channels, width, 3, padding=1), act)
        return residual(body, L.Conv2d(channels, width, 1, bias=bias)), width
    if kind == "dense":
        return concat(serial(), serial(L.Conv2d(channels, width, 3, padding=1), act)), channels + width
    if kind == "branches":
        return concat(L.Conv2d(channels, width, 1), serial(act, L.Conv2d(channels, 2, 3, padding=1))), width + 2
    if kind == "grouped":
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        return serial(L.Conv2d(channels, 2 * groups, 3, padding=1, groups=groups, bias=bias), act), 2 * groups
    if kind == "depthwise":
        wide = channels * draw(st.sampled_from([1, 2]))
        return L.Conv2d(channels, wide, 3, padding=1, groups=channels, bias=bias), wide
    if kind == "pool":
        return L.AvgPool2d(3, 1, 1) if draw(st.booleans()) else L.MaxPool2d(3, 1, 1), channels
    if kind == "norm":
        norm = draw(st.sampled_from([L.BatchNorm2d(width), L.InstanceNorm2d(width, affine=True), L.PReLU(width)]))
        return serial(L.Conv2d(channels, width, 3, padding=1, bias=bias), norm, act), width
    if kind == "groupnorm":
        groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
        return serial(same, L.GroupNorm(groups, channels)), channels
    if kind == "excite":
        squeeze, excite = L.Conv2d(channels, width, 1), L.Conv2d(width, channels, 1)
        gate = serial(L.AdaptiveAvgPool2d(1), squeeze, act, excite, L.Sigmoid())
        nodes = [Node("x", Input()), *inline(gate, "gate", ("x",))]
        return Spec((*nodes, Node("scale", L.Multiply(), ("x", nodes[-1].name)))), channels
    if kind == "shuffle":
        groups = draw(st.sampled_from([g for g in (1, 2, 3) if channels % g == 0]))
        return serial(same, L.ChannelShuffle(groups)), channels
    if kind == "slices":
        at = draw(st.integers(1, channels - 1))
        nodes = [Node("x", Input()), Node("a", L.Slice(1, 0, at), ("x",)), Node("b", L.Slice(1, at, channels), ("x",))]
        nodes += [Node("conv", L.Conv2d(at, at, 1), ("a",)), Node("joint", L.Concat(), ("b", "conv"))]
        return Spec(tuple(nodes)), channels
    if kind == "transposed":
        groups = draw(st.sampled_from([g for g in (1, 2) if channels % g == 0]))
        return L.ConvTranspose2d(channels, 2 * groups, 3, padding=1, groups=groups, bias=bias), 2 * groups
    if kind == "shared":
        nodes = [Node("x", Input()), Node("one", same, ("x",), "tied"), Node("act", act, ("one",))]
        return Spec((*nodes, Node("two", same, ("act",), "tied"))), channels
    assert kind == "pixels"
    return serial(L.Conv2d(channels, 4 * width, 1), L.PixelShuffle(2), L.AvgPool2d(2)), width


def _trunk(draw: st.DrawFn, homogeneous: bool) -> tuple[list[Part], int, int]:
    """A random network that gives out maps: its parts, the number of maps and their height and width."""
    channels, size = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([3, 4]))
    first = draw(st.sampled_from([2, 4, 6]))
    parts: list[Part] = [Input((channels, size, size)), L.Conv2d(channels, first, 3, padding=1)]
    channels = first
    for _ in range(draw(st.integers(1, 4))):
        part, channels = _conv_block(draw, channels, homogeneous)
        parts.append(part)
    return parts, channels, size


def _specs(draw: st.DrawFn, homogeneous: bool) -> Spec:
    parts, channels, size = _trunk(draw, homogeneous)
    if draw(st.booleans()):
        parts.append(L.AdaptiveAvgPool2d(1))
        size = 1
    parts.append(L.Flatten())
    features = channels * size * size
    if draw(st.booleans()):
        hidden = draw(st.sampled_from([3, 5]))
        parts += [L.Linear(features, hidden), L.ReLU()]
        features = hidden
    return serial(*parts, L.Linear(features, 2))


@st.composite
def specs(draw: st.DrawFn) -> Spec:
    """Random convolutional classifiers of two classes, with every construct that the library knows."""
    return _specs(draw, homogeneous=False)


@st.composite
def homogeneous_specs(draw: st.DrawFn) -> Spec:
    """Random networks in which all layers between a write and a read are positively homogeneous."""
    return _specs(draw, homogeneous=True)


@st.composite
def trunks(draw: st.DrawFn) -> Spec:
    """Random convolutional networks without a head: they take images of any size, and give out maps of that size."""
    return serial(*_trunk(draw, homogeneous=False)[0])


@st.composite
def token_specs(draw: st.DrawFn, *, any_length: bool = False) -> Spec:
    """Random transformers, with embeddings, positions, class token, grouped queries, gated units and layer scale.

    Attention and MLP stand one after the other, or are added to each other first.

    Args:
        any_length: of those that take texts of every length, the first token alone is classified.
    """
    length, width = draw(st.sampled_from([2, 3])), draw(st.sampled_from([3, 4]))
    nodes = [Node("tokens", Input((length,))), Node("embed", L.Embedding(5, width), ("tokens",))]
    last = "embed"

    def add(name: str, part: Part, *inputs: str) -> str:
        added = inline(part, name, inputs)
        nodes.extend(added)
        return added[-1].name

    if not any_length and draw(st.booleans()):
        add("position", L.Parameter((length, width), std=0.5))
        last = add("placed", L.Add(), last, "position")
    if draw(st.booleans()):
        add("cls", L.Parameter((1, width), std=0.5, expand=True), "tokens")
        last = add("joined", L.Concat(), "cls", last)
        length += 1
    norms = [L.LayerNorm(width), L.RMSNorm(width), L.Identity()]
    for k in range(draw(st.integers(1, 2))):
        heads, kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 2)]))
        attention = multihead_attention(
            width, heads, num_kv_heads=kv_heads, head_dim=draw(st.sampled_from([1, 2])), causal=draw(st.booleans())
        )
        body: Part = serial(draw(st.sampled_from(norms)), attention)
        order = draw(st.sampled_from(["one after the other", "skip first", "skip last"]))
        if draw(st.booleans()):
            scaled = [*inline(body, "body", ("x",)), Node("gamma", L.Parameter(width, std=1.0))]
            body = Spec((Node("x", Input()), *scaled, Node("scaled", L.Multiply(), (scaled[-2].name, "gamma"))))
        skip = last
        last = add(f"attn{k}", residual(body) if order == "one after the other" else body, skip)
        hidden = draw(st.sampled_from([2, 3]))
        if draw(st.booleans()):
            mlp = serial(draw(st.sampled_from(norms)), L.Linear(width, hidden), L.GELU(), L.Linear(hidden, width))
        else:
            up = [Node("x", Input()), Node("up", L.Linear(width, 2 * hidden), ("x",))]
            up += [Node("a", L.Slice(2, 0, hidden), ("up",)), Node("b", L.Slice(2, hidden, 2 * hidden), ("up",))]
            up += [Node("act", L.SiLU(), ("a",)), Node("gated", L.Multiply(), ("act", "b"))]
            mlp = serial(Spec((*up, Node("down", L.Linear(hidden, width), ("gated",)))))
        if order == "one after the other":
            last = add(f"mlp{k}", residual(mlp), last)
        else:
            both = add(f"both{k}", L.Add(), last, add(f"mlp{k}", mlp, skip))
            last = add(f"sum{k}", L.Add(), *((skip, both) if order == "skip first" else (both, skip)))
    if any_length or draw(st.booleans()):
        last = add("first", serial(L.Slice(1, 0, 1), L.Flatten()), last)
        features = width
    else:
        last = add("flat", L.Flatten(), last)
        features = length * width
    add("head", L.Linear(features, 2), last)
    return Spec(tuple(nodes), ("head",))


@st.composite
def networks(
    draw: st.DrawFn, kinds: st.SearchStrategy[Spec] | None = None, *, branches: bool | None = False
) -> Network:
    """A random spec with random parameters and a random batch, in float64, coupled.

    Args:
        kinds: the strategy for the spec; by default `specs` or `token_specs`.
        branches: whether residual branches are units, too; ``None`` for some of the networks.
    """
    spec = draw(st.one_of(specs(), token_specs()) if kinds is None else kinds)
    seed = draw(st.integers(0, 2**16))
    return network(spec, seed, branches=draw(st.booleans()) if branches is None else branches)


def network(spec: Spec, seed: int = 0, *, branches: bool = False) -> Network:
    """A spec with random parameters and a random batch, in float64, coupled, with its branches as units if asked."""
    generator = torch.Generator().manual_seed(seed)
    params = random_params(spec, generator)
    return Network(spec, params, batch_for(spec, generator), couple(params, spec, branches=branches))


@st.composite
def plans(draw: st.DrawFn, coupling: Coupling, *, exact: bool = False) -> Plan:
    """A random plan that removes no axis as a whole; with ``exact`` only exact units."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    return random_plan(coupling, generator, draw(st.sampled_from([0.2, 0.5, 0.9])), exact=exact)

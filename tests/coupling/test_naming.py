"""Naming: the scopes of a captured module say what they are, at all sizes and after a cut; and printing by roles."""

import functools
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from modules import MODULES, captured
from torch import nn

import taylorfx as tfx
from taylorfx import Input, serial
from taylorfx import layers as L
from taylorfx.testing.strategies import network


class Attention(nn.Module):
    """Queries, keys and values of two heads each; with ``groups`` two query heads for every one of keys."""

    def __init__(self, width: int, groups: int = 1) -> None:
        super().__init__()
        self.groups = groups
        self.q_proj = nn.Linear(width, 2 * groups * 4)
        self.k_proj, self.v_proj = nn.Linear(width, 2 * 4), nn.Linear(width, 2 * 5)
        self.o_proj = nn.Linear(2 * groups * 5, width)

    def forward(self, x):
        q = self.q_proj(x).unflatten(-1, (2 * self.groups, 4)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.groups > 1)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """One layer for queries, keys and values, and a product of matrices written out."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * 8), nn.Linear(8, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind()
        return self.out((torch.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v).transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(width, 6), nn.Linear(width, 6), nn.Linear(6, width)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.attn, self.mlp = nn.LayerNorm(width), attention, Gated(width)

    def forward(self, x):
        x = x + self.attn(self.norm(x))
        return x + self.mlp(x)


class Language(nn.Module):
    def __init__(self, attention, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.layers = nn.ModuleList(Block(8, attention(8)) for _ in range(blocks))
        self.head = nn.Linear(8, 20)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.layers:
            x = block(x)
        return self.head(x)


class Residual(nn.Module):
    def __init__(self, inside: int, outside: int, groups: int = 1) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(outside, inside, 1), nn.Conv2d(inside, outside, 3, padding=1, groups=groups)

    def forward(self, x):
        return x + self.conv2(self.conv1(x).relu())


class Images(nn.Module):
    """Two stages, each with a stream of its own, and a classifier of two layers."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3)
        self.stage1 = nn.Sequential(Residual(6, 4, groups), Residual(6, 4))
        self.stage2 = nn.Sequential(nn.Conv2d(4, 8, 3, 2), Residual(6, 8), Residual(6, 8))
        self.classifier = nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 2))

    def forward(self, x):
        return self.classifier(self.stage2(self.stage1(self.stem(x))).mean((2, 3)))


def tokens(length):
    return torch.randint(20, (2, length))


def images(size):
    return torch.randn(2, 3, size, size + 1)


CASES = {
    "attention": (lambda: Language(Attention), tokens, [": heads", ": query/key dims", ": value dims"]),
    "grouped queries": (
        lambda: Language(lambda n: Attention(n, 2)),
        tokens,
        [": key/value heads", ": query heads per key/value head", ": query/key dims", ": value dims"],
    ),
    "fused": (lambda: Language(Fused), tokens, [": heads", ": head dims"]),
}


def at_two_sizes(module, example):
    """The scopes of a module, which are the same at two sizes of its example."""
    one, other = (tfx.couple(*tfx.from_torch(module.eval(), example(size))) for size in (12, 19))
    assert one.names == other.names
    assert one.scopes == other.scopes
    assert {*one.frozen} == {*other.frozen}
    assert one.paths == other.paths
    return one.scopes


@pytest.mark.parametrize("name", CASES)
def test_the_axes_of_attention_have_the_names_of_their_roles_at_all_sizes(name):
    make, example, roles = CASES[name]
    scopes = at_two_sizes(make(), example)
    blocks = [f"layers.{k}.{inner}" for k in (0, 1) for inner in (*(f"attn{role}" for role in roles), "mlp: hidden")]
    assert {*scopes} == {"stream", *blocks}


def test_channels_have_the_name_of_the_layer_that_writes_them_alone_and_streams_that_of_their_stage():
    assert at_two_sizes(Images(), images) == (
        *("stream", "stage1.0.conv1", "stage1.1.conv1", "stage2: stream", "stage2.1.conv1", "stage2.2.conv1"),
        *("classifier.0", "classifier.2"),
    )


def test_groups_of_a_convolution_have_a_role():
    coupling = tfx.couple(*tfx.from_torch(Images(2).eval(), images(12)))
    sizes = dict(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))
    assert sizes["stage1.0: channels into each group"] == 3
    assert sizes["stream, groups"] == sizes["stream, channels out of each group"] == 2


@pytest.mark.parametrize("name", MODULES)
def test_names_are_different_and_none_is_that_of_a_numbered_node(name):
    *_, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    assert len({*coupling.scopes}) == len(coupling.scopes)
    assert len({*coupling.names}) == len(coupling)
    modules = {path.rpartition(".")[0] for path in spec.shapes} | {*spec.shapes}
    numbered = {node.name for node in spec if re.search(r"_\d+$", node.name)} - modules
    scopes = {scope.split(": ")[0].split(".")[0] for scope in (*coupling.scopes, *coupling.frozen)}
    assert not scopes & numbered


@pytest.mark.parametrize("name", MODULES)
def test_what_stays_of_a_scope_keeps_its_name(name):
    *_, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    largest = int(coupling.sizes.argmax()) if len(coupling) else 0
    if not len(coupling) or coupling.sizes[largest] < 3:
        return  # a scope that is cut to one unit is none any more, and one group is no group
    second = np.flatnonzero(coupling.scope == largest)[1]
    plan = tfx.Plan(coupling, np.arange(len(coupling)) != second)
    assert {*tfx.couple(tfx.cut(params, plan), plan.spec).scopes} == {*coupling.scopes}


@pytest.mark.parametrize("name", MODULES)
def test_the_parameters_of_a_scope_are_those_that_get_smaller_without_it(name):
    *_, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    for scope, paths in enumerate(coupling.paths):
        smaller = set()
        for unit in np.flatnonzero(coupling.scope == scope).tolist() if coupling.sizes[scope] > 1 else ():
            plan = tfx.Plan(coupling, np.arange(len(coupling)) != unit)
            smaller |= {path for path, axes in plan.indices.items() if any(kept is not None for kept in axes)}
        assert smaller == {*paths} or coupling.sizes[scope] == 1


def test_scopes_of_repeated_blocks_are_one_row():
    module = Language(lambda n: Attention(n, 2), 3).eval()
    long = str(tfx.couple(*tfx.from_torch(module, tokens(5)))).splitlines()
    assert long[0] == f"{8 + 3 * (2 + 2 + 4 + 5 + 6)} units in {1 + 3 * 5} scopes"
    assert len(long) == 12
    (hidden,) = (line.split() for line in long if "mlp: hidden" in line)
    assert hidden == ["layers.*.mlp:", "hidden", "3", "6", f"{3 * (3 * 6 * 8 + 2 * 6)}"]
    (stream,) = (line.split() for line in long if line.startswith("stream"))
    assert stream[1:3] == ["1", "8"]
    assert "inexact" in " ".join(stream)
    assert long[-1] == "head: frozen, head is an output of the network"


def test_frozen_scopes_are_listed_by_reason():
    layers = {f"block{k}": L.Softmax(1) if k % 2 else L.Linear(4, 4) for k in range(6)}
    coupling = network(serial(Input((4,)), **layers, head=L.Linear(4, 2))).coupling
    lines = str(coupling).splitlines()
    assert "block0: frozen, block1: Softmax holds input 0, axis 1 rigid" in lines
    assert "head: frozen, head is an output of the network" in lines


class Copies(nn.Module):
    """Gives out its stream, block by block; with ``final`` also something as wide that no layer consumes."""

    def __init__(self, final=False) -> None:
        super().__init__()
        self.stem, self.head, self.final = nn.Linear(3, 4), nn.Linear(4, 2), final
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x):
        states = [self.stem(x)]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        out = {"logits": self.head(states[-1]), "states": states}
        return {**out, "final": 2 * states[-1]} if self.final else out


def test_a_stream_that_is_frozen_by_copies_alone_says_which_and_leaves_without_them():
    module, x = Copies().eval(), torch.randn(2, 3)
    coupling = tfx.couple(*tfx.from_torch(module, x))
    assert coupling.frozen["stream"].endswith("it would not be frozen without states.*: from_torch(..., outputs=...)")
    assert "states" not in coupling.frozen["head"]
    assert "without" not in tfx.couple(*tfx.from_torch(Copies(final=True).eval(), x)).frozen["stream"]
    alone = tfx.couple(*tfx.from_torch(module, x, outputs="logits"))
    assert "stream" in alone.scopes
    assert {*alone.scopes} == {*coupling.scopes, "stream"}


@pytest.mark.parametrize(
    ("glob", "ends"),
    [
        ("*: heads", [": heads"]),
        ("*0.attn.q_proj*", ["0.attn: heads", "0.attn: query/key dims"]),  # what this layer writes
        ("layers.1.*", ["1.attn: heads", "1.attn: query/key dims", "1.attn: value dims", "1.mlp: hidden"]),
        ("layers.0.attn.o_proj.weight", ["0.attn: heads", "0.attn: value dims", "stream"]),  # all that shrinks it
        ("stream", ["stream"]),
        ("head", []),  # frozen
    ],
)
def test_globs_match_scopes_and_the_parameters_that_shrink_with_them(glob, ends):
    coupling = language()
    expected = [scope for scope in coupling.scopes if any(scope.endswith(end) for end in ends)]
    protected = tfx.Constraints(protect=glob).on(coupling).protected
    assert [scope for k, scope in enumerate(coupling.scopes) if protected[coupling.scope == k].all()] == expected
    assert not protected[~np.isin(np.array(coupling.scopes)[coupling.scope], expected)].any()
    floors = tfx.Constraints(floor={glob: 2}).on(coupling).floors
    assert [scope for scope, floor in zip(coupling.scopes, floors, strict=True) if floor == 2] == expected


def test_a_glob_that_matches_nothing_is_refused_with_what_is_near():
    near = (
        r"protect received '\*q_prj\*', which match nothing. Near them are layers.0.attn.q_proj.weight, .* The scopes"
    )
    with pytest.raises(tfx.SelectionError, match=near):
        tfx.Constraints(protect="*q_prj*").on(language())
    with pytest.raises(tfx.SelectionError, match=r"Near them are layers\.0\.mlp: hidden"):
        tfx.Constraints(multiple={"*: hiden": 2}).on(language())


def test_a_glob_that_named_a_scope_does_not_turn_to_parameters_when_the_scope_is_gone():
    params, spec = tfx.from_torch(Images().eval(), images(12))
    whole = tfx.couple(params, spec)
    glob = "classifier.0"
    lasting = tfx.Constraints(floor={"classifier.0*": 1}, multiple={glob: 2}).lasting(whole)
    keep = ~np.isin(whole.names, [f"{glob}[{k}]" for k in range(1, 7)])  # one unit is left, which has to stay
    plan = tfx.Plan(whole, keep)
    after = tfx.couple(tfx.cut(params, plan), plan.spec)
    assert glob not in after.scopes
    assert {*lasting.carried(plan, after).on(after).multiples} == {1}


@functools.cache
def language():
    return tfx.couple(*tfx.from_torch(Language(Attention).eval(), tokens(5)))

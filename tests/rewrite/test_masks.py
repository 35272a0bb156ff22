"""Attention over long sequences: masks are recognized by how they are computed, and no scores are kept."""

import operator
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers.indices import CAUSAL, Condition, Whole, constant, known, unknown
from taylorfx.rewrite.fused import Fused
from taylorfx.rewrite.gated import Gated
from taylorfx.rewrite.lean import lean
from taylorfx.scoring.tap_plan import TapPlan

HEADS, T, S = 4, 12, 15
WINDOW = Whole(((-2, -1), (-1, 1)), 4)  # j > i - 5
LATER = Whole(((-2, 1), (-1, -1)), 1)  # j <= i + 1


def rows(t, start=0):
    return torch.arange(start, start + t)[:, None]


def causal(x, y, padding):
    return torch.arange(y.shape[1]) <= rows(x.shape[1])


def sliding(x, y, padding):
    i, j = rows(x.shape[1]), torch.arange(y.shape[1])
    return (j <= i) & (j > i - 5)


def padded(x, y, padding):
    return padding.bool()[:, None, None, :].expand(-1, 1, x.shape[1], -1)


def looked_up(x, y, padding):
    """As transformers computes it: looked up by the numbers of examples and positions, packed sequences apart."""
    n, s = y.shape[:2]
    positions = torch.arange(s)[None].expand(n, -1)
    packed = (torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    batch = torch.arange(n)[:, None, None, None]
    i, j = rows(x.shape[1])[None, None], torch.arange(s)[None, None, None]
    return (packed[batch, i] == packed[batch, j]) & (positions[batch, j] <= positions[batch, i])


def distances(x, y, padding):
    return (rows(x.shape[1]) - torch.arange(y.shape[1])) % 2 == 0


# The mask; whether the kernel is told that it is causal, the other bounds, how many tensors are left.
FREE = {  # of these no tensor is left that has a number for every pair of positions
    "none": (lambda x, y, padding: None, False, (), 0),
    "causal": (causal, True, (), 0),
    "looked up": (looked_up, True, (), 0),
    "padding": (padded, False, (), 1),
    "causal and padding": (lambda *args: causal(*args) & padded(*args), True, (), 1),
}
SLIDING = {
    "sliding": (sliding, True, (WINDOW,), 0),
    "around": (lambda x, y, padding: torch.arange(y.shape[1]) > rows(x.shape[1]) - 5, False, (WINDOW,), 0),
    "one later": (lambda x, y, padding: torch.arange(y.shape[1]) <= rows(x.shape[1], 1), False, (LATER,), 0),
    "sliding and padding": (lambda *args: padded(*args) & sliding(*args), True, (WINDOW,), 1),
    "distances": (distances, False, (), 1),
}
MASKS = {"free": FREE, "sliding": SLIDING}


class Attends(nn.Module):
    """Attention from ``x`` to ``y`` under one mask after the other, and a gated unit."""

    def __init__(self, masks):
        super().__init__()
        self.masks = masks
        self.embed, self.gate, self.up, self.head = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 3)
        self.maps = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    def forward(self, x, y, padding):
        x, y = self.embed(x), self.embed(y)
        query, key, value, out = self.maps
        for mask in self.masks:
            q, k, v = (f(z).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f, z in ((query, x), (key, y), (value, y)))
            z = F.scaled_dot_product_attention(q, k, v, mask(x, y, padding)).transpose(1, 2).flatten(2)
            x = x + out(z)
        return self.head(F.silu(self.gate(x)) * self.up(x))


def batch(t, s, left):
    """Where tokens are missing at the start, or, as negative numbers, at the end."""
    padding = torch.ones(2, s, dtype=torch.long)
    for k, n in enumerate(left):
        padding[k, : max(n, 0)] = 0
        padding[k, s + min(n, 0) :] = 0
    generator = torch.Generator().manual_seed(0)
    x, y, targets = (torch.randn(2, n, 3, dtype=torch.float64, generator=generator) for n in (t, s, t))
    return (x, y, padding), targets


@lru_cache
def captured(name):
    torch.manual_seed(1)
    module = Attends([mask for mask, *_ in MASKS[name].values()]).eval().double()
    params, spec = tfx.from_torch(module, batch(T, S, (0, 0))[0])
    return module, params, spec, tfx.couple(params, spec)


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_recognized_by_how_they_are_computed(name):
    _, params, _, coupling = captured(name)
    _, copy = lean(params, coupling)
    fused = [node for node in copy if isinstance(node.layer, Fused)]
    found = [(node.layer.causal, node.layer.bounds, len(node.inputs) - 3) for node in fused]
    assert found == [tuple(rest) for _, *rest in MASKS[name].values()]
    assert not {"le", "and", "gt"}.intersection(node.layer.title for node in copy if name == "free")


@pytest.mark.parametrize(("t", "s", "left"), [(T, S, (2, 0)), (T, T, (0, -4)), (7, 9, (3, -1)), (7, 8, (8, 0))])
@pytest.mark.parametrize("name", MASKS)
def test_derivatives_are_those_of_the_module_at_any_size(name, t, s, left):
    """Also where a query may attend to nothing: at the start of a sequence that is padded there, or all padding."""
    module, params, spec, coupling = captured(name)
    inputs, targets = batch(t, s, left)
    fast, plain = (
        tfx.derivatives(params, spec, inputs, targets, coupling, loss=F.mse_loss, fold=fold) for fold in (True, False)
    )
    assert_close(fast.summed, plain.summed, rtol=1e-9, atol=1e-12)
    assert_close(fast.mean, plain.mean, rtol=1e-9, atol=1e-12)
    own = torch.stack([F.mse_loss(a, b) for a, b in zip(module(*inputs), targets, strict=True)])
    assert_close(fast.losses, own.detach())


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor that is made."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.numbers = max(self.numbers, x.untyped_storage().size() // x.element_size())
        return result


@pytest.mark.parametrize(("name", "most"), [("free", 2 * 64 * 8 * 4), ("sliding", 2 * 64 * 64)])
def test_no_tensor_has_a_number_for_every_score(name, most):
    """Nor for every pair of positions, where masks are causal or padding. Nor in the backward pass."""
    _, params, spec, coupling = captured(name)
    sizes = []
    for fold in (True, False):
        with Largest() as largest:
            tfx.derivatives(params, spec, *batch(64, 64, (5, 0)), coupling, loss=F.mse_loss, fold=fold)
        sizes.append(largest.numbers)
    assert sizes[0] <= most < 2 * HEADS * 64 * 64 <= sizes[1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", MASKS)
def test_half_precision_ranks_as_double(name, dtype):
    _, params, spec, coupling = captured(name)
    (x, y, padding), targets = batch(T, S, (2, 0))
    half = tfx.tree.unflatten({path: leaf.to(dtype) for path, leaf in tfx.tree.flatten(params).items()})
    inputs = x.to(dtype), y.to(dtype), padding
    computed = tfx.derivatives(half, spec, inputs, targets.to(dtype), coupling, loss=F.mse_loss).summed
    expected = tfx.derivatives(params, spec, (x, y, padding), targets, coupling, loss=F.mse_loss).summed
    assert computed.dtype == torch.float32
    ranks = [z.abs().sum(0).argsort().argsort().double() for z in (computed, expected)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] >= 0.99


def test_a_gated_unit_keeps_its_factors_and_the_tap_lies_at_one():
    """What is made of them, the activation and the product, is not kept."""
    _, params, _, coupling = captured("free")
    leaves, copy = lean(params, coupling)
    (gated,) = (node for node in copy if isinstance(node.layer, Gated))
    plan = TapPlan.of(leaves, copy, coupling.reads, bounds=coupling.bounds)
    (tap,), (count,) = plan.stops[gated.name, 1].reads, plan.stops["head", 0].reads
    assert (tap.tapped, tap.counted, tap.source) == (True, False, None)
    assert (count.tapped, count.counted, count.place) == (False, True, tap.place)
    assert gated.inputs == ("gate", "up")
    assert not any(node.layer.title == "SiLU" for node in copy)


COMPARED = {"ge": operator.ge, "gt": operator.gt, "le": operator.le, "lt": operator.lt, "eq": operator.eq}
NUMBERS = st.integers(-4, 4)


@settings(max_examples=60)
@given(st.sampled_from(sorted(COMPARED)), *[NUMBERS] * 6, st.integers(2, 5), st.integers(2, 5))
def test_what_is_known_of_a_comparison_is_what_it_gives(name, a, b, c, d, e, f, t, s):
    """Of ``a i + b j + c`` and ``d i + e j + f`` at any size."""
    one, other = (
        Whole((), z).plus(Whole(((-2, 1),)), x).plus(Whole(((-1, 1),)), y) for x, y, z in ((a, b, c), (d, e, f))
    )
    layer = L.Elementwise(f"{name}.Tensor", (("$", 0), ("$", 1)))
    condition = known("mask", layer, [one, other], [(t, s), (t, s)])
    both = torch.ones(t, s, dtype=torch.bool)
    for bound in condition.bounds:
        both = both & (bound.at(t, s) >= 0)
    assert torch.equal(both, COMPARED[name](one.at(t, s), other.at(t, s)).expand(t, s))


def test_what_is_not_followed_is_known_by_its_node():
    class Own(L.Elementwise):
        """A comparison from outside, which may compute something else."""

    i, j, args = Whole(((-2, 1),)), Whole(((-1, 1),)), (("$", 0), ("$", 1))
    assert known("own", Own("le.Tensor", args), [j, i], [(1, 3), (3, 1)]) == unknown("own")
    assert known("mask", L.Elementwise("le.Tensor", args), [j, i], [(1, 3), (3, 1)]) == Condition((CAUSAL,))
    assert known("or", L.Elementwise("__or__.Tensor", args), [Condition((CAUSAL,)), Condition()], []) == unknown("or")
    assert constant("some", torch.tensor(1.0)) == constant("some", torch.ones(2).int()) == unknown("some")

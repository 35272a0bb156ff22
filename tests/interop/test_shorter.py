"""The short form of a size is the same number, at every size."""

import pytest
import sympy
from hypothesis import example, given
from hypothesis import strategies as st
from torch.utils._sympy.functions import FloorDiv, Max, Min, Mod

from taylorfx.interop.capture.shorter import shortened

H, W = (sympy.Symbol(name, positive=True, integer=True) for name in ("h", "w"))


def convolved(n, kernel, stride, *, divide):
    """The size after a convolution that pads by half of its kernel."""
    return divide(n + kernel // 2 * 2 - kernel, stride) + 1


def valid(n, kernel, stride, *, divide):
    return divide(n - kernel, stride) + 1


def same(n, kernel, stride, *, divide, greater=max):
    """After one with TensorFlow's padding, which depends on the size."""
    needed = (divide(n + stride - 1, stride) - 1) * stride + kernel - n
    return divide(n + greater(needed, 0) - kernel, stride) + 1


def windowed(n, kernel, stride, *, divide):
    """Padded to whole windows."""
    return kernel * divide(n + kernel - 1, kernel)


def widened(n, kernel, stride, *, divide):
    return stride * (n - 1) + kernel


KINDS = [convolved, valid, same, windowed, widened]
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 7), st.integers(1, 4)), max_size=5)


def chained(steps, n, *, symbolic=False):
    """The size after several layers."""
    for kind, kernel, stride in steps:
        options = {"greater": Max} if symbolic and kind is same else {}
        n = kind(n, kernel, stride, divide=FloorDiv if symbolic else int.__floordiv__, **options)
        n = shortened(n) if symbolic else n
    return n


@given(STEPS, st.integers(1, 5000))
@example([(same, 3, 2)] * 5, 97)
@example([(windowed, 7, 1), (convolved, 2, 2), (windowed, 7, 1)], 2500)
def test_a_size_after_several_layers_is_the_number_that_they_give(steps, n):
    size = chained(steps, H, symbolic=True)
    assert size.xreplace({H: sympy.Integer(n)}) == chained(steps, n)


@given(st.lists(st.tuples(st.sampled_from([convolved, same]), st.sampled_from([3, 5, 7]), st.just(2)), max_size=7))
def test_at_any_depth_a_size_takes_one_division(steps):
    size = chained(steps, H, symbolic=True)
    assert size == (FloorDiv(H + 2 ** len(steps) - 1, 2 ** len(steps)) if steps else H)


ALIKE = {
    "sizes of two axes": FloorDiv(H, 2) * W + 1,
    "a clamp far away": Min(H, 5000) + 1,
    "a clamp of a quotient": FloorDiv(Min(H, 6000) - 1, 2) + 1,
    "a clamp nearby": Max(H - 40, 3) * 2 + 1,
    "a remainder": Mod(H, 8),
    "a part of other parts": Mod(H + 7, FloorDiv(H, 32)) + 1,
    "a number that may be negative": Max(sympy.Symbol("u", integer=True), 0) + 1,
    "a root": sympy.sqrt(H) + 1,
    "a comparison": sympy.Gt(H + H * W + 1, 5),
}


@pytest.mark.parametrize("name", ALIKE)
def test_what_has_no_shorter_form_stays(name):
    assert shortened(ALIKE[name]) == ALIKE[name]


def test_products_of_several_axes_are_shortened_axis_by_axis():
    long = (FloorDiv(H - 1, 2) + 1) * (FloorDiv(W - 1, 4) + 1)
    assert shortened(long) == FloorDiv(H + 1, 2) * FloorDiv(W + 3, 4)

"""Sizes that follow from the inputs: their formulas say what the arithmetic of numbers says."""

import copy
import operator
import pickle
from dataclasses import dataclass

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from taylorfx import layers as L
from taylorfx.layers.base import Layer
from taylorfx.layers.sizes import (
    OPERATORS,
    Ratio,
    Size,
    at,
    axes_of,
    fault,
    has_sizes,
    held,
    numbers,
    rescaled,
    shown,
    value,
)

STEPS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "//": operator.floordiv, "%": operator.mod}
PAIRS = st.tuples(st.integers(1, 60), st.integers(1, 60))


@st.composite
def computed(draw):
    """A function of two whole numbers, as a list of steps of a stack machine."""
    return draw(
        st.lists(st.tuples(st.sampled_from([*STEPS]), st.sampled_from(["h", "w", 2, 3, 7]), st.booleans()), max_size=6)
    )


def run(steps, h, w):
    """The steps, on numbers or on sizes."""
    result = h
    for name, other, flipped in steps:
        other = {"h": h, "w": w}.get(other, other)
        one, two = (other, result) if flipped else (result, other)
        assume(name not in ("//", "%") or two != 0)
        result = STEPS[name](one, two)
    return result


@given(computed(), PAIRS, PAIRS)
@example([("*", "w", False), ("//", 2, False), ("-", 3, True)], (4, 6), (5, 9))
def test_a_formula_says_at_other_sizes_what_the_arithmetic_says(steps, here, there):
    size = run(steps, Size(here[0], "x.1"), Size(here[1], "x.2"))
    assert numbers(size) == run(steps, *here)
    assert isinstance(size, Size)
    assert not fault(size.formula)
    try:
        expected = run(steps, *there)
    except ZeroDivisionError:
        assume(False)
    assert value(size.formula, {"x.1": there[0], "x.2": there[1]}) == expected


@given(computed(), PAIRS)
@example([("-", 3, True), ("-", "w", True), ("%", 7, False)], (4, 6))
@example([("//", 2, True), ("*", 3, True), ("//", "w", False)], (4, 6))
def test_a_formula_is_written_as_python_reads_it(steps, here):
    h, w = here
    size = run(steps, Size(h, "h.1"), Size(w, "w.1"))
    text = shown(size.formula).replace("h.1", str(h)).replace("w.1", str(w))
    assert eval(text) == numbers(size), text


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 20), st.integers(1, 20), st.integers(1, 12))
def test_an_axis_that_lost_units_is_in_proportion_at_other_sizes(channels, fewer, here, there, fewest):
    """Of ``channels * h`` positions, those of the channels that stay; a second cut makes the formula no longer."""
    size = Size(channels, "c.1") * 0 + channels * Size(here, "x.1")
    once = rescaled(size, fewer * here)
    twice = rescaled(once, fewest * here)
    for kept, left in ((fewer, once), (fewest, twice)):
        assert int(left) == kept * here
        assert not isinstance(left, Size) or value(left.formula, {"x.1": there, "c.1": channels}) == kept * there
    assert shown(twice.formula).count("//") <= 1


def test_a_size_is_a_number_like_any_other():
    size = Size(12, ("*", "x.1", 3))
    assert (size == 12, hash(size) == hash(12), [*range(size)][-1], f"{size}") == (True, True, 11, "12")
    for other in (copy.deepcopy(size), pickle.loads(pickle.dumps(size))):
        assert other == 12
        assert other.formula == size.formula
    ratio = pickle.loads(pickle.dumps(1 / size))
    assert isinstance(ratio, Ratio)
    assert ratio == 1 / 12
    assert shown(ratio.formula) == "1 / (x.1 * 3)"
    assert (-size).formula == ("-", 0, size.formula)
    with pytest.raises(TypeError):
        size + "a"


@dataclass(frozen=True)
class Wrapped(Layer):
    layer: Layer


def test_a_layer_is_fitted_wherever_it_holds_sizes():
    view = L.View((1, Size(12, ("*", "x.1", 3)), 2))
    operator_ = L.Along("roll.default", (("$", 0), (Size(2, ("//", "x.1", 2)),), (1,)), dims=(1,))
    for layer, where in ((view, lambda x: x.shape), (operator_, lambda x: x.args[1])):
        for one, read in ((layer, where), (Wrapped(layer), lambda x, where=where: where(x.layer))):
            assert has_sizes(one)
            fitted, plain = at(one, {"x.1": 6}), at(one, {"x.1": 6}, plain=True)
            assert read(fitted) == read(plain)
            assert read(fitted) != read(one)
            assert [*held(fitted)]
            assert not [*held(plain)]
            assert at(fitted, {"x.1": 4}) == one
    assert not has_sizes(L.View((1, 2)))
    assert axes_of(view.shape[1].formula) == {"x.1"}


@pytest.mark.parametrize(
    ("formula", "message"),
    [
        (("eval", "x.1", 2), "one of"),
        (("+", 1), "one of"),
        (("//", 1, 2, 3), "one of"),
        ((), "before its operands"),
        ("x", "an axis is named"),
        ("x.a", "an axis is named"),
        (("+", "x.1", None), "a formula is"),
        (True, "a formula is"),
        (("**", 10, ("**", 10, 10)), "powers are numbers"),
        (("**", 10, 400), "powers are numbers"),
        (("*", ("+", 1, ("+", 2)), 1), "one of"),
    ],
)
def test_what_is_no_formula_is_refused(formula, message):
    assert message in fault(formula)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_of_formulas_computes(name):
    terms = {"not": (1,), "if": (("<", "x.1", 2), 3, 4), "**": ("x.1", 2)}.get(name, ("x.1", 2))
    if name in ("float", "floor", "ceil", "trunc", "round", "abs"):
        terms = (("/", "x.1", 2),)
    formula = (name, *terms)
    assert not fault(formula)
    assert isinstance(value(formula, {"x.1": 7}), (int, float))
    assert shown(formula)

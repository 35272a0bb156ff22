"""The steps from labels to units: each compared with what it stands for, said in plain loops, or seen on its result."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given

import taylorfx as tfx
from taylorfx import Input, Node, Spec, serial
from taylorfx import layers as L
from taylorfx.coupling.axes import lay_out
from taylorfx.coupling.expand import Factors, expand
from taylorfx.coupling.join import join
from taylorfx.coupling.labeling import Labeling
from taylorfx.network.labels import EXAMPLE, Bound, Factor, Labeled, Labels, Ties
from taylorfx.network.limits import Room
from taylorfx.testing.strategies import Network, network, networks

Law = Callable[[Network], None]


def pinned(law: Law) -> Law:
    """Every construct, and random networks."""
    for spec in CONSTRUCTS.values():
        law = example(network(spec))(law)
    return given(networks())(law)


def labels(*numbers: int) -> Labels:
    return np.array(numbers)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_classes_are_the_labels_that_a_chain_of_ties_leads_to(pairs: list[tuple[int, int]]) -> None:
    reached = [{k} for k in range(10)]
    for _ in range(10):
        for one, other in pairs:
            reached[one] |= reached[other]
            reached[other] |= reached[one]
    classes = join(Ties(count=10, equal=[(labels(one), labels(other)) for one, other in pairs]))
    for one, other in itertools.product(range(10), repeat=2):
        assert (classes.of[one] == classes.of[other]) == (other in reached[one])
    assert classes.first.tolist() == [classes.of.tolist().index(c) for c in range(classes.count)]


def test_two_layouts_of_one_axis_are_matched_as_a_whole() -> None:
    """Channels are groups by channels, and again channels by groups; a third layer has other channels of its own."""
    grid = labels(0, 1, 2, 3), labels(4, 4, 5, 5), labels(6, 7, 6, 7)
    exchanged = labels(0, 1, 2, 3), labels(8, 9, 8, 9), labels(10, 10, 11, 11)
    other = labels(12, 13, 14, 15), labels(16, 16, 17, 17), labels(18, 19, 18, 19)
    of = join(Ties(count=20, products=[grid, exchanged, other])).of
    assert of[[4, 5, 6, 7]].tolist() == of[[10, 11, 8, 9]].tolist()
    assert len({*of[[4, 5, 6, 7, 16, 17, 18, 19]].tolist()}) == 8


def test_products_that_lead_back_to_each_other_are_one_class() -> None:
    """Of ``0 = 1 * 2`` and ``1 = 0 * 3`` neither is its own factor, but each is a factor of its factor."""
    classes = join(Ties(count=5, products=[(labels(0, 1), labels(1, 0), labels(2, 3))]))
    assert classes.of.tolist() == [0, 0, 0, 0, 1]
    assert not len(classes.products.whole)


@st.composite
def labelings(draw: st.DrawFn) -> tuple[Labeling, Factors]:
    """A few axes of one to three factors, labeled, rigid or the examples; labels may be -1, and some are tied."""
    factor = st.integers(1, 3).flatmap(
        lambda n: st.just(Factor(n)) | st.lists(st.integers(-1, 7), min_size=n, max_size=n).map(
            lambda numbers: Factor(n, np.array(numbers))
        )
    )  # fmt: skip
    axes = draw(st.lists(st.lists(factor | st.just(Factor(1, EXAMPLE)), min_size=1, max_size=3), max_size=4))
    ties = Ties(count=8, equal=[(labels(0), labels(1))], products=[(labels(2), labels(3), labels(4))])
    bound = Bound((), letters={f"x{k}": tuple(axis) for k, axis in enumerate(axes)})
    return Labeling(Spec((Node("x", Input((1,))),)), {"x": bound}, ties), expand(join(ties))


@given(labelings())
def test_every_position_has_the_units_of_each_of_its_factors(drawn: tuple[Labeling, Factors]) -> None:
    labeling, factors = drawn
    axes = lay_out(labeling, factors)
    number = np.append(np.arange(factors.classes.count) * 10, -1)  # every class is a unit
    rows = axes.rows(number)
    for axis in labeling.bounds["x"].letters.values():
        units = rows.get(axes.numbers[id(axis)])
        for position, place in enumerate(itertools.product(*(range(factor.size) for factor in axis))):
            expected = [u for factor, k in zip(axis, place, strict=True) for u in units_of(factor, k, factors)]
            column = [] if units is None else [u for u in units[:, position].tolist() if u >= 0]
            assert column == [10 * u for u in expected]


def units_of(factor: Factor, position: int, factors: Factors) -> list[int]:
    if factor.labels is None or factor.labels is EXAMPLE or factor.labels[position] < 0:
        return []
    return [u for u in factors.table[:, factors.classes.of[factor.labels[position]]].tolist() if u >= 0]


def test_axes_are_laid_out_within_the_limits_of_a_network() -> None:
    ties = Ties(count=6, room=Room(labels=5))
    axis: Labeled = (Factor(6, np.arange(6)),)
    labeling = Labeling(Spec((Node("x", Input((1,))),)), {"x": Bound((), letters={"c": axis})}, ties)
    with pytest.raises(tfx.ShapeError, match="at most 67,108,864 positions together"):
        lay_out(labeling, expand(join(ties)))


@pinned
def test_a_unit_is_consumed_and_is_no_whole_axis(net: Network) -> None:
    coupling = net.coupling
    read = {u for place in coupling.reads for u in place.units.ravel().tolist()}
    units = range(len(coupling))
    assert {u for u in units if coupling.exact[u]} <= read
    assert not [row for axis in coupling.axes for row in axis if row[0] >= 0 and (row == row[0]).all()]
    assert len(set(coupling.names)) == len(coupling)


@pinned
def test_units_are_numbered_scope_by_scope_in_the_order_of_their_positions(net: Network) -> None:
    coupling = net.coupling
    places = list(zip(coupling.scope.tolist(), coupling.index.tolist(), strict=True))
    assert places == sorted(places)
    order = {node.name: k for k, node in enumerate(coupling.spec)}
    owners = [order.get(name, order.get(name.rpartition(".")[0], -1)) for name in coupling.scopes]
    assert owners == sorted(owners)


@pinned
def test_axes_differ_and_have_the_sizes_of_what_they_belong_to(net: Network) -> None:
    coupling = net.coupling
    axes = [(axis.shape, axis.tobytes()) for axis in coupling.axes]
    assert len(set(axes)) == len(axes)
    for path, numbers in coupling.parameters.items():
        assert tuple(coupling.axes[k].shape[1] for k in numbers) == coupling.spec.shapes[path]
    for name, numbers in coupling.letters.items():
        for letter, k in numbers.items():
            assert coupling.axes[k].shape[1] == coupling.bounds[name].sizes[letter]
    for place in (*coupling.reads, *coupling.writes):
        bound = coupling.bounds[place.node]
        assert place.shape == (bound.shape if place.slot < 0 else bound.inputs[place.slot])
        assert place.units.shape[1] == place.shape[place.axis]
        assert (place.units >= 0).any(1).all()


def test_the_first_reason_is_the_one_that_is_told() -> None:
    """A scope that an output holds and that no layer consumes."""
    nodes = Node("x", Input((2,))), Node("a", L.Linear(2, 3), "x"), Node("b", L.Softmax(1), "a")
    coupling = network(Spec(nodes, ("a", "b"))).coupling
    assert coupling.frozen == {"a": "b: Softmax holds input 0, axis 1 rigid"}


def test_what_no_layer_consumes_stays() -> None:
    nodes = Node("x", Input((2,))), Node("a", L.Linear(2, 3), "x"), Node("b", L.Linear(2, 2), "x")
    coupling = network(Spec(nodes, ("b",))).coupling
    assert coupling.frozen["a"] == "no layer consumes it"
    assert len(coupling) == 0


def test_a_coupling_and_a_plan_are_one_line() -> None:
    spec = serial(Input((2,)), L.Linear(2, 4), L.ReLU(), L.Linear(4, 3), L.Linear(3, 2))
    coupling = network(spec).coupling
    assert repr(coupling) == "Coupling(7 units in 2 scopes, 1 frozen)"
    plan = tfx.select(torch.arange(7.0), coupling, budget=5)
    assert repr(plan) == f"Plan(keeps 5 of 7 units, asked for {plan.asked})"
    assert repr(tfx.Plan(coupling, plan.keep)) == "Plan(keeps 5 of 7 units)"
    assert "scope" in str(coupling)
    assert str(plan).count("\n") > 4

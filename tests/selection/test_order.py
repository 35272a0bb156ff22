"""The order in which units leave: the same as said in plain loops."""

from __future__ import annotations

import math
from itertools import pairwise

import hypothesis.strategies as st
import numpy as np
from constructs import CONSTRUCTS
from hypothesis import example, given

from taylorfx import layers as L
from taylorfx import serial
from taylorfx.coupling.units import Coupling, Mask
from taylorfx.network.labels import Labels
from taylorfx.selection.constraints import Rules
from taylorfx.selection.order import Values, returned, steps
from taylorfx.testing.strategies import network

COUPLINGS = [network(CONSTRUCTS[name]).coupling for name in ("residual stream", "multi-head", "dense", "grouped")]


@st.composite
def orders(draw: st.DrawFn) -> tuple[Values, Coupling, Mask, Rules]:
    """Few different scores, so that many are equal; scopes of as many units keep the same number of them."""
    coupling = draw(st.sampled_from(COUPLINGS))
    units, scopes = len(coupling), len(coupling.scopes)
    values = np.array(draw(st.lists(st.integers(0, 5), min_size=units, max_size=units)), float)
    held = np.array(draw(st.lists(st.sampled_from([False, False, True]), min_size=units, max_size=units)))
    groups: dict[int, list[int]] = {}
    for k, size in enumerate(coupling.sizes.tolist()):
        groups.setdefault(size if draw(st.booleans()) else -k - 1, []).append(k)

    def each(*numbers: float) -> list:
        return draw(st.lists(st.sampled_from(numbers), min_size=scopes, max_size=scopes))

    rules = Rules(list(groups.values()), each(1, 1, 2, 3), each(1.0, 1.0, 0.5, 0.4, 0.0), each(1, 1, 2, 3), held)
    return values, coupling, held, rules


def plainly(values: Values, coupling: Coupling, held: Mask, rules: Rules) -> list[list[int]]:
    """The units of each step: bundles lead from one number of units that a scope may keep to the next smaller one."""
    bundles: list[list[int]] = []
    for group in rules.groups:
        queues = [[u for u in range(len(values)) if coupling.scope[u] == k and not held[u]] for k in group]
        queues = [sorted(queue, key=lambda u: (values[u], -u)) for queue in queues]
        size, multiple = int(coupling.sizes[group[0]]), math.lcm(*(rules.multiples[k] for k in group))
        allowed = [
            n
            for n in range(size, 0, -1)
            if n == size
            or (
                n % multiple == 0
                and all(n >= rules.floors[k] and size - n <= rules.most[k] * size + 1e-9 for k in group)
                and all(size - n <= len(queue) for queue in queues)
            )
        ]
        bundles += [[u for queue in queues for u in queue[size - a : size - b]] for a, b in pairwise(allowed)]
    return sorted(bundles, key=lambda bundle: (sum(values[bundle]) / len(bundle), -bundle[0]))


def two_multiples() -> tuple[Values, Coupling, Mask, Rules]:
    """Two scopes of 9 units that keep as many, one of them a multiple of 2, the other of 3: together of 6."""
    spec = serial(L.Input((4,)), L.Linear(4, 9), L.ReLU(), L.Linear(9, 9), L.ReLU(), L.Linear(9, 2))
    held = np.zeros(18, bool)
    return np.arange(18.0), network(spec).coupling, held, Rules([[0, 1]], [1, 1], [1.0, 1.0], [2, 3], held)


@given(orders())
@example(two_multiples())
def test_the_bundles_of_lowest_mean_score_leave_first(drawn: tuple[Values, Coupling, Mask, Rules]) -> None:
    step, count = steps(*drawn)
    expected = plainly(*drawn)
    assert count == len(expected)
    assert members(step, count) == [sorted(bundle) for bundle in expected]
    assert not (drawn[2] & (step < count)).any()


def members(step: Labels, count: int) -> list[list[int]]:
    return [np.flatnonzero(step == k).tolist() for k in range(count)]


@given(orders(), st.floats(0.0, 1.0), st.floats(0.0, 1.0), st.data())
def test_the_best_bundles_that_fit_come_back(
    drawn: tuple[Values, Coupling, Mask, Rules], share: float, room: float, data: st.DataObject
) -> None:
    values, coupling, _, rules = drawn
    step, count = steps(*drawn)
    keep = step >= int(share * count)
    prices = np.array(data.draw(st.lists(st.integers(1, 5), min_size=len(values), max_size=len(values))))
    limit = prices[keep].sum() + room * prices[~keep].sum()

    def fits(mask: Mask) -> bool:
        return bool(prices[mask].sum() <= limit)

    def bundles(mask: Mask) -> list[list[int]]:
        """What may come back next of every group, in plain loops, the highest mean first."""
        result = []
        for group in rules.groups:
            width = math.lcm(*(rules.multiples[k] for k in group))
            gone = [[u for u in range(len(values)) if coupling.scope[u] == k and not mask[u]] for k in group]
            result.append([u for us in gone for u in sorted(us, key=lambda u: (-values[u], u))[:width]])
        return sorted((units for units in result if units), key=lambda units: -values[units].mean())

    def and_also(mask: Mask, units: list[int]) -> Mask:
        more = mask.copy()
        more[units] = True
        return more

    after = returned(keep, ~keep, values, (coupling.scope, rules), fits)
    assert fits(after)
    assert (after >= keep).all()
    assert not any(fits(and_also(after, units)) for units in bundles(after))
    fitting = [units for units in bundles(keep) if fits(and_also(keep, units))]
    if fitting:
        best = [units for units in fitting if values[units].mean() == values[fitting[0]].mean()]
        assert any(after[units].all() for units in best)
    for group in rules.groups:  # in the order in which they left, and as far as the rules let them
        counts = {int(after[coupling.scope == k].sum()) for k in group}
        width, size = math.lcm(*(rules.multiples[k] for k in group)), int(coupling.sizes[group[0]])
        assert all(n % width == 0 or n == size for n in counts)
        assert len(counts) == 1

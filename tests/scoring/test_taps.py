"""The taps of a pass: what is planned for each input and output of a node, and what the state of a pass holds."""

import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import example, given
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, serial
from taylorfx import layers as L
from taylorfx.layers.roles import Pointwise, Recomputed
from taylorfx.network.run import evaluate
from taylorfx.rewrite.lean import lean
from taylorfx.scoring.tap_plan import TapPlan
from taylorfx.scoring.taps import Taps, examples_first
from taylorfx.testing.strategies import network, networks


def tokens(*layers: tfx.Layer) -> Spec:
    """Linear layers around some others, over three tokens."""
    named = {f"part{k}": layer for k, layer in enumerate(layers)}
    tail = {"flat": L.Flatten(), "head": L.Linear(12, 2)}
    return serial(Input((3, 4)), up=L.Linear(4, 4), **named, down=L.Linear(4, 4), **tail)


def shared(*readers: tfx.Layer, first: tfx.Layer | None = None) -> Spec:
    """What several layers consume."""
    nodes = [Node("x", Input((3, 4))), Node("up", L.Linear(4, 4), "x"), Node("a", first or L.GELU(), "up")]
    nodes += [Node(f"read{k}", layer, "a") for k, layer in enumerate(readers)]
    nodes += [Node("sum", L.Add(), tuple(f"read{k}" for k in range(len(readers)))), Node("flat", L.Flatten(), "sum")]
    return Spec((*nodes, Node("head", L.Linear(12, 2), "flat")))


class Swish(tfx.Layer):
    """An activation from outside: ``x * sigmoid(2 x)``, made again from what torch keeps for it."""

    def signature(self, *shapes):
        return "... -> ..."

    def apply(self, params, *inputs):
        return inputs[0] * (2 * inputs[0]).sigmoid()

    def roles(self):
        return Recomputed(), Pointwise(self._slope)

    def _slope(self, kept, gradient, over):
        gate = (2 * kept).sigmoid()
        slope = gate * (1 + 2 * kept * (1 - gate))
        return gradient.mul_(slope) if over else gradient * slope


class OwnLinear(L.Linear):
    """A linear layer from outside."""

    roles = L.Linear.roles

    def apply(self, params, *inputs):
        return inputs[0] @ params["weight"].mT + params["bias"]


def planned(spec: Spec, **options):
    net = network(spec)
    params, copy = lean(net.params, net.coupling)
    return TapPlan.of(params, copy, net.coupling.reads, **options)


def read_of(plan: TapPlan, name: str):
    (read,) = plan.stops[name, 0].reads
    return read


SQUARE = L.Elementwise("pow.Tensor_Scalar", (("$", 0), 2))

# Layers between two linear ones; at which stop is kept what the second reads, by how many steps it is made from that,
# and whether the tap multiplies the gradient by a slope.
KEPT_AT = {
    "gelu": (tokens(L.GELU()), ("part0", 0), 1, True),
    "an activation from outside": (tokens(Swish()), ("part0", 0), 1, True),
    "a linear layer from outside": (shared(OwnLinear(4, 4)), ("a", 0), 1, True),
    "layer norm": (tokens(L.LayerNorm(4)), ("part0", 0), 1, False),
    "turned and turned back": (
        tokens(L.GELU(), L.Permute((0, 2, 1)), L.Permute((0, 2, 1))), ("part0", 0), 3, False,
    ),
    "sigmoid": (tokens(L.Sigmoid()), None, 0, False),
    "relu written over its input": (
        serial(Input((2, 4, 4)), L.Conv2d(2, 4, 1), up=L.Conv2d(4, 4, 1), relu=L.ReLU(), down=L.Conv2d(4, 2, 1)),
        ("relu", 0), 0, True,
    ),
    "gelu before a convolution, which keeps what it reads": (
        serial(Input((2, 4, 4)), up=L.Conv2d(2, 4, 1), gelu=L.GELU(), down=L.Conv2d(4, 2, 1)), None, 0, False,
    ),
    "a square before a mean": (
        serial(Input((3, 4)), up=L.Linear(4, 4), square=SQUARE, down=L.Reduce("mean", (2,))), ("square", 0), 1, True,
    ),
    "read by two layers": (shared(L.Linear(4, 4), L.GELU()), ("a", 0), 1, False),
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT_AT)
def test_what_is_kept_is_what_the_activation_can_be_made_from(name):
    spec, source, steps, slope = KEPT_AT[name]
    plan = planned(spec)
    read = read_of(plan, "read0" if "read0" in spec.by_name else "down")
    assert (read.source, len(read.recipe.steps), read.recipe.slope is not None) == (source, steps, slope)
    assert source is None or plan.stops[source].kept


@pytest.mark.parametrize("name", KEPT_AT)
def test_what_is_made_again_has_the_derivatives_of_autograd(name):
    net = network(KEPT_AT[name][0])
    gates, loss = torch.ones(len(net.coupling), dtype=torch.float64), lambda outputs, _: outputs.sin().sum()
    expected = tfx.truth.gradient(net.params, net.spec, *net.batch, net.coupling, gates, loss=loss)
    assert_close(tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, loss=loss).summed.sum(0), expected)


def test_the_plan_says_what_is_let_go_when():
    """The last of the twins needs the tap, the first of them what the tap is made from."""
    plan = planned(shared(L.Linear(4, 4), L.Linear(4, 4), L.Linear(4, 4)))
    assert [(stop.sources, stop.twins) for (name, _), stop in plan.stops.items() if name.startswith("read")] == [
        ([("a", 0)], []), ([], []), ([], [0]),
    ]  # fmt: skip


def test_twins_read_one_value_in_the_same_way():
    spec = shared(L.Linear(4, 4), L.Linear(4, 4), L.LayerNorm(4), first=L.Tanh())
    plan = planned(spec)
    assert [read_of(plan, name).twin for name in ("read0", "read1", "head")] == [0, 0, None]
    place = read_of(plan, "read0").place
    around = {place.key: torch.zeros(4, dtype=torch.float64)}
    plan = planned(spec, around=around)
    assert [read_of(plan, name).twin for name in ("read0", "read1")] == [None, None]


@given(networks())
@example(network(CONSTRUCTS["multi-head"]))
@example(network(tokens(L.GELU())))
@example(network(shared(L.Linear(4, 4), L.Linear(4, 4))))
def test_nothing_is_held_when_a_pass_is_over(net):
    params, copy = lean(net.params, net.coupling)
    for places, network_ in ((net.coupling.reads, (params, copy)), (net.coupling.writes, (net.params, net.spec))):
        ones = {str(p.key): torch.ones(len(net.batch[1]), p.units.shape[1]) for p in places}
        taps = Taps(TapPlan.of(*network_, places), ones)
        held = 0

        def tap(name, slot, x, taps=taps):
            nonlocal held
            result = taps(name, slot, x)
            held = max(held, len(taps.kept) + len(taps.tapped))
            return result

        evaluate(*network_, (net.batch[0],), tap=tap)
        assert set(taps.spread) == set(ones)
        assert not taps.kept
        assert not taps.tapped
        stops = taps.plan.stops.values()
        assert (held > 0) == any(stop.kept or any(read.twin is not None for read in stop.reads) for stop in stops)


@pytest.mark.parametrize("spec", [tokens(Swish()), shared(OwnLinear(4, 4)), shared(OwnLinear(4, 4), Swish())])
def test_layers_from_outside_are_tapped_right(spec):
    net = network(spec)
    computed, expected = (
        tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, fold=fold)[:3] for fold in (True, False)
    )
    assert_close(computed, expected)
    gates = torch.ones(len(net.coupling), dtype=torch.float64)
    gradient = tfx.truth.gradient(net.params, net.spec, *net.batch, net.coupling, gates)
    assert_close(computed[1].sum(0), gradient)


def test_the_plan_is_made_once_for_all_batches(monkeypatch):
    made, of = [], TapPlan.of
    monkeypatch.setattr(
        TapPlan, "of", staticmethod(lambda *args, **options: (made.append(args), of(*args, **options))[1])
    )
    net = network(CONSTRUCTS["chain"])
    tfx.measure(net.params, net.spec, [net.batch], net.coupling)
    once = len(made)
    tfx.measure(net.params, net.spec, [net.batch] * 3, net.coupling)
    assert len(made) == 2 * once > 0


def test_examples_come_first():
    """As a loop over the examples collects them."""
    x = torch.randn(5, 2 * 3 * 4, 7)
    expected = [x.reshape(5, 2, 3, 4, 7)[:, :, k].reshape(5, 8, 7) for k in range(3)]
    assert torch.equal(examples_first(x, 3, 1, 2), torch.stack(expected))

"""How the derivatives are computed is invisible: folded or not, in which batches and memory format."""

import hypothesis.strategies as st
import pytest
import torch
from constructs import BLOCK, CONSTRUCTS, SAME, classifier
from hypothesis import example, given
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import Input, Node, Spec, concat, residual, serial
from taylorfx import layers as L
from taylorfx.network.parameters import check
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network, networks, random_params

CLOSE = {"rtol": 1e-9, "atol": 1e-11}
NORM = L.BatchNorm2d(4)


def normed(*layers: tfx.Layer | Spec, channels: int, size: int = 4) -> Spec:
    """A classifier in which batch norm follows each of these layers, which write that many channels."""
    parts = [x for layer in layers for x in (layer, L.BatchNorm2d(getattr(layer, "out_channels", 4)), L.SiLU())]
    return classifier(*parts, channels=channels, size=size)


def by_parameters(layer: tfx.Layer, operation: tfx.Layer, *shapes: tuple[int, ...], back: bool = False) -> Spec:
    """A layer whose output meets parameters one after the other."""
    nodes = [Node("x", Input()), Node("layer", layer, ("x",))]
    for k, shape in enumerate(shapes):
        heard = (f"p{k}", nodes[-1].name) if back else (nodes[-1].name, f"p{k}")
        nodes += [Node(f"p{k}", L.Parameter(shape, std=1.0)), Node(f"o{k}", operation, heard)]
    return Spec(tuple(nodes))


def tied_norms() -> Spec:
    """Two convolutions of their own, one norm's parameters for both."""
    nodes = (
        Node("x", Input()),
        Node("one", SAME, ("x",)),
        Node("norm", NORM, ("one",)),
        Node("two", SAME, ("norm",)),
        Node("again", NORM, ("two",), "norm"),
    )
    return Spec(nodes)


def heard_twice(conv: bool) -> Spec:
    """The convolution, or its norm, is heard by two."""
    other = "conv" if conv else "norm"
    return Spec((
        Node("x", Input()), Node("conv", SAME, ("x",)), Node("norm", NORM, ("conv",)),
        Node("act", L.Sigmoid(), (other,)), Node("sum", L.Add(), ("act", "norm")),
    ))  # fmt: skip


def normed_twice() -> Spec:
    """The convolution's norm is heard by another norm, and not by it alone."""
    return Spec((
        Node("x", Input()), Node("conv", SAME, ("x",)), Node("norm", NORM, ("conv",)), Node("again", NORM, ("norm",)),
        Node("sum", L.Add(), ("norm", "again")),
    ))  # fmt: skip


def outputs(*names: str) -> Spec:
    nodes = Node("x", Input((2, 4, 4))), Node("conv", L.Conv2d(2, 4, 3), ("x",)), Node("norm", NORM, ("conv",))
    tail = Node("flat", L.Flatten(), ("norm",)), Node("head", L.Linear(16, 2), ("flat",))
    return Spec((*nodes, *tail), names)


def turned(layer: tfx.Layer, dims: tuple[int, ...], *after: tfx.Layer | tuple[int, ...], twice: bool = False) -> Spec:
    """A layer whose output is permuted, and then normed or scaled; the permutation is perhaps heard by another."""
    nodes = [Node("x", Input()), Node("layer", layer, ("x",)), Node("turn", L.Permute(dims), ("layer",))]
    for k, what in enumerate(after):
        if isinstance(what, tuple):
            nodes += [
                Node(f"p{k}", L.Parameter(what, std=1.0)),
                Node(f"o{k}", L.Multiply(), (nodes[-1].name, f"p{k}")),
            ]
        else:
            nodes.append(Node(f"o{k}", what, (nodes[-1].name,)))
    return Spec((*nodes, *([Node("sum", L.Add(), ("turn", nodes[-1].name))] if twice else [])))


LAST, FIRST = (0, 2, 3, 1), (0, 3, 1, 2)

# A network, and how many of its nodes go.
FOLDED: dict[str, tuple[Spec, int]] = {
    "dense": (normed(SAME, channels=4), 1),
    "bias": (normed(L.Conv2d(4, 5, 1, bias=False), L.Conv2d(5, 3, 1), channels=3), 2),
    "grouped": (normed(L.Conv2d(4, 6, 3, padding=1, groups=2, bias=False), channels=6), 1),
    "depthwise": (normed(L.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), channels=8), 1),
    "transposed": (normed(L.ConvTranspose2d(4, 6, 3, padding=1, groups=2), channels=6), 1),
    "transposed, one group": (normed(L.ConvTranspose2d(4, 3, 3, padding=1, bias=False), channels=3), 1),
    "no affine": (classifier(SAME, L.BatchNorm2d(4, affine=False), channels=4), 1),
    "tracked instance norm": (
        classifier(SAME, L.InstanceNorm2d(4, affine=True, track_running_stats=True), channels=4), 1,
    ),
    "untracked": (classifier(SAME, L.BatchNorm2d(4, track_running_stats=False), channels=4), 0),
    "untracked instance norm": (classifier(SAME, L.InstanceNorm2d(4), channels=4), 0),
    "one after the other": (classifier(SAME, NORM, NORM, NORM, channels=4), 3),
    "before": (classifier(L.ReLU(), NORM, SAME, channels=4), 0),
    "residual": (classifier(residual(serial(BLOCK, SAME, NORM)), channels=4), 1),
    "joined": (classifier(concat(L.Conv2d(4, 2, 1), L.Conv2d(4, 2, 1)), NORM, channels=4), 0),
    "shared convolutions": (
        classifier(Spec((
            Node("x", Input()), Node("one", SAME, ("x",), "tied"), Node("norm", NORM, ("one",)),
            Node("two", SAME, ("norm",), "tied"),
        )), channels=4), 0,
    ),
    "shared norms": (classifier(tied_norms(), channels=4), 2),
    "others hear the convolution": (classifier(heard_twice(True), channels=4), 0),
    "others hear the norm": (classifier(heard_twice(False), channels=4), 1),
    "others hear the first norm": (classifier(normed_twice(), channels=4), 1),
    "spread by its parameter": (
        classifier(by_parameters(L.Conv2d(4, 1, 1), L.Multiply(), (4, 1, 1)), channels=4), 0,
    ),
    "the place of the bias is taken": (
        classifier(Spec((
            Node("x", Input()), Node("conv", L.Conv2d(4, 4, 1, bias=False), ("x",)), Node("norm", NORM, ("conv",)),
            Node("two", L.Conv2d(4, 4, 1), ("norm",), (("bias", "conv.bias"),)),
        )), channels=4), 0,
    ),
    "linear": (serial(Input(3), L.Linear(3, 5), L.BatchNorm1d(5), L.ReLU(), L.Linear(5, 2)), 1),
    "linear, positions normed": (
        serial(Input((5, 3)), L.Linear(3, 5), L.BatchNorm1d(5), L.Flatten(), L.Linear(25, 2)), 0,
    ),
    "products": (classifier(by_parameters(SAME, L.Multiply(), (4, 1, 1), (1, 1, 1), (1,)), channels=4), 6),
    "sums": (classifier(by_parameters(SAME, L.Add(), (4, 1, 1), (1, 4, 1, 1), back=True), channels=4), 4),
    "parameter of every place": (classifier(by_parameters(SAME, L.Multiply(), (4, 4, 1)), channels=4), 0),
    "parameter of places": (classifier(by_parameters(SAME, L.Multiply(), (4,)), channels=4), 0),
    "scaled tokens": (
        serial(Input((3, 2)), by_parameters(L.Linear(2, 4), L.Multiply(), (4,)), L.Flatten(), L.Linear(12, 2)),
        2,
    ),
    "broadcast by its parameter": (
        serial(Input((2, 1)), by_parameters(L.Conv1d(2, 4, 1), L.Add(), (4, 3)), L.Flatten(), L.Linear(12, 2)),
        0,
    ),
    "scaled behind a permutation": (
        classifier(L.Permute(LAST), turned(L.Linear(4, 4), FIRST, (4, 1, 1)), channels=4), 2,
    ),
    "normed behind a permutation": (
        classifier(L.Permute(LAST), turned(L.Linear(4, 4), FIRST, NORM, (4, 1, 1)), channels=4), 3,
    ),
    "a convolution scaled behind a permutation": (classifier(turned(SAME, LAST, (4,)), channels=4), 2),
    "places scaled behind a permutation": (classifier(turned(SAME, LAST, (4, 1, 1)), channels=4), 0),
    "rows normed behind a permutation": (classifier(turned(SAME, LAST, NORM), channels=4), 0),
    "the permutation is heard by another": (classifier(turned(SAME, LAST, (4,), twice=True), channels=4), 0),
    "the norm is an output": (outputs("norm"), 1),
    "the convolution is an output": (outputs("conv", "head"), 0),
}  # fmt: skip


def folded(net):
    return tfx.fold(net.params, net.spec)


def pinned(law):
    for spec in (*CONSTRUCTS.values(), *(spec for spec, _ in FOLDED.values() if len(spec.outputs) == 1)):
        law = example(network(spec))(law)
    return given(networks())(law)


@pytest.mark.parametrize("name", FOLDED)
def test_what_can_be_folded_is_gone(name):
    spec, gone = FOLDED[name]
    net = network(spec)
    _, small = folded(net)
    assert len(spec) - len(small) == gone
    assert {node.name for node in small} <= {node.name for node in spec}


@pinned
def test_folding_leaves_the_outputs(net):
    assert_close(tfx.apply(*folded(net), net.batch[0]), tfx.apply(net.params, net.spec, net.batch[0]), **CLOSE)


@pinned
def test_folding_leaves_the_units_and_their_derivatives(net):
    if len(tfx.apply(net.params, net.spec, net.batch[0]).shape) > 2:
        return  # no classifier
    expected = tfx.derivatives(net.params, net.spec, *net.batch, net.coupling, fold=False)
    assert_close(tfx.derivatives(net.params, net.spec, *net.batch, net.coupling)[:3], expected[:3], **CLOSE)
    if net.spec == FOLDED["shared norms"][0]:
        return  # which alone tied the units of the two convolutions
    params, spec = folded(net)
    coupling = tfx.couple(params, spec)
    assert sorted(coupling.names) == sorted(net.coupling.names)
    order = [coupling.names.index(name) for name in net.coupling.names]
    found = tfx.derivatives(params, spec, *net.batch, coupling, fold=False)
    assert_close(found[1][:, order], expected[1], **CLOSE)


@pinned
def test_folding_twice_is_folding_once_and_changes_nothing_that_is_given(net):
    before = tfx.tree.unflatten({path: leaf.clone() for path, leaf in tfx.tree.flatten(net.params).items()})
    params, spec = folded(net)
    again = tfx.fold(params, spec)
    assert again[0] is params
    assert again[1] is spec
    assert_trees_equal(net.params, before)
    check(net.params, net.spec)


@given(networks(), st.booleans())
@example(network(CONSTRUCTS["chain"]), True)
def test_moments_are_of_what_was_read_before(net, at_writes):
    stats = [
        tfx.measure(net.params, net.spec, net.batch, net.coupling, moments=True, at_writes=at_writes, fold=fold)
        for fold in (False, True)
    ]
    assert_close(stats[1].moments.sum_sq, stats[0].moments.sum_sq, **CLOSE)
    assert_close(stats[1].sum_abs, stats[0].sum_abs, **CLOSE)


@pytest.mark.parametrize("names", [("norm",), ("head", "norm"), ("norm", "head")])
def test_an_output_is_what_it_was(names):
    spec = outputs(*names)
    net = network(spec)
    small = folded(net)
    assert small[1].outputs == tuple("conv" if name == "norm" else name for name in names)
    assert_close(tfx.apply(*small, net.batch[0]), tfx.apply(net.params, spec, net.batch[0]), **CLOSE)


def test_without_a_declared_shape_norms_after_convolutions_still_fold():
    spec = Spec((Node("x", Input()), Node("conv", SAME, ("x",)), Node("norm", NORM, ("conv",))))
    params = random_params(spec, torch.Generator().manual_seed(0))
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    small = tfx.fold(params, spec)
    assert len(small[1]) == 2
    assert_close(tfx.apply(*small, x), tfx.apply(params, spec, x), **CLOSE)


def test_folding_is_differentiable():
    net = network(CONSTRUCTS["chain"])
    trained, buffers = tfx.partition(net.params, net.spec)

    def value(trained, fold):
        network = tfx.tree.combine(trained, buffers), net.spec
        return tfx.apply(*(tfx.fold(*network) if fold else network), net.batch[0]).square().sum()

    slopes = torch.func.grad(value)
    assert_trees_equal(slopes(trained, True), slopes(trained, False), **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_folded_in_single(dtype):
    """The folded weight is the exact one, rounded once."""
    net = network(FOLDED["dense"][0])
    low = tfx.tree.unflatten({path: leaf.to(dtype) for path, leaf in tfx.tree.flatten(net.params).items()})
    high = tfx.tree.unflatten({path: leaf.double() for path, leaf in tfx.tree.flatten(low).items()})
    for path, leaf in tfx.tree.flatten(tfx.fold(low, net.spec)[0]).items():
        assert leaf.dtype == dtype
        exact = tfx.tree.flatten(tfx.fold(high, net.spec)[0])[path]
        assert ((leaf.double() - exact).abs() <= 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-7).all()


@given(networks(), st.integers(1, 4), st.booleans())
@example(network(CONSTRUCTS["chain"]), 2, True)
@example(network(CONSTRUCTS["table"]), 2, True)
@example(network(CONSTRUCTS["untracked batch norm"]), 2, False)
def test_micro_batches_are_the_whole_batch(net, size, at_writes):
    whole, parts = (
        tfx.measure(
            net.params, net.spec, net.batch, net.coupling, moments=True, rows=True, at_writes=at_writes, micro_batch=n
        )
        for n in (None, size)
    )
    assert (whole.n, whole.batches) == (parts.n, parts.batches) == (3, 1)
    for name in ("loss", "sum", "sum_abs", "sum_sq", "sum_abs_mean", "sum_batch_abs", "sum_batch_sq", "rows"):
        assert_close(getattr(parts, name), getattr(whole, name), **CLOSE)
    for name in ("count", "sum", "sum_sq", "zeros"):
        assert_close(getattr(parts.moments, name), getattr(whole.moments, name), **CLOSE)


def test_micro_batches_bound_what_runs_at_a_time():
    net, seen = network(CONSTRUCTS["chain"]), []

    def loss(outputs, targets):
        seen.append(len(outputs))
        return torch.nn.functional.cross_entropy(outputs, targets)

    tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss, micro_batch=2)
    assert len(seen) == 2  # of two examples and of one, vectorized


@pytest.mark.parametrize("options", [{"micro_batch": 0}, {"micro_batch": 2, "training": True}])
def test_micro_batches_that_would_mean_something_else_are_refused(options):
    net = network(CONSTRUCTS["chain"])
    with pytest.raises(ValueError, match="Micro-batches have one or more examples, and are not for training"):
        tfx.measure(net.params, net.spec, net.batch, net.coupling, **options)

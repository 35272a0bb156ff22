"""Several calls of a module are one network: each computes what the module does, before and after a cut."""

import copy
import dataclasses
import functools
import inspect
import typing

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import Call, CaptureError, from_torch, to_torch
from taylorfx.interop.capture.optional import merge
from taylorfx.network.bind import propagate
from taylorfx.network.labels import Ties, is_example
from taylorfx.network.run import bind_inputs
from taylorfx.testing.strategies import networks

CLOSE = {"rtol": 1e-10, "atol": 1e-11}
EXACT = {"rtol": 0.0, "atol": 0.0}


class Scaled(nn.Module):
    """A mask in the middle, with a norm of its own."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2), nn.BatchNorm1d(6)

    def forward(self, x, mask=None):
        x = self.a(x).relu()
        if mask is not None:
            x = self.norm(x) * mask
        return self.c(self.b(x).relu())


class Side(nn.Module):
    """A second input with layers of its own, whose channels are tied to those of the first."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.side, self.c = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x, *, extra=None):
        x = self.a(x).relu()
        if extra is not None:
            x = x + self.side(extra).relu()
        return {"y": self.c(self.b(x).tanh()), "stream": None, "sum": x.sum(1, keepdim=True)}


class Tokens(nn.Module):
    """Embeddings and attention, with a mask and types that have defaults."""

    def __init__(self):
        super().__init__()
        self.words, self.types, self.norm = nn.Embedding(11, 8), nn.Embedding(2, 8), nn.LayerNorm(8)
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 3)

    def forward(self, tokens, mask=None, types=None):
        types = torch.zeros_like(tokens) if types is None else types
        x = self.norm(self.words(tokens) + self.types(types))
        q, k, v = (layer(x).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mask = None if mask is None else mask[:, None, None, :]
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return self.down(F.gelu(self.up(x)))


class Broadcast(nn.Module):
    """A factor of every example, or one for all: other axes, so that the choice stands behind the product."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.one = nn.Linear(3, 6), nn.Linear(6, 2), nn.Parameter(torch.tensor(0.7))

    def forward(self, x, scale=None):
        return self.b(self.a(x).relu() * (self.one if scale is None else scale))


class Nested(nn.Module):
    """Entries of a dict that are there or not."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(6, 5), nn.Linear(5, 2)

    def forward(self, parts):
        x = self.a(parts["x"]).relu()
        if "mask" in parts:
            x = x * parts["mask"]
        if "bias" in parts:
            x = x + parts["bias"]
        return (self.c(self.b(x).relu()), x.mean(1, keepdim=True))


def real(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


X, MASK = real(5, 3), real(5, 6)
TOKENS = torch.randint(11, (4, 7), generator=torch.Generator().manual_seed(0))
SEEN = torch.arange(7) < torch.tensor([[7], [5], [3], [6]])
TYPES = (torch.arange(7) > 3).long().expand(4, 7)

CASES = {
    "a mask, then none": (Scaled, [Call(X, mask=MASK), X]),
    "no mask, then one": (Scaled, [X, Call(X, MASK)]),
    "a side input": (Side, [Call(X, extra=real(5, 4)), X]),
    "attention": (Tokens, [Call(TOKENS, SEEN), TOKENS]),
    "three calls": (Tokens, [TOKENS, (TOKENS, SEEN), {"tokens": TOKENS, "types": TYPES}]),
    "all four calls": (Tokens, [(TOKENS, SEEN, TYPES), TOKENS, (TOKENS, SEEN), Call(TOKENS, types=TYPES)]),
    "other axes": (Broadcast, [Call(X, real(5, 1)), X]),
    "entries": (Nested, [Call({"x": X, "mask": MASK}), Call({"x": X}), Call({"x": X, "bias": MASK})]),
}


def module_of(name):
    torch.manual_seed(0)
    return CASES[name][0]().double().eval()


def calls_of(name):
    whole = [x if isinstance(x, (Call, dict, tuple)) else (x,) for x in CASES[name][1]]
    return [Call(*x) if isinstance(x, tuple) else Call(**x) if isinstance(x, dict) else x for x in whole]


@functools.cache
def network_of(name):
    module = module_of(name)
    return module, *from_torch(module, examples=CASES[name][1])


def captured(name):
    module, params, spec = network_of(name)
    return copy.deepcopy(module), params, spec


def tensors(out, call):
    """The tensors of a call by input, as the plain module itself sorts them."""
    from taylorfx.interop.calls import bind

    return bind(out._interface, call.args, call.kwargs, out.spec.calls)


def leaves(outputs):
    """The tensors of outputs, of a dict or a tuple alike."""
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else (outputs,)
    return [x for x in values if x is not None]


def smaller(params, spec, seed=0):
    """The plan by which some units leave, exact ones first."""
    coupling = tfx.couple(params, spec)
    scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(seed))
    return tfx.select(scores + 9 * ~torch.as_tensor(coupling.exact), coupling, budget=tfx.Units(0.7))


@pytest.mark.parametrize("name", CASES)
def test_every_call_is_the_call_of_the_module(name):
    module, params, spec = captured(name)
    out = to_torch(params, spec)
    assert len(spec.calls) == len(calls_of(name))
    assert inspect.signature(out.forward) == inspect.signature(module.forward)
    for call in calls_of(name):
        expected = leaves(module(*call.args, **call.kwargs))
        assert_close(leaves(out(*call.args, **call.kwargs)), expected, **CLOSE)
        assert_close(leaves(tfx.apply(params, spec, tensors(out, call))), expected, **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_call_trains_as_the_module_does(name):
    module, params, spec = captured(name)
    out, module = to_torch(params, spec).train(), module.train()
    for call in calls_of(name):
        torch.manual_seed(1)
        expected = leaves(module(*call.args, **call.kwargs))
        torch.manual_seed(1)
        outputs = leaves(out(*call.args, **call.kwargs))
        assert_close(outputs, expected, **CLOSE)
        for results in (outputs, expected):
            sum((x**2).sum() for x in results).backward()
    theirs = dict(module.named_parameters())
    for path, parameter in out.named_parameters():
        grad, expected = parameter.grad, theirs[path].grad
        assert (grad is None) == (expected is None)
        if grad is not None:
            assert_close(grad, expected, **CLOSE)
    buffers = dict(module.named_buffers())
    for path, buffer in out.named_buffers():
        assert_close(buffer, buffers[path], **CLOSE)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_is_the_gated_network_in_every_call_and_the_plain_module_computes_it(name):
    _, params, spec = captured(name)
    plan = smaller(params, spec)
    less = tfx.cut(params, plan)
    out = to_torch(less, plan.spec)
    assert (
        0
        < sum(x.numel() for x in tfx.tree.flatten(less).values())
        < sum(x.numel() for x in tfx.tree.flatten(params).values())
    )
    assert plan.coupling.exact[~plan.keep].all()
    for call in calls_of(name):
        inputs = tensors(out, call)
        assert_close(tfx.apply(less, plan.spec, inputs), tfx.apply(params, spec, inputs, gates=plan.gates), **CLOSE)
        assert_close(leaves(out(*call.args, **call.kwargs)), leaves(tfx.apply(less, plan.spec, inputs)), **EXACT)


@pytest.mark.parametrize("name", CASES)
def test_a_stored_network_takes_the_same_calls(name, tmp_path):
    _, params, spec = captured(name)
    plan = smaller(params, spec)
    tfx.save(tmp_path / "net.safetensors", tfx.cut(params, plan), plan.spec)
    less, again = tfx.load(tmp_path / "net.safetensors")
    assert again == plan.spec
    assert [*again.calls] == [*spec.calls]
    for copied in (copy.deepcopy(spec), dataclasses.replace(spec)):
        assert copied == spec
        assert [*copied.calls] == [*spec.calls]
    out = to_torch(less, again)
    for call in calls_of(name):
        assert_close(
            out(*call.args, **call.kwargs), to_torch(tfx.cut(params, plan), plan.spec)(*call.args, **call.kwargs)
        )


@pytest.mark.parametrize("name", CASES)
def test_derivatives_are_measured_in_the_call_that_a_batch_makes(name):
    _, params, spec = captured(name)
    coupling, out = tfx.couple(params, spec), to_torch(params, spec)

    def loss(outputs, targets):
        return sum((x.flatten(1) ** 3).sum(1) for x in leaves(outputs)) * targets

    for call in calls_of(name):
        inputs = tensors(out, call)
        count = len(next(iter(inputs.values())))
        targets = torch.ones(count, dtype=torch.float64)
        values = torch.ones(count, len(coupling), dtype=torch.float64, requires_grad=True)
        total = loss(tfx.apply(params, spec, inputs, gates=tfx.gates(coupling, values)), targets).sum()
        (expected,) = torch.autograd.grad(total, values)
        stats = tfx.measure(params, spec, (inputs, targets), coupling, loss=loss, rows=True, moments=True)
        assert_close(stats.rows, expected, rtol=1e-8, atol=1e-9)


def test_flops_and_memory_are_those_of_the_first_call():
    module = module_of("attention")
    for examples in (CASES["attention"][1], CASES["attention"][1][::-1]):
        both, (first, *_) = from_torch(module, examples=examples), examples
        alone = from_torch(module, first.args if isinstance(first, Call) else first)
        for cost in (tfx.cost.flops, tfx.cost.memory):
            assert cost(tfx.couple(*alone)).total == cost(tfx.couple(*both)).total


# Any network.


@st.composite
def masked(draw):
    """A network, and the same with a second input that scales the value of some nodes."""
    net = draw(networks())
    bounds = propagate(net.spec, Ties(labeled=False))
    inner = [n.name for n in net.spec if not isinstance(n.layer, tfx.Input) and bounds[n.name].output
             and is_example(bounds[n.name].output[0]) and n.name not in net.spec.outputs]  # fmt: skip
    hit = draw(st.lists(st.sampled_from(inner), min_size=1, max_size=2, unique=True)) if inner else []
    names, nodes = {name: f"{name}.scaled" for name in hit}, []
    shapes = {name: bounds[name].shape[1:] for name in hit}
    for node in net.spec.nodes:
        nodes.append(dataclasses.replace(node, inputs=tuple(names.get(x, x) for x in node.inputs)))
        if node.name in hit:
            nodes.append(tfx.Node(f"{node.name}.mask", tfx.Input(shapes[node.name])))
            nodes.append(tfx.Node(names[node.name], L.Multiply(), (node.name, f"{node.name}.mask")))
    return net, dataclasses.replace(net.spec, nodes=tuple(nodes)), shapes


@given(masked(), st.booleans(), st.integers(0, 2**16))
def test_a_network_with_and_without_masks_is_one_network(case, turned, seed):
    net, with_masks, shapes = case
    generator = torch.Generator().manual_seed(seed)
    x = bind_inputs(net.spec, (net.batch[0],))
    count = len(next(iter(x.values())))
    masks = {f"{name}.mask": torch.rand(count, *shape, generator=generator).double() for name, shape in shapes.items()}
    calls = [(net.spec, x), (with_masks, {**x, **masks})][:: -1 if turned else 1]
    if not masks:
        return
    params, spec = merge([(net.params, part) for part, _ in calls], [inputs for _, inputs in calls])
    assert len(spec) <= len(with_masks) + 2 * len(masks) + sum(spec.uses[name] for name in masks)
    for part, inputs in calls:
        assert_close(tfx.apply(params, spec, inputs), tfx.apply(net.params, part, inputs), **EXACT)
    coupling = tfx.couple(params, spec)
    assert len(coupling) <= len(net.coupling)  # masks have sizes that stay
    if len(coupling):
        scores = torch.rand(len(coupling), generator=generator) + 9 * ~torch.as_tensor(coupling.exact)
        plan = tfx.select(scores, coupling, budget=tfx.Units(0.6))
        if coupling.exact[~plan.keep].all():
            for _, inputs in calls:
                less = tfx.apply(tfx.cut(params, plan), plan.spec, inputs)
                assert_close(less, tfx.apply(params, spec, inputs, gates=plan.gates), **CLOSE)


def test_what_differs_stands_alone_and_the_rest_is_shared():
    _, _, spec = captured("a mask, then none")
    assert [node.name for node in spec if isinstance(node.layer, L.Choose)] == ["choose_0"]
    assert [sum(isinstance(node.layer, kind) for node in spec) for kind in (L.Linear, L.ReLU, L.BatchNorm1d)] == [
        3,
        2,
        1,
    ]
    assert [node.name for node in spec.called("x")].count("norm") == 0
    assert [node.name for node in spec.called("x", "mask")].count("norm") == 1
    assert spec.first == spec.called("x", "mask")


def test_a_default_stands_in_for_the_input():
    _, _, spec = captured("three calls")
    chosen = [node for node in spec if isinstance(node.layer, L.Choose)]
    assert any("types" in node.inputs for node in chosen)
    assert sum(isinstance(node.layer, L.Linear) for node in spec) == 6


@pytest.mark.parametrize("name", ["a mask, then none", "three calls"])
def test_every_call_is_compiled_and_exported(name):
    module, params, spec = captured(name)
    out = to_torch(params, spec)
    for call in calls_of(name):
        expected = module(*call.args, **call.kwargs)
        torch.compiler.reset()
        assert_close(torch.compile(out, backend="eager", fullgraph=True)(*call.args, **call.kwargs), expected, **CLOSE)
        for strict in (False, True):
            program = torch.export.export(out, call.args, call.kwargs, strict=strict)
            assert_close(program.module()(*call.args, **call.kwargs), expected, **CLOSE)


def test_one_call_is_a_network_of_its_own():
    module, params, spec = captured("a side input")
    part = spec.called("x")
    own = tfx.tree.restrict(params, part.shapes)
    assert "side" not in own
    out = to_torch(own, part)
    assert_close(leaves(out(X)), leaves(module(X)), **CLOSE)
    with pytest.raises(TypeError, match="extra"):
        out(X, extra=real(5, 4))


def test_a_pruned_network_takes_both_calls():
    module, params, spec = captured("attention")
    batch = ({"tokens": TOKENS, "mask": SEEN}, torch.randint(3, (4, 7), generator=torch.Generator().manual_seed(1)))

    def loss(outputs, targets):
        return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)

    less, smaller = tfx.prune(params, spec, batch, budget=tfx.Parameters(0.7), loss=loss)
    out = to_torch(less, smaller)
    for call in calls_of("attention"):
        assert out(*call.args, **call.kwargs).shape == module(*call.args, **call.kwargs).shape


# Refusals.


def test_calls_that_were_not_captured_are_refused_by_name():
    _, params, spec = captured("three calls")
    out = to_torch(params, spec)
    with pytest.raises(TypeError, match="tensors for tokens, mask, types; it was captured with those for"):
        out(TOKENS, SEEN, TYPES)
    with pytest.raises(TypeError, match="tokens: missing"):
        out(mask=SEEN)
    with pytest.raises(TypeError, match="mask: it was captured as None; received True"):
        out(TOKENS, mask=True)
    with pytest.raises(TypeError, match="there is no such argument"):
        out(TOKENS, masks=SEEN)
    with pytest.raises(tfx.ShapeError, match="received mask, tokens, types"):
        tfx.apply(params, spec, TOKENS, SEEN, TYPES)
    with pytest.raises(tfx.ShapeError, match="some of which may be left out; received 4"):
        tfx.apply(params, spec, TOKENS, SEEN, TYPES, TYPES)


@pytest.mark.parametrize("left_out", [{}, {"mask": None}])
def test_an_input_is_left_out_of_a_dict_or_given_as_none(left_out):
    module, params, spec = captured("attention")
    assert_close(tfx.apply(params, spec, {"tokens": TOKENS, **left_out}), module(TOKENS), **CLOSE)
    assert_close(tfx.apply(params, spec, (TOKENS, None)), module(TOKENS), **CLOSE)
    assert_close(to_torch(params, spec)(TOKENS, mask=None), module(TOKENS), **CLOSE)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)

    def forward(self, x, mask=None, flag=False, more=None):
        y = self.a(x)
        if mask is not None:
            return (y * mask, y) if flag else y * mask
        return y.sum(1, keepdim=True) if more is not None else y


ONES = torch.ones(5, 3)
REFUSED = {
    "flag: one value, received True and False": [Call(ONES, ONES, True), Call(ONES)],
    "one kind of outputs: in example 0 1 tensors, in example 1 2 tensors": [Call(ONES), Call(ONES, ONES, flag=True)],
    "calls with other tensors each, received mask, x twice": [Call(ONES, ONES), Call(ONES, mask=ONES)],
    "outputs of the same sizes": [Call(ONES), Call(ONES, more=ONES)],
    "x: one size and type in all examples": [Call(ONES), Call(torch.ones(5, 1, 3), torch.ones(5, 1, 3))],
}


@pytest.mark.parametrize("said", REFUSED)
def test_calls_that_one_network_cannot_stand_for_are_refused_by_name(said):
    with pytest.raises(CaptureError, match=said):
        from_torch(Several(), examples=REFUSED[said])


def test_one_call_or_several_are_captured_not_both():
    with pytest.raises(CaptureError, match="received no example"):
        from_torch(Several(), examples=[])
    with pytest.raises(CaptureError, match="received both"):
        from_torch(Several(), ONES, examples=[ONES])
    with pytest.raises(CaptureError, match="received a Tensor"):
        from_torch(Several(), examples=torch.ones(2))


def test_a_network_with_optional_inputs_is_no_part_of_another():
    _, _, spec = captured("a mask, then none")
    with pytest.raises(tfx.SpecError, match="some of '0' may be left out"):
        tfx.serial(spec)


@pytest.mark.parametrize(
    ("calls", "of", "said"),
    [((True, False, True), (0, 1), "mask [(]3[)], y [(]2[)]"), ((True, True), (0, 1), "received two with x, mask")],
)
def test_nodes_agree_about_the_calls(calls, of, said):
    nodes = [tfx.Node("x", tfx.Input((3,))), tfx.Node("mask", tfx.Input((3,), calls=calls))]
    nodes.append(tfx.Node("y", L.Choose(of), ("x", "mask")))
    with pytest.raises(ValueError, match=said):
        tfx.Spec(tuple(nodes))


def test_a_choice_without_calls_is_refused():
    nodes = tfx.Node("x", tfx.Input((3,))), tfx.Node("r", L.ReLU(), "x"), tfx.Node("y", L.Choose((0, 1)), ("r", "x"))
    with pytest.raises(tfx.ShapeError, match="has none that may be left out"):
        tfx.apply({}, tfx.Spec(nodes), torch.ones(2, 3))
    with pytest.raises(tfx.ShapeError, match="from 0; received"):
        L.Choose((1, 2))


# Containers.


@dataclasses.dataclass
class Parts:
    x: torch.Tensor
    mask: typing.Any = None


@dataclasses.dataclass
class Result:
    y: torch.Tensor
    mask: typing.Any = None
    hidden: typing.Any = None


for kind in (Parts, Result):
    torch.export.register_dataclass(kind, serialized_type_name=kind.__name__)


class Classes(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 6), nn.Linear(6, 2)

    def forward(self, parts, scale=1.0):
        x = self.a(parts.x).relu() * scale
        x = x if parts.mask is None else x * parts.mask
        return Result(self.b(x), None, {"last": [x]})


def test_dataclasses_dicts_and_none_go_in_and_out():
    module = Classes().double().eval()
    calls = [Call(Parts(X, MASK)), Call(Parts(X))]
    params, spec = from_torch(module, examples=calls)
    out = to_torch(params, spec)
    assert spec.keys == ("y", "hidden.last.0")
    for call in calls:
        expected, outputs = module(*call.args), out(*call.args)
        assert_close(outputs, {"y": expected.y, "hidden.last.0": expected.hidden["last"][0]}, **CLOSE)
    with pytest.raises(TypeError, match=r"scale: it was captured as 1[.]0; received 2[.]0"):
        out(Parts(X), scale=2.0)
    with pytest.raises(TypeError, match=r"parts.x: it was captured as a tensor; received none"):
        out(Parts(None, MASK))

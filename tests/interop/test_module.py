"""What a module is beyond its computation comes back with it: its call, its ties, what it trains, its class."""

import copy
import dataclasses
import inspect
import itertools
import json
import pickle
import typing

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import from_torch, to_torch
from taylorfx.network.interface import Argument, Interface


def halved(params, spec):
    """Half of the units leave."""
    coupling = tfx.couple(params, spec)
    plan = tfx.select(torch.arange(float(len(coupling))), coupling, budget=tfx.Units(0.5))
    return tfx.cut(params, plan), plan.spec


# The call.


class Called(nn.Module):
    """Tensors, numbers and containers, by position and by name."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x, mask=None, by=1.0, *, parts=None, flag=False, dtype=torch.float32):
        x = self.a(x).relu() * by
        if mask is not None:
            x = x * mask
        if parts is not None:
            x = x + parts["left"] + parts["right"][0]
        return -self.b(x) if flag else self.b(x)


X, MASK = torch.randn(5, 3), torch.randn(5, 4)
PARTS = {"left": torch.randn(5, 4), "right": [torch.randn(5, 4)]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("apart", [False, True])
def test_every_way_to_call_the_module_calls_what_comes_back(masked, apart):
    module = Called().eval()
    given = {"x": X, "mask": MASK if masked else None, "by": 2.0, "parts": PARTS if apart else None, "flag": True}
    out = to_torch(*from_torch(module, (), example_kwargs=given))
    expected = module(**given)
    own, theirs = (list(inspect.signature(m.forward).parameters.values()) for m in (module, out))
    assert [(p.name, p.kind) for p in own] == [(p.name, p.kind) for p in theirs]
    assert inspect.signature(out.forward).parameters["by"].default == 2.0
    for count in range(4):  # so many by position, the rest by name
        names = list(given)
        args = [given[name] for name in names[:count]]
        assert_close(out(*args, **{name: given[name] for name in names[count:]}), expected)
    for left in itertools.product([False, True], repeat=3):  # what holds a value may be left out
        some = {name: x for name, x in given.items() if not (name in ("by", "flag") and left[0])}
        some = {name: x for name, x in some.items() if not (x is None and left[1])}
        assert_close(out(**some), expected)
    again = to_torch(*from_torch(out, (), example_kwargs={k: x for k, x in given.items() if x is not None}))
    assert_close(again(**given), expected)


@pytest.mark.parametrize(
    ("args", "kwargs", "messages"),
    [
        ((X,), {"mask": MASK}, [r"mask: it was captured as None; received a tensor of shape \(5, 4\)"]),
        ((X,), {"anything": 3}, ["anything: there is no such argument; received 3"]),
        ((X,), {"anything": None}, ["anything: there is no such argument; received None"]),
        ((X, None, 1.0, 4), {}, ["argument 3: there is no such argument"]),
        ((X,), {"x": X}, ["x: it is given by position and by name"]),
        ((), {"mask": None}, ["x: missing; it was captured as a tensor"]),
        ((3.0,), {}, ["x: it was captured as a tensor; received float"]),
        (((X, X),), {}, ["x: it was captured as a tensor; received none", r"x\.0: it was not captured"]),
        (
            (X,),
            {"by": 2.0, "flag": True},
            ["by: it was captured as 1.0; received 2.0", "flag: .* False; received True"],
        ),
        ((X,), {"parts": PARTS}, [r"parts\.left: it was not captured", r"parts\.right\.0: it was not captured"]),
    ],
)
def test_what_was_not_captured_is_refused_by_name_all_at_once(args, kwargs, messages):
    out = to_torch(*from_torch(Called().eval(), X))
    with pytest.raises(TypeError) as caught:
        out(*args, **kwargs)
    for message in ["The network takes what was captured with it", *messages, "Leave it out, or capture"]:
        caught.match(message)
    assert_close(out(X, mask=None, by=1.0, dtype=torch.float32), out(X))


def test_an_argument_that_was_captured_as_a_tensor_is_demanded():
    out = to_torch(*from_torch(Called().eval(), (X, MASK), example_kwargs={"parts": PARTS}))
    with pytest.raises(
        TypeError, match=r"(?s)mask: missing.*parts\.right\.0: it was captured as a tensor; received int"
    ):
        out(X, parts={"left": MASK, "right": [3]})
    assert inspect.signature(out.forward).parameters["mask"].default is None


def test_arguments_of_any_number_are_taken_and_their_number_is_fixed():
    class Any(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 2)

        def forward(self, x, *others, by=2.0, **more):
            return self.a(x + sum(others)) * by

    module = Any().eval()
    out = to_torch(*from_torch(module, (X, 2 * X, 3 * X)))
    assert str(inspect.signature(out.forward)) == "(x, *others, by=2.0, **more)"
    assert_close(out(X, X, X), module(X, X, X))
    with pytest.raises(TypeError, match=r"(?s)others\.2: it was not captured.*name: it was not captured; received 3"):
        out(X, X, X, X, name=3)


def test_a_network_that_was_not_captured_has_an_argument_for_every_input():
    nodes = (tfx.Node("x.left", tfx.Input((3,))), tfx.Node("class", tfx.Input((3,))))
    spec = tfx.Spec((*nodes, tfx.Node("add", L.Add(), ("x.left", "class"))))
    out = to_torch({}, spec)
    assert str(inspect.signature(out.forward)) == "(x_left, class_)"
    assert_close(out(X, class_=X), 2 * X)
    with pytest.raises(TypeError, match="class_: missing"):
        out(X)


@pytest.mark.parametrize("strict", [False, True])
def test_what_comes_out_is_exported_and_compiled_with_its_own_arguments(strict):
    module = Called().eval()
    out = to_torch(*from_torch(module, (X, MASK, 2.0), example_kwargs={"parts": PARTS}))
    batch = torch.export.Dim("batch", min=1)
    shapes = {"x": {0: batch}, "mask": {0: batch}, "parts": {"left": {0: batch}, "right": [{0: batch}]}}
    program = torch.export.export(out, (X, MASK), {"parts": PARTS}, dynamic_shapes=shapes, strict=strict)
    few = {"left": PARTS["left"][:2], "right": [PARTS["right"][0][:2]]}
    assert_close(program.module()(X[:2], MASK[:2], parts=few), module(X[:2], MASK[:2], 2.0, parts=few))
    compiled = torch.compile(out, fullgraph=True, backend="eager")
    assert_close(compiled(X, mask=MASK, parts=PARTS), module(X, MASK, 2.0, parts=PARTS))
    plain = to_torch(*from_torch(nn.Linear(3, 2), X))
    torch.export.export(plain, (X,), dynamic_shapes=({0: batch},), strict=strict)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_is_called_as_the_original_is(copied):
    out = to_torch(*from_torch(Called().eval(), (X, MASK)))
    again = copied(out)
    assert type(again) is type(out)
    assert isinstance(again, type(to_torch({}, tfx.serial(tfx.Input((3,)), a=L.ReLU()))).__base__)
    assert inspect.signature(again.forward) == inspect.signature(out.forward)
    assert_close(again(X, mask=MASK), out(X, MASK))


def test_it_comes_out_in_inference_mode():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    x = torch.randn(4, 3, 2, 2)
    for mode in (False, True):
        out = to_torch(*from_torch(module.train(mode), x))
        assert not any(part.training for part in out.modules())
        assert all(part.training is mode for part in to_torch(*from_torch(module, x), like=module).modules())


def test_a_model_of_transformers_is_called_as_itself():
    pytest.importorskip("transformers")
    from _torchvision import library

    if __import__("importlib").util.find_spec("torchvision"):
        library()
    import transformers as t

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
    config = t.LlamaConfig(**sizes, vocab_size=60, max_position_embeddings=16, tie_word_embeddings=True)
    module, tokens = t.LlamaForCausalLM(config).eval(), torch.arange(21).reshape(3, 7)
    out = to_torch(*(network := from_torch(module, {"input_ids": tokens})))
    assert list(inspect.signature(out.forward).parameters) == list(inspect.signature(module.forward).parameters)
    assert out.state_dict().keys() == module.state_dict().keys()
    assert out.lm_head.weight is out.model.embed_tokens.weight
    expected = module(tokens).logits
    for found in (out(tokens), out(input_ids=tokens, attention_mask=None), to_torch(*network, like=module)(tokens)):
        assert_close(found["logits"], expected)
    with pytest.raises(TypeError, match="labels: it was captured as None; received a tensor"):
        out(tokens, labels=tokens)


# Ties.


class Tied(nn.Module):
    """One parameter, one buffer and one submodule, each under two names."""

    def __init__(self):
        super().__init__()
        self.emb, self.mid, self.head = nn.Embedding(50, 16), nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.head.weight = self.emb.weight
        self.norm = nn.BatchNorm1d(16)
        self.again = self.norm
        self.register_buffer("scale", torch.rand(16))
        self.mid.register_buffer("same", self.scale)
        self.register_buffer("passing", torch.rand(16), persistent=False)

    def forward(self, ids):
        x = self.mid(self.emb(ids)) * self.scale + self.passing
        x = self.again(self.norm(x.transpose(1, 2))).transpose(1, 2)
        return self.head((x * self.mid.same).relu())


def ties(module):
    assert module.head.weight is module.emb.weight
    assert module.norm.weight is module.again.weight
    assert module.norm.running_mean is module.again.running_mean
    assert module.mid.same is module.scale


def test_names_that_share_a_tensor_share_it_wherever_the_module_goes(tmp_path):
    module, ids = Tied().eval(), torch.randint(50, (4, 7))
    params, spec = from_torch(module, ids)
    tfx.save(tmp_path / "net.safetensors", params, spec)
    for network in ((params, spec), tfx.load(tmp_path / "net.safetensors"), halved(params, spec)):
        out = to_torch(*network)
        assert out.state_dict().keys() == module.state_dict().keys()
        expected = tfx.apply(*network, ids)
        copies = [out, copy.deepcopy(out), pickle.loads(pickle.dumps(out)), to_torch(*network, like=module)]
        copies.append(to_torch(*network).requires_grad_(False))
        copies[-1].load_state_dict({name: torch.zeros_like(x) for name, x in out.state_dict().items()})
        copies[-1].load_state_dict(out.state_dict())
        for other in copies:
            ties(other)
            assert_close(other(ids), expected)
            assert_close(other.state_dict(), out.state_dict())
        weights = [p for p in out.parameters() if p.shape == out.emb.weight.shape]
        assert len(weights) == 1, "one parameter, which an optimizer sees once"
        moved = out.double()
        assert moved.head.weight is moved.emb.weight
        assert moved.norm.running_mean is moved.again.running_mean
        moved.train()(ids)
        assert_close(moved.state_dict()["again.running_mean"], moved.state_dict()["norm.running_mean"])


def test_a_tied_weight_trains_as_one():
    module, ids = Tied(), torch.randint(50, (4, 7))
    out = to_torch(*from_torch(module, ids)).train()
    for m in (module.train(), out):
        m(ids).square().mean().backward()
    assert_close(out.emb.weight.grad, module.emb.weight.grad)
    assert_close(out.state_dict()["norm.running_var"], module.state_dict()["norm.running_var"])


# What is trained.


def test_frozen_parameters_stay_frozen_to_the_end(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 2, 1))
    module[0].requires_grad_(False)
    module[1].bias.requires_grad_(False)
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    x = torch.randn(4, 3, 2, 2)
    params, spec = from_torch(module, x)
    small = halved(params, spec)
    tfx.save(tmp_path / "net.safetensors", *small)
    for network in ((params, spec), small, tfx.load(tmp_path / "net.safetensors"), tfx.fold(*small)):
        for out in (to_torch(*network), *([to_torch(*network, like=module)] if "1" in network[0] else [])):
            found = {name for name, p in out.named_parameters() if not p.requires_grad}
            assert found == {name for name in frozen if name in tfx.tree.flatten(network[0])}
            assert not any(name in dict(out.named_buffers()) for name in frozen)
        trained, rest = tfx.partition(*network)
        assert not frozen & set(tfx.tree.flatten(trained))
        assert not any(name in frozen for name in tfx.tree.flatten(trained))
        assert_close(tfx.tree.flatten(tfx.tree.combine(trained, rest)), tfx.tree.flatten(network[0]))


def test_a_frozen_parameter_does_not_move_in_training():
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    module[0].requires_grad_(False)
    x = torch.randn(4, 3, 2, 2)
    out = to_torch(*from_torch(module, x)).train()
    optimizer = torch.optim.SGD([p for p in out.parameters() if p.requires_grad], lr=0.1)
    before = copy.deepcopy(out.state_dict())
    out(x).square().mean().backward()
    optimizer.step()
    still = {name for name, tensor in out.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {"0.weight", "0.bias"}


def test_complex_parameters_are_trained():
    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.w = nn.Linear(3, 4), nn.Parameter(torch.randn(4, dtype=torch.complex64))

        def forward(self, x):
            return (self.a(x) * self.w).abs()

    out = to_torch(*from_torch(Complex().eval(), X))
    assert "w" in dict(out.named_parameters())


# The class.


class Auxiliary(nn.Module):
    """A head of training alone, and a method that inference does not call."""

    def __init__(self):
        super().__init__()
        self.c, self.o, self.aux = nn.Linear(3, 16), nn.Linear(16, 5), nn.Linear(16, 5)
        self.extra = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        h = self.c(x).relu()
        return (self.o(h), self.aux(h)) if self.training else self.o(h)

    def embed(self, x):
        return self.c(x) + self.extra


def test_parameters_that_are_not_captured_are_said_and_never_left_at_their_old_size():
    module = Auxiliary().eval()
    with pytest.warns(UserWarning, match=r"Auxiliary does not use .*: extra, aux\.weight, aux\.bias\."):
        params, spec = from_torch(module, X)
    like = to_torch(params, spec, like=module)  # nothing was cut
    assert like.train()(X)[1].shape == (5, 5)
    small = halved(params, spec)
    with pytest.raises(tfx.interop.LikeError, match=r"extra, aux\.weight, aux\.bias\. .* unchanged=\['extra', 'aux'\]"):
        to_torch(*small, like=module)
    with pytest.raises(tfx.interop.LikeError, match=r"sizes: extra\. "):
        to_torch(*small, like=module, unchanged=["aux"])
    with pytest.raises(tfx.interop.LikeError, match="has no 'au'"):
        to_torch(*small, like=module, unchanged=["au"])
    with pytest.raises(tfx.interop.LikeError, match="The embed of Auxiliary does not run"):
        to_torch(*small, like=module, unchanged=["extra", "aux"])
    out = to_torch(*small, like=module, unchanged=["extra", "aux", "embed"])
    assert out.c.out_features == 8
    assert out.aux.in_features == 16
    assert_close(out(X), tfx.apply(*small, X))


@pytest.mark.parametrize("by", [2, 2.5, True, None, "twice", "x"])
def test_sizes_stay_open_beside_arguments_that_are_no_tensors(by):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv1d(3, 2, 1)

        def forward(self, x, by=1.0, *, parts=None):
            x = self.a(x) * (by if isinstance(by, (int, float)) else 2 if by is None else 3)
            return x * parts["factor"]

    module, x = Scaled().eval(), torch.randn(2, 3, 7)
    given = {"by": by, "parts": {"factor": 3}}
    params, spec = from_torch(module, x, example_kwargs=given)
    assert spec.input_layers["x"].ranges == ((3, 3, 1), (1, None, 1))
    longer = torch.randn(2, 3, 9)
    assert_close(tfx.apply(params, spec, longer), module(longer, **given))


class Reads(nn.Module):
    """Tokens, with a mask of whole numbers and one of truth values, one of them by name alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Embedding(5, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, ids, mask, scale=1.0, *, keep, parts=None):
        x = self.b(self.a(ids)).relu() * mask[..., None] * scale
        return self.c(torch.where(keep[..., None], x, 0) + parts["bias"][0][..., None])


def test_the_class_of_a_network_of_tokens_is_proven_without_an_example():
    module, ids = Reads().eval(), torch.randint(5, (4, 7))
    parts = {"bias": [torch.randn(4, 7)]}
    given = {"mask": torch.ones_like(ids), "keep": ids > 2, "scale": 3.0, "parts": parts}
    params, spec = from_torch(module, ids, example_kwargs=given)
    dtypes = {node.name: node.layer.dtype for node in spec.inputs}
    assert list(dtypes.values()) == ["int64", "int64", "bool", None]
    assert {node.name: node.layer.dtype for node in spec.at(*[(7,)] * 4).inputs} == dtypes
    assert {layer.ranges for layer in spec.input_layers.values()} == {((1, None, 1),)}
    small = halved(params, spec)
    for out in (to_torch(*small, like=module), to_torch(*small, like=module, example_inputs=ids, example_kwargs=given)):
        assert type(out) is Reads
        assert_close(out(ids, **given), to_torch(*small)(ids, **given))
    del given["scale"]  # its value is part of the network, whatever the class has for a default
    assert_close(to_torch(*small, like=module, example_inputs=ids, example_kwargs=given)(ids, scale=3.0, **given),
                 to_torch(*small)(ids, **given))  # fmt: skip
    with pytest.raises(tfx.interop.LikeError, match=r"(?s)as it was captured.*keep: missing"):
        to_torch(*small, like=module, example_inputs=(ids, ids))
    with pytest.raises(tfx.ShapeError, match="received 'load'"):
        tfx.Input((3,), dtype="load")


@pytest.mark.skipif(not hasattr(typing, "get_overloads"), reason="overloads are kept since Python 3.11")
def test_the_type_checker_knows_the_class_that_comes_back():
    hints = [typing.get_type_hints(f) for f in typing.get_overloads(to_torch)]
    assert isinstance(hints[0]["return"], typing.TypeVar)
    assert hints[0]["like"] is hints[0]["return"]
    assert hints[0]["return"].__bound__ is nn.Module
    assert issubclass(hints[1]["return"], nn.Module)


# On disk.


def test_an_interface_is_the_same_after_json():
    module = Called().eval()
    _, spec = from_torch(module, (X, MASK, 2.0), example_kwargs={"parts": PARTS})
    assert spec.interface.arguments[3].inputs == (("left", "parts_left"), ("right.0", "parts_right_0"))
    assert spec.interface.arguments[2] == Argument("by", default=(2.0,), fixed=(("", 2.0),))
    assert tfx.from_json(tfx.to_json(spec)) == spec
    assert Interface.from_data(json.loads(json.dumps(dataclasses.asdict(spec.interface)))) == spec.interface


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"other": []}, "interface has no field 'other'"),
        ({"arguments": 3}, "arguments is a list; received 3"),
        ({"arguments": [3]}, "entries with a name; received 3"),
        ({"arguments": [{"name": "x", "kin": 3}]}, "no field 'kin'"),
        ({"arguments": [{"name": "x y"}]}, "names and kinds of Python's; received 'x y'"),
        ({"arguments": [{"name": "x", "kind": "FAST"}]}, "'FAST'"),
        ({"arguments": [{"name": "x", "inputs": [["", 3]]}]}, r"a place and a node in inputs; received \['', 3\]"),
        ({"arguments": [{"name": "x", "fixed": [["", []]]}]}, "a place and a plain value in fixed"),
        ({"arguments": [{"name": "x", "default": [1, 2]}]}, "at most one plain value"),
        ({"arguments": [{"name": "x"}, {"name": "x"}]}, "duplicate parameter name"),
        ({"ties": [["a"]]}, r"interface\.ties has pairs of names; received \['a'\]"),
        ({"frozen": [3]}, r"interface\.frozen has names; received 3"),
    ],
)
def test_an_interface_of_another_kind_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        Interface.from_data(data)

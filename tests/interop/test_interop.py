"""Modules captured by `from_torch`: right or frozen, never wrong; and given back by `to_torch`."""

import copy
import dataclasses
import pickle

import pytest
import torch
from hypothesis import given, settings
from modules import MODULES, captured
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import CaptureError, from_torch, to_torch
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import networks, random_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


@pytest.mark.parametrize("name", MODULES)
def test_a_captured_module_is_right_or_frozen(name):
    (module, x, params, spec), units = captured(name), MODULES[name][2]
    assert_close(tfx.apply(params, spec, x), module(x), **CLOSE)
    assert set(tfx.tree.flatten(params)) >= {path for path, _ in module.named_parameters() if path in spec.shapes}
    assert tfx.from_json(tfx.to_json(spec)) == spec
    coupling = tfx.couple(params, spec)
    assert len(coupling) == units, f"{coupling}\n{spec}"
    for seed in range(4):
        plan = random_plan(coupling, torch.Generator().manual_seed(seed), exact=True)
        small = tfx.cut(params, plan)
        assert_close(tfx.apply(small, plan.spec, x), tfx.apply(params, spec, x, gates=plan.gates), **CLOSE)
        assert_close(to_torch(small, plan.spec).eval()(x), tfx.apply(small, plan.spec, x), **CLOSE)
        everything = random_plan(coupling, torch.Generator().manual_seed(seed), 0.9)
        trained = to_torch(tfx.cut(params, everything), everything.spec).train()
        trained(x).sum().backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in trained.parameters())
    targets = torch.tensor([0, 1, 0])
    stats = tfx.measure(params, spec, (x, targets), coupling)
    alone = [tfx.measure(params, spec, (x[k : k + 1], targets[k : k + 1]), coupling) for k in range(3)]
    assert_close(sum(alone).sum_sq, stats.sum_sq, **CLOSE)


@settings(max_examples=12)
@given(networks())
def test_a_network_comes_back_from_a_module_with_its_units(net):
    inputs = tuple(net.batch[0].values())
    params, spec = from_torch(to_torch(net.params, net.spec).eval(), inputs)
    assert_close(tfx.apply(params, spec, inputs), tfx.apply(net.params, net.spec, inputs), **CLOSE)
    coupling = tfx.couple(params, spec)
    assert len(coupling) == len(net.coupling), f"{coupling}\n{net.coupling}"
    plan = random_plan(coupling, torch.Generator().manual_seed(0), exact=True)
    small = tfx.apply(tfx.cut(params, plan), plan.spec, inputs)
    assert_close(small, tfx.apply(params, spec, inputs, gates=plan.gates), **CLOSE)


class Folded(nn.Module):
    """Examples folded with tokens, heads and time, as packed attention and recurrent code does."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mlp = nn.Linear(8, 6)
        self.head = nn.Linear(24, 2)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        tokens = x.reshape(-1, 8)
        return self.head(self.mlp(tokens).relu().view(x.shape[0], -1))


def test_examples_are_followed_wherever_they_are_folded():
    module = Folded().double().eval()
    x, targets = torch.randn(5, 4, 3, dtype=torch.float64), torch.randint(2, (5,))
    params, spec = from_torch(module, x)
    assert_close(tfx.apply(params, spec, x), module(x), **CLOSE)
    coupling = tfx.couple(params, spec)
    assert not coupling.mixing
    places = {place.example for place in coupling.reads}
    assert len(places) > 1, "some reads have their examples elsewhere than in front"
    values = torch.ones(5, len(coupling), dtype=torch.float64)

    def losses(values):
        output = tfx.apply(params, spec, x, gates=tfx.gates(coupling, values))
        return nn.functional.cross_entropy(output, targets, reduction="none").sum()

    rows = tfx.derivatives(params, spec, x, targets, coupling)[1]
    assert_close(rows, torch.func.grad(losses)(values), **CLOSE)
    for k in range(5):
        assert_close(rows[k : k + 1], tfx.derivatives(params, spec, x[k : k + 1], targets[k : k + 1], coupling)[1])


def test_the_module_is_left_as_it_was():
    module = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(18, 2))
    module[0].eval()
    modes = [part.training for part in module.modules()]
    state = {name: (t.clone(), t._version, t.data_ptr()) for name, t in module.state_dict().items()}
    params, _ = from_torch(module, torch.randn(2, 1, 3, 3))
    assert [part.training for part in module.modules()] == modes
    for name, tensor in module.state_dict().items():
        copied, version, place = state[name]
        assert torch.equal(tensor, copied)
        assert (tensor._version, tensor.data_ptr()) == (version, place)
        assert tfx.tree.flatten(params)[name].data_ptr() == place


def test_what_comes_out_has_the_names_and_values_of_what_went_in():
    module = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.PReLU(), nn.Flatten(), nn.Linear(27, 2)).eval()
    x = torch.randn(4, 1, 5, 5)
    params, spec = from_torch(module, x)
    out = to_torch(params, spec)
    assert out.state_dict().keys() == module.state_dict().keys()
    out.load_state_dict(module.state_dict())
    for mode in (False, True):
        assert_close(out.train(mode)(x), module.train(mode)(x))
    assert_close(out.state_dict()["1.running_mean"], module.state_dict()["1.running_mean"])
    assert int(out.state_dict()["1.num_batches_tracked"]) == 1
    again, same = from_torch(out.eval(), x)
    assert_trees_equal(again, out.tree())
    assert [node.layer for node in same] == [node.layer for node in spec]


def test_what_comes_out_lives_as_a_module_does():
    _, x, params, spec = captured("squeeze and excitation")
    out = to_torch(params, spec).eval()
    expected = out(x)
    for other in (copy.deepcopy(out), pickle.loads(pickle.dumps(out))):
        assert_close(other(x), expected)
    assert out.float()(x.float()).dtype == torch.float32
    out = out.double()
    assert_close(torch.compile(out, fullgraph=True, backend="aot_eager")(x), expected, **CLOSE)
    program = torch.export.export(out, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    assert_close(program.module()(x[:2]), expected[:2], **CLOSE)
    optimizer = torch.optim.SGD(out.train().parameters(), lr=0.1)
    before = out(x).square().mean()
    before.backward()
    optimizer.step()
    assert out(x).square().mean() < before


def test_several_inputs_and_outputs_come_by_name():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.fc = nn.Embedding(7, 4), nn.Linear(3, 4)
            self.one, self.two = nn.Linear(4, 2), nn.Linear(4, 5)

        def forward(self, tokens, extra):
            x = self.embed(tokens).mean(1) + self.fc(extra)
            return {"one": self.one(x), "two": self.two(x)}

    module = Two().eval()
    tokens, extra = torch.randint(7, (3, 6)), torch.randn(3, 3)
    params, spec = from_torch(module, (tokens,), example_kwargs={"extra": extra})
    assert [node.name for node in spec.inputs] == ["tokens", "extra"]
    assert_close(tfx.apply(params, spec, {"extra": extra, "tokens": tokens}), module(tokens, extra))
    assert_close(to_torch(params, spec).eval()(tokens, extra), module(tokens, extra))
    _, same = from_torch(to_torch(params, spec).eval(), (tokens, extra))
    assert (same.keys, same.outputs) == (spec.keys, spec.outputs)
    assert tfx.from_json(tfx.to_json(spec)) == spec
    assert len(tfx.couple(params, spec)) == 4


def test_arguments_that_are_no_tensors_are_part_of_the_network():
    class Optional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 4)

        def forward(self, x, mask=None, by=1.0, flag=True):
            x = self.a(x) * by
            return (x if mask is None else x * mask) if flag else -x

    module, x = Optional().eval(), torch.randn(5, 3)
    for arguments in ((x, None, 2.0, False), (x, torch.randn(5, 4), 3.0)):
        params, spec = from_torch(module, arguments)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        assert_close(tfx.apply(params, spec, *tensors), module(*arguments))


def test_a_name_in_the_spec_is_the_modules_own():
    _, _, _, spec = captured("residual projection")
    assert [node.name for node in spec if node.layer.shapes()] == ["a", "b", "s", "head"]


@dataclasses.dataclass
class Out:
    """What `Named` gives out: some of it nested, one of it twice."""

    logits: torch.Tensor
    states: tuple[torch.Tensor, ...]
    nothing: None = None


torch.utils._pytree.register_dataclass(Out)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.a(x).relu()
        return Out(self.b(x), (x, 2 * x, x))


def test_a_dataclass_comes_out_as_a_dict_and_a_tuple_as_a_tuple():
    module, x = Named().eval(), torch.randn(5, 3)
    params, spec = from_torch(module, x)
    out = module(x)
    expected = {"logits": out.logits, "states.0": out.states[0], "states.1": out.states[1], "states.2": out.states[2]}
    assert_close(tfx.apply(params, spec, x), expected)
    stats = tfx.measure(params, spec, (x, torch.randint(2, (5,))), tfx.couple(params, spec), loss=picked)
    assert stats.n == 5
    with pytest.raises(ValueError, match="received dict"):
        tfx.measure(params, spec, (x, torch.randint(2, (5,))), tfx.couple(params, spec))
    module.forward = lambda x: (module.b(x := module.a(x)), x, x)
    params, spec = from_torch(module, x)
    assert [tuple(y.shape) for y in tfx.apply(params, spec, x)] == [(5, 2), (5, 4), (5, 4)]


def picked(outputs, targets):
    return nn.functional.cross_entropy(outputs["logits"], targets)


class Loop(nn.Module):
    """Made for as many examples as it is captured with."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(torch.stack([self.a(x[k]) for k in range(x.shape[0])]).relu())


def test_a_module_for_a_fixed_number_of_examples_is_captured_for_one_at_a_time():
    module, x = Loop().double().eval(), torch.randn(3, 4, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one example at a time"):
        params, spec = from_torch(module, x)
    assert tfx.from_json(tfx.to_json(spec)) == spec
    coupling = tfx.couple(params, spec)
    assert len(coupling) == 6
    assert coupling.mixing
    plan = random_plan(coupling, torch.Generator().manual_seed(0))
    for k in range(3):
        one = x[k : k + 1]
        assert_close(tfx.apply(params, spec, one), module(one), **CLOSE)
        assert_close(
            tfx.apply(tfx.cut(params, plan), plan.spec, one), tfx.apply(params, spec, one, gates=plan.gates), **CLOSE
        )
    targets = torch.tensor([0, 1, 2])
    rows = tfx.derivatives(params, spec, x, targets, coupling)[1]
    whole = tfx.serial(tfx.Input((4,)), a=L.Linear(4, 6), relu=L.ReLU(), b=L.Linear(6, 3))
    assert_close(rows, tfx.derivatives(params, whole, x, targets, tfx.couple(params, whole))[1], **CLOSE)
    assert_close(tfx.apply(params, spec, x), module(x), **CLOSE)  # one after the other
    with pytest.raises(tfx.ShapeError, match="one example at a time"):
        tfx.train(params, spec, x)


def test_a_rule_from_outside_says_what_an_operator_becomes():
    @torch.library.custom_op("taylorfx_tests::bend", mutates_args=())
    def bend(x: torch.Tensor, by: float) -> torch.Tensor:
        return x * x.sigmoid() * by

    bend.register_fake(lambda x, by: torch.empty_like(x))

    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return grad * ctx.by * (s + x * s * (1 - s)), None

    def setup(ctx, inputs, output):
        ctx.by = inputs[1]
        ctx.save_for_backward(inputs[0])

    bend.register_autograd(backward, setup_context=setup)

    class Bent(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.b(bend(self.a(x), 2.0))

    module, x = Bent().eval(), torch.randn(5, 3)
    params, spec = from_torch(module, x)
    assert_close(tfx.apply(params, spec, x), module(x))
    coupling = tfx.couple(params, spec)
    assert not len(coupling)
    assert "taylorfx_tests.bend" in coupling.frozen["a"]

    @tfx.interop.rule("taylorfx_tests::bend")
    def _(x, by):
        assert x == tfx.interop.Value((1, 4), 0)
        return L.Elementwise("taylorfx_tests.bend.default", (("$", 0), by))

    params, spec = from_torch(module, x)
    assert_close(tfx.apply(params, spec, x), module(x))
    coupling = tfx.couple(params, spec)
    assert len(coupling) == 4
    plan = random_plan(coupling, torch.Generator().manual_seed(0))
    assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, x), tfx.apply(params, spec, x, gates=plan.gates))
    with pytest.raises(ValueError, match="namespace::name"):
        tfx.interop.rule("bend")


class Sized(nn.Module):
    """Its forward has a size written down."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.b(self.a(x).view(-1, 2, 3).flatten(1))


class Scaled(Sized):
    """Its forward runs with any size, and computes something else."""

    def forward(self, x):
        return self.b(self.a(x)) / self.a.out_features**0.5


def test_the_users_own_class_comes_back_with_smaller_layers():
    module = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.PReLU(8), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1),
        nn.GroupNorm(2, 4), nn.Flatten(), nn.Linear(64, 2),
    ).train()  # fmt: skip
    x = torch.randn(3, 1, 8, 8)
    params, spec = from_torch(module, x)
    state = copy.deepcopy(module.state_dict())
    plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(0))
    small = tfx.cut(params, plan)
    out = to_torch(small, plan.spec, like=module)
    assert type(out) is nn.Sequential
    assert out.training
    assert_trees_equal(module.state_dict(), state)
    assert_close(copy.deepcopy(out).eval()(x), tfx.apply(small, plan.spec, x))
    convolution = out[0]
    assert convolution.out_channels == len(convolution.weight) == out[1].num_features == out[3].groups
    assert out[7].in_features == out[7].weight.shape[1]
    assert all(p.requires_grad and p.is_leaf for p in out.parameters())
    out(x).sum().backward()


@pytest.mark.parametrize(("kind", "message"), [(Sized, "does not run"), (Scaled, "computes something else")])
def test_a_class_that_has_sizes_written_down_is_refused(kind, message):
    module, x = kind().eval(), torch.randn(3, 4)
    params, spec = from_torch(module, x)
    coupling = tfx.couple(params, spec)
    plan = tfx.select(torch.arange(float(len(coupling))), coupling, budget=len(coupling) - 1)
    with pytest.raises(tfx.interop.LikeError, match=message):
        to_torch(tfx.cut(params, plan), plan.spec, like=module, example_inputs=x)
    with pytest.raises(tfx.interop.LikeError, match=r"has no a\.weight"):
        to_torch(params, spec, like=nn.ReLU())


def test_what_comes_out_goes_to_onnx_and_computes_the_same_there(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    for name in ("squeeze and excitation", "attention by hand", "channel shuffle"):
        _, x, params, spec = captured(name)
        plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(0))
        out, x = to_torch(tfx.cut(params, plan), plan.spec).eval().float(), x.float()
        shapes = ({0: torch.export.Dim.DYNAMIC},)
        torch.onnx.export(out, (x,), tmp_path / "m.onnx", dynamo=True, dynamic_shapes=shapes, verbose=False)
        session = runtime.InferenceSession(str(tmp_path / "m.onnx"))
        for batch in (x, x[:2]):
            found = session.run(None, {session.get_inputs()[0].name: batch.numpy()})[0]
            assert_close(torch.from_numpy(found), out(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("module", "example", "message"),
    [
        (lambda x: x, torch.zeros(1), "captures a torch.nn.Module; received function"),
        (nn.Linear(2, 2), (), "received no tensor"),
        (nn.Linear(2, 2), torch.zeros(2, 3), "cannot capture Linear"),
        (nn.Linear(2, 2).half(), torch.zeros(2, 2), r"input 0: torch\.float32, the module torch\.float16"),
        (nn.Linear(2, 2), torch.zeros(2, 2, device="meta"), "one device .* cpu: weight, bias; meta: input 0"),
        (nn.Bilinear(2, 2, 2), (torch.zeros(3, 2), torch.zeros(4, 2)), "input 0 has 3, input 1 has 4"),
        (nn.Linear(2, 2), torch.tensor(1.0), "input 0: has no axis of examples"),
        (nn.Linear(2, 2), torch.zeros(2, 2).to_sparse(), r"input 0: Tensor \(sparse_coo\)"),
        (nn.LazyLinear(2), torch.zeros(2, 2), "weight: UninitializedParameter"),
        (nn.Linear(2, 2), torch.quantize_per_tensor(torch.zeros(2, 2), 1.0, 0, torch.quint8), "quantized"),
    ],
)
def test_what_cannot_be_captured_is_refused(module, example, message):
    with pytest.raises(CaptureError, match=message):
        from_torch(module, example)


def test_pieces_along_the_examples_run_and_freeze():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.fc(x) + self.fc(x).flip(0))

    module, x = Halves().double().eval(), torch.randn(4, 3, dtype=torch.float64)
    params, spec = from_torch(module, x)
    assert_close(tfx.apply(params, spec, x), module(x), **CLOSE)
    coupling = tfx.couple(params, spec)
    assert not len(coupling)
    assert coupling.mixing


def test_sizes_that_are_no_multiple_of_the_batch_are_followed_for_one_example():
    class Odd(nn.Module):
        def forward(self, x):
            return torch.cat([x, x[:1]])

    with pytest.warns(UserWarning, match="multiples of the batch"):
        params, spec = from_torch(Odd(), torch.randn(3, 2))
    one = torch.randn(1, 2)
    assert_close(tfx.apply(params, spec, one), Odd()(one))


def test_control_flow_that_depends_on_data_is_refused_with_every_line_of_it():
    class Branch(nn.Module):
        def forward(self, x):
            x = x if x.sum() > 0 else -x
            return x + 1 if x.mean() > 3 else x

    with pytest.raises(CaptureError, match=r"torch\.export cannot capture Branch") as caught:
        from_torch(Branch(), torch.randn(2, 3))
    assert str(caught.value).count("test_interop.py:") == 2, caught.value

"""Capture means what the module means: in training, at other sizes, with a channel silenced."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from modules import MODULES, P, captured, conv, flat, head, net
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import ShapeError, from_torch, to_torch
from taylorfx.interop import CaptureError

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def taken(module, *example, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return from_torch(module, example, **kwargs)


def step(module, x):
    """Outputs, gradients and buffers of one training step, and which parameters it trains."""
    module.train()
    torch.manual_seed(5)
    y = module(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
    gradients = {path: p.grad for path, p in module.named_parameters() if p.requires_grad}
    return y, gradients, dict(module.named_buffers()), all(part.training for part in module.modules())


# Training.


@pytest.mark.parametrize("name", [name for name in MODULES if name != "in place"])  # which does not train by itself
def test_a_training_step_of_the_copy_is_one_of_the_module(name):
    module, x, params, spec = captured(name)
    mine, theirs = step(to_torch(params, spec), x), step(copy.deepcopy(module), x)
    assert_close(mine[0], theirs[0], **CLOSE)
    assert mine[1].keys() == theirs[1].keys()
    for path, gradient in theirs[1].items():
        assert_close(mine[1][path], gradient, **CLOSE, msg=lambda text, path=path: f"{path}: {text}")
    for path, buffer in theirs[2].items():
        if path in mine[2]:
            assert_close(mine[2][path], buffer, **CLOSE, check_dtype=False)
    assert mine[3]
    assert theirs[3]


def test_the_row_of_padding_is_not_trained():
    module = nn.Sequential(nn.Embedding(9, 4, padding_idx=1), nn.Linear(4, 3)).eval()
    tokens = torch.arange(8).reshape(2, 4) % 3
    mine, theirs = step(to_torch(*from_torch(module, tokens)), tokens), step(module, tokens)
    assert_close(mine[1], theirs[1])
    assert not mine[1]["0.weight"][1].any()


def test_what_drops_out_is_drawn_from_torchs_own_generator():
    _, x, params, spec = captured("drops out")
    copied = to_torch(params, spec).train()
    assert not torch.equal(copied(x), copied(x))
    assert torch.equal(copied.eval()(x), copied(x))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.head(flat(m.a(x) * 2 if m.training else m.a(x))),
        lambda m, x: m.head(flat(m.a(x))) if m.training else m.head(flat(m.a(x))).softmax(1),
        lambda m, x: m.head(flat(m.a(x) + torch.randn_like(m.a(x)) if m.training else m.a(x))),
        lambda m, x: m.head(flat(m.a(x) * torch.empty(len(x), 1, 1, 1).bernoulli_(0.7) if m.training else m.a(x))),
        lambda m, x: m.head(flat(m.a(x) + (m.seen.add_(1) * 0 if m.training else 0))),
    ],
)
def test_what_only_training_does_is_kept_or_said(forward):
    module, shape, _ = net(forward, 4, a=conv(), head=head(), seen=torch.tensor(0.0))
    with pytest.warns(UserWarning, match="does something else in training than in inference"):
        from_torch(module.eval(), torch.randn(3, *shape))


def test_a_module_that_cannot_be_captured_in_training_says_so():
    def forward(m, x):
        if m.training and x.sum() > 0:
            return m.head(flat(m.a(x)))
        return m.head(flat(m.a(x)))

    module, shape, _ = net(forward, 4, a=conv(), d=nn.Dropout(0.5), head=head())
    with pytest.warns(UserWarning, match="cannot be captured in training mode"):
        from_torch(module.eval(), torch.randn(3, *shape))


# Sizes.

SHAPED = [name for name, (_, shape, _) in MODULES.items() if len(shape) > 1]


def other(shape, by):
    return (shape[0], *(n + k for n, k in zip(shape[1:], by, strict=False)))


@pytest.mark.parametrize("name", SHAPED)
def test_at_other_sizes_a_network_is_its_module_or_refuses_by_name(name):
    module, x, params, spec = captured(name)
    for by in itertools.product((-1, 0, 2), repeat=min(x.ndim - 2, 2)):
        if any(by):
            y = torch.randn(3, *other(x.shape[1:], by), dtype=x.dtype)
            try:
                found = tfx.apply(params, spec, y)
            except ShapeError as error:
                assert any(word in str(error) for word in ("takes", "size", "axis"))
            else:
                assert_close(found, module(y), **CLOSE)


SIZED = {
    "flattened": (lambda m, x: m.a(x).flatten(2).mean(-1), (2, 8, 8)),
    "divided by its area": (lambda m, x: m.a(x).sum((2, 3)) / (x.shape[2] * x.shape[3]), (2, 8, 8)),
    "second half": (lambda m, x: m.a(x)[..., x.shape[-1] // 2 :], (2, 8, 8)),
    "behind a branch": (lambda m, x: m.a(x) if x.shape[-1] > 6 else m.a(x) * 2, (2, 8, 8)),
    "but for one size": (lambda m, x: m.a(x) * 2 if x.shape[-1] == 6 else m.a(x), (2, 8, 8)),
    "divisible": (lambda m, x: m.a(x) if x.shape[-1] % 2 == 0 else m.a(x) * 2, (2, 8, 8)),
    "square": (lambda m, x: m.a(x) if x.shape[-1] == x.shape[-2] else m.a(x) * 2, (2, 8, 8)),
    "area": (lambda m, x: m.a(x) if x.shape[-1] * x.shape[-2] > 50 else m.a(x) * 2, (2, 8, 8)),
    "counted": (lambda m, x: m.a(x) + torch.arange(x.shape[-1]).to(x), (2, 8, 8)),
    "masked": (lambda m, x: m.a(x) * torch.ones(x.shape[-1], x.shape[-1]).tril().to(x), (2, 8, 8)),
    "resized": (lambda m, x: F.interpolate(F.max_pool2d(m.a(x), 2), size=x.shape[2:]), (2, 8, 8)),
    "any": (lambda m, x: F.adaptive_avg_pool2d(F.max_pool2d(m.a(x), 2).relu(), 1).flatten(1), (2, 8, 8)),
    "maps": (lambda m, x: m.a(x).relu().mean(1, keepdim=True), (2, 8, 8)),
}  # fmt: skip
FREE = {"divisible": 5, "but for one size": 5, "behind a branch": 5, "square": 2, "area": 5, "masked": 2}
"""How many of the eight other sizes are taken, where the module does something else at the others."""


@pytest.mark.parametrize("name", SIZED)
def test_a_size_is_taken_where_it_is_proven(name):
    module, shape, _ = net(SIZED[name][0], 0, x=SIZED[name][1], a=conv())
    params, spec = taken(module.eval(), torch.randn(3, *shape))
    answered = 0
    for by in itertools.product((-2, 0, 3), repeat=2):
        y = torch.randn(2, *other(shape, by))
        try:
            found = tfx.apply(params, spec, y)
        except ShapeError as error:
            assert "takes size" in str(error)
            with pytest.raises(ShapeError, match="takes size"):
                spec.at(tuple(y.shape[1:])).table()
        else:
            answered += any(by)
            assert_close(found, module(y))
    assert answered == FREE.get(name, 8)


# Silence.


@pytest.mark.parametrize("name", MODULES)
def test_a_gate_at_zero_is_the_module_with_the_channel_silenced(name):
    """Where every layer that reads a unit is a submodule, hooks can silence what it takes in.

    What a recurrent layer reads of its own state has tests of its own (tests/layers/test_recurrent.py).
    """
    module, x, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    parts = dict(module.named_modules())
    for scope in coupling.scopes:
        unit = coupling.names.index(next(n for n in coupling.names if n.startswith(f"{scope}[")))
        places = [place for place in coupling.reads if (place.units == unit).any()]
        if not all(place.node in parts and place.example == (0, 1) and place.slot >= 0 for place in places):
            continue
        silenced = copy.deepcopy(module)
        for place in places:
            mask = torch.ones(x.new_zeros(place.shape).shape, dtype=x.dtype)
            mask[(slice(None),) * place.axis + (torch.from_numpy((place.units == unit).any(0)),)] = 0
            silenced.get_submodule(place.node).register_forward_pre_hook(
                lambda _, given, mask=mask: (given[0] * mask, *given[1:])
            )
        gates = torch.ones(len(coupling), dtype=x.dtype)
        gates[unit] = 0
        assert_close(tfx.apply(params, spec, x, gates=tfx.gates(coupling, gates)), silenced(x), **CLOSE)


LOOKED_AT = ("spectral norm", "weight norm, twice", "norm of a weight", "grouped, standardized")


@pytest.mark.parametrize("name", LOOKED_AT)
def test_units_that_a_statistic_of_weights_looks_at_are_inexact(name):
    _, x, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    mine = coupling.scope == 0
    assert not coupling.exact[mine].any()
    plan = tfx.select((~torch.from_numpy(mine)).double(), coupling, budget=tfx.Remove(1), per_cost=False)
    assert not plan.keep[mine].all()
    moved = tfx.apply(tfx.cut(params, plan), plan.spec, x) - tfx.apply(params, spec, x, gates=plan.gates)
    assert moved.abs().max() > 1e-6, "which is why"


@pytest.mark.parametrize("make", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.parametrize("layer", [nn.Conv2d, nn.ConvTranspose2d])
def test_a_gate_does_not_reach_the_norm_of_a_weight(make, layer):
    module = nn.Sequential(conv(2, 5), nn.ReLU(), make(layer(5, 3, 3))).double().eval()
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    params, spec = taken(module, x)
    coupling = tfx.couple(params, spec)
    gates = torch.ones(len(coupling), dtype=x.dtype)
    gates[coupling.names.index("0[2]")] = 0
    found = tfx.apply(params, spec, x, gates=tfx.gates(coupling, gates))
    module[1].register_forward_hook(lambda _, __, y: y * (torch.arange(5) != 2)[:, None, None])
    assert_close(found, module(x), **CLOSE)


@pytest.mark.parametrize("make", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_older_norms_of_weights_train_as_they_do(make):
    torch.manual_seed(0)
    module = nn.Sequential(conv(2, 4), make(conv(4, 3)), nn.Flatten(), head(48)).double().eval()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    copied = to_torch(*taken(module, x))
    for _ in range(2):
        mine, theirs = step(copied, x), step(module, x)
        assert_close(mine[0], theirs[0], **CLOSE)
        for path, gradient in theirs[1].items():
            assert_close(mine[1][path], gradient, **CLOSE)


class Positions(nn.Module):
    def __init__(self, table):
        super().__init__()
        self.register_buffer("position_ids", torch.arange(64)[None])
        self.words, self.positions = nn.Embedding(50, 16), nn.Embedding(64, 16)
        self.rows = nn.Parameter(torch.randn(64, 16)) if table else None
        self.hidden, self.out = nn.Linear(16, 32), nn.Linear(32, 3)

    def forward(self, ids):
        n = ids.shape[1]
        h = self.words(ids) + self.positions(self.position_ids[:, :n])
        h = h if self.rows is None else h + self.rows[:n]
        return self.out(self.hidden(h).relu().mean(1))


@pytest.mark.parametrize("table", [False, True])
def test_the_units_do_not_depend_on_the_length_of_the_example(table):
    module = Positions(table).eval()
    found = [tfx.couple(*taken(module, torch.randint(50, (2, n)))) for n in (5, 12)]
    assert found[0].scopes == found[1].scopes == ("words", "hidden")
    assert [*found[0].sizes] == [*found[1].sizes] == [16, 32]


# Calls.


def test_a_dict_of_examples_names_the_arguments():
    module, shape, _ = net(lambda m, x, scale: m.a(x) * scale, 4, a=conv())
    x, scale = torch.randn(3, *shape), torch.rand(3, 1, 1, 1)
    params, spec = from_torch(module.eval(), {"scale": scale, "x": x})
    assert_close(tfx.apply(params, spec, {"x": x, "scale": scale}), module(x, scale))
    with pytest.raises(CaptureError, match="a tensor, a tuple of the positional arguments or a dict"):
        from_torch(module, 3)


def test_an_example_may_be_a_view():
    tokens = torch.randint(50, (4, 9))[:, :-1]
    module = nn.Sequential(nn.Embedding(50, 6), nn.Linear(6, 3)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, spec = from_torch(module, tokens)
    assert_close(tfx.apply(params, spec, tokens), module(tokens))


def test_none_among_the_outputs_is_left_out_and_numbers_are_named():
    module, shape, _ = net(lambda m, x: (m.a(x), None), 4, a=conv())
    x = torch.randn(3, *shape)
    assert_close(tfx.apply(*from_torch(module.eval(), x), x), module(x)[0])
    module, shape, _ = net(lambda m, x: (m.a(x), 3, m.a.weight), 4, a=conv())
    with pytest.raises(CaptureError, match="output 1 is 3, a int, output 2 is a parameter"):
        from_torch(module.eval(), x)


def test_a_cache_is_left_out():
    class Config:
        use_cache = True

    def forward(m, x):
        y = m.a(x)
        return (y, {"cache": object()}) if m.config.use_cache else (y,)

    module, shape, _ = net(forward, 4, a=conv())
    module.config = Config()
    x = torch.randn(3, *shape)
    params, spec = from_torch(module.eval(), x)
    assert_close(tfx.apply(params, spec, x), module(x)[0])
    assert module.config.use_cache


def test_older_norms_of_weights_are_captured_after_a_run():
    module = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 4)), nn.Linear(4, 2)).eval()
    x = torch.randn(5, 3)
    module(x)
    assert_close(tfx.apply(*from_torch(module, x), x), module(x))


# Values.


def test_random_numbers_in_inference_are_said():
    module, shape, _ = net(lambda m, x: m.head(flat(F.dropout(m.a(x), 0.5, training=True))), 4, a=conv(), head=head())
    with pytest.warns(UserWarning, match="draws random numbers in inference"):
        from_torch(module.eval(), torch.randn(3, *shape))


def test_complex_pairs_do_not_depend_on_the_layout_of_memory():
    def forward(m, x):
        z = torch.view_as_complex(m.a(x).unflatten(-1, (2, 4)).transpose(-1, -2).contiguous())
        return m.head((z * torch.view_as_complex(m.turn)).real.flatten(1))

    module, shape, _ = net(forward, 0, x=(3, 4), a=nn.Linear(4, 8), turn=P(4, 2), head=head(12))
    x = torch.randn(3, *shape)
    params, spec = from_torch(module.eval(), x)
    assert_close(tfx.apply(params, spec, x), module(x))
    mine, theirs = step(to_torch(params, spec), x), step(module, x)
    assert_close(mine[1], theirs[1])


def test_memory_by_strides_is_refused():
    module, shape, _ = net(lambda m, x: m.a(x).as_strided((x.shape[0], 4), (64, 1)), 4, a=conv())
    with pytest.raises(CaptureError, match="strides"):
        from_torch(module.eval(), torch.randn(3, *shape))


def test_an_operator_without_a_derivative_is_refused():
    @torch.library.custom_op("taylorfx_test::opaque", mutates_args=())
    def opaque(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    opaque.register_fake(torch.empty_like)
    module, shape, _ = net(lambda m, x: m.head(flat(opaque(m.a(x)))), 4, a=conv(), head=head())
    with pytest.raises(CaptureError, match="opaque"):
        from_torch(module.eval(), torch.randn(3, *shape))


def test_a_module_of_a_fixed_number_of_examples_runs_batches_one_by_one():
    def forward(m, x):
        n = int(x.shape[0])  # a number from here on
        return m.a(x).reshape(1, n * 4, 4, 4).reshape(n, 4, 4, 4).mean((2, 3))

    module, shape, _ = net(forward, 4, a=conv())
    x = torch.randn(3, *shape)
    with pytest.warns(UserWarning, match="one example at a time"):
        params, spec = from_torch(module.eval(), x)
    assert_close(tfx.apply(params, spec, x), module(x))
    assert_close(to_torch(params, spec)(x), module(x))


def test_a_module_whose_examples_meet_is_not_run_one_by_one():
    module, shape, _ = net(lambda m, x: m.a(x) - m.a(x).mean(0, keepdim=True) * len(x), 4, a=conv())
    x = torch.randn(3, *shape)
    params, spec = taken(module.eval(), x)
    if spec.inputs[0].layer.alone:
        with pytest.raises(ShapeError, match="one example at a time"):
            tfx.apply(params, spec, x)
    else:
        assert_close(tfx.apply(params, spec, x), module(x))


# Outputs.


def is_torchdynamo_exporting():
    """As in the code of models of transformers, which import it."""
    return torch.compiler.is_exporting()


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x):
        y = self.a(x)
        for _ in range(9 if is_torchdynamo_exporting() else 0):
            y = y + 0
        return y


def test_code_that_asks_whether_it_is_exported_runs_as_it_does_otherwise():
    asks, module, x = is_torchdynamo_exporting, Asking(), torch.randn(2, 4)
    params, spec = from_torch(module, x)
    assert [node.name for node in spec] == ["x", "a"]
    assert_close(tfx.apply(params, spec, x), module(x))
    assert is_torchdynamo_exporting is asks


def test_a_softmax_is_computed_in_the_dtype_that_it_names():
    class Scores(nn.Module):
        def forward(self, x):
            return x.softmax(-1, dtype=torch.float32)

    x = torch.randn(3, 50).bfloat16()
    params, spec = from_torch(Scores(), x)
    assert torch.equal(tfx.apply(params, spec, x), Scores()(x))


def test_a_part_with_nothing_in_it_is_left_out_or_refused():
    def forward(m, x):
        y = m.a(x)
        kept, rest = y.split((5, 0), -1)
        z = kept * 2
        z[..., 5:] = rest * 2
        return torch.cat([z, y[..., 5:], rest], -1) if m.whole else y[..., 5:].sum(-1, True) + z

    module, shape, _ = net(forward, 0, x=(4,), a=nn.Linear(4, 5))
    x, module.whole = torch.randn(3, *shape), True
    assert_close(tfx.apply(*from_torch(module, x), x), module(x))
    module.whole = False
    with pytest.raises(CaptureError, match=r"slice_\d+ has nothing in it"):
        from_torch(module, x)


class Several(nn.Module):
    """Gives out a number and tensors, of which ``inner`` has a layer of its own."""

    def __init__(self, named):
        super().__init__()
        self.first, self.second, self.other, self.named = nn.Linear(3, 4), nn.Linear(4, 2), nn.Linear(4, 5), named

    def forward(self, x):
        h = self.first(x).relu()
        out = {"logits": self.second(h), "inner": [h, self.other(h)], "count": 3}
        return out if self.named else (out["logits"], *out["inner"])


@pytest.mark.parametrize(
    ("named", "outputs", "expected"),
    [
        (True, "logits", {"logits": 0}),
        (True, ["inner.1", "logits"], {"logits": 0, "inner.1": 2}),
        (True, ["inner.*"], {"inner.0": 1, "inner.1": 2}),
        (False, 2, {2: 2}),
        (False, (0, 1), {0: 0, 1: 1}),
    ],
)
def test_only_the_outputs_that_are_asked_for_are_captured(named, outputs, expected):
    module, x = Several(named).eval(), torch.randn(2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the other outputs need is left out
        params, spec = from_torch(module, x, outputs=outputs)
    found = tfx.apply(params, spec, x)
    found = dict(found) if named else dict(zip(expected, found if len(expected) > 1 else (found,), strict=True))
    flat = Several(False)
    flat.load_state_dict(module.state_dict())
    assert_close(found, {key: flat(x)[k] for key, k in expected.items()})
    assert ("other.weight" in tfx.tree.flatten(params)) == (2 in expected.values())


class Contrastive(torch.nn.Module):
    """As CLIP gives out the features of every example, and the products of all pairs of examples."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)

    def forward(self, x):
        features = self.b(self.a(x).relu())
        return {"pairs": (features @ features.T).t(), "features": features}


def test_outputs_that_are_not_asked_for_may_mix_the_examples():
    module, x = Contrastive().eval(), torch.randn(3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params, spec = from_torch(module, x, outputs="features")
    more = torch.randn(5, 3)
    assert_close(tfx.apply(params, spec, more)["features"], module(more)["features"])
    assert not tfx.couple(params, spec).mixing
    with pytest.warns(UserWarning, match="captured for one example at a time"):
        from_torch(module, x)


def test_outputs_that_the_module_does_not_have_are_refused_with_those_that_it_has():
    x = torch.randn(2, 3)
    with pytest.raises(
        CaptureError, match=r"received 'logit', 3, which no output has.* logits, inner.0, inner.1, count"
    ):
        from_torch(Several(True).eval(), x, outputs=["logit", 3, "logits"])
    with pytest.raises(CaptureError, match=r"received 3, which no output has\. The module gives out 0, 1, 2"):
        from_torch(Several(False).eval(), x, outputs=3)
    with pytest.raises(CaptureError, match="received none"):
        from_torch(Several(False).eval(), x, outputs=[])

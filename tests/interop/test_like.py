"""The user's own class with smaller layers: attributes that hold sizes are found, and what cannot be is refused."""

import copy
import functools
import importlib.util
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import from_torch, to_torch
from taylorfx.interop import LikeError, holdable
from taylorfx.interop.attributes import Resized, groups_of
from taylorfx.interop.trials import of_batch
from taylorfx.store import from_json, to_json
from taylorfx.testing.strategies import random_plan

X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))


class Attention(nn.Module):
    """Attention with everything written down: heads, their dimensions, all of them, the groups of queries."""

    def __init__(self, width=16, heads=4, kv_heads=2, dim=4):
        super().__init__()
        self.heads, self.dim, self.groups = heads, dim, heads // kv_heads
        self.sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        self.all_dims = heads * dim
        self.qkv = nn.Linear(width, sum(self.sizes))
        self.out = nn.Linear(heads * dim, width)

    def forward(self, x):
        q, k, v = self.qkv(x).split(self.sizes, -1)
        q = q.view(*q.shape[:2], self.heads, self.dim).transpose(1, 2)
        k, v = (y.unflatten(-1, (self.heads // self.groups, self.dim)).transpose(1, 2) for y in (k, v))
        k, v = (y.repeat_interleave(self.groups, 1) for y in (k, v))
        y = scaled_dot_product_attention(q, k, v, scale=0.5)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:2], self.all_dims))


class Transformer(nn.Module):
    """Blocks of attention and of a gated layer whose halves a chunk takes apart."""

    def __init__(self, layers=2):
        super().__init__()
        self.embed = nn.Embedding(40, 16)
        self.attention = nn.ModuleList(Attention() for _ in range(layers))
        self.up = nn.ModuleList(nn.Linear(16, 24) for _ in range(layers))
        self.down = nn.ModuleList(nn.Linear(12, 16) for _ in range(layers))
        self.head = nn.Linear(16, 5)

    def forward(self, ids):
        x = self.embed(ids)
        for attention, up, down in zip(self.attention, self.up, self.down, strict=True):
            x = x + attention(x)
            a, b = up(x).chunk(2, -1)
            x = x + down(a.relu() * b)
        return self.head(x.mean(1))


class Halves(nn.Module):
    """The two halves of a chunk go to layers of their own: they keep equal numbers."""

    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.head = (
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(6, 4, 1),
            nn.Conv2d(6, 4, 3, padding=1),
            nn.Linear(8, 5),
        )

    def forward(self, x):
        a, b = self.stem(x).relu().chunk(2, 1)
        return self.head(torch.cat([self.a(a), self.b(b)], 1).relu().mean((2, 3)))


class Groups(nn.Module):
    """Grouped and depthwise weights of its own class, and a shuffle that knows their number."""

    def __init__(self):
        super().__init__()
        self.channels, self.groups = 8, 2
        self.stem, self.depth = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.weight = nn.Parameter(torch.randn(8, 4, 1, 1) / 2)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.depth(self.stem(x)).relu()
        x = nn.functional.conv2d(x, self.weight, groups=self.groups)
        x = x.view(x.shape[0], self.groups, self.channels // self.groups, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head(nn.functional.dropout(self.norm(x), 0.3, self.training).mean((2, 3)))


class Even(nn.Module):
    """Its class wants an even number of channels."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        if x.shape[1] % 2:
            raise ValueError("an even number of channels")
        return self.head(x.relu().mean((2, 3)))


class Written(nn.Module):
    """A number of channels written down in code."""

    def __init__(self):
        super().__init__()
        self.free, self.stem, self.head = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(self.free(x).relu())
        return self.head(x.view(-1, 8, 36).relu().mean(2))


class Auxiliary(nn.Module):
    """A head of training beside the output, on what the first layer writes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head, self.aux = nn.Linear(3, 8), nn.Linear(8, 6), nn.Linear(6, 5), nn.Linear(8, 5)

    def forward(self, x):
        h = self.a(x).relu()
        y = self.head(self.b(h).relu())
        return (y, self.aux(h)) if self.training else y


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(8, 6, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip


MODULES = {
    "convolutions": (convolutions, X),
    "transformer": (Transformer, TOKENS),
    "halves": (Halves, X),
    "groups": (Groups, X),
    "even": (Even, X),
    "written": (Written, X),
}


@functools.cache
def captured(name):
    make, x = MODULES[name]
    torch.manual_seed(0)
    module = make().eval()
    return module, x, *from_torch(module, x)


def without(params, spec, names, count=1):
    """The network without the first units of these scopes."""
    coupling = tfx.couple(params, spec)
    keep = np.ones(len(coupling), bool)
    for name in names:
        keep[np.flatnonzero(coupling.scope == coupling.scopes.index(name))[:count]] = False
    plan = tfx.Plan(coupling, keep)
    return tfx.cut(params, plan), plan.spec


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ("even", "written")])
def test_what_can_be_held_is_returned_and_computes_the_same(name):
    """The law: whatever is cut under these constraints, the class holds, in inference and in training."""
    module, x, params, spec = captured(name)
    coupling = tfx.couple(params, spec)
    state = copy.deepcopy(module.state_dict()), {key: dict(vars(part)) for key, part in module.named_modules()}
    constraints = holdable(module, params, spec)
    for seed, share in enumerate((0.85, 0.6)):
        scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(seed))
        plan = tfx.select(scores, coupling, budget=tfx.Parameters(share), constraints=constraints)
        small = tfx.cut(params, plan), plan.spec
        out = to_torch(*small, like=module)
        assert type(out) is type(module)
        assert_close(out(x), tfx.apply(*small, x))
        torch.manual_seed(1)
        expected = to_torch(*small).train()(x)
        torch.manual_seed(1)
        assert_close(out.train()(x), expected)
    assert_close(module.state_dict(), state[0])
    assert {key: dict(vars(part)) for key, part in module.named_modules()} == state[1], "the module is as it was"


@pytest.mark.parametrize("name", MODULES)
def test_pruning_like_a_module_gives_what_its_class_holds(name):
    module, x, params, spec = captured(name)
    batch = x, torch.arange(len(x))
    small = tfx.prune(params, spec, iter([batch]), budget=tfx.Parameters(0.75), steps=2, like=module)
    assert_close(to_torch(*small, like=module)(x), tfx.apply(*small, x))


def test_dimensions_that_become_one_scope_with_their_last_head_are_its_chunks():
    """Of one key head, the layer's outputs are dimensions of queries, of keys and of values alone: one scope."""
    _, _, params, spec = captured("transformer")
    whole, (keys, values, heads) = tfx.couple(params, spec), (f"attention.1{x}" for x in
        (".qkv: query/key dims", ": value dims", ".qkv: heads"))  # fmt: skip

    def carried(cut, **constraints):
        keep = np.ones(len(whole), bool)
        for name, count in cut.items():
            keep[np.flatnonzero(whole.scope == whole.scopes.index(name))[:count]] = False
        plan = tfx.Plan(whole, keep)
        after = tfx.couple(tfx.cut(params, plan), plan.spec)
        scope = after.scopes.index("attention.1: head dims")
        assert after.sizes[scope] == 8 - sum(cut.values()) + 1
        lasting = tfx.Constraints(**constraints).lasting(whole).carried(plan, after)
        rules = lasting.on(after)
        held = bool(rules.protected[after.scope == scope].all())
        return rules.chunks[scope], rules.multiples[scope], rules.floors[scope], held

    assert carried({heads: 1}) == (1, 1, 1, False)
    assert carried({heads: 1}, uniform=[(keys, values)]) == (2, 2, 2, False)
    assert carried({heads: 1}, multiple={values: 2}) == (2, 4, 2, False)
    assert carried({heads: 1}, floor={keys: 3}) == (2, 2, 6, False)
    assert carried({heads: 1}, protect=values)[3]
    assert carried({heads: 1, keys: 2}, floor={values: 2})[3], "runs of unequal lengths are no chunks"
    assert carried({heads: 1}, uniform=[(keys, "attention.0.qkv: query/key dims")])[3], "half of a scope is none"


def test_constraints_are_no_stricter_than_they_need_to_be():
    module, _, params, spec = captured("convolutions")
    assert holdable(module, params, spec) == tfx.Constraints()
    module, _, params, spec = captured("transformer")
    coupling, constraints = tfx.couple(params, spec), holdable(module, params, spec)
    sizes = dict(zip(coupling.scopes, coupling.sizes.tolist(), strict=True))
    assert {sizes[name] for name in constraints.protect} <= {4}, "heads, groups of queries, the stream may leave"


def test_halves_of_a_chunk_keep_equal_numbers():
    module, _, params, spec = captured("halves")
    assert holdable(module, params, spec) == tfx.Constraints(chunks={"stem": 2})
    with pytest.raises(LikeError):
        to_torch(*without(params, spec, ["stem"], 2), like=module)


def test_an_even_number_stays_even():
    module, _, params, spec = captured("even")
    assert holdable(module, params, spec) == tfx.Constraints(multiple={"stem": 2})


def test_what_is_written_in_the_code_is_protected_and_refused_with_its_line():
    module, _, params, spec = captured("written")
    assert holdable(module, params, spec) == tfx.Constraints(protect="stem")
    line = next(k for k, text in enumerate(open(__file__), 1) if "x.view(-1, 8, 36)" in text)  # noqa: SIM115, PTH123
    with pytest.raises(
        LikeError, match=rf"does not run .*\n  {re.escape(__file__)}:{line}: return self\.head\(x\.view"
    ):
        to_torch(*without(params, spec, ["stem"]), like=module)


class Faint(nn.Module):
    """Attention that looks at all positions nearly alike; its scale is that of the dimensions that there are."""

    def __init__(self, std):
        super().__init__()
        self.heads = 4
        self.q, self.k, self.v, self.head = (nn.Linear(16, 16, bias=False) for _ in range(4))
        nn.init.normal_(self.q.weight, 0, std)
        nn.init.normal_(self.k.weight, 0, std)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.head(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1))


@pytest.mark.parametrize(("std", "message"), [(1.0, "computes something else"), (0.005, "computes nearly what")])
def test_a_scale_that_does_not_fit_is_refused_where_it_hardly_shows(std, message):
    torch.manual_seed(0)
    module, x = Faint(std).eval(), torch.randn(4, 6, 16)
    params, spec = from_torch(module, x)
    coupling = tfx.couple(params, spec)
    others = [scope for scope in coupling.scopes if scope != "query/key dims"]
    plan = tfx.select(tfx.criteria.weight_l2(params, coupling), coupling, budget=tfx.Remove(2), protect=others)
    with pytest.raises(LikeError, match=message):
        to_torch(tfx.cut(params, plan), plan.spec, like=module, example_inputs=x)
    assert "query/key dims" in holdable(module, params, spec, example_inputs=x).protect


def test_an_auxiliary_head_keeps_what_it_consumes():
    torch.manual_seed(0)
    module, x = Auxiliary().eval(), X[:, :, 0, 0]
    with pytest.warns(UserWarning, match="aux"):
        params, spec = from_torch(module, x)
    assert holdable(module, params, spec) == tfx.Constraints(protect="a")
    out = to_torch(*without(params, spec, ["b"], 2), like=module)  # what the head consumes keeps its size: it is seen
    assert_close(out.train()(x)[1], module.train()(x)[1])
    with pytest.raises(LikeError, match=r"aux\.weight, aux\.bias.*unchanged=\['aux'\]"):
        to_torch(*without(params, spec, ["a"], 2), like=module)


def test_attributes_follow_the_shapes_around_them():
    """Half of the heads leave: of each attribute the right value is among the candidates."""
    module = Attention()
    old = {path: tuple(x.shape) for path, x in module.named_parameters()}
    new = old | {"qkv.weight": (16, 16), "qkv.bias": (16,), "out.weight": (16, 8)}
    groups = groups_of(module, Resized(old, new), frozenset(["qkv", "out"]))
    candidates = {(x.slots[0].name, x.slots[0].entry): x.candidates for x in groups}
    right = {("heads", None): 2, ("dim", None): 4, ("groups", None): 2, ("all_dims", None): 8}
    right |= {("sizes", 0): 8, ("sizes", 1): 4, ("sizes", 2): 4}
    assert all((n,) in candidates[key] for key, n in right.items())
    small = to_torch(*without(*(network := captured("transformer"))[2:], ["attention.0.qkv: heads"]), like=network[0])
    assert vars(small.attention[0]) | right_of(small.attention[0]) == vars(small.attention[0])
    assert small.attention[1].sizes == [16, 8, 8]


def right_of(attention):
    """What the attributes of an attention have to be, by its parameters, if its heads have 4 dimensions."""
    dims = attention.out.in_features
    return {"heads": dims // 4, "dim": 4, "all_dims": dims, "sizes": [dims, dims // 2, dims // 2], "groups": 2}


def test_a_path_that_only_training_takes_is_proven():
    class Steep(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 5)

        def forward(self, x):
            h = self.a(x).relu()
            if self.training:
                h = nn.functional.dropout(h.view(-1, 8), 0.5)
            return self.b(h)

    module, x = Steep().eval(), X[:, :, 0, 0]
    params, spec = from_torch(module, x)
    with pytest.raises(LikeError, match=r"in training mode:\n.*view\(-1, 8\)"):
        to_torch(*without(params, spec, ["a"]), like=module)


def test_a_path_of_other_sizes_is_proven():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Linear(8, 5)

        def forward(self, x):
            x = self.a(x).relu()
            if torch.compiler.is_exporting() or x.shape[2] != 9:
                return self.b(x.mean((2, 3)))
            return self.b(x.view(-1, 8, 81).mean(2))

    module = Wide().eval()
    params, spec = from_torch(module, X)
    original = of_batch(module, params, spec, X)
    assert {"with x of 3x4x4", "with x of 3x9x9", "with one example", "with 4 examples"} <= {
        x.title for x in original.calls
    }
    with pytest.raises(LikeError, match=r"with x of 3x9x9:\n.*view\(-1, 8, 81\)"):
        to_torch(*without(params, spec, ["a"]), like=module)


class Encoder(nn.Module):
    """Its ``forward`` calls its own methods, and it offers others."""

    def __init__(self):
        super().__init__()
        self.stem, self.body, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 12, 3, padding=1), nn.Linear(12, 5)
        self.width, self.heads = 12, 3

    def features(self, x):
        return self.body(self.stem(x).relu()).relu()

    def encode(self, x, normalized=False):
        y = self.features(x).mean((2, 3))
        return y / y.norm(dim=1, keepdim=True) if normalized else y

    def forward(self, x):
        return self.head(self.encode(x))

    def predict(self, x):
        return self(x).argmax(1)

    def rows(self, x):
        """Reads sizes that `forward` does not."""
        return self.features(x).view(len(x), self.heads, self.width // self.heads, -1)

    def fit(self, x):
        """Changes parameters: it is not tried."""
        with torch.no_grad():
            self.head.weight.mul_(2)
        return self(x)


class Pooling(Encoder):
    """Has a method that no call of ``forward`` reaches, with a size written down."""

    def pooled(self, x):
        return self.features(x).view(-1, 12, 36).mean(2)


def silenced(module, plan):
    """The module with the channels that leave at zero, and the kept ones of its last features."""
    whole = copy.deepcopy(module)
    for name in ("stem", "body"):
        (axis, *_) = plan.coupling.parameters[f"{name}.weight"]
        gone = torch.from_numpy(~plan.alive[axis])
        with torch.no_grad():
            getattr(whole, name).weight[gone] = 0
            getattr(whole, name).bias[gone] = 0
    return whole, ~gone


@pytest.mark.parametrize("seed", range(3))
def test_other_methods_of_a_class_are_those_of_the_gated_original(seed):
    torch.manual_seed(0)
    module = Encoder().eval()
    params, spec = from_torch(module, X)
    coupling = tfx.couple(params, spec)
    keep = random_plan(coupling, torch.Generator().manual_seed(seed), 0.4).keep.copy()
    body = np.flatnonzero(coupling.scope == coupling.scopes.index("body"))
    keep[body] = np.arange(12) % (seed + 2) > 0  # 6, 8 or 9 of its maps stay
    plan = tfx.Plan(coupling, keep)
    small = to_torch(tfx.cut(params, plan), plan.spec, like=module)
    whole, kept = silenced(module, plan)
    assert_close(small.head.weight, module.head.weight[:, kept])
    assert_close(small(X), whole(X))
    assert_close(small.features(X), whole.features(X)[:, kept])
    for normalized in (False, True):
        assert_close(small.encode(X, normalized), whole.encode(X, normalized)[:, kept])
    assert torch.equal(small.predict(X), whole.predict(X))
    assert_close(small.rows(X).flatten(1, 2).flatten(2), whole.features(X)[:, kept].flatten(2))
    assert holdable(module, params, spec).protect == ()


def test_a_method_with_an_old_size_is_refused_with_its_line():
    torch.manual_seed(0)
    module = Pooling().eval()
    params, spec = from_torch(module, X)
    line = Pooling.pooled.__code__.co_firstlineno + 1
    with pytest.raises(
        LikeError,
        match=rf"(?s)The pooled of Pooling does not run .* of forward:\n.*:{line}: return.*=\['pooled'\] gives",
    ):
        to_torch(*without(params, spec, ["body"], 4), like=module)
    given_up = to_torch(*without(params, spec, ["body"], 4), like=module, unchanged=["pooled"])
    assert given_up.rows(X).shape == (4, 2, 4, 36)
    assert holdable(module, params, spec) == tfx.Constraints(protect="body")
    state = copy.deepcopy(module.state_dict())
    to_torch(*without(params, spec, ["stem"]), like=module)
    assert_close(module.state_dict(), state)


# Models of transformers.


def transformers():
    pytest.importorskip("transformers")
    from _torchvision import library

    if importlib.util.find_spec("torchvision"):
        library()
    import transformers

    return transformers


def llama(t):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return t.LlamaForCausalLM(t.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=2, tie_word_embeddings=True))


def gpt2(t):
    config = t.GPT2Config(n_embd=16, n_layer=2, n_head=4, n_inner=24, vocab_size=40, n_positions=16)
    config.bos_token_id = config.eos_token_id = 1
    return t.GPT2LMHeadModel(config)


def bert(t):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    return t.BertForSequenceClassification(t.BertConfig(**sizes, vocab_size=40, max_position_embeddings=16))


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_a_model_of_transformers_is_pruned_as_its_own_class(make):
    t = transformers()
    torch.manual_seed(0)
    module = make(t).eval()
    params, spec = from_torch(module, {"input_ids": TOKENS})
    original = of_batch(module, params, spec, TOKENS)
    titles = " ".join(call.title for call in original.calls)
    assert "with the first row of attention_mask masked" in titles
    assert ("with a cache" in titles) is (make is not bert)

    def loss(outputs, targets):
        return outputs["logits"].square().flatten(1).mean(1)

    batch = TOKENS, torch.zeros(3)
    small = tfx.prune(params, spec, batch, budget=tfx.Units(0.6), steps=1, like=module, loss=loss)
    out = to_torch(*small, like=module)
    assert type(out) is type(module)
    expected = tfx.apply(*small, TOKENS)["logits"]
    mask = torch.ones_like(TOKENS)
    for kwargs in ({}, {"attention_mask": mask}):
        assert_close(out(input_ids=TOKENS, **kwargs).logits, expected)
    mask[0, :3] = 0
    assert_close(out(input_ids=TOKENS, attention_mask=mask).logits[1:], expected[1:])
    if make is not bert:
        assert out.lm_head.weight is out.get_input_embeddings().weight, "they are tied"
        texts = [out.generate(TOKENS, max_new_tokens=3, do_sample=False, use_cache=cached) for cached in (False, True)]
        assert torch.equal(*texts)


def test_a_cached_or_masked_call_finds_attributes_that_the_example_does_not_read():
    t = transformers()
    torch.manual_seed(0)
    module = llama(t).eval()
    params, spec = from_torch(module, {"input_ids": TOKENS})
    coupling = tfx.couple(params, spec)
    queries = [k for k, name in enumerate(coupling.scopes) if "query heads per" in name]
    assert len(queries) == 2
    out = to_torch(*without(params, spec, [coupling.scopes[queries[0]]]), like=module)
    assert [layer.self_attn.num_key_value_groups for layer in out.model.layers] == [1, 2]


class Three(nn.Module):
    """Gives out what it computes on the way, and two tensors of one shape."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x):
        h = self.first(x).relu()
        y = self.second(h)
        return h, y, y.softmax(1)


@pytest.mark.parametrize("outputs", [1, 2, (1, 2)])
def test_a_module_that_gives_out_more_is_compared_where_the_network_gives_out(outputs):
    module, x = Three().eval(), torch.randn(2, 3)
    params, spec = from_torch(module, x, outputs=outputs)
    spec = from_json(to_json(spec))
    plan = random_plan(tfx.couple(params, spec), torch.Generator().manual_seed(0), 0.5)
    params = tfx.cut(params, plan)
    given = to_torch(params, plan.spec, like=module)(x)
    assert len(given[0][0]) < 8
    expected = given[outputs] if isinstance(outputs, int) else tuple(given[k] for k in outputs)
    assert_close(tfx.apply(params, plan.spec, x), expected)


class Typed(nn.Module):
    """Has an argument whose default is no plain value."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 8), nn.Linear(8, 5)

    def forward(self, x, dtype=torch.float32):
        return self.second(self.first(x).to(dtype).relu())


def test_a_default_that_is_no_plain_value_stays_the_modules():
    module, x = Typed().eval(), torch.randn(2, 3)
    small = without(*from_torch(module, x), ["first"])
    assert_close(to_torch(*small, like=module)(x), tfx.apply(*small, x))

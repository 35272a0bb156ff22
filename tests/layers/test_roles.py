"""A layer states what passes may know of it, from outside as ours; a subclass that computes something else does not."""

import ast
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.layers import roles as R
from taylorfx.layers.roles import Mixing
from taylorfx.rewrite.lean import lean
from taylorfx.testing.laws import check_layer
from taylorfx.testing.roles import CHECKS
from taylorfx.testing.strategies import random_params

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(16, 4, 5, 5, generator=GENERATOR, dtype=torch.float64), torch.arange(16) % 3


@dataclass(frozen=True)
class Squared(L.Conv2d):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs).square()


@dataclass(frozen=True)
class Shifting(L.BatchNorm2d):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs) + 3


@dataclass(frozen=True)
class Tenfold(L.Linear):
    def apply(self, params, *inputs):
        return 10 * super().apply(params, *inputs).tanh()


@dataclass(frozen=True)
class Reversed(L.Permute):
    def apply(self, params, *inputs):
        return super().apply(params, *inputs).flip(-1)


@dataclass(frozen=True)
class Last(L.Slice):
    """Another part of as many positions."""

    def apply(self, params, *inputs):
        return inputs[0].flip(self.dim).narrow(self.dim, self.start, self.stop - self.start)


@dataclass(frozen=True)
class Renamed(L.Conv2d):
    """The same arithmetic; `__str__` and a field of its own change nothing of it."""

    note: str = ""

    def tell(self):
        return self.note


@dataclass(frozen=True)
class Linear(L.Linear):
    pass


def test_a_subclass_has_the_roles_of_its_base_until_it_overrides_something():
    assert L.Conv2d(4, 6, 3).role(Mixing)
    assert Renamed(4, 6, 3).role(Mixing)
    assert Linear(4, 6).role(Mixing)
    assert not Squared(4, 6, 3).role(Mixing)
    assert not Tenfold(4, 6).role(Mixing)
    assert not L.ReLU().role(Mixing)
    for name in ("apply", "train", "signature", "init", "multiplies", "inexact", "_anything"):
        kind = type("Own", (L.Linear,), {name: getattr(L.Linear, name, None)})
        assert bool(kind(4, 6).role(Mixing)) == (name == "_anything")
        again = type("Again", (kind,), {"roles": L.Linear.roles})  # it states them anew
        below = type("Below", (again,), {})
        assert again(4, 6).role(Mixing)
        assert below(4, 6).role(Mixing)


def spec_of(conv=L.Conv2d, norm=L.BatchNorm2d, linear=L.Linear):
    return tfx.serial(
        tfx.Input((4, 5, 5)), conv1=L.Conv2d(4, 8, 3), relu=L.ReLU(), conv2=conv(8, 6, 1, bias=False),
        norm=norm(6), relu2=L.ReLU(), flat=L.Flatten(), hidden=linear(54, 7), out=L.Linear(7, 3),
    )  # fmt: skip


KINDS = {"convolution": {"conv": Squared}, "norm": {"norm": Shifting}, "linear layer": {"linear": Tenfold}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["compensate", "reconstruct"])
def test_a_repair_of_nothing_that_is_lost_changes_nothing(kind, name):
    """Units that are silent: what the smaller network computes is right as cut, so any repair has to leave it."""
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    params["conv1"]["weight"][:3] = 0
    params["conv1"]["bias"][:3] = -1  # silent behind the ReLU
    coupling = tfx.couple(params, spec)
    scores = torch.tensor([float(n not in {"conv1[0]", "conv1[1]", "conv1[2]"}) for n in coupling.names])
    plan = tfx.select(scores, coupling, budget=tfx.Remove(3))
    small, smaller = getattr(tfx, name)(params, plan, BATCH)
    expected = tfx.apply(params, spec, BATCH[0])
    assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, BATCH[0]), expected)
    assert_close(tfx.apply(small, smaller, BATCH[0]), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["compensate", "reconstruct"])
def test_a_layer_that_computes_something_else_keeps_its_parameters(kind, name):
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    coupling = tfx.couple(params, spec)
    plan = tfx.select(torch.rand(len(coupling), generator=GENERATOR), coupling, budget=tfx.Units(0.6))
    small, _ = getattr(tfx, name)(params, plan, BATCH)
    nodes = {"convolution": ("conv2", "norm"), "norm": ("norm",), "linear layer": ("hidden",)}[kind]
    cut = tfx.cut(params, plan)
    assert all(torch.equal(small[node][leaf], tensor) for node in nodes for leaf, tensor in cut[node].items())
    plain, _ = getattr(tfx, name)(params, tfx.Plan(tfx.couple(params, spec_of()), plan.keep), BATCH)
    moved = [not torch.equal(plain[node][leaf], tensor) for node in nodes for leaf, tensor in cut[node].items()]
    assert any(moved) or (kind, name) == ("norm", "reconstruct")  # the control: the layer itself is repaired


def test_a_norm_that_computes_something_else_is_not_recalibrated():
    for norm, kept in ((Shifting, True), (L.BatchNorm2d, False)):
        spec = spec_of(norm=norm)
        params = random_params(spec, GENERATOR)
        new = tfx.recalibrate(params, spec, BATCH)
        assert torch.equal(new["norm"]["running_mean"], params["norm"]["running_mean"]) == kept


def test_a_norm_that_computes_something_else_has_no_scale_to_score():
    spec = spec_of(norm=Shifting)
    params = random_params(spec, GENERATOR)
    with pytest.raises(ValueError, match="units of conv1, conv2, hidden pass none"):
        tfx.criteria.batchnorm_scale(params, tfx.couple(params, spec))


@pytest.mark.parametrize("kind", KINDS)
def test_folding_leaves_the_outputs_of_what_computes_something_else(kind):
    spec = spec_of(**KINDS[kind])
    params = random_params(spec, GENERATOR)
    assert_close(tfx.apply(*tfx.fold(params, spec), BATCH[0]), tfx.apply(params, spec, BATCH[0]))


def test_folding_and_scoring_see_through_no_permutation_that_does_more():
    spec = tfx.serial(
        tfx.Input((5, 4)), a=L.Linear(4, 6), turn=Reversed((0, 2, 1)), norm=L.BatchNorm1d(6), b=L.Linear(5, 3),
    )  # fmt: skip
    params, x = random_params(spec, GENERATOR), torch.randn(7, 5, 4, dtype=torch.float64)
    assert_close(tfx.apply(*tfx.fold(params, spec), x), tfx.apply(params, spec, x))


@pytest.mark.parametrize("cut", [Last(1, 0, 2), L.Slice(1, 0, 2)])
def test_scores_are_those_of_the_network_as_it_is(cut):
    """The private copy takes no other slice earlier than the real one."""
    spec = tfx.serial(
        tfx.Input((6, 4)), a=L.Linear(4, 6), act=L.ReLU(), b=L.Linear(6, 5), cut=cut, flat=L.Flatten(),
        out=L.Linear(10, 3),
    )  # fmt: skip
    params, batch = random_params(spec, GENERATOR), (torch.randn(7, 6, 4, dtype=torch.float64), torch.arange(7) % 3)
    coupling = tfx.couple(params, spec)
    one, other = (tfx.measure(params, spec, batch, coupling, fold=fold) for fold in (True, False))
    assert_close(one.sum, other.sum)
    assert_close(one.sum_abs, other.sum_abs)


STATED = {
    L.Linear(4, 6): {R.Mixing, R.Memory},
    L.Conv1d(4, 6, 3): {R.Mixing, R.Memory},
    L.Conv2d(4, 6, 3): {R.Mixing, R.Memory},
    L.Conv3d(4, 6, 3): {R.Mixing, R.Memory},
    L.ConvTranspose1d(4, 6, 3): {R.Mixing, R.Memory},
    L.ConvTranspose2d(4, 6, 3): {R.Mixing, R.Memory},
    L.ConvTranspose3d(4, 6, 3): {R.Mixing, R.Memory},
    L.BatchNorm1d(4): {R.ChannelAffine, R.Normalizing, R.RunningStatistics},
    L.BatchNorm2d(4): {R.ChannelAffine, R.Normalizing, R.RunningStatistics},
    L.BatchNorm3d(4): {R.ChannelAffine, R.Normalizing, R.RunningStatistics},
    L.BatchNorm2d(4, affine=False): {R.ChannelAffine, R.RunningStatistics},
    L.BatchNorm2d(4, track_running_stats=False): {R.Normalizing},
    L.InstanceNorm1d(4, track_running_stats=True): {R.ChannelAffine},
    L.InstanceNorm2d(4, track_running_stats=True): {R.ChannelAffine},
    L.InstanceNorm3d(4, track_running_stats=True): {R.ChannelAffine},
    L.InstanceNorm2d(4): set(),
    L.LayerNorm(4): {R.Recomputed},
    L.ReLU(): {R.Pointwise},
    L.ReLU6(): {R.Pointwise},
    L.GELU(): {R.Pointwise, R.Recomputed},
    L.SiLU(): {R.Pointwise, R.Recomputed},
    L.Mish(): {R.Recomputed},
    L.Hardswish(): {R.Recomputed},
    L.Softplus(): {R.Recomputed},
    L.Permute((0, 2, 1)): {R.Viewing},
    L.View((1, 4)): {R.Viewing},
    L.Reshape((4,)): {R.Viewing},
    L.Flatten(): {R.Viewing},
    L.Slice(1, 0, 2): {R.Slicing},
    L.Concat(1): {R.Joining},
    L.Add(): {R.Sum},
    L.Multiply(): {R.Product},
    L.Parameter((4,)): {R.Constant},
    L.Buffer((4,)): {R.Constant},
    L.Buffer((4,), expand=True): set(),
    L.ScaledDotProduct(0.5): {R.Attending},
    L.ExpertLinear(4, 3, 5, 2): {R.Experts},
    L.Elementwise("pow.Tensor_Scalar", (("$", 0), 2)): {R.Pointwise, R.Recomputed},
    L.Elementwise("pow.Tensor_Scalar", (("$", 0), 3)): set(),
    L.Reduce("mean", (1,)): {R.Memory},
    L.Reduce("sum", (1,)): {R.Memory, R.Summing},
    L.Reduce("amax", (1,)): set(),
    L.Softmax(): set(),
    L.Dropout(): {R.Noise},
    L.Dropout(0.1, (0,)): {R.Noise},
    L.Dropout(alpha=True): set(),
}
KINDS_OF_ROLES = {getattr(R, name) for name in R.__all__} - {R.Role}


@pytest.mark.parametrize("layer", STATED, ids=str)
def test_our_layers_have_the_roles_that_they_state(layer):
    """Each concrete class, so that no one of them loses the roles of its base by a line that is missing."""
    assert {kind for kind in KINDS_OF_ROLES if layer.role(kind)} == STATED[layer]
    assert all(role == layer.role(type(role)) and hash(role) == hash(layer.role(type(role))) for role in layer.roles())


def test_every_kind_of_role_is_stated_and_proven():
    assert set().union(*STATED.values()) == KINDS_OF_ROLES == CHECKS.keys()


@dataclass(frozen=True)
class Dense(tfx.Layer):
    """A linear layer as a user may write it: a weight ``(inputs, outputs)``, and names of its own."""

    inputs: int
    outputs: int
    shifts: bool = True

    def signature(self, *shapes):
        return f"... a, kernel: a b{', offset: b' if self.shifts else ''} -> ... b"

    def fields(self, *shapes):
        return {"inputs": "a", "outputs": "b"}

    def init(self, generator):
        bound = 1 / math.sqrt(self.inputs)
        return {name: torch.empty(n).uniform_(-bound, bound, generator=generator) for name, n in self.shapes().items()}

    def apply(self, params, *inputs):
        value = inputs[0] @ params["kernel"]
        return value + params["offset"] if self.shifts else value

    def roles(self):
        return (Mixing(self, weight="kernel", bias="offset", option="shifts"),)


def both(spec, generator):
    """A network of linear layers and the same of `Dense`, with the same parameters."""
    ours = random_params(spec, generator)
    nodes = []
    for node in spec:
        linear = isinstance(node.layer, L.Linear)
        layer = Dense(node.layer.in_features, node.layer.out_features, node.layer.bias) if linear else node.layer
        nodes.append(replace(node, layer=layer))
    return ours, theirs(ours, spec), tfx.Spec(tuple(nodes), spec.outputs)


def theirs(params, spec):
    """The parameters of linear layers as `Dense` has them."""
    leaves = {}
    for path, leaf in tfx.tree.flatten(params).items():
        name, _, last = path.rpartition(".")
        if isinstance(spec[name].layer, L.Linear):
            path, leaf = (f"{name}.kernel", leaf.T) if last == "weight" else (f"{name}.offset", leaf)
        leaves[path] = leaf
    return tfx.tree.unflatten(leaves)


TOKENS = tfx.serial(
    tfx.Input((5, 4)), a=L.Linear(4, 6, bias=False), turn=L.Permute((0, 2, 1)), norm=L.BatchNorm1d(6),
    back=L.Permute((0, 2, 1)), act=L.GELU(), b=L.Linear(6, 7), act2=L.ReLU(), flat=L.Flatten(), c=L.Linear(35, 3),
)  # fmt: skip


@pytest.mark.parametrize("name", ["fold", "lean", "compensate", "reconstruct"])
def test_a_linear_layer_from_outside_is_treated_as_ours(name):
    """Folded, compensated and reconstructed to the same numbers."""
    ours, outside, spec = both(TOKENS, torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    batch = torch.randn(20, 5, 4, dtype=torch.float64, generator=generator), torch.arange(20) % 3
    assert_close(tfx.apply(outside, spec, batch[0]), tfx.apply(ours, TOKENS, batch[0]))
    couplings = tfx.couple(ours, TOKENS), tfx.couple(outside, spec)
    keep = torch.rand(len(couplings[0]), generator=generator).numpy() > 0.4
    if name == "fold":
        (one, first), (two, second) = tfx.fold(ours, TOKENS), tfx.fold(outside, spec)
        assert len(first) == len(second) == len(spec) - 1
    elif name == "lean":
        (one, first), (two, second) = lean(ours, couplings[0]), lean(outside, couplings[1])
        assert len(first) == len(second) == len(spec) - 1
    else:
        plans = [tfx.Plan(coupling, keep) for coupling in couplings]
        (one, first), (two, second) = (
            getattr(tfx, name)(params, plan, batch) for params, plan in zip((ours, outside), plans, strict=True)
        )
    assert [node.name for node in second] == [node.name for node in first]
    moved = tfx.tree.flatten(theirs(one, first))
    assert moved.keys() == tfx.tree.flatten(two).keys()
    for path, leaf in tfx.tree.flatten(two).items():
        assert_close(leaf, moved[path], rtol=1e-9, atol=1e-9)
    assert second["a"].layer == Dense(4, first["a"].layer.out_features, first["a"].layer.bias)


def test_the_role_of_a_layer_from_outside_is_proven():
    check_layer(Dense(4, 3), (5, 4))
    check_layer(Dense(4, 3, shifts=False), (4,))


@dataclass(frozen=True)
class Scale(tfx.Layer):
    """Numbers per channel from outside."""

    channels: int

    def signature(self, *shapes):
        return "B c ..., log: c -> B c ..."

    def fields(self, *shapes):
        return {"channels": "c"}

    def init(self, generator):
        return {"log": torch.randn(self.channels, generator=generator)}

    def apply(self, params, *inputs):
        return inputs[0] * self.numbers(params)[0].reshape(-1, *[1] * (inputs[0].ndim - 2))

    def numbers(self, params):
        return params["log"].exp(), torch.zeros_like(params["log"])

    def roles(self):
        return (R.ChannelAffine(self.numbers),)


def test_numbers_per_channel_from_outside_are_folded():
    check_layer(Scale(4), (4, 3))
    spec = tfx.serial(tfx.Input((3, 5, 5)), conv=L.Conv2d(3, 4, 3), scale=Scale(4), out=L.Conv2d(4, 2, 3))
    params, x = random_params(spec, GENERATOR), torch.randn(2, 3, 5, 5, dtype=torch.float64)
    small, folded = tfx.fold(params, spec)
    assert [node.name for node in folded] == ["input", "conv", "out"]
    assert_close(tfx.apply(small, folded, x), tfx.apply(params, spec, x))


def lying(base, *args, **methods):
    """A layer with other methods than its base, whose roles it states unless they are among them."""
    lies = sum(name.startswith(f"{__name__}.Lying") for name in L.LAYERS)
    body = {"roles": base.roles, **methods, "__module__": __name__}
    return dataclass(frozen=True)(type(f"Lying{lies}", (base,), body))(*args)


def doubled(self, params, x):
    return 2 * L.Linear.apply(self, params, x)


def lifted(self, params, x):
    return L.Conv2d.apply(self, params, x) + 1


def raised(self, params, x):
    return L.BatchNorm2d.apply(self, params, x) + 1


def says(*roles):
    return lambda self: roles


LIARS = {
    "windows": (lying(L.Linear, 4, 3, apply=doubled), (4,), "Mixing"),
    "kernel": (lying(L.Conv2d, 4, 6, 3, apply=lifted), (4, 5, 5), "Mixing"),
    "affine": (lying(L.BatchNorm2d, 4, apply=raised), (4, 3, 3), "ChannelAffine"),
    "average": (lying(L.BatchNorm2d, 4, roles=lambda self: (R.RunningStatistics(self),)), (4, 3, 3), "Running"),
    "normalizing": (lying(L.BatchNorm2d, 4, roles=says(R.Normalizing("bias"))), (4, 3, 3), "Normalizing"),
    "slope": (lying(L.Tanh, roles=says(*L.ReLU().roles())), (4,), "Pointwise"),
    "slope of another": (lying(L.GELU, roles=says(*L.SiLU().roles())), (4,), "Pointwise"),
    "recomputed": (lying(L.Sigmoid, roles=says(R.Recomputed())), (4,), "Recomputed"),
    "view": (lying(L.ReLU, roles=says(R.Viewing())), (4,), "Viewing"),
    "dims": (lying(L.Permute, (0, 2, 1), roles=says(R.Viewing((0, 1, 2)))), (3, 3), "Viewing"),
    "summing": (lying(L.Reduce, "mean", (1,), roles=says(R.Summing((1,)))), (4, 3), "Summing"),
    "noise": (lying(L.ReLU, roles=says(R.Noise())), (4,), "Noise"),
    "noise that adds": (lying(L.Dropout, 0.5, None, True, roles=says(R.Noise())), (4,), "Noise"),
    "slice": (lying(L.Slice, 1, 0, 2, roles=says(R.Slicing(1, 1, 3))), (4,), "Slicing"),
    "constant": (lying(L.Parameter, (3,), 1.0, 0.0, True, roles=says(R.Constant())), (4,), "Constant"),
    "value": (lying(L.Sigmoid, roles=says(R.Memory(new_value=True))), (4,), "Memory"),
    "input": (lying(L.Conv2d, 4, 6, 3, roles=says(R.Memory(keeps_input=False))), (4, 5, 5), "Memory"),
    "gradient": (lying(L.Identity, roles=says(R.Memory(new_gradient=True))), (4,), "Memory"),
}


@pytest.mark.parametrize("name", LIARS)
def test_a_role_that_is_not_true_is_found_out(name):
    layer, shape, role = LIARS[name]
    with pytest.raises(AssertionError, match=f"role {role}"):
        check_layer(layer, shape, seeds=range(1))


@pytest.mark.parametrize(("layer", "role"), [(L.Multiply, R.Sum()), (L.Add, R.Product()), (L.Add, R.Joining(1))])
def test_a_role_of_several_inputs_that_is_not_true_is_found_out(layer, role):
    with pytest.raises(AssertionError, match=f"role {type(role).__name__}"):
        check_layer(lying(layer, roles=says(role)), (4,), (4,), seeds=range(1))
    wrong = lying(L.ScaledDotProduct, 0.5, roles=says(R.Attending(0.25)))
    with pytest.raises(AssertionError, match="role Attending"):
        check_layer(wrong, (2, 3, 4), (2, 3, 4), (2, 3, 4), seeds=range(1))


PACKAGE = Path(tfx.__file__).parent
PASSES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent.name not in ("layers", "interop", "capture"))
CLASSES = {name for name in L.__all__ if isinstance(getattr(L, name), type) and issubclass(getattr(L, name), L.Layer)}


def class_tests(tree: ast.AST) -> Iterator[str]:
    """The layer classes that a source asks an object to be one of.

    `Layer` itself is none, nor are `Input` and `Choose`, which say how a network is called.
    """
    taken = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("taylorfx.layers")
        for name in node.names
    }
    for node in ast.walk(tree):
        asked: list[ast.AST] = []
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("isinstance", "issubclass"):
            asked = node.args[1:]
        elif isinstance(node, ast.Compare):
            asked = node.comparators
        elif isinstance(node, ast.Dict):  # a table by classes
            asked = [key for key in node.keys if key is not None]
        for part in (part for root in asked for part in ast.walk(root)):
            layer = isinstance(part, ast.Attribute) and ast.unparse(part.value) in ("L", "layers")
            name = part.attr if layer else part.id if isinstance(part, ast.Name) and part.id in taken else ""
            if name in CLASSES - {"Input", "Choose", "Layer"}:
                yield name


@pytest.mark.parametrize("path", PASSES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_pass_asks_for_a_role_and_for_no_class(path):
    if "testing" not in path.parts:
        assert not [*class_tests(ast.parse(path.read_text()))]


def test_the_search_for_classes_finds_them():
    """The control of the test above."""
    start = "from taylorfx.layers import Input, Layer, Linear; "
    for text in ("isinstance(x, L.Conv2d)", "type(x) is Linear", "type(x) in (L.Add, L.Slice)", "{L.GELU: 1}"):
        assert [*class_tests(ast.parse(start + text))]
    for text in ("isinstance(x, (L.Input, Layer))", "type(x) is nn.Parameter", "serial(L.ReLU())"):
        assert not [*class_tests(ast.parse(start + text))]


def test_a_new_layer_touches_one_file():
    """The probe: outside of its module the package does not name a transposed convolution over volumes."""
    sources = (path for path in PACKAGE.rglob("*.py") if "interop" not in path.parts)
    naming = [path.relative_to(PACKAGE).as_posix() for path in sources if "ConvTranspose3d" in path.read_text()]
    assert naming == ["layers/conv.py"]

"""Sizes that are left open: the same coupling at all of them, guards, and what runs on batches of several."""

import warnings

import pytest
import torch
from modules import conv, net
from sized import SIZED, anchored, conv8, halving, sized
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import ShapeError, from_torch, to_torch
from taylorfx.interop import CaptureError
from taylorfx.layers.sizes import shown
from taylorfx.testing.strategies import random_plan

CLOSE = {"rtol": 1e-9, "atol": 1e-9}


SIZES = ((8, 8), (11, 7), (16, 22))
each = pytest.mark.parametrize("name", SIZED)


def image(size, count=3):
    return torch.randn(count, 2, *size, generator=torch.Generator().manual_seed(size[0]), dtype=torch.float64)


def caught(name, size=SIZES[0]):
    torch.manual_seed(0)
    module = sized(name, conv8()).double().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return module, *from_torch(module, image(size))


@each
def test_captured_once_it_is_its_module_at_all_sizes(name):
    module, params, spec = caught(name)
    out = to_torch(params, spec)
    dynamic = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    again = torch.export.export(out, (image(SIZES[0]),), dynamic_shapes=(dynamic,)).module()
    compiled = torch.compile(out, dynamic=True, fullgraph=True, backend="eager")
    for size in SIZES:
        x = image(size, 2)
        for run in (lambda x: tfx.apply(params, spec, x), out, again, compiled):
            assert_close(run(x), module(x), **CLOSE)
    assert_close(out.train()(image(SIZES[1])), module.train()(image(SIZES[1])), **CLOSE)


@each
def test_the_coupling_is_the_same_at_all_sizes(name):
    couplings = []
    for captured_at in SIZES[:2]:
        _module, params, spec = caught(name, captured_at)
        couplings += [tfx.couple(params, at) for at in (spec, spec.at((2, *SIZES[2])))]
    first = couplings[0]
    plans = [random_plan(c, torch.Generator().manual_seed(1), 0.5, exact=True) for c in couplings]
    for coupling, plan in zip(couplings, plans, strict=True):
        assert coupling.names == first.names
        assert coupling.scopes == first.scopes
        assert coupling.frozen.keys() == first.frozen.keys()
        assert (plan.keep == plans[0].keep).all()


@each
def test_cut_is_gated_at_all_sizes(name):
    _, params, spec = caught(name)
    coupling = tfx.couple(params, spec)
    plan = random_plan(coupling, torch.Generator().manual_seed(3), 0.5, exact=True)
    small = tfx.cut(params, plan)
    for size in SIZES:
        gated = tfx.apply(params, spec, image(size), gates=plan.gates)
        assert_close(tfx.apply(small, plan.spec, image(size)), gated, **CLOSE)
        assert_close(to_torch(small, plan.spec)(image(size)), gated, **CLOSE)


@pytest.mark.parametrize("name", ["attention", "skipped"])
def test_scores_repair_and_the_oracle_take_batches_of_several_sizes(name):
    """Each as with a network captured at the size of the batch."""
    _, params, spec = caught(name)
    coupling = tfx.couple(params, spec)

    def loss(outputs, targets):
        return (outputs.flatten(1) * targets).sum(1)

    batches = [(image(size), torch.ones(3, 1, dtype=torch.float64)) for size in SIZES[:2]]
    options = {"loss": loss, "moments": True}
    together = tfx.measure(params, spec, batches, coupling, **options)
    alone = []
    for size, batch in zip(SIZES, batches, strict=False):
        _, _, there = caught(name, size)
        alone.append(tfx.measure(params, there, batch, tfx.couple(params, there), **options))
    assert_close(together.sum, alone[0].sum + alone[1].sum, **CLOSE)
    assert_close(together.moments.sum_sq, alone[0].moments.sum_sq + alone[1].moments.sum_sq, **CLOSE)

    units = range(min(3, len(coupling)))
    left_out = tfx.truth.oracle(params, spec, batches[1], coupling, units=units, loss=loss)
    _, _, there = caught(name, SIZES[1])
    expected = tfx.truth.oracle(params, there, batches[1], tfx.couple(params, there), units=units, loss=loss)
    assert_close(left_out.sum, expected.sum, **CLOSE)

    plan = random_plan(coupling, torch.Generator().manual_seed(3), 0.5, exact=True)
    mended, small = tfx.repair.reconstruct(params, plan, batches)
    assert tfx.apply(mended, small, image(SIZES[2])).shape == tfx.apply(params, spec, image(SIZES[2])).shape
    if name == "skipped":
        with pytest.raises(ShapeError, match="batches of one size"):
            tfx.repair.compensate(params, plan, batches)
        mended, _ = tfx.repair.compensate(params, plan, batches[1:])
        other = random_plan(tfx.couple(params, there), torch.Generator().manual_seed(3), 0.5, exact=True)
        assert_close(mended, tfx.repair.compensate(params, other, batches[1:])[0], **CLOSE)


def test_costs_are_those_of_the_size_that_is_asked_for():
    _, _params, spec = caught("skipped")
    here, there = spec.table(), spec.at((2, 16, 16)).table()
    assert "8x16x16" in there
    assert "8x16x16" not in here
    flops = [int(text.split()[-1].replace(",", "")) for text in (here, there)]
    assert flops[1] == 4 * flops[0]
    assert spec.at((2, 16, 16)).at((2, 8, 8)) == spec


def test_axes_that_belong_together_are_guarded():
    def forward(m, x):
        return m.a(x) * 2 if x.shape[2] == x.shape[3] else m.a(x)

    module = net(forward, 0, a=conv())[0].double().eval()
    params, spec = from_torch(module, image((8, 8)))
    assert [shown(guard) for guard in spec.guards] == ["x.3 == x.2"]
    assert "x.3 == x.2" in str(spec)
    assert_close(tfx.apply(params, spec, image((9, 9))), module(image((9, 9))), **CLOSE)
    for refused in (lambda: tfx.apply(params, spec, image((9, 8))), lambda: spec.at((2, 9, 8))):
        with pytest.raises(ShapeError, match=r"takes sizes with x\.3 == x\.2, received x\.2 of size 9, x\.3 of size 8"):
            refused()
    assert tfx.from_json(tfx.to_json(spec)).guards == spec.guards


def test_a_cut_up_to_the_end_is_taken_as_well():
    """Of windows of three, nothing is padded or cut off at 9 and 12: torch.export says that sizes are others."""
    module, params, spec = caught("padded")
    assert not any("!=" in shown(guard) for guard in spec.guards)
    for size in ((9, 12), (9, 8), (7, 12)):
        assert_close(tfx.apply(params, spec, image(size)), module(image(size)), **CLOSE)


def test_one_position_is_taken_where_the_module_computes_the_same():
    squeezes = net(lambda m, x: m.a(x).squeeze(2).sum(1), 0, a=conv())[0].double().eval()
    params, spec = from_torch(squeezes, image((5, 6)))
    assert [least for least, _, _ in spec.inputs[0].layer.ranges] == [2, 2, 1]
    with pytest.raises(ShapeError, match="axis 2 takes size 2 or more"):
        tfx.apply(params, spec, image((1, 6)))
    assert_close(tfx.apply(params, spec, image((5, 1))), squeezes(image((5, 1))), **CLOSE)


class Held(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        assert x.shape[2] == 8
        return self.a(x)


def test_the_line_that_holds_an_axis_is_said_and_open_axes_can_be_demanded():
    module = Held().double().eval()
    params, spec = from_torch(module, image((8, 8)), sizes=["x.3"])
    line = Held.forward.__code__.co_firstlineno + 1
    with pytest.raises(
        ShapeError, match=rf"axis 2 takes size 8, received 9 \(held by test_sizes\.py:{line} in forward\)"
    ):
        tfx.apply(params, spec, image((9, 8)))
    assert_close(tfx.apply(params, spec, image((8, 9))), module(image((8, 9))), **CLOSE)
    with pytest.raises(CaptureError, match=rf"x\.2: it is held at 8 by test_sizes\.py:{line}") as caught_:
        from_torch(module, image((8, 8)), sizes=["x.2", "x.7"])
    assert "x.7: there is no such axis; there are x.1, x.2, x.3" in str(caught_.value)
    _, fixed = from_torch(module, image((8, 8)), sizes=False)
    assert [least == most for least, most, _ in fixed.inputs[0].layer.ranges] == [True] * 3


class Looked(nn.Module):
    """Looks its rows up by the height, which is no symbol for long; words may be of any length."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Linear(3, 4)
        self.tables = {6: torch.ones(6, 1), 8: torch.arange(8.0)[:, None]}

    def forward(self, x, words):
        return (self.a(x) * self.tables[x.shape[2]]).mean((2, 3))[:, None] + self.b(words)


def test_axes_that_can_be_open_by_themselves_are_so_where_others_cannot():
    module = Looked().double().eval()
    words = torch.randn(3, 9, 3, dtype=torch.float64)
    params, spec = from_torch(module, (image((8, 8)), words[:, :4]))
    assert_close(tfx.apply(params, spec, image((8, 9)), words), module(image((8, 9)), words), **CLOSE)
    with pytest.raises(ShapeError, match=r"x: axis 2 takes size 8, received 6 \(held by .*hash"):
        tfx.apply(params, spec, image((6, 9)), words)
    with pytest.raises(CaptureError, match=r"x\.2: it is held at 8 by .*hash"):
        from_torch(module, (image((8, 8)), words), sizes=["x.2", "x.3", "words.1"])


def test_sizes_are_open_where_maps_have_one_position_at_the_example():
    module = net(anchored, 0, a=conv8(), b=halving(5), d=nn.Conv2d(6, 4, 1))[0].double().eval()
    params, spec = from_torch(module, image((16, 12)))
    assert not spec.guards
    for size in ((16, 12), (97, 70), (5, 9)):
        assert_close(tfx.apply(params, spec, image(size)), module(image(size)), **CLOSE)


class Padded(nn.Module):
    """Pads its rows until several numbers divide them: the formula of their length doubles each time."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1)

    def forward(self, x):
        for n in (3, 5, 7, 11, 13):
            x = nn.functional.pad(x, (0, -x.shape[3] % n))
        return self.a(x)


def test_sizes_with_long_formulas_are_followed_where_that_is_demanded():
    module = Padded().double().eval()
    params, spec = from_torch(module, image((6, 8)))
    line = Padded.forward.__code__.co_firstlineno + 2
    held = rf"held by a size with a long formula, test_sizes\.py:{line} in forward; sizes= follows it"
    with pytest.raises(ShapeError, match=rf"axis 3 takes size 8, received 9 \({held}\)"):
        tfx.apply(params, spec, image((6, 9)))
    params, spec = from_torch(module, image((6, 8)), sizes=["x.3"])
    for width in (9, 34):
        assert_close(tfx.apply(params, spec, image((6, width))), module(image((6, width))), **CLOSE)


@each
def test_a_file_keeps_the_formulas(name):
    module, params, spec = caught(name)
    again = tfx.from_json(tfx.to_json(spec))
    assert again == spec
    x = image(SIZES[2])
    assert_close(tfx.apply(params, again, x), module(x), **CLOSE)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"x.2"', '"y.2"', "no input has the axis 'y.2'"),
        ('["%"', '["eval"', "a formula has one of"),
        ('"x.2"', '"x"', "an axis is named after an input"),
        ('{"number": ', '{"number": 1', "for the declared inputs, not 1"),
        ('"formula"', '"formulas"', "expected values, or sizes as"),
    ],
)
def test_a_file_with_a_formula_that_is_wrong_is_refused(old, new, message):
    text = tfx.to_json(caught("padded")[2])
    assert old in text
    with pytest.raises(ValueError, match="does not describe a network") as error:
        tfx.from_json(text.replace(old, new))
    assert message in str(error.value)


class Overwriting(nn.Module):
    """Writes on what inference's dropout gives: that is what it was given."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, x):
        y = self.linear(x)
        z = self.dropout(y)
        z.add_(1)
        return y + z


def test_a_network_that_differs_at_the_example_is_refused():
    with pytest.raises(CaptureError, match="that of Overwriting gives something else"):
        from_torch(Overwriting().eval(), torch.randn(2, 4))


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_length_is_open_beside_spectral_norms(norm):
    module = nn.Sequential(norm(nn.Conv1d(3, 4, 3)), nn.ReLU(), norm(nn.ConvTranspose1d(4, 5, 3))).eval()
    params, spec = from_torch(module, torch.randn(2, 3, 9))
    x = torch.randn(2, 3, 17)
    assert_close(tfx.apply(params, spec, x), module(x))


def test_a_length_is_open_in_half_precision():
    """Rounding is not taken for a difference."""
    layers = (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True) for _ in range(4))
    module = nn.Sequential(*layers).bfloat16().eval()
    _, spec = from_torch(module, torch.randn(2, 9, 32, dtype=torch.bfloat16))
    assert spec.input_layers["input"].ranges[0][1] is None

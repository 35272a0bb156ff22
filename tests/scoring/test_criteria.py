"""Criteria against their formulas, computed from scratch with torch.nn and plain autograd."""

import pytest
import torch
from constructs import CONSTRUCTS
from torch import nn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import network, random_params

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def vgg():
    """A small network of the original's kind, as a spec and as modules with the same tensors."""
    spec = tfx.serial(
        tfx.Input((2, 8, 8)), L.Conv2d(2, 5, 3, padding=1), L.BatchNorm2d(5), L.ReLU(), L.MaxPool2d(2),
        L.Conv2d(5, 4, 3, padding=1), L.ReLU(), L.Flatten(), L.Linear(64, 3),
    )  # fmt: skip
    module = nn.Sequential(
        nn.Conv2d(2, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(5, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3),
    ).double()  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    params = random_params(spec, generator)
    module.load_state_dict(tfx.tree.flatten(params))
    x, y = torch.randn(6, 2, 8, 8, generator=generator, dtype=torch.float64), torch.arange(6) % 3
    return spec, params, module, x, y


def activations(module, x, y, at, reduction):
    """Activations and their gradients at the outputs of some layers, by plain autograd."""
    kept, value = [], x
    for k, layer in enumerate(module):
        value = layer(value)
        if k in at:
            value.retain_grad()
            kept.append(value)
    nn.functional.cross_entropy(value, y, reduction=reduction).backward()
    return [(a.detach(), a.grad) for a in kept]


def test_taylor_is_the_papers_equation_at_the_reads():
    spec, params, module, x, y = vgg()
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, (x, y), coupling)
    found = activations(module.eval(), x, y, at=(3, 6), reduction="sum")  # what the second conv and the linear read
    maps = [a.reshape(6, c, -1) for (a, _), c in zip(found, (5, 4), strict=True)]
    grads = [g.reshape(6, c, -1) for (_, g), c in zip(found, (5, 4), strict=True)]
    summed = [(a * g).sum(2) for a, g in zip(maps, grads, strict=True)]
    mean = [(a * g).mean(2) for a, g in zip(maps, grads, strict=True)]
    g = torch.cat(summed, 1)
    assert_close(tfx.taylor(stats, coupling), g.abs().mean(0), **CLOSE)
    assert_close(tfx.taylor(stats, coupling, spatial_mean=True), torch.cat(mean, 1).abs().mean(0), **CLOSE)
    paper = torch.cat([s / s.norm() for s in (m.abs().mean(0) for m in mean)])
    scores = tfx.taylor(stats, coupling, spatial_mean=True, normalizer=tfx.criteria.per_layer_l2)
    assert_close(scores, paper, **CLOSE)
    assert_close(tfx.criteria.taylor_squared(stats, coupling), g.mean(0).square(), **CLOSE)
    assert_close(tfx.fisher(stats, coupling), g.square().mean(0) / 2, **CLOSE)
    assert_close(tfx.criteria.signed(stats, coupling), -g.mean(0), **CLOSE)
    assert_close(tfx.criteria.second_order(stats, coupling), -g.mean(0) + g.square().mean(0) / 2, **CLOSE)


def test_activation_criteria_look_at_what_is_read():
    spec, params, module, x, y = vgg()
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, (x, y), coupling, moments=True)
    found = activations(module.eval(), x, y, at=(3, 6), reduction="sum")
    maps = [a.reshape(6, c, -1).transpose(0, 1).flatten(1) for (a, _), c in zip(found, (5, 4), strict=True)]
    assert_close(tfx.criteria.activation_mean(stats, coupling), torch.cat([m.mean(1) for m in maps]), **CLOSE)
    assert_close(
        tfx.criteria.activation_std(stats, coupling), torch.cat([m.std(1, correction=0) for m in maps]), **CLOSE
    )
    live = torch.cat([(m != 0).double().mean(1) for m in maps])
    assert_close(tfx.criteria.apoz(stats, coupling), live, **CLOSE)
    with pytest.raises(ValueError, match="moments=True"):
        tfx.criteria.apoz(tfx.measure(params, spec, (x, y), coupling), coupling)


def test_compat_is_the_originals_arithmetic():
    spec, params, module, x, y = vgg()
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, (x, y), coupling, at_writes=True, training=True)
    scores = tfx.criteria.compat(stats, coupling)
    found = activations(module.train(), x, y, at=(0, 4), reduction="mean")  # the convolutions' outputs
    original = [(a * g).sum((0, 2, 3)).abs() for a, g in found]
    assert_close(scores, torch.cat([s / s.norm() for s in original]), rtol=1e-6, atol=1e-6)
    # Behind the first convolution stands a batch norm, which ignores the scale of what it hears: but for its eps and
    # rounding the sum over the batch is zero, while the examples' own derivatives are not.
    per_example = (found[0][0] * found[0][1]).sum((2, 3)).abs().sum(0)
    assert original[0].max() < 1e-4 * per_example.max()


def test_weight_criteria_are_norms_of_the_filters():
    spec, params, module, _, _ = vgg()
    coupling = tfx.couple(params, spec)
    filters = [module[k].weight.detach().flatten(1) for k in (0, 4)]
    assert_close(tfx.criteria.weight_l1(params, coupling), torch.cat([w.abs().sum(1) for w in filters]), **CLOSE)
    assert_close(tfx.criteria.weight_l2(params, coupling), torch.cat([w.norm(dim=1) for w in filters]), **CLOSE)
    with pytest.raises(ValueError, match="4 pass none"):
        tfx.criteria.batchnorm_scale(params, coupling)


def test_weights_of_shared_and_coupled_layers_count_together():
    net = network(CONSTRUCTS["projection"])
    w, leaves = tfx.criteria.weight_l1(net.params, net.coupling), tfx.tree.flatten(net.params)
    both = sum(leaves[path].abs().flatten(1).sum(1) for path in ("1.0.weight", "1.shortcut.weight"))
    assert_close(w[4:], both, **CLOSE)
    shared = network(CONSTRUCTS["shared"])
    stem, tied = (tfx.tree.flatten(shared.params)[p].abs().flatten(1).sum(1) for p in ("0.weight", "1.tied.weight"))
    assert_close(tfx.criteria.weight_l1(shared.params, shared.coupling), stem + tied, **CLOSE)


def test_batchnorm_scale_is_the_magnitude_of_the_scale():
    net = network(tfx.serial(tfx.Input((2, 4, 4)), L.Conv2d(2, 4, 1), L.BatchNorm2d(4), L.ReLU(), L.Flatten(),
                             L.Linear(64, 2)))  # fmt: skip
    assert_close(tfx.criteria.batchnorm_scale(net.params, net.coupling), net.params["1"]["weight"].abs(), **CLOSE)


@pytest.mark.parametrize(
    ("normalizer", "norm"),
    [
        (tfx.criteria.per_layer_l2, torch.linalg.norm),
        (tfx.criteria.per_layer_mean, torch.mean),
        (tfx.criteria.per_layer_max, torch.amax),
    ],
)
def test_normalizers_make_every_layer_of_norm_one(normalizer, norm):
    net = network(CONSTRUCTS["dense"])
    raw = torch.rand(len(net.coupling), dtype=torch.float64)
    scores = normalizer(raw, net.coupling)
    for k in range(len(net.coupling.scopes)):
        members = torch.from_numpy(net.coupling.scope == k)
        assert_close(norm(scores[members]), torch.ones((), dtype=torch.float64), **CLOSE)
        assert_close(scores[members] * norm(raw[members]), raw[members], **CLOSE)
    assert torch.equal(normalizer(0 * raw, net.coupling), 0 * raw)
    assert tfx.criteria.unnormalized(raw, net.coupling) is raw


def test_prune_takes_any_plain_function():
    net = network(CONSTRUCTS["chain"])

    def last_first(stats, coupling):
        return -torch.arange(float(len(coupling)))

    params, spec = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Remove(2), criterion=last_first)
    assert spec["3"].layer.out_channels == 3
    assert torch.equal(params["3"]["weight"], net.params["3"]["weight"][:3])
    _, spec = tfx.prune(net.params, net.spec, net.batch, budget=tfx.Remove(2), criterion=tfx.criteria.weight_l2)
    assert sum(spec[n].layer.out_channels for n in "03") == 7
    _, spec = tfx.prune(net.params, net.spec, [net.batch] * 2, budget=0.5, criterion=tfx.criteria.apoz, moments=True)
    assert sum(spec[n].layer.out_channels for n in "03") == 4


def test_random_scores_come_from_the_generator():
    coupling = network(CONSTRUCTS["chain"]).coupling
    one, two = (tfx.criteria.random(coupling, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, two)
    assert len(one) == len(coupling)


def test_a_mean_and_a_sum_over_the_batch_are_the_same_loss():
    net = network(CONSTRUCTS["chain"])
    results = [
        tfx.measure(net.params, net.spec, net.batch, net.coupling, loss=loss)
        for loss in (
            tfx.cross_entropy,
            nn.functional.cross_entropy,
            lambda o, t: nn.functional.cross_entropy(o, t, reduction="sum"),
            lambda o, t: nn.functional.cross_entropy(o, t, reduction="none"),
        )
    ]
    for other in results[1:]:
        assert_close(other.sum_sq, results[0].sum_sq, **CLOSE)
        assert_close(other.loss, results[0].loss, **CLOSE)


def test_sums_are_kept_in_single_precision_or_better():
    net = network(CONSTRUCTS["chain"])
    half = tfx.tree.unflatten(
        (k, v.bfloat16() if v.is_floating_point() else v) for k, v in tfx.tree.flatten(net.params).items()
    )
    batch = net.batch[0]["input"].bfloat16(), net.batch[1]
    assert tfx.measure(half, net.spec, batch, net.coupling, moments=True).sum_abs.dtype == torch.float32
    assert tfx.measure(net.params, net.spec, net.batch, net.coupling).sum_abs.dtype == torch.float64


def test_statistics_are_one_line():
    spec, params, _, x, y = vgg()
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, [(x[:4], y[:4]), (x[4:], y[4:])], coupling, rows=True, moments=True)
    loss = tfx.cross_entropy(tfx.apply(params, spec, x), y).mean()
    assert repr(stats) == f"Statistics(6 examples in 2 batches, 9 units with moments with rows, mean loss {loss:.4g})"
    whole = tfx.measure(params, spec, (x, y), coupling, per_example=False, loss=nn.functional.cross_entropy)
    assert repr(whole) == f"Statistics(1 batch, 9 units of whole batches, mean loss {loss:.4g})"
    assert repr(tfx.Statistics.neutral(coupling.names)) == "Statistics(0 examples in 0 batches, 9 units)"


def test_by_labels_drawn_from_the_network_the_fisher_is_its_fisher_information():
    """The mean over draws is the sum over all classes, each by its probability; by other labels it is not."""
    spec = tfx.serial(tfx.Input((3,)), L.Linear(3, 5), L.Tanh(), L.Linear(5, 4))
    generator = torch.Generator().manual_seed(0)
    params = tfx.tree.unflatten({path: 2 * leaf for path, leaf in tfx.tree.flatten(tfx.init(spec, generator)).items()})
    coupling, x = tfx.couple(params, spec), torch.randn(3, 3, generator=generator)
    scores = tfx.apply(params, spec, x)
    squares = [tfx.derivatives(params, spec, x, torch.full((3,), k), coupling).summed.square() for k in range(4)]
    exact = sum(scores.softmax(1)[:, k, None] * squares[k] for k in range(4)).mean(0) / 2
    many = x.repeat(4000, 1)
    drawn = tfx.criteria.sampled(scores.repeat(4000, 1), generator)
    torch.testing.assert_close(
        tfx.fisher(tfx.measure(params, spec, (many, drawn), coupling), coupling), exact, rtol=0.05, atol=1e-4
    )
    uniform = torch.randint(4, (len(many),), generator=generator)
    others = tfx.fisher(tfx.measure(params, spec, (many, uniform), coupling), coupling)
    assert ((others - exact).abs() > 0.1 * exact).any()


def test_labels_are_drawn_for_every_position():
    scores = torch.full((2, 3, 5, 4), -99.0)
    wanted = torch.randint(3, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    scores.scatter_(1, wanted[:, None], 99.0)
    assert torch.equal(tfx.criteria.sampled(scores, torch.Generator().manual_seed(1)), wanted)

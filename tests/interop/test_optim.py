"""Training through a cut: what an optimizer, a schedule or an average does to what stays, it goes on to do."""

import copy
import io
import warnings

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import nn, optim
from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.interop import carry, reschedule
from taylorfx.testing.strategies import networks, plans
from taylorfx.tree import flatten, unflatten

# Every one treats each entry of a parameter alone. With a large eps a step is a smooth function of the gradient, so
# that rounding in a gradient that is zero stays as small as it is.
ELEMENTWISE = {
    "SGD": lambda p: optim.SGD(p, 0.1),
    "SGD with momentum": lambda p: optim.SGD(p, 0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "SGD, Nesterov, fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, fused=True),
    "Adam": lambda p: optim.Adam(p, 0.01, eps=0.01),
    "Adam, amsgrad, foreach": lambda p: optim.Adam(p, 0.01, eps=0.01, amsgrad=True, foreach=True),
    "AdamW": lambda p: optim.AdamW(p, 0.01, eps=0.01, weight_decay=0.1),
    "AdamW, amsgrad, fused": lambda p: optim.AdamW(p, 0.01, eps=0.01, amsgrad=True, fused=True),
    "AdamW, maximize": lambda p: optim.AdamW(p, 0.01, eps=0.01, maximize=True),
    "RMSprop": lambda p: optim.RMSprop(p, 0.01, eps=0.01, momentum=0.9, centered=True),
    "Adagrad": lambda p: optim.Adagrad(p, 0.01, eps=0.01, lr_decay=0.1, initial_accumulator_value=0.1),
    "NAdam": lambda p: optim.NAdam(p, 0.01, eps=0.01),
    "Adadelta": lambda p: optim.Adadelta(p, eps=0.01),
    "Adamax": lambda p: optim.Adamax(p, 0.01, eps=0.01),
    "RAdam": lambda p: optim.RAdam(p, 0.01, eps=0.01),
    "ASGD": lambda p: optim.ASGD(p, 0.01),
}
SIGNED = {"Rprop": lambda p: optim.Rprop(p, 0.01)}  # a step of the sign of a gradient, whatever its size
SOME = settings(max_examples=settings().max_examples // 5)  # for each optimizer
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


def leaves_of(tree):
    """The floating-point leaves of a tree as new leaves of autograd, by path."""
    return {
        path: leaf.detach().clone().requires_grad_() for path, leaf in flatten(tree).items() if leaf.is_floating_point()
    }


def feed(optimizer, leaves, grads):
    """One step with these gradients."""
    for path, leaf in leaves.items():
        leaf.grad = grads[path].clone()
    optimizer.step()


def fresh(leaves, seed):
    generator = torch.Generator().manual_seed(seed)
    return {path: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for path, leaf in leaves.items()}


def cut(leaves, plan):
    return flatten(tfx.cut(unflatten(leaves), plan))


def assert_same(one, other, **close):
    assert one.keys() == other.keys()
    for path, leaf in one.items():
        assert_close(leaf, other[path], msg=lambda text, path=path: f"{path}: {text}", **close)


@SOME
@given(st.data())
@pytest.mark.parametrize("name", [*ELEMENTWISE, *SIGNED])
def test_a_step_after_the_cut_is_the_cut_of_the_step(name, data):
    """With gradients that are cut alike: whatever leaves, and whatever was trained before."""
    network = data.draw(networks())
    plan = data.draw(plans(network.coupling))
    whole = leaves_of(network.params)
    optimizer = {**ELEMENTWISE, **SIGNED}[name](whole.values())
    for seed in range(data.draw(st.integers(0, 2))):
        feed(optimizer, whole, fresh(whole, seed))
    small = leaves_of(tfx.cut(unflatten(whole), plan))
    before = copy.deepcopy(optimizer.state_dict())
    carried = carry(optimizer, plan, small, old=whole)
    for seed in range(10, 13):
        feed(carried, small, cut(fresh(whole, seed), plan))
    assert str(optimizer.state_dict()) == str(before)  # which is left as it was
    for seed in range(10, 13):
        feed(optimizer, whole, fresh(whole, seed))
    assert_same(small, cut(whole, plan), rtol=1e-12, atol=1e-14)


@SOME
@given(st.data())
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_training_after_the_cut_is_gated_training_of_what_stays(name, data):
    """In float64, parameters agree to nine digits after three steps before and three after the cut."""
    network = data.draw(networks())
    plan = data.draw(plans(network.coupling, exact=True))
    inputs, targets = network.batch

    def step(optimizer, leaves, others, spec, gates=None):
        optimizer.zero_grad()
        outputs = tfx.apply(unflatten({**others, **leaves}), spec, inputs, gates=gates)
        nn.functional.cross_entropy(outputs, targets).backward()
        optimizer.step()

    trained, rest = tfx.partition(network.params, network.spec)
    whole, others = leaves_of(trained), flatten(rest)
    optimizer = ELEMENTWISE[name](whole.values())
    for _ in range(3):
        step(optimizer, whole, others, network.spec)
    small = leaves_of(tfx.cut(unflatten(whole), plan))
    carried = carry(optimizer, plan, small, old=whole)
    for _ in range(3):
        step(carried, small, cut(others, plan), plan.spec)
        step(optimizer, whole, others, network.spec, plan.gates)
    assert_same(small, cut(whole, plan), **CLOSE)


@pytest.mark.parametrize("repair", [None, tfx.compensate])
def test_carrying_over_all_steps_of_a_prune_at_once_is_carrying_step_by_step(repair):
    """A bias that layer "b" gains from the repair is of no plan, and of neither optimizer."""
    spec = tfx.serial(
        tfx.Input((4,)), a=L.Linear(4, 12), act=L.Tanh(), b=L.Linear(12, 9, bias=False), more=L.Tanh(),
        head=L.Linear(9, 3),
    )  # fmt: skip
    params = tfx.init(spec, torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = leaves_of(params)
    optimizer = optim.AdamW(whole.values(), 0.01, amsgrad=True)
    for seed in range(3):
        feed(optimizer, whole, fresh(whole, seed))
    generator = torch.Generator().manual_seed(1)
    batch = torch.randn(16, 4, generator=generator, dtype=torch.float64), torch.arange(16) % 3
    pruned = tfx.prune(unflatten(whole), spec, batch, budget=tfx.Flops(0.5), steps=3, repair=repair)
    small = leaves_of(pruned.params)
    assert len(pruned.plans) == 3
    assert ("b.bias" in small) == (repair is not None)
    at_once = carry(optimizer, pruned.plan, small, old=whole)
    stepwise, before = optimizer, whole
    for plan in pruned.plans:
        after = leaves_of(tfx.cut(unflatten({path: before[path] for path in whole}), plan))
        stepwise, before = carry(stepwise, plan, after, old=before), after
    assert len(at_once.state) == len(whole)
    assert str(at_once.state_dict()) == str(stepwise.state_dict())
    for path in whole:
        assert_same(at_once.state[small[path]], stepwise.state[before[path]], rtol=0, atol=0)


# Two that do not treat entries alone.


def one_matrix(*shape):
    """A convolution or a linear layer between two others, its weight, and a plan that takes some of both its axes."""
    layer = L.Linear(6, 5, bias=False) if len(shape) == 2 else L.Conv2d(6, 5, (3, 2), bias=False)
    around = L.Linear if len(shape) == 2 else (lambda i, o, **options: L.Conv2d(i, o, 1, **options))
    spec = tfx.serial(
        tfx.Input((2,) if len(shape) == 2 else (2, 4, 4)),
        a=around(2, 6, bias=False),
        w=layer,
        b=around(5, 2, bias=False),
    )
    params = tfx.init(spec, torch.Generator().manual_seed(0), dtype=torch.float64)
    coupling = tfx.couple(params, spec)
    keep = np.ones(len(coupling), bool)
    keep[[0, 2, 7]] = False
    return {"w.weight": leaves_of(params)["w.weight"]}, tfx.Plan(coupling, keep)


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 2)], ids=["matrix", "convolution"])
def test_adafactor_keeps_the_estimate_of_every_square_that_stays(shape):
    whole, plan = one_matrix(*shape)
    optimizer = optim.Adafactor(whole.values(), 0.1)
    for seed in range(3):
        feed(optimizer, whole, fresh(whole, seed))
    small = leaves_of(cut(whole, plan))
    carried = carry(optimizer, plan, small, old=whole)

    def estimate(state):
        return state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True)

    (before,), (after,) = optimizer.state.values(), carried.state.values()
    assert small["w.weight"].shape != whole["w.weight"].shape
    assert_close(estimate(after), cut({"w.weight": estimate(before)}, plan)["w.weight"], rtol=1e-12, atol=0)
    means = [estimate(after).mean(axis, keepdim=True) for axis in (-1, -2)]
    assert_close([after["row_var"], after["col_var"]], means, rtol=1e-12, atol=0)
    assert after["step"] == 3


@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 3, 2)], ids=["matrix", "convolution"])
def test_adafactor_has_the_state_of_one_that_only_saw_what_stays(shape):
    """Where its estimate is no approximation: where squares of gradients are products of a row and a column."""
    whole, plan = one_matrix(*shape)
    small = leaves_of(cut(whole, plan))
    alone = leaves_of(cut(whole, plan))
    optimizer, expected = optim.Adafactor(whole.values(), 0.1), optim.Adafactor(alone.values(), 0.1)
    rows, columns = fresh({"r": whole["w.weight"][..., :1], "c": whole["w.weight"][..., :1, :]}, 7).values()
    for scale in (1.0, -3.0, 0.5):
        grads = {"w.weight": scale * rows * columns}
        feed(optimizer, whole, grads)
        feed(expected, alone, cut(grads, plan))
    (after,), (truth,) = carry(optimizer, plan, small, old=whole).state.values(), expected.state.values()
    assert_close(after, truth, rtol=1e-12, atol=0)


def test_adafactor_of_zero_gradients_and_of_vectors():
    whole, plan = one_matrix(5, 6)
    optimizer = optim.Adafactor(whole.values(), 0.1)
    feed(optimizer, whole, {"w.weight": torch.zeros_like(whole["w.weight"])})
    (state,) = carry(optimizer, plan, leaves_of(cut(whole, plan)), old=whole).state.values()
    assert not state["row_var"].any()
    assert not state["col_var"].any()
    assert state["row_var"].shape == (4, 1)
    assert state["col_var"].shape == (1, 4)
    model, plan, small = modules()
    optimizer = optim.Adafactor(model.parameters())
    train(model, optimizer)
    carried = carry(optimizer, plan, small, old=model)
    assert_close(carried.state[small.a.bias]["variance"], optimizer.state[model.a.bias]["variance"][kept(plan)])
    train(small, carried)


def test_muon_goes_on_with_the_momentum_that_stays():
    """Its momentum is that of the cut gradients; a step orthogonalizes the smaller matrix."""
    whole, plan = one_matrix(5, 6)
    optimizer = optim.Muon(whole.values(), 0.1)
    feed(optimizer, whole, fresh(whole, 0))
    small = leaves_of(cut(whole, plan))
    carried = carry(optimizer, plan, small, old=whole)
    feed(carried, small, cut(fresh(whole, 1), plan))
    feed(optimizer, whole, fresh(whole, 1))
    (before,), (after,) = optimizer.state.values(), carried.state.values()
    assert_close(after["momentum_buffer"], cut({"w.weight": before["momentum_buffer"]}, plan)["w.weight"])
    assert (small["w.weight"] - cut(whole, plan)["w.weight"]).abs().max() > 1e-3


def test_muon_steps_as_before_where_what_leaves_had_no_gradient():
    """Rows and columns of zeros change nothing of what is orthogonalized, which torch does in bfloat16."""
    whole, plan = one_matrix(5, 6)
    small = leaves_of(cut(whole, plan))
    optimizer = optim.Muon(whole.values(), 0.1, weight_decay=0)
    for seed in range(2):
        feed(optimizer, whole, flatten(tfx.expand(unflatten(cut(fresh(whole, seed), plan)), plan)))
    small = leaves_of(cut(whole, plan))
    carried = carry(optimizer, plan, small, old=whole)
    gated = flatten(tfx.expand(unflatten(cut(fresh(whole, 2), plan)), plan))
    feed(optimizer, whole, gated)
    feed(carried, small, cut(gated, plan))
    assert_close(small, cut(whole, plan), rtol=0, atol=2e-3)


# Modules.


def modules():
    """A module, a plan that takes two of its five hidden units, and the smaller module."""
    torch.manual_seed(0)
    model = Model()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*does not use all of its parameters")
        params, spec = tfx.from_torch(model, torch.randn(2, 3))
    plan = tfx.Plan(tfx.couple(params, spec), np.array([True, False, True, False, True]))
    return model, plan, tfx.to_torch(tfx.cut(params, plan), plan.spec, like=model, unchanged=["extra"])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        self.extra = nn.Linear(2, 2)  # which the network does not have

    def forward(self, x):
        return self.b(self.norm(self.a(x)).relu())


def kept(plan):
    return torch.from_numpy(np.flatnonzero(plan.keep))


def train(model, optimizer, steps=2, scaler=None):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 3, generator=generator)).square().mean()
        (loss if scaler is None else scaler.scale(loss)).backward()
        (optimizer if scaler is None else scaler).step(*([] if scaler is None else [optimizer]))
        if scaler is not None:
            scaler.update()


@pytest.fixture(autouse=True)
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_groups_settings_flags_and_hooks_are_kept():
    model, plan, small = modules()
    groups = [
        {"params": [model.a.weight, model.b.weight], "weight_decay": 0.1, "fused": True},
        {"params": [model.b.bias, model.a.bias, model.extra.weight], "lr": torch.tensor(0.5), "betas": (0.5, 0.6)},
    ]
    optimizer = optim.AdamW(groups, lr=torch.tensor(0.01), amsgrad=True, maximize=True)
    calls = []
    optimizer.register_step_pre_hook(lambda which, *_: calls.append(which))
    train(model, optimizer)
    carried = carry(optimizer, plan, small, old=model)
    assert type(carried) is optim.AdamW
    assert carried.defaults == optimizer.defaults
    settings = [[{k: v for k, v in g.items() if k != "params"} for g in o.param_groups] for o in (optimizer, carried)]
    assert settings[0] == settings[1]
    assert carried.param_groups[1]["lr"] is not optimizer.param_groups[1]["lr"]
    names = {id(p): name for name, p in small.named_parameters()}
    assert [[names[id(p)] for p in g["params"]] for g in carried.param_groups] == [
        ["a.weight", "b.weight"], ["b.bias", "a.bias", "extra.weight"],
    ]  # fmt: skip
    state = optimizer.state[model.a.weight]
    assert_close(carried.state[small.a.weight]["max_exp_avg_sq"], state["max_exp_avg_sq"][kept(plan)])
    assert small.extra.weight not in carried.state  # it never had a gradient
    train(small, carried, steps=1)
    assert calls == [optimizer, optimizer, carried]


@pytest.mark.parametrize("name", [*ELEMENTWISE, "Adafactor"])
def test_the_state_of_what_was_carried_is_saved_and_loaded(name):
    model, plan, small = modules()
    make = {**ELEMENTWISE, "Adafactor": optim.Adafactor}[name]
    optimizer = make(model.parameters())
    train(model, optimizer)
    carried = carry(optimizer, plan, small, old=model)
    file = io.BytesIO()
    torch.save([carried.state_dict(), small.state_dict()], file)
    file.seek(0)
    state, weights = torch.load(file)
    again = modules()[2]
    again.load_state_dict(weights)
    loaded = make(again.parameters())
    loaded.load_state_dict(state)
    train(small, carried)
    train(again, loaded)
    assert_close(again.state_dict(), small.state_dict(), rtol=0, atol=0)


def test_names_that_an_optimizer_knows_need_no_module():
    model, plan, small = modules()
    optimizer = optim.Adam(model.named_parameters(), 0.01)
    train(model, optimizer)
    carried, expected = carry(optimizer, plan, small), carry(optimizer, plan, small, old=model)
    assert_close(carried.state_dict()["state"], expected.state_dict()["state"], rtol=0, atol=0)
    assert carried.param_groups[0]["param_names"] == optimizer.param_groups[0]["param_names"]


def test_a_tied_parameter_is_carried_by_the_name_that_the_plan_knows():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.a, self.b = nn.Module(), nn.Linear(4, 5), nn.Linear(5, 4)
            self.first.register_parameter("tied", self.a.weight)

        def forward(self, x):
            return self.b(self.a(x).relu())

    model, x = Tied(), torch.randn(2, 4)
    params, spec = tfx.from_torch(model, x)
    plan = tfx.Plan(tfx.couple(params, spec), np.array([True, False, True, True, False]))
    small = tfx.to_torch(tfx.cut(params, plan), plan.spec, like=model)
    for old, entries in ((model, model.parameters()), (None, model.named_parameters())):
        optimizer = optim.SGD(entries, 0.1, momentum=0.9)
        model(x).sum().backward()
        optimizer.step()
        carried = carry(optimizer, plan, small, old=old)
        buffer = optimizer.state[model.a.weight]["momentum_buffer"]
        assert_close(carried.state[small.a.weight]["momentum_buffer"], buffer[kept(plan)])


# Schedules, scalers, averages.

SCHEDULES = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda k: 0.9**k),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda k: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.3, 4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=5),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "CyclicLR, scaled": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, scale_fn=lambda k: 0.9**k),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "SWALR": lambda o: SWALR(o, 0.02, 3),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_goes_on(name, before):
    model, plan, small = MODULES
    optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
    scheduler = SCHEDULES[name](optimizer)

    def rates(optimizer, scheduler, steps):
        for _ in range(steps):
            optimizer.step()
            scheduler.step()
            yield optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"], scheduler.get_last_lr()

    [*rates(optimizer, scheduler, before)]
    optimizer.step()
    carried = carry(optimizer, plan, small, old=model)
    following = reschedule(scheduler, carried)
    assert following.optimizer is carried
    following.step()  # of the step of the optimizer before
    scheduler.step()
    assert carried.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    assert [*rates(carried, following, 5)] == [*rates(optimizer, scheduler, 5)]


def test_a_schedule_that_looks_at_a_metric_goes_on():
    model, plan, small = MODULES
    optimizer = optim.SGD(model.parameters(), 0.1)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=1)
    scheduler.step(1.0)
    scheduler.step(1.0)
    carried = carry(optimizer, plan, small, old=model)
    reschedule(scheduler, carried).step(1.0)
    assert carried.param_groups[0]["lr"] == pytest.approx(0.01)
    assert optimizer.param_groups[0]["lr"] == 0.1
    with pytest.raises(ValueError, match="received 2 groups after 1"):
        reschedule(scheduler, optim.SGD([{"params": [small.a.weight]}, {"params": [small.b.weight]}], 0.1))


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_gradients_goes_on(fused):
    model, plan, small = modules()
    optimizer = optim.AdamW(model.parameters(), 0.01, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    train(model, optimizer, 3, scaler)
    small = tfx.to_torch(
        tfx.cut(dict(tfx.tree.unflatten(state(model, plan))), plan), plan.spec, like=model, unchanged=["extra"]
    )
    carried, plain = carry(optimizer, plan, small, old=model), copy.deepcopy(small)
    unscaled = carry(carried, whole_plan(plan), plain, old=small)
    train(small.train(), carried, 3, scaler)
    train(plain.train(), unscaled, 3)
    assert scaler.get_scale() == 8.0 * 2**3
    assert_close(small.state_dict(), plain.state_dict())


def state(model, plan):
    tensors = model.state_dict()
    return {path: tensors[path] for path in plan.indices}


def whole_plan(plan):
    """All that another plan has left stays."""
    params = tfx.init(plan.spec, torch.Generator())
    coupling = tfx.couple(params, plan.spec)
    return tfx.Plan(coupling, np.ones(len(coupling), bool))


@pytest.mark.parametrize("buffers", [False, True])
def test_an_averaged_model_goes_on(buffers):
    model, plan, small = modules()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=buffers)
    optimizer = optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        train(model, optimizer, 1)
        average.update_parameters(model)
    before = copy.deepcopy(average.state_dict())
    carried = carry(average, plan, small)
    assert carried.n_averaged == 3
    assert carried.training == average.training
    expected = tfx.cut(tfx.tree.unflatten(state(average.module, plan)), plan)
    assert_same(state(carried.module, plan), flatten(expected), rtol=0, atol=0)
    assert_close(carried.module.extra.weight, average.module.extra.weight)
    values = {name: value.clone() for name, value in carried.module.named_parameters()}
    carried.update_parameters(small)
    assert_close(
        dict(carried.module.named_parameters()),
        {name: 0.9 * values[name] + 0.1 * value for name, value in small.named_parameters()},
    )
    assert_close(average.state_dict(), before, rtol=0, atol=0)
    assert carried.module.a.weight is not small.a.weight


# Errors.

MODULES = modules()


class Odd(optim.SGD):
    """A state that is a matrix for every axis, as preconditioners are."""

    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter].update(step=1, left=torch.eye(len(parameter)), factor=[1])


def refusal(training, plan=MODULES[1], new=MODULES[2], **options):
    with pytest.raises(tfx.PlanError) as caught:
        carry(training, plan, new, **options)
    return str(caught.value)


def test_states_without_a_rule_are_listed_with_their_parameters():
    model = MODULES[0]
    optimizer = Odd(model.parameters(), 0.1)
    optimizer.step()
    message = refusal(optimizer, old=model)
    assert "a.weight: no rule for the state 'left' of Odd (a tensor of shape (5, 5))" in message
    assert "b.bias: no rule for the state 'factor' of Odd (list)" in message
    assert "'step'" not in message
    assert "elementwise=[...]" in message
    closure = optim.LBFGS(model.parameters())
    closure.step(lambda: model(torch.ones(2, 3)).square().sum() * 0)
    assert "a.weight: no rule for the state 'func_evals' of LBFGS (int)" in refusal(closure, old=model)


def test_states_from_elsewhere_are_carried_when_they_are_named():
    model, plan, small = MODULES
    optimizer = optim.SGD([model.a.bias], 0.1)
    optimizer.state[model.a.bias]["slow"] = torch.arange(5.0)
    assert "'slow' of SGD (a tensor of shape (5,))" in refusal(optimizer, old=model)
    carried = carry(optimizer, plan, small, old=model, elementwise=["slow"])
    assert carried.state[small.a.bias]["slow"].tolist() == [0, 2, 4]
    optimizer.state[model.a.bias]["slow"] = torch.arange(4.0)
    assert "'slow' of SGD (a tensor of shape (4,))" in refusal(optimizer, old=model, elementwise=["slow"])


def test_parameters_that_do_not_fit_are_listed():
    model, _, small = MODULES
    optimizer = optim.SGD(model.parameters(), 0.1)
    assert "named_parameters()" in refusal(optimizer)
    other = copy.deepcopy(model)
    assert "parameter 0 of group 0, (5, 3): old has no such tensor" in refusal(optimizer, old=other)
    message = refusal(optimizer, new=model, old=model)
    assert "a.weight: expected (3, 3) after the cut, received (5, 3)" in message
    assert "b.weight: expected (3, 3) after the cut, received (3, 5)" in message
    assert "extra" not in message
    grown = {**dict(small.named_parameters()), "extra.weight": nn.Parameter(torch.ones(3, 2))}
    message = refusal(optimizer, new=grown, old=model)
    assert "extra.weight: not in the plan's network and of shape (2, 2), then (3, 2)" in message
    partly = {path: leaf for path, leaf in small.named_parameters() if path != "norm.bias"}
    assert "norm.bias: new has no parameter of this name" in refusal(optimizer, new=partly, old=model)
    twice = refusal(optim.SGD(small.parameters(), 0.1), old=small)
    assert "a.weight: expected (5, 3) before the cut, received (3, 3)" in twice
    computed = {path: leaf * 1 for path, leaf in small.named_parameters()}
    assert "a.bias: computed from other tensors: detach() it" in refusal(optimizer, new=computed, old=model)
    constant = {path: leaf.detach() for path, leaf in small.named_parameters()}
    assert "a.bias: does not require a gradient any more" in refusal(optimizer, new=constant, old=model)
    half, elsewhere = copy.deepcopy(small).half(), copy.deepcopy(small).to("meta")
    assert "a.bias: float32 on cpu before the cut, float16 on cpu after" in refusal(optimizer, new=half, old=model)
    assert "a.bias: float32 on cpu before the cut, float32 on meta after" in refusal(
        optimizer, new=elsewhere, old=model
    )
    optimizer.state[torch.ones(3)] = {"step": 1}
    message = refusal(optimizer, new=small, old=model)
    assert "Received:\n  a state of what is in no group (a tensor of shape (3,))" in message


def test_what_is_no_optimizer_is_refused():
    model = MODULES[0]
    assert "received a Model" in refusal(model)
    average = AveragedModel(model)
    assert "received a dict" in refusal(average, new={})
    assert "a.weight: expected (3, 3) after the cut, received (5, 3)" in refusal(average, new=model)
    assert "b.c: the average has no parameter of this name" in refusal(average, new=nn.ModuleDict({"b": Named()}))

    class Wrapped(optim.SGD):
        def __init__(self, params, momentum_of_another_kind, **options):
            super().__init__(params, **options)

    assert "Wrapped refuses them" in refusal(Wrapped(model.parameters(), 1, lr=0.1), old=model)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.c = nn.Parameter(torch.ones(1))


def test_the_state_of_an_optimizer_is_no_tree_to_cut_and_the_error_says_what_to_do():
    model, plan, _ = MODULES
    optimizer = optim.Adam(model.parameters())
    train(copy.deepcopy(model), optimizer, 0)
    with pytest.raises(tfx.PlanError, match=r"state of an optimizer of torch: taylorfx\.interop\.carry\(optimizer"):
        tfx.cut(optimizer.state_dict(), plan)

"""Losses: of every example or of the whole batch, vectorized or not, with targets of the user's own structure.

What is measured is compared with brute force: ordinary autograd of the user's loss by gates that are multiplied in,
one batch or one example at a time.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import optree
import pytest
import torch
from constructs import CONSTRUCTS
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.testing.strategies import Network, network, networks

CLOSE = {"rtol": 1e-9, "atol": 1e-12}


def brute(net: Network, inputs: Any, value: Callable[[Any], Tensor]) -> Tensor:
    """The derivatives of a number that is made of the outputs, by gates that all examples share: plain autograd."""
    values = torch.ones(len(net.coupling), dtype=torch.float64, requires_grad=True)
    outputs = tfx.apply(net.params, net.spec, inputs, gates=tfx.gates(net.coupling, values))
    return torch.autograd.grad(value(outputs), values, materialize_grads=True)[0]


def measured(net: Network, batches: Any, **options: Any) -> tfx.Statistics:
    return tfx.measure(net.params, net.spec, batches, net.coupling, rows=True, **options)


def leaf(outputs: Any) -> Tensor:
    return optree.tree_leaves(outputs)[0]


def part(tree: Any, k: int) -> Any:
    return optree.tree_map(lambda x: x[k : k + 1], tree)


# --- losses of the whole batch


def info_nce(outputs: Any, targets: Any) -> Tensor:
    """Contrastive: every example against all others."""
    z = F.normalize(leaf(outputs).flatten(1) + 0.1, dim=1)
    return F.cross_entropy(5 * z @ z.T, torch.arange(len(z)))


def off_diagonal(outputs: Any, targets: Any) -> Tensor:
    """Of one example alone it is constant up to rounding: its own similarity, one."""
    z = F.normalize(leaf(outputs).flatten(1) + 0.1, dim=1)
    return (z @ z.T - 1).square().mean()


def in_numpy(outputs: Any, targets: Any) -> Tensor:
    """A permutation that numpy finds compares neighbors."""
    rows = leaf(outputs).flatten(1)
    return (rows - rows[np.argsort(rows.detach().numpy().sum(1))]).square().sum()


def shifted(net: Network, count: int = 3) -> list[Any]:
    """Batches that differ from each other."""
    inputs, targets = net.batch

    def moved(x: Tensor, k: int) -> Tensor:
        return x + 0.1 * k if x.is_floating_point() else x.roll(k, -1)

    return [(optree.tree_map(lambda x, k=k: moved(x, k), inputs), targets) for k in range(count)]


def check_whole_batch(net: Network, loss: Any) -> None:
    batches = shifted(net)
    stats = measured(net, batches, loss=loss, per_example=False)
    truth = torch.stack([brute(net, inputs, lambda outputs, t=t: loss(outputs, t)) for inputs, t in batches])
    assert (stats.n, stats.batches, stats.per_example) == (3, 3, False)
    assert_close(stats.rows, truth, **CLOSE)
    for field, value in {
        "sum": truth, "sum_abs": truth.abs(), "sum_sq": truth.square(), "sum_batch_abs": truth.abs(),
        "sum_batch_sq": truth.square(),
    }.items():  # fmt: skip
        assert_close(getattr(stats, field), value.sum(0), **CLOSE)
    losses = [loss(tfx.apply(net.params, net.spec, inputs), targets) for inputs, targets in batches]
    assert_close(stats.loss, torch.stack(losses).sum(), **CLOSE)


@pytest.mark.parametrize("name", CONSTRUCTS)
def test_statistics_of_a_loss_of_the_whole_batch_are_its_gradients_batch_by_batch(name: str) -> None:
    check_whole_batch(network(CONSTRUCTS[name]), info_nce)


@given(networks())
def test_so_they_are_on_random_networks(net: Network) -> None:
    assume(len(net.coupling))
    check_whole_batch(net, lambda outputs, targets: leaf(outputs).sum(0).square().sum())


@pytest.mark.parametrize("loss", [off_diagonal, in_numpy])
def test_a_loss_of_the_whole_batch_may_be_anything_that_autograd_follows(loss: Any) -> None:
    check_whole_batch(network(CONSTRUCTS["chain"]), loss)


@pytest.mark.parametrize("name", ["chain", "excitation"])
def test_of_a_mean_over_examples_it_is_the_mean_of_the_examples_own(name: str) -> None:
    """So what depends on sums of whole batches alone, first order and `taylor_squared`, is the same."""
    net = network(CONSTRUCTS[name])
    batches = shifted(net)
    each, whole = (
        measured(net, batches, loss=F.cross_entropy),
        measured(net, batches, loss=F.cross_entropy, per_example=False),
    )
    count = len(net.batch[1])
    assert_close(whole.rows, each.rows.unflatten(0, (3, count)).mean(1), **CLOSE)
    for criterion in (tfx.criteria.signed, tfx.criteria.taylor_squared):
        assert_close(criterion(whole, net.coupling), criterion(each, net.coupling), **CLOSE)


def test_the_oracle_and_the_forecasts_know_losses_of_the_whole_batch() -> None:
    net = network(CONSTRUCTS["chain"])
    batches = shifted(net)
    options: dict[str, Any] = {"loss": info_nce, "per_example": False}

    def at(values: Tensor) -> Tensor:
        found = [
            info_nce(tfx.apply(net.params, net.spec, x, gates=tfx.gates(net.coupling, values)), y) for x, y in batches
        ]
        return torch.stack(found)

    ones = torch.ones(len(net.coupling), dtype=torch.float64)
    changes = torch.stack([at(1 - one) - at(ones) for one in torch.eye(len(ones), dtype=torch.float64)])
    for chunk in (1, 3, None):
        truth = tfx.truth.oracle(net.params, net.spec, batches, net.coupling, chunk=chunk, **options)
        assert truth.n == 3
        assert_close(truth.signed(), changes.mean(1), **CLOSE)
        assert_close(truth.mean_absolute(), changes.abs().mean(1), **CLOSE)
    integral = tfx.truth.path_integral(net.params, net.spec, batches, net.coupling, nodes=16, **options)
    assert_close(integral, changes.mean(1), rtol=2e-2, atol=2e-3)  # there are kinks on the way
    hessian = torch.autograd.functional.hessian(lambda values: at(values).mean(), ones)
    slope = torch.autograd.functional.jacobian(lambda values: at(values).mean(), ones)
    second = tfx.truth.exact_second_order(net.params, net.spec, batches, net.coupling, **options)
    assert_close(second, hessian.diagonal() / 2 - slope, **CLOSE)
    plan = tfx.select(second, net.coupling, budget=tfx.Remove(3))
    leaving = torch.from_numpy(~plan.keep).double()
    forecast = tfx.truth.plan_second_order(net.params, net.spec, batches, plan, **options)
    assert_close(forecast, leaving @ hessian @ leaving / 2 - slope @ leaving, **CLOSE)


def test_prune_takes_a_loss_of_the_whole_batch() -> None:
    net = network(CONSTRUCTS["chain"])
    for criterion in (None, tfx.fisher):
        _, small = tfx.prune(
            net.params,
            net.spec,
            net.batch,
            budget=tfx.Flops(0.7),
            loss=info_nce,
            per_example=False,
            criterion=criterion,
        )
        assert small != net.spec


def test_observations_of_two_kinds_do_not_add_up_and_batches_are_not_divided() -> None:
    net = network(CONSTRUCTS["chain"])
    each, whole = measured(net, net.batch), measured(net, net.batch, per_example=False, loss=info_nce)
    with pytest.raises(ValueError, match=r"units with rows and .* units with rows of whole batches"):
        each + whole
    with pytest.raises(ValueError, match="not for training nor for a loss of the whole batch"):
        measured(net, net.batch, per_example=False, loss=info_nce, micro_batch=1)
    with pytest.raises(ValueError, match="one number per batch; received shape"):
        measured(net, net.batch, per_example=False, loss=lambda outputs, targets: outputs)
    with pytest.raises(ValueError, match="per_example=False and a split"):
        measured(net, net.batch, per_example=False, loss=info_nce, split=lambda targets, k: targets)


# --- losses that vmap cannot run


class Plain(torch.autograd.Function):
    """Without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return 2 * ctx.saved_tensors[0] * grads[0]


def branches(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.square().sum() if targets[0] > 0 else outputs.sin().sum()


def matched(outputs: Tensor, targets: Tensor) -> Tensor:
    distances = (outputs[0, :, None] - torch.linspace(-1, 1, outputs.shape[1])).square()
    return distances[linear_sum_assignment(distances.detach().numpy())].sum()


def written_over(outputs: Tensor, targets: Tensor) -> Tensor:
    outputs[outputs < 0] *= 0.1
    return outputs.square().sum()


UNVECTORIZED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a mask of booleans": lambda outputs, targets: outputs[outputs > 0].square().sum() + outputs.sum(),
    "item": lambda outputs, targets: outputs.square().sum() / (1 + outputs.abs().max().item()),
    "a branch on data": branches,
    "matching in scipy": matched,
    "numpy": lambda outputs, targets: (outputs * torch.from_numpy(np.tanh(outputs.detach().numpy()))).sum(),
    "a function without a rule for vmap": lambda outputs, targets: Plain.apply(outputs).sum(),
    "outputs written over": written_over,
    "a loop over targets": lambda outputs, targets: sum(
        (outputs[0, t].square() for t in targets.tolist()), outputs.sum()
    ),
}


@pytest.mark.parametrize("what", UNVECTORIZED)
def test_a_loss_that_vmap_cannot_run_is_measured_example_by_example(what: str) -> None:
    net, loss = network(CONSTRUCTS["chain"]), UNVECTORIZED[what]
    inputs, targets = net.batch
    with pytest.warns(UserWarning, match="cannot run the loss") as hints:
        stats = measured(net, [net.batch, net.batch], loss=loss)
    assert len(hints) == 1
    truth = [brute(net, part(inputs, k), lambda x, k=k: loss(x, part(targets, k))) for k in range(len(targets))]
    assert_close(stats.rows, torch.stack([*truth, *truth]), **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_close(measured(net, net.batch, loss=loss, micro_batch=2).rows, torch.stack(truth), **CLOSE)


@pytest.mark.parametrize("what", ["matching in scipy", "a branch on data"])
def test_the_oracle_and_the_forecasts_know_losses_that_vmap_cannot_run(what: str) -> None:
    """Beside the same ones for whole batches of one example, of which the test above knows that they are right."""
    net, loss = network(CONSTRUCTS["chain"]), UNVECTORIZED[what]
    inputs, targets = net.batch
    singles = [(part(inputs, k), part(targets, k)) for k in range(len(targets))]
    for call in (
        lambda *args, **options: tfx.truth.oracle(*args, **options).sum,
        tfx.truth.path_integral,
        tfx.truth.exact_second_order,
    ):
        found = call(net.params, net.spec, net.batch, net.coupling, loss=loss)
        assert_close(found, call(net.params, net.spec, singles, net.coupling, loss=loss, per_example=False), **CLOSE)
    values = torch.rand(len(targets), len(net.coupling), dtype=torch.float64)
    own = [
        tfx.truth.gradient(net.params, net.spec, *one, net.coupling, row[None], loss=loss, per_example=False)
        for one, row in zip(singles, values, strict=True)
    ]
    assert_close(
        tfx.truth.gradient(net.params, net.spec, inputs, targets, net.coupling, values, loss=loss),
        torch.cat(own),
        **CLOSE,
    )


def test_a_network_that_mixes_examples_takes_such_a_loss() -> None:
    spec = tfx.serial(
        tfx.Input((2, 4, 4)),
        L.Conv2d(2, 4, 3),
        L.BatchNorm2d(4, track_running_stats=False),
        L.ReLU(),
        L.Flatten(),
        L.Linear(16, 3),
    )
    net = network(spec)
    assert net.coupling.mixing
    inputs, targets = net.batch
    stats = measured(net, net.batch, loss=matched)
    truth = [brute(net, part(inputs, k), lambda x, k=k: matched(x, part(targets, k))) for k in range(len(targets))]
    assert_close(stats.rows, torch.stack(truth), **CLOSE)
    check_whole_batch(net, info_nce)


def broken(kind: str) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if kind == "and a branch" and outputs.sum().item() == 0.5:
            return outputs.sum()
        if kind == "of one example only" and targets[0] == 1:
            return {"known": outputs}["unknown"].sum()
        return outputs.sum() if kind == "of one example only" else {"known": outputs}["unknown"].sum()

    return loss


@pytest.mark.parametrize("kind", ["at once", "and a branch", "of one example only"])
@pytest.mark.parametrize("per_example", [True, False])
def test_a_fault_of_the_loss_is_raised_as_it_is(kind: str, per_example: bool) -> None:
    """Neither as what vmap says of it, nor after that."""
    net = network(CONSTRUCTS["chain"])
    inputs, targets = net.batch
    batch = (inputs, torch.ones_like(targets))
    for call in (tfx.measure, tfx.truth.oracle, tfx.truth.path_integral):
        with pytest.raises(KeyError, match="unknown") as caught:
            call(net.params, net.spec, batch, net.coupling, loss=broken(kind), per_example=per_example)
        assert caught.value.__cause__ is None
        assert caught.value.__context__ is None


# --- targets of the user's own structure


class Detector:
    """A small detector without anchors: every cell of a map of 2 x 2 gives scores of three classes and a box."""

    spec = tfx.serial(
        tfx.Input((2, 8, 8)),
        L.Conv2d(2, 6, 3, padding=1, stride=2),
        L.SiLU(),
        L.Conv2d(6, 5, 3, padding=1, stride=2),
        L.SiLU(),
        L.Conv2d(5, 7, 1),
    )

    @staticmethod
    def loss(outputs: Tensor, targets: list[dict[str, Tensor]]) -> Tensor:
        """Each box is matched with the cell that costs least, all others should see nothing (Carion et al. 2020)."""
        assert len(outputs) == len(targets)
        losses = []
        for cells, target in zip(outputs.flatten(2).mT, targets, strict=True):
            scores, boxes = cells[:, :3], cells[:, 3:].sigmoid()
            wanted = torch.full((len(cells),), 2)  # the last class is nothing
            loss = boxes.new_zeros(())
            if len(target["boxes"]):
                far = torch.cdist(boxes, target["boxes"], p=1)
                cost = far - scores.softmax(1)[:, target["labels"]]
                row, column = linear_sum_assignment(cost.detach().numpy())
                wanted[row] = target["labels"][column]
                loss = far[row, column].mean()
            losses.append(loss + F.cross_entropy(scores, wanted))
        return torch.stack(losses).mean()

    @classmethod
    def data(cls, counts: tuple[int, ...]) -> tuple[Network, list[dict[str, Tensor]]]:
        net, generator = network(cls.spec), torch.Generator().manual_seed(1)
        x = torch.randn(len(counts), 2, 8, 8, generator=generator, dtype=torch.float64)
        targets = [
            {
                "boxes": torch.rand(count, 4, generator=generator, dtype=torch.float64),
                "labels": torch.randint(2, (count,), generator=generator),
            }
            for count in counts
        ]
        return net._replace(batch=(x, targets)), targets


@pytest.mark.parametrize("counts", [(3, 0, 1, 2), (2, 2), (1,)])
@pytest.mark.parametrize("collate", [list, tuple])
def test_a_detector_is_measured_with_its_own_loss(counts: tuple[int, ...], collate: Any) -> None:
    net, targets = Detector.data(counts)
    x = net.batch[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing to hint at
        stats = measured(net, (x, collate(targets)), loss=Detector.loss)
    truth = torch.stack(
        [brute(net, x[k : k + 1], lambda y, k=k: Detector.loss(y, targets[k : k + 1])) for k in range(len(x))]
    )
    assert truth.abs().amax(1).min() > 1e-4
    assert_close(stats.rows, truth, **CLOSE)
    whole = measured(net, (x, targets), loss=Detector.loss, per_example=False)
    assert_close(whole.rows, truth.mean(0, keepdim=True), **CLOSE)
    _, small = tfx.prune(net.params, net.spec, (x, targets), budget=tfx.Flops(0.6), loss=Detector.loss)
    assert small != net.spec
    truth = tfx.truth.oracle(net.params, net.spec, (x, targets), net.coupling, loss=Detector.loss)
    assert truth.n == len(x)


def test_a_user_splits_boxes_that_carry_the_number_of_their_image() -> None:
    """``(M, 6)``: image, label, box, as YOLO has them."""
    net, targets = Detector.data((3, 0, 1, 2))
    x = net.batch[0]

    def flat(image: int, target: dict[str, Tensor]) -> Tensor:
        count = len(target["boxes"])
        return torch.cat([torch.full((count, 1), image), target["labels"][:, None], target["boxes"]], 1)

    def split(table: Tensor, k: int) -> Tensor:
        mine = table[table[:, 0] == k]
        return torch.cat([torch.zeros_like(mine[:, :1]), mine[:, 1:]], 1)

    def loss(outputs: Tensor, table: Tensor) -> Tensor:
        images = [table[table[:, 0] == k] for k in range(len(outputs))]
        return Detector.loss(outputs, [{"labels": t[:, 1].long(), "boxes": t[:, 2:]} for t in images])

    table = torch.cat([flat(k, target) for k, target in enumerate(targets)])
    truth = measured(net, (x, targets), loss=Detector.loss).rows
    for micro_batch in (None, 3):
        stats = measured(net, (x, table), loss=loss, split=split, micro_batch=micro_batch)
        assert_close(stats.rows, truth, **CLOSE)
    both = [
        tfx.truth.oracle(net.params, net.spec, (x, t), net.coupling, loss=one, split=how).sum
        for t, one, how in ((targets, Detector.loss, None), (table, loss, split))
    ]
    assert_close(*both, **CLOSE)
    with pytest.raises(ValueError, match=r"received \[4, 6\]. Targets of another structure need split=..., a loss"):
        measured(net, (x, table), loss=loss)


def total_of(tree: Any) -> Tensor:
    return sum((torch.as_tensor(x).double().sum() for x in optree.tree_leaves(tree)), torch.zeros(()))


WORDS = ["a", "bb", "ccc", "dddd"]
TARGETS: dict[str, tuple[Any, Callable[[int], Any]]] = {
    "a dict of lists": (
        {"boxes": [torch.ones(k, 4) for k in range(4)], "weight": torch.arange(4.0)},
        lambda k: {"boxes": [torch.ones(k, 4)], "weight": torch.tensor([float(k)])},
    ),
    "strings": (WORDS, lambda k: [WORDS[k]]),
    "arrays": (np.arange(8.0).reshape(4, 2), lambda k: np.arange(8.0).reshape(4, 2)[k : k + 1]),
    "a pair of tensors": (
        (torch.arange(4.0), torch.ones(4, 2)),
        lambda k: (torch.tensor([float(k)]), torch.ones(1, 2)),
    ),
    "nothing": (None, lambda k: None),
    "a dict with nothing": ({"y": torch.arange(4), "mask": None}, lambda k: {"y": torch.tensor([k]), "mask": None}),
}


@pytest.mark.parametrize("what", TARGETS)
def test_targets_are_taken_apart_by_examples(what: str) -> None:
    net = network(tfx.serial(tfx.Input(3), L.Linear(3, 4), L.ReLU(), L.Linear(4, 2)))
    x = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    targets, expected = TARGETS[what]
    seen: list[Any] = []

    def loss(outputs: Tensor, given: Any) -> Tensor:
        seen.append(given)
        return outputs.square().sum() * outputs.sum().item()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        measured(net, (x, targets), loss=loss)
    for k, one_of_them in enumerate(seen[-4:]):
        assert optree.tree_structure(one_of_them) == optree.tree_structure(expected(k))
        for one, other in zip(optree.tree_leaves(one_of_them), optree.tree_leaves(expected(k)), strict=True):
            if isinstance(one, str):
                assert one == other
            else:
                assert_close(torch.as_tensor(one), torch.as_tensor(other))


REFUSED: dict[str, tuple[Any, str]] = {
    "as many tensors as examples": ([torch.ones(4, 2)] * 4, "received 4 Tensors of 4 for 4 examples, which can be eit"),
    "a number": (3.0, "lists with one entry per example, here 4; received float. .* a loss of the whole batch"),
    "a tensor without an axis": (torch.tensor(1.0), r"received \[0, 4\]"),
    "too short a list": (WORDS[:3], "received str"),
    "a list of other length beside": ({"a": torch.ones(4), "b": torch.ones(3)}, r"received \[3, 4\]"),
    "a list for cross entropy": (WORDS, "Targets of cross entropy are a tensor.*received list"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_targets_that_nobody_can_take_apart_are_refused(what: str) -> None:
    net = network(tfx.serial(tfx.Input(3), L.Linear(3, 4), L.ReLU(), L.Linear(4, 2)))
    targets, words = REFUSED[what]
    options = {} if "cross entropy" in what else {"loss": lambda outputs, targets: outputs.sum()}
    with pytest.raises(ValueError, match=words):
        measured(net, (torch.ones(4, 3, dtype=torch.float64), targets), **options)


def test_outputs_whose_first_axis_is_not_the_examples_are_refused() -> None:
    spec = tfx.serial(tfx.Input((3, 2)), L.Linear(2, 4), L.ReLU(), L.Linear(4, 2), L.Permute((1, 0, 2)))
    net = network(spec)
    x = torch.randn(5, 3, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"whose first axis runs over the examples; received shapes \(3, 5, 2\)"):
        measured(net, (x, torch.ones(5)), loss=lambda outputs, targets: outputs.sum())
    measured(net, (x, torch.ones(5)), loss=lambda outputs, targets: outputs.sum(), per_example=False)


# --- losses that say nothing


def similarity(outputs: Tensor, targets: Tensor) -> Tensor:
    z = F.normalize(outputs.flatten(1), dim=1)
    return -(z @ z.T).mean() / 0.07


FLAT: dict[str, Callable[[Any, Any], Tensor]] = {
    "compares examples": info_nce,
    "compares examples, constant up to rounding": off_diagonal,
    "compares examples, far from zero": similarity,
    "is not finite for one example": lambda outputs, targets: outputs.std(0).mean(),
    "detaches": lambda outputs, targets: outputs.detach().sum(),
    "looks at targets alone": lambda outputs, targets: targets.double().sum(),
    "counts": lambda outputs, targets: (outputs.argmax(1) == targets).double().mean(),
    "rounds": lambda outputs, targets: outputs.round().sum(),
    "multiplies by zero": lambda outputs, targets: outputs.sum() * 0,
}


@pytest.mark.parametrize("what", FLAT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_does_not_change_with_the_outputs_is_refused(what: str, dtype: torch.dtype) -> None:
    net = network(CONSTRUCTS["chain"])
    params, inputs = optree.tree_map(lambda x: x.to(dtype), (net.params, net.batch[0]))
    batch, loss = (inputs, net.batch[1]), FLAT[what]
    calls = [
        lambda: tfx.measure(params, net.spec, [batch, batch], net.coupling, loss=loss),
        lambda: tfx.prune(params, net.spec, batch, budget=tfx.Flops(0.7), loss=loss),
        lambda: tfx.prune(params, net.spec, batch, budget=tfx.Flops(0.7), loss=loss, criterion=tfx.taylor),
        lambda: next(tfx.iterate(params, net.spec, batch, budgets=[tfx.Flops(0.7)], loss=loss)),
    ]
    if what in ("detaches", "counts", "rounds"):  # there are changes without derivatives
        tfx.truth.oracle(params, net.spec, batch, net.coupling, loss=loss)
    else:
        calls.append(lambda: tfx.truth.oracle(params, net.spec, batch, net.coupling, loss=loss))
    for call in calls:
        with pytest.raises(ValueError, match=r"loss.*per_example=False"):
            call()


def test_a_loss_of_whole_batches_that_does_not_change_is_refused_too() -> None:
    net = network(CONSTRUCTS["chain"])
    with pytest.raises(ValueError, match="derivatives by the outputs of a whole batch"):
        measured(net, net.batch, loss=FLAT["detaches"], per_example=False)


def test_losses_that_are_flat_here_only_are_measured() -> None:
    """Margins that all examples keep, examples learned by heart, ignored targets, small numbers: all of them pass."""
    net = network(CONSTRUCTS["chain"])
    inputs, targets = net.batch
    margins = tfx.apply(net.params, net.spec, inputs).diff(dim=1)[:, 0]
    least, sides = margins.abs().min().item(), margins.sign()
    kept = measured(net, (inputs, sides), loss=lambda y, side: F.relu(1 - 2 / least * side * y.diff(dim=1)).sum())
    assert kept.sum_abs.max() == 0
    params32, inputs32 = optree.tree_map(lambda x: x.float(), (net.params, inputs))
    predicted = tfx.apply(params32, net.spec, inputs32).argmax(1)
    sure = tfx.measure(
        params32, net.spec, (inputs32, predicted), net.coupling, loss=lambda y, t: F.cross_entropy(1e3 * y, t)
    )
    assert sure.n == len(targets)
    some = [(inputs, torch.full_like(targets, -100)), net.batch]
    assert measured(net, some[::-1]).rows[len(targets) :].abs().max() == 0
    assert measured(net, some).rows[: len(targets)].abs().max() == 0
    small = measured(net, net.batch, loss=lambda y, t: 1e-9 * y.square().sum())
    assert_close(small.sum_abs, 1e-9 * measured(net, net.batch, loss=lambda y, t: y.square().sum()).sum_abs)


def test_units_that_nothing_depends_on_do_not_make_a_loss_flat() -> None:
    """A network without a living unit is measured: nothing is lost with any of them. Scores of zero rank nothing."""
    net = network(CONSTRUCTS["chain"])
    dead = optree.tree_map(torch.zeros_like, net.params)
    stats = tfx.measure(dead, net.spec, net.batch, net.coupling, rows=True)
    assert stats.sum_abs.max() == 0
    with pytest.raises(tfx.SelectionError, match="Scores are zero for all 9 units, so nothing tells them apart"):
        tfx.prune(dead, net.spec, net.batch, budget=tfx.Flops(0.7), criterion=tfx.taylor)


# --- no batch at all


@given(networks(), st.booleans())
def test_statistics_of_no_batch_change_nothing(net: Network, moments: bool) -> None:
    empty = tfx.measure(net.params, net.spec, [], net.coupling)
    stats = measured(net, net.batch, moments=moments)
    neutral = tfx.Statistics.neutral(net.coupling.names)
    assert (empty.n, empty.batches, empty.units) == (neutral.n, neutral.batches, neutral.units)
    assert stats + neutral is stats
    assert neutral + stats is stats
    assert sum([empty, stats, empty]) is stats
    assert (empty + neutral).n == 0


def test_nothing_is_decided_by_statistics_of_no_batch() -> None:
    net = network(CONSTRUCTS["chain"])
    neutral = tfx.measure(net.params, net.spec, [], net.coupling, rows=True)
    for call in (
        lambda: tfx.taylor(neutral, net.coupling),
        lambda: tfx.joint(neutral, net.coupling, budget=tfx.Flops(0.5)),
        lambda: tfx.prune(net.params, net.spec, [], budget=tfx.Flops(0.5)),
    ):
        with pytest.raises(ValueError, match="Statistics of no batch say nothing about any unit"):
            call()
    with pytest.raises(ValueError, match="of the same units"):
        neutral + tfx.Statistics.neutral(("a[0]",))

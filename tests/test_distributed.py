"""Several processes with some of the batches each compute what one with all of them does, or all say why not.

Processes are slow to start. Two and four of them are started once each, and check the laws and the faults in one go.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch._dynamo  # torch.func needs it; imported when there is a group, it would keep that and its threads alive
from constructs import CONSTRUCTS
from torch.nn import functional as F
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.candidates import best
from taylorfx.distributed import Same, agreed, alone, total
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import Network, network, random_plan

CLOSE = {"rtol": 1e-8, "atol": 1e-10}
REPAIRS = (tfx.compensate, tfx.recalibrate, tfx.reconstruct)
PATIENCE = 5.0
"""Seconds that processes wait for one that is not going to come."""


def setting() -> tuple[Network, tfx.Plan, list[Any]]:
    """A network, a plan for it, and six batches of several sizes."""
    net = network(CONSTRUCTS["chain"])
    plan = random_plan(net.coupling, torch.Generator().manual_seed(1))
    x, y = next(iter(net.batch[0].values())), net.batch[1]
    return net, plan, [(x[: 1 + k % 3] * (1 + 0.1 * k), y[: 1 + k % 3]) for k in range(6)]


def computed(batches: list[Any], total: Any) -> dict[str, Any]:
    """What is measured, repaired and pruned with some batches."""
    net, plan, _ = setting()
    params, spec, coupling = net.params, net.spec, net.coupling
    pruned = functools.partial(tfx.prune, params, spec, budget=tfx.Flops(0.5), steps=2, total=total)
    compared = functools.partial(best, params, spec, budget=tfx.Flops(0.5), held_out=[*batches], total=total)
    ways: dict[str, Any] = {"joint": {"steps": 2}, "fisher": {"criterion": tfx.fisher, "steps": 1}}
    return {
        "stats": tfx.measure(params, spec, batches, coupling, rows=True, moments=True, total=total),
        "means": (total or alone)(lambda: tfx.repair.means(params, spec, batches, coupling)),
        **{repair.__name__: repair(params, plan, batches, total=total) for repair in REPAIRS},
        "statistics of norms": (tfx.recalibrate(params, spec, batches, total=total), spec),
        "pruned": pruned(batches),
        "the best of two": compared(batches, candidates=ways, tune=lambda params, _: params).pruned,
        "pruned by second order": pruned(batches, criterion=tfx.criteria.second_order),
        **{f"pruned and {repair.__name__}": pruned(batches, repair=repair) for repair in REPAIRS},
        "pruned in depth": in_depth(batches, total),
    }


def residual() -> Network:
    """A network with branches."""
    return network(CONSTRUCTS["residual stream"])


def in_depth(batches: list[Any], total: Any) -> tfx.sentence.Pruned:
    """A residual network that loses branches, measured on as many images as there are in each of the batches."""
    net = residual()
    images, targets = next(iter(net.batch[0].values())), net.batch[1]
    shown = [(images[: len(y)] * (1 + x.abs().mean()), targets[: len(y)]) for x, y in batches]
    return tfx.prune(net.params, net.spec, shown, budget=tfx.Flops(0.5), branches=True, steps=1, total=total)


def shares(size: int) -> list[list[Any]]:
    """Batches, by process; one of four has none."""
    *_, batches = setting()
    return [batches[:4], batches[4:]] if size == 2 else [batches[:1], [], batches[1:3], batches[3:]]


class Fault(NamedTuple):
    """What one process does wrong: what all of them call, what that one says, and what the others say."""

    call: Callable[[], object]
    its: str
    others: str


def faults(wrong: bool, mine: list[Any]) -> Iterator[tuple[str, Fault]]:
    """What all of them call; ``wrong`` in the process that does something else. ``{}`` is its rank."""
    net, plan, _ = setting()
    measure = functools.partial(tfx.measure, spec=net.spec, coupling=net.coupling, total=total)
    params, other = net.params, random_plan(net.coupling, torch.Generator().manual_seed(5))
    prune = functools.partial(tfx.prune, params, net.spec, mine, budget=tfx.Flops(0.5), total=total)

    def same(call: Callable[[], object], words: str) -> Fault:
        """All processes see it alike."""
        return Fault(call, words, words)

    def unlucky(*args: Any, **options: Any) -> Any:
        raise OSError("no space left")

    def if_wrong(one: Any, other: Any) -> Any:
        return one if wrong else other

    def loaded() -> Iterator[Any]:
        yield from mine
        unlucky()

    single = (
        tfx.tree.map_paths(lambda path, x: x.float() if x.is_floating_point() else x, params),
        [(x.float(), y) for x, y in mine],
    )
    yield (
        "dtype",
        same(
            lambda: measure(*if_wrong(single, (params, mine))[:1], batches=if_wrong(single[1], mine)),
            "process 0: float64/.* process {}: float32/",
        ),
    )
    last = [*tfx.tree.flatten(params)][-1]
    moved = tfx.tree.map_paths(lambda path, x: x + 1e-9 * (path == last), params)
    yield (
        "parameters",
        same(
            lambda: measure(if_wrong(moved, params), batches=mine),
            "process 0: .* parameters (.*), units .* process {}: ",
        ),
    )
    nodes = tuple(dataclasses.replace(n, layer=L.GELU()) if n.layer == L.ReLU() else n for n in net.spec)
    smooth = dataclasses.replace(net.spec, nodes=nodes)
    smoothly = smooth, tfx.couple(params, smooth)
    yield (
        "layers",
        same(
            lambda: tfx.measure(
                params, *[(net.spec, mine, net.coupling), (smooth, mine, smoothly[1])][wrong], total=total
            ),
            "process 0: .* layers (.*), cross.* process {}: ",
        ),
    )
    yield "options", same(lambda: measure(params, batches=mine, rows=wrong), "process {}: .* by example with rows")
    yield (
        "plan",
        same(
            lambda: tfx.reconstruct(params, if_wrong(other, plan), mine, total=total),
            "process 0: .* plan .* process {}: .*",
        ),
    )
    yield (
        "kinds",
        same(lambda: total(if_wrong(Same("one"), tfx.repair.Means({}, {}))), "process 0: Means; .*process {}: one"),
    )
    yield "raises in the loss", Fault(
        lambda: measure(params, batches=mine, loss=named_as(F.cross_entropy, if_wrong(unlucky, F.cross_entropy))),
        "^no space left", "process {}: OSError: no space left",
    )  # fmt: skip
    nan = [(x * torch.nan, y) for x, y in mine]
    yield "NaN in the loss", Fault(
        lambda: measure(params, batches=if_wrong(nan, mine)),
        "^Losses have to be finite", "process {}: ValueError: Losses have to be finite; that of batch 0",
    )  # fmt: skip
    for repair in REPAIRS:
        yield (
            f"NaN seen by {repair.__name__}",
            same(
                functools.partial(repair, params, plan, if_wrong(nan, mine), total=total),
                "process {}: its .* not finite",
            ),
        )
        yield f"batches that fail in {repair.__name__}", Fault(
            functools.partial(repair, params, plan, if_wrong(loaded(), mine), total=total),
            "^no space left", "process {}: OSError: no space left",
        )  # fmt: skip
        yield (
            f"no batches for {repair.__name__}",
            same(functools.partial(repair, params, plan, [], total=total), "nothing to repair from"),
        )
    yield "no batches", same(lambda: measure(params, batches=[]), "none of the processes received a batch")
    yield (
        "prune whose choice fails",
        Fault(
            lambda: prune(choose=if_wrong(unlucky, tfx.joint)), "^no space left", "process {}: OSError: no space left"
        ),
    )
    first = np.arange(len(net.coupling)) % 5 != wrong
    yield (
        "prune whose plans differ",
        same(
            lambda: prune(
                choose=lambda stats, coupling, **options: tfx.Plan(coupling, first), budget=tfx.Flops(0.99), steps=1
            ),
            "process 0: plan .* process {}: plan ",
        ),
    )
    yield (
        "prune whose repairs fail",
        Fault(
            lambda: prune(repair=if_wrong(unlucky, tfx.compensate)),
            "^no space left",
            "process {}: OSError: no space left",
        ),
    )


def named_as(one: Any, other: Any) -> Any:
    """A function under the name of another one, so that the options look the same."""
    return functools.wraps(one)(lambda *args: other(*args))


@contextlib.contextmanager
def group(rank: int, size: int, folder: str) -> Iterator[None]:
    """Two meet in a file, four where the first process keeps the store, which ends with it."""
    torch.set_num_threads(1)
    limit, port = timedelta(seconds=60), Path(folder, "port")
    if size == 2:
        torch.distributed.init_process_group("gloo", f"file://{folder}/meet", limit, size, rank)
    else:
        wait_for(port if rank else Path(folder))
        at = int(port.read_text()) if rank else 0
        store = torch.distributed.TCPStore("127.0.0.1", at, size, rank == 0, limit, wait_for_workers=False)
        if rank == 0:
            port.with_name("part").write_text(str(store.port))
            port.with_name("part").rename(port)
        torch.distributed.init_process_group("gloo", None, limit, size, rank, store)
    yield
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def wait_for(path: Path) -> None:
    while not path.exists():
        time.sleep(0.05)


def process(rank: int, size: int, folder: str) -> None:
    """One of several: the last does what is wrong, and is killed in the end."""
    mine, wrong = shares(size)[rank], rank == size - 1
    with contextlib.ExitStack() as stack:
        stack.enter_context(group(rank, size, folder))
        torch.save(computed(mine, total), f"{folder}/{rank}")
        for what, fault in faults(wrong, mine):
            said = raised(fault.call, what)
            words = (fault.its if wrong else fault.others).format(size - 1)
            assert re.search(words, said, re.DOTALL), f"{what} in process {rank}: {said}"
        time.sleep(wrong)  # none minds one that is late
        net, *_ = setting()
        again = tfx.measure(net.params, net.spec, mine, net.coupling, total=total)
        assert again.n == sum(len(x) for x, _ in setting()[2]), "they go on after failures"
        first = torch.distributed.new_group([0])
        if rank == 0:
            assert total(torch.ones(2), first).tolist() == [1, 1]
        else:
            assert "not in the group" in raised(lambda: total(torch.ones(2), first), "a group of others")
        assert total(torch.ones(2)).tolist() == [size, size]
        name_the_dead(rank, size)
        Path(folder, f"{rank}.done").touch()
        if size == 4:
            name_who_kept_the_store(rank, folder)
        os._exit(0)  # the group cannot be taken down in order any more


def raised(call: Callable[[], object], what: str) -> str:
    try:
        call()
    except (ValueError, OSError, RuntimeError) as error:
        return str(error)
    raise AssertionError(f"{what}: nothing was raised")


def name_the_dead(rank: int, size: int) -> None:
    """The last of the processes is killed while it measures; of four, another one comes too late."""
    net, _, batches = setting()
    torch.distributed.group.WORLD.get_group_store().set_timeout(timedelta(seconds=PATIENCE))
    late, gone = rank == 2 and size == 4, "2, 3 of 4" if size == 4 else "1 of 2"

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if rank == size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep((PATIENCE + 1) * late)
        return F.cross_entropy(logits, target)

    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"process {gone} did not within the timeout"):
        tfx.measure(net.params, net.spec, batches[:1], net.coupling, loss=loss, total=total)
    assert time.monotonic() - start < 6 * PATIENCE


def name_who_kept_the_store(rank: int, folder: str) -> None:
    """The first process ends, and the store with it; the second comes to meet it."""
    if rank == 0:
        wait_for(Path(folder, "2.done"))  # which also reads the store
        os._exit(0)
    while rank == 1 and "0, or the launcher, which keeps it, has ended" not in raised(lambda: total(Same("")), "end"):
        time.sleep(0.05)


def start(size: int, folder: Path) -> None:
    """Run `process` in several; the last one is killed."""
    context = multiprocessing.get_context("spawn")
    started = [context.Process(target=process, args=(rank, size, str(folder))) for rank in range(size)]
    for one in started:
        one.start()
    for one in started:
        one.join(timeout=200)
        if one.is_alive():
            one.kill()
    assert [one.exitcode for one in started] == [*[0] * (size - 1), -signal.SIGKILL]
    assert all((folder / f"{rank}.done").exists() for rank in range(size - 1))


@pytest.mark.skipif(sys.platform == "win32", reason="gloo meets in a file elsewhere")
@pytest.mark.parametrize("size", [2, 4])
def test_processes_compute_what_one_does_and_all_name_the_one_that_fails(size: int, tmp_path: Path) -> None:
    expected = computed(setting()[2], None)
    start(size, tmp_path)
    results = [torch.load(tmp_path / str(rank), weights_only=False) for rank in range(size)]
    for result in results:
        stats, others = result["stats"], expected["stats"]
        assert (stats.n, stats.batches, stats.units, stats.networks) == (
            others.n, others.batches, others.units, others.networks
        )  # fmt: skip
        for field in ("loss", "sum", "sum_abs", "sum_sq", "sum_abs_mean", "sum_batch_abs", "sum_batch_sq", "rows"):
            assert_close(getattr(stats, field), getattr(others, field), **CLOSE)
        assert_close(stats.moments.sum_sq, others.moments.sum_sq, **CLOSE)
        assert result["means"].count == expected["means"].count
        assert_close(dict(result["means"].sum), dict(expected["means"].sum), **CLOSE)
        for name in expected.keys() - {"stats", "means"}:
            (params, spec), (one, its) = result[name], expected[name]
            assert spec == its, name
            assert_trees_equal(params, one, **CLOSE)
            first, mine = (tfx.tree.flatten(x[name][0]) for x in (results[0], result))
            assert all(torch.equal(first[path], leaf) for path, leaf in mine.items()), f"{name}: not the same bits"
    assert expected["pruned"][1] != setting()[0].spec


def test_one_process_alone_computes_the_same_bits_with_a_total() -> None:
    batches = setting()[2]
    without, along, initialized = (computed(batches, one) for one in (None, alone, total))
    for other in (along, initialized):
        assert torch.equal(without["stats"].rows, other["stats"].rows)
        for name in without.keys() - {"stats", "means"}:
            assert without[name][1] == other[name][1]
            assert_trees_equal(without[name][0], other[name][0], rtol=0, atol=0)


def test_a_repair_from_outside_is_called_with_a_total_if_it_takes_one() -> None:
    net, _, batches = setting()
    received = []

    def plain(params: Any, plan: Any, batches: Any) -> Any:
        return tfx.compensate(params, plan, batches)

    def summing(params: Any, plan: Any, batches: Any, *, total: Any = None) -> Any:
        received.append(total)
        return tfx.compensate(params, plan, batches, total=total)

    prune = functools.partial(tfx.prune, net.params, net.spec, batches, budget=tfx.Flops(0.7), steps=1)
    plainly, summed = (prune(repair=repair, total=alone) for repair in (plain, summing))
    assert_trees_equal(plainly[0], summed[0], rtol=0, atol=0)
    prune(repair=summing)
    prune(repair=functools.partial(summing, total=None), total=alone)
    assert received == [alone, None, None], "what is filled in stays"


def test_what_is_no_sum_over_batches_of_processes_is_refused() -> None:
    net, _, batches = setting()
    arguments = net.params, net.spec, batches, net.coupling
    with pytest.raises(ValueError, match="received total= with something else"):
        tfx.truth.oracle(*arguments, measurement=tfx.Measurement(total=total))
    with pytest.raises(ValueError, match="received total= with <lambda>"):
        tfx.prune(
            *arguments[:3], budget=tfx.Flops(0.5), criterion=tfx.criteria.Criterion(lambda *a, loss: 0, of="network"),
            total=total,
        )  # fmt: skip
    with pytest.raises(ValueError, match="received one and other"):
        Same("one") + Same("other")
    with pytest.raises(ValueError, match="at inputs of one size; received sums that differ in a"):
        tfx.repair.Means({"a": 1}, {"a": torch.zeros(1)}) + tfx.repair.Means({"a": 1}, {"a": torch.zeros(2)})
    for repair in REPAIRS:
        with pytest.raises(ValueError, match="There is nothing to repair from"):
            repair(net.params, setting()[1], [])


def test_nothing_is_compared_in_one_process() -> None:
    assert agreed(None, lambda: 3, lambda _: pytest.fail("not asked for")) == 3
    assert agreed(alone, lambda: 3, str) == 3

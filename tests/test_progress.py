"""What takes long says how far it is, on request; and the result is the same."""

import functools
import logging
import sys

import pytest
import torch
from _torchvision import library
from networks import convolutional
from torch import nn

import taylorfx as tfx
from taylorfx.cost.timings import Timings
from taylorfx.progress import bar
from taylorfx.testing.laws import assert_trees_equal
from taylorfx.testing.strategies import network

NET = network(convolutional())
LINEAR = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
CAPTURED = tfx.from_torch(LINEAR, torch.ones(2, 2))
PLAN = tfx.select(torch.arange(float(len(NET.coupling))), NET.coupling, budget=tfx.Flops(0.6))


def pruned(**options):
    return tfx.prune(NET.params, NET.spec, [NET.batch] * 2, budget=tfx.Flops(0.8), **options)


def timed(timings):
    timings(NET.spec)
    return timings


def held(constraints):
    """Constraints as a tree of tensors."""
    return {"protected": torch.tensor(len(constraints.protect))}


@functools.cache
def tiny():
    pytest.importorskip("transformers")
    library()
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 12, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    return tfx.interop.huggingface.from_pretrained(model, outputs="logits")


def llama(**options):
    return tfx.interop.huggingface.holdable(*tiny(), **options)


LONG = {
    "measure": lambda **options: {
        "sum": tfx.measure(NET.params, NET.spec, [NET.batch] * 2, NET.coupling, **options).sum
    },
    "prune": lambda **options: pruned(**options)[0],
    "prune, by a value": lambda progress=False: pruned(measurement=tfx.Measurement(progress=progress))[0],
    "oracle": lambda **options: {
        "sum": tfx.truth.oracle(NET.params, NET.spec, NET.batch, NET.coupling, units=[0, 1], **options).sum
    },
    "from_torch": lambda **options: tfx.from_torch(LINEAR, torch.ones(2, 2), **options)[0],
    "timings": lambda **options: {"nodes": torch.tensor(len(timed(Timings(repeats=1, **options)).table))},
    "reconstruct": lambda **options: tfx.reconstruct(NET.params, PLAN, NET.batch, **options)[0],
    "to_torch": lambda **options: dict(tfx.to_torch(*CAPTURED, like=LINEAR, **options).named_parameters()),
    "holdable": lambda **options: held(tfx.interop.holdable(LINEAR, *CAPTURED, **options)),
    "holdable, by a config": lambda **options: held(llama(**options)),
}
UNKNOWN = ("holdable", "holdable, by a config")  # how many tries there will be is not known before


class Advances(list):
    """A display of rich that keeps what it is told."""

    def __call__(self, **options):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.append(("closed", error[0]))

    def add_task(self, what, total):
        self.append((what, total))

    def advance(self, task, count):
        self.append(count)


@pytest.mark.parametrize("name", LONG)
def test_a_bar_goes_to_its_end_and_changes_nothing(name, monkeypatch):
    import rich.progress

    expected = LONG[name]()
    monkeypatch.setattr(rich.progress, "Progress", told := Advances())
    assert_trees_equal(LONG[name](progress=True), expected)
    starts = [k for k, entry in enumerate(told) if isinstance(entry, tuple) and entry[0] != "closed"]
    assert len(starts) == (3 if name.startswith("prune") else 1)  # a bar for each of prune's steps
    for start in starts:
        what, total = told[start]
        end = told.index(("closed", None), start)
        assert what == ("measure" if name.startswith("prune") else name.partition(",")[0])
        assert sum(told[start + 1 : end]) > 0
        assert total == (None if name in UNKNOWN else sum(told[start + 1 : end]))


def test_a_bar_is_closed_when_an_error_comes(monkeypatch):
    import rich.progress

    monkeypatch.setattr(rich.progress, "Progress", told := Advances())
    with pytest.raises(ValueError, match="A batch is a pair"):
        tfx.measure(NET.params, NET.spec, [NET.batch, 3], NET.coupling, progress=True)
    assert told == [("measure", 2), 1, ("closed", ValueError)]
    with bar(True, "unknown", 0):
        assert told[-1] == ("unknown", None)


@pytest.mark.parametrize("name", LONG)
def test_a_bar_needs_rich(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match="pip install rich"):
        LONG[name](progress=True)


def test_any_iterable_of_batches_will_do_as_a_bar_of_the_users_own(capsys):
    from rich.progress import track

    tqdm = track([NET.batch] * 3, "mine")
    assert tfx.measure(NET.params, NET.spec, tqdm, NET.coupling).batches == 3


def test_the_log_says_every_step(caplog):
    """At INFO, by the logger "taylorfx"; nothing at the level that is the default."""
    caplog.set_level(logging.INFO, "taylorfx")
    _, spec = pruned()
    steps = [line for line in caplog.messages if line.startswith("step ")]
    assert [line.split(":")[0] for line in steps] == ["step 1", "step 2", "step 3"]
    assert "FLOPs" in steps[-1]
    assert sum(line.startswith("measure: Statistics(6 examples in 2 batches") for line in caplog.messages) == 3
    caplog.clear()
    tfx.reconstruct(NET.params, PLAN, NET.batch)
    LONG["oracle"]()
    Timings(repeats=1)(spec)
    tfx.from_torch(nn.Linear(2, 3), torch.ones(2, 2))
    LONG["to_torch"]()
    LONG["holdable"]()
    for start in (
        "to_torch: looks for the sizes of a smaller Sequential", "to_torch: the smaller Sequential is proven on ",
        "holdable: tries what Sequential can lose", "holdable: Sequential was cut ",
        "reconstruct: ", "oracle: left out 2 units", "timings: Conv2d(", "from_torch: torch.export reads Linear",
        "from_torch: 2 nodes, 2 parameters",
    ):  # fmt: skip
        assert any(line.startswith(start) for line in caplog.messages), start
    assert {record.levelno for record in caplog.records if record.name == "taylorfx"} == {logging.INFO}

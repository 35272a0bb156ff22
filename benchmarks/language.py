"""What is left of a language model at a given cost? Criteria, repairs and training, on Python's own documentation.

For each seed a small Llama learns the language reference and the docstrings that come with Python, in byte pairs. Every
contestant scores it on the same 64 sequences and says what stays at some shares of the FLOPs, within what a Llama and
its config can hold. What comes out is tested on texts that nothing else has seen: as cut, repaired
(`reconstruct(biases=False)`), and after equal numbers of training steps, with the unpruned model as a teacher and
without. From the root of the repository:

    python benchmarks/language.py                        # one seed, half of the FLOPs, 100 steps: half an hour
    python benchmarks/language.py --seeds 0 1 2 --shares .85 .7 .5 --steps 100 1000 --teacher
    python benchmarks/language.py --by time              # shares of the measured time instead
    python benchmarks/language.py --experts 8 --by parameters   # a mixture, whose tokens always go to two experts

Models and results are kept as they come (``--cache``): a run that was stopped continues. Prints Markdown: perplexities
per token, means over the seeds with their 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _language import Case, Contestant, Size, Subject, contestants, documents, learn, repair
from _language import tokens as tokenized
from _shares import BUDGETS
from _tables import interval, markdown
from _torchvision import library
from quality import CACHE

import taylorfx as tfx
from taylorfx.cost.runners import Pace, race
from taylorfx.interop import huggingface


def run(seed: int, options: argparse.Namespace, streams: tuple[torch.Tensor, torch.Tensor]) -> None:
    """All that is asked for and not yet known of one seed."""
    size, file = Size.of(options.width, options.experts), results(seed, options)
    model, rows, test = Subject.of(seed, streams, size, options.train, options.cache)
    case = Case.of(model, rows, seed, options.by)
    found = json.loads(file.read_text()) if file.exists() else {}
    found["whole"] = found.get("whole") or {"as cut": huggingface.perplexity(model, test)}
    for name, choose in chosen(contestants(case), options.contestants).items():
        for share in options.shares:
            known = found.setdefault(f"{name} @ {share}", {})
            wanted = ["as cut", "repaired", *variants(options)]
            if {*wanted} <= {*known}:
                continue
            plan = choose([share])[share]
            small = tfx.cut(case.params, plan), plan.spec
            repaired = repair(case.params, plan, case.batches)
            for what, of in (("FLOPs", tfx.cost.flops), ("parameters", tfx.cost.parameters)):
                cost = of(plan.coupling)
                known[what] = cost(plan.keep) / cost.total
            known["time"] = relative(case, small, test)
            for variant in [x for x in wanted if x not in known]:
                network = tfx.to_torch(*(small if variant == "as cut" else repaired))
                if variant.startswith("tuned"):
                    steps = int(variant.split()[1])
                    teacher = case.model if variant.endswith("teacher") else None
                    draw = torch.Generator().manual_seed(seed)
                    learn(network, streams[0], size, steps, 1e-3, draw, teacher)
                known[variant] = huggingface.perplexity(network, test)
                file.write_text(json.dumps(found, indent=1))
            print(f"seed {seed}, {name} @ {share}: {known}", flush=True)


def results(seed: int, options: argparse.Namespace) -> Path:
    """The file of what is known of one seed."""
    name = Size.of(options.width, options.experts).name(options.train, seed)
    path: Path = options.cache / f"{name}{options.variant}.json"
    return path


def chosen(every: dict[str, Contestant], names: Sequence[str]) -> dict[str, Contestant]:
    """Those with these names, or all if there are none."""
    if unknown := [name for name in names if name not in every]:
        raise SystemExit(f"No contestants: {unknown}. There are: {[*every]}.")
    return {name: every[name] for name in names or every}


def variants(options: argparse.Namespace) -> list[str]:
    """After how many steps, all from the repaired network, and with which teacher."""
    return [f"tuned {n}{x}" for n in options.steps for x in ("", " teacher")[: 1 + options.teacher]]


def relative(case: Case, small: tuple[tfx.Params, tfx.Spec], test: list) -> float:
    """The time of a pass by that of the whole network, both as plain modules, by turns."""
    modules = [tfx.to_torch(*network) for network in (small, (case.params, case.spec))]
    with torch.no_grad():
        times = race([lambda module=module: module(**test[0][0]) for module in modules], Pace(error=0.01, seconds=20))
    return float(np.median(times[:, 0] / times[:, 1]))


def table(results: dict[int, dict[str, Any]], share: float, columns: list[str]) -> str:
    """The contestants of one share, as Markdown."""
    known = ["FLOPs", "parameters", "time", *columns]
    keys = [key for key in next(iter(results.values())) if key.endswith(f" @ {share}")]
    rows = []
    for key in keys:
        row = [key.rpartition(" @ ")[0]]
        for column in known:
            values = [kept[key][column] for kept in results.values() if column in kept.get(key, {})]
            mean = interval(values) if values else None
            spread = f" ± {mean.high - mean.value:.2f}" if mean and len(values) > 1 else ""
            row.append(f"{mean.value:.2f}{spread}" if mean else "")
        rows.append(row)
    return markdown(["contestant", *known], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5])
    parser.add_argument("--steps", type=int, nargs="*", default=[100], help="of training after the cut")
    parser.add_argument("--teacher", action="store_true", help="train with the unpruned model as a teacher, too")
    parser.add_argument("--train", type=int, default=1500, help="steps of training of the model itself")
    parser.add_argument("--width", type=int, default=128, help="of the model's stream")
    parser.add_argument("--experts", type=int, default=0, help="of every layer; 0 for none")
    parser.add_argument("--by", choices=BUDGETS, default="FLOPs", help="what the shares are of")
    parser.add_argument("--contestants", nargs="+", default=[], help="only these")
    parser.add_argument("--cache", type=Path, default=CACHE.parent / "language")
    options = parser.parse_args()
    options.variant = "" if options.by == "FLOPs" else f"-{options.by}"
    if importlib.util.find_spec("torchvision"):
        library()
    torch.set_num_threads(1)
    streams = tokenized(documents())
    print(f"{len(streams[0]):,} tokens to learn from, {len(streams[1]):,} others", flush=True)
    for seed in options.seeds:
        run(seed, options, streams)
    kept = {seed: json.loads(results(seed, options).read_text()) for seed in options.seeds}
    whole = interval([one["whole"]["as cut"] for one in kept.values()])
    print(f"\nThe unpruned models have a perplexity of {whole.value:.2f}.")
    for share in options.shares:
        print(f"\n{share:.0%} of the {options.by}:\n\n{table(kept, share, ['as cut', 'repaired', *variants(options)])}")


if __name__ == "__main__":
    main()

"""Coupling, selecting and cutting to half the FLOPs, against copying the surviving weights once, and Torch-Pruning.

    python benchmarks/cutting.py                        # twelve models and the growth; half an hour with the peer
    python benchmarks/cutting.py --quick                # three models, two minutes
    python benchmarks/cutting.py resnet50 --no-peer

README.md beside this says what exactly is timed.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from _torchvision import library
from _transformers import Logits
from torch import Tensor, nn

import taylorfx as tfx
from taylorfx import layers as L
from taylorfx.report.plots import plot_frontier
from taylorfx.truth.correlations import Interval

MODELS = {
    "resnet50": "ResNet-50", "convnext_tiny": "ConvNeXt-T", "bert": "BERT-base", "densenet121": "DenseNet-121",
    "vit_b_16": "ViT-B/16", "regnet_y_32gf": "RegNetY-32GF", "resnet152": "ResNet-152", "swin_b": "Swin-B",
    "efficientnet_v2_l": "EfficientNetV2-L", "densenet201": "DenseNet-201", "vit_l_16": "ViT-L/16",
    "llama": "Llama, 1.1 billion, bfloat16",
}  # fmt: skip
QUICK = ("resnet50", "bert", "densenet121")
SIZES = (100, 300, 1_000, 3_000, 10_000)
EXAMPLES = (64, 128, 256, 512, 1024)
HERE = Path(__file__).parent
MARKERS = "<!-- cutting: begin -->", "<!-- cutting: end -->"
# Every tensor above 64 kB is mapped anew and given back at once, so that "fresh memory" is what it says.
FRESH = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_TOP_PAD_": "0"}
# Threads that wait for each other on a busy machine would spend the CPU time that is measured here.
PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}
T = TypeVar("T")


def model(name: str) -> tuple[nn.Module, Tensor]:
    """The module in inference mode, with random weights, and an example of its input."""
    torch.manual_seed(0)
    models = library()  # before transformers, which imports it, too
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(attn_implementation="eager", num_labels=10)
        return Logits(BertForSequenceClassification(config)).eval(), torch.randint(999, (1, 128))
    if name == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(  # the sizes of TinyLlama
            hidden_size=2048, num_hidden_layers=22, num_attention_heads=32, num_key_value_heads=4,
            intermediate_size=5632, vocab_size=32000, use_cache=False,
        )  # fmt: skip
        return Logits(LlamaForCausalLM(config).to(torch.bfloat16)).eval(), torch.randint(999, (1, 16))
    return models.get_model(name, weights=None).eval(), torch.randn(1, 3, 224, 224)


def timed(call: Callable[[], T]) -> tuple[tuple[float, float], T]:
    """Seconds of CPU in all threads and of the clock, and what the call gives."""
    clock, cpu = time.perf_counter(), time.process_time()
    value = call()
    return (time.process_time() - cpu, time.perf_counter() - clock), value


def copied(leaves: Mapping[str, Tensor]) -> list[Tensor]:
    """Every tensor into fresh memory, by ``index_select`` of all of its rows."""
    return [x.index_select(0, torch.arange(len(x))) if x.ndim else x.clone() for x in leaves.values()]


def kilobytes(key: str) -> int:
    """A number of this process, from Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def peak(call: Callable[[], object]) -> float | None:
    """Megabytes that a call holds at most above what is held before it, its result among them; none but on Linux."""
    if not Path("/proc/self/clear_refs").exists():
        return None
    Path("/proc/self/clear_refs").write_text("5")  # the highest is the present from here on
    before = kilobytes("VmRSS:")
    call()
    return (kilobytes("VmHWM:") - before) / 1024


def ours(name: str, runs: int) -> dict[str, Any]:
    """One model: couple, select, cut and copy in turn, each on a network as new, and the peak memory of a cut."""
    params, spec = tfx.from_torch(*model(name))
    text, budget = tfx.to_json(spec), tfx.Flops(0.5)
    scores = torch.rand(len(tfx.couple(params, spec)), generator=torch.Generator().manual_seed(0))
    times: dict[str, list[tuple[float, float]]] = {step: [] for step in ("couple", "select", "cut", "copy")}
    for turn in range(runs + 1):
        spec = tfx.from_json(text)
        couple, coupling = timed(lambda spec=spec: tfx.couple(params, spec))
        select, plan = timed(lambda coupling=coupling: tfx.select(scores, coupling, budget=budget))
        cut, (small, _) = timed(lambda plan=plan: (tfx.cut(params, plan), plan.spec))
        copy, fresh = timed(lambda small=small: copied(tfx.tree.flatten(small)))
        if turn:  # the first one warms up
            for step, found in zip(times, (couple, select, cut, copy), strict=True):
                times[step].append(found)
        kept = sum(x.nbytes for x in tfx.tree.flatten(small).values())
        del small, fresh
    leaves = tfx.tree.flatten(params).values()
    largest = max(x.nbytes for x in leaves)
    return {
        "nodes": len(spec), "units": len(coupling), "parameters": sum(x.numel() for x in leaves), "times": times,
        "kept MB": kept / 2**20, "largest MB": largest / 2**20, "peak MB": peak(lambda: tfx.cut(params, plan)),
    }  # fmt: skip


def peer(name: str, runs: int) -> dict[str, Any]:
    """Torch-Pruning: its graph, its step to about half the FLOPs by random scores, and copying what is left."""
    import torch_pruning

    whole, x = model(name)
    times: dict[str, list[tuple[float, float]]] = {"graph": [], "step": [], "copy": []}
    for _ in range(runs):
        module = copy.deepcopy(whole)
        last = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
        graph, pruner = timed(
            lambda module=module, last=last: torch_pruning.pruner.BasePruner(
                module, x, torch_pruning.importance.RandomImportance(), pruning_ratio=0.3, ignored_layers=[last]
            )
        )
        step, _ = timed(pruner.step)
        with torch.no_grad():
            fresh, _ = timed(lambda module=module: copied(module.state_dict()))
        for kind, found in zip(times, (graph, step, fresh), strict=True):
            times[kind].append(found)
    return {"times": times}


def chain(nodes: int) -> tfx.Spec:
    """Linear layers of 64 with activations between them."""
    return tfx.serial(tfx.Input((64,)), *(L.ReLU() if k % 2 else L.Linear(64, 64) for k in range(nodes - 1)))


def dense(nodes: int) -> tfx.Spec:
    """Every third node concatenates two new features with all before them, which all layers behind it read."""
    found, last = [tfx.Node("x", tfx.Input((8,))), tfx.Node("0", L.Linear(8, 8), "x")], "0"
    for k in range((nodes - 2) // 3):
        found += [
            tfx.Node(f"{k}.linear", L.Linear(8 + 2 * k, 2), last),
            tfx.Node(f"{k}.relu", L.ReLU(), f"{k}.linear"),
            tfx.Node(f"{k}.concat", L.Concat(1), (last, f"{k}.relu")),
        ]
        last = f"{k}.concat"
    head = tfx.Node("head", L.Linear(8 + 2 * ((nodes - 2) // 3), 4), last)
    return tfx.Spec((*found, head))


def growth(kind: str, nodes: int) -> dict[str, Any]:
    """The best of three of every step on a chain or a dense graph."""
    spec = {"chain": chain, "dense": dense}[kind](nodes)
    params = tfx.tree.unflatten((path, torch.zeros(shape)) for path, shape in spec.shapes.items())
    text, best = tfx.to_json(spec), {step: float("inf") for step in ("couple", "select", "cut")}
    for _ in range(3):
        spec = tfx.from_json(text)
        couple, coupling = timed(lambda spec=spec: tfx.couple(params, spec))
        scores = torch.rand(len(coupling), generator=torch.Generator().manual_seed(0))
        select, plan = timed(lambda c=coupling, s=scores: tfx.select(s, c, budget=tfx.Parameters(0.5)))
        cut, _ = timed(lambda plan=plan: (tfx.cut(params, plan), plan.spec))
        best = {step: min(best[step], t[0]) for step, t in zip(best, (couple, select, cut), strict=True)}
    positions = sum(coupling.axes[k].size for letters in coupling.letters.values() for k in letters.values())
    return {"nodes": len(spec), "positions": positions, **best}


def scoring(examples: int) -> float:
    """Seconds of CPU for measuring a small residual network on so many images, in batches of 64: the best of three."""
    body = tfx.serial(L.Conv2d(16, 32, 3, padding=1), L.ReLU(), L.Conv2d(32, 16, 3, padding=1))
    spec = tfx.serial(
        tfx.Input((3, 32, 32)), L.Conv2d(3, 16, 3, padding=1), tfx.residual(body), L.ReLU(),
        L.AdaptiveAvgPool2d(1), L.Flatten(), L.Linear(16, 10),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    params = tfx.init(spec, generator)
    coupling = tfx.couple(params, spec)
    x, y = torch.randn(examples, 3, 32, 32, generator=generator), torch.randint(10, (examples,), generator=generator)
    batches = list(zip(x.split(64), y.split(64), strict=True))
    return min(timed(lambda: tfx.measure(params, spec, batches, coupling))[0][0] for _ in range(3))


def child(*arguments: str, seconds: float) -> dict[str, Any]:
    """What this script prints in a process of its own, or why there is nothing within so many seconds of CPU."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], capture_output=True, text=True, env={**os.environ, **FRESH, **PATIENT},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 5)),
    )  # fmt: skip
    if done.returncode == -signal.SIGXCPU:
        return {"nothing": f"no result in {seconds:.0f} s"}
    if done.returncode:
        print(done.stderr[-1500:], file=sys.stderr)
        return {"nothing": "fails, " + (done.stderr.strip().splitlines() or ["?"])[-1].partition(":")[0]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def middle(values: list[float], form: str = ".2f") -> str:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return f"{median:{form}} ({low:{form}} to {high:{form}})"


def shares(times: Mapping[str, list[list[float]]], steps: tuple[str, ...], kind: int) -> list[float]:
    """What some steps cost, of copying in the same turn; in CPU time (0) or by the clock (1)."""
    turns = zip(*(times[step] for step in (*steps, "copy")), strict=True)
    return [sum(found[kind] for found in turn[:-1]) / turn[-1][kind] for turn in turns]


def row(name: str, found: Mapping[str, Any]) -> list[str]:
    """One model's line of the table."""
    mine, other = found["ours"], found.get("peer", {})
    if "nothing" in mine:
        return [MODELS[name], mine["nothing"], *[""] * 9]
    times, ratio = mine["times"], "-"
    if "times" in other:
        ratio = f"{statistics.median(shares(other['times'], ('graph', 'step'), 0)):.0f}"
    seconds = [f"{statistics.median(t[0] for t in times[step]):.3f}" for step in ("couple", "select", "cut", "copy")]
    steps = ("couple", "select", "cut")
    extra = "-" if mine["peak MB"] is None else f"{mine['peak MB']:.0f} / {mine['kept MB'] + mine['largest MB']:.0f}"
    return [
        MODELS[name], f"{mine['parameters'] / 1e6:.1f}", str(mine["nodes"]), *seconds,
        middle(shares(times, ("cut",), 0)), middle(shares(times, steps, 0)), middle(shares(times, steps, 1)), extra,
        other.get("nothing", ratio),
    ]  # fmt: skip


def table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def tables(found: Mapping[str, Any]) -> str:
    """All of it as Markdown."""
    head = ["model", "parameters, M", "nodes", "couple, s", "select, s", "cut, s", "copy, s", "cut / copy",
            "all three / copy", "the same, by the clock", "peak / bound, MB", "Torch-Pruning, all / copy"]  # fmt: skip
    parts = [table(head, [row(name, found["models"][name]) for name in found["models"]])]
    if found.get("growth"):
        head = ["graph", "nodes", "axis positions", "couple, s", "ns per position", "select, s", "cut, s"]
        lines = [
            [kind, f"{g['nodes']:,}", f"{g['positions']:,}", f"{g['couple']:.3f}",
             f"{1e9 * g['couple'] / g['positions']:,.0f}", f"{g['select']:.3f}", f"{g['cut']:.3f}"]
            for kind, rows in found["growth"].items() for g in rows
        ]  # fmt: skip
        parts.append(table(head, lines))
        lines = [[n, f"{seconds:.3f}", f"{1e3 * seconds / int(n):.2f}"] for n, seconds in found["scoring"].items()]
        parts.append(table(["examples", "measure, s", "ms per example"], lines))
    return "\n\n".join(parts)


def publish(found: Mapping[str, Any]) -> None:
    """Write the tables between the markers of README.md, the numbers into cutting.json, and the plot of the growth."""
    readme = HERE / "README.md"
    old = readme.read_text()
    before, after = old.split(MARKERS[0])[0], old.split(MARKERS[1])[1]
    readme.write_text(f"{before}{MARKERS[0]}\n\n{tables(found)}\n\n{MARKERS[1]}{after}")
    (HERE / "cutting.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = {
        f"{step}, {kind} graph": [(g["positions"], Interval(g[step], g[step], g[step])) for g in rows]
        for kind, rows in found["growth"].items()
        for step in ("couple", "select", "cut")
    }
    figure = plot_frontier(lines, x="positions of all axes", y="seconds of CPU", title="Growth, 100 to 10,000 nodes")
    figure.axes[0].set(xscale="log", yscale="log")
    figure.savefig(HERE.parent / "docs" / "cutting_growth.png")


def collect(options: argparse.Namespace, found: dict[str, Any]) -> None:
    """Run every part in a child process of its own; what is there already is kept."""
    shared = (f"--runs={options.runs}", f"--threads={options.threads}")
    for kind in ("ours",) if options.no_peer else ("ours", "peer"):
        for name in options.names:
            entry = found.setdefault("models", {}).setdefault(name, {})
            if kind not in entry:
                entry[kind] = child(name, f"--child={kind}", *shared, seconds=options.limit if kind == "peer" else 1800)
                print(f"| {' | '.join(row(name, entry))} |", file=sys.stderr, flush=True)
                save(options, found)
    if options.no_growth:
        return
    for kind in ("chain", "dense"):
        if kind not in found.setdefault("growth", {}):
            sizes = SIZES[:3] if options.quick else SIZES
            found["growth"][kind] = [
                child(kind, f"--child={n}", f"--threads={options.threads}", seconds=1800) for n in sizes
            ]
            save(options, found)
    if "scoring" not in found:
        found["scoring"] = child("measure", "--child=scoring", f"--threads={options.threads}", seconds=600)
        save(options, found)


def save(options: argparse.Namespace, found: Mapping[str, Any]) -> None:
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(MODELS)}; by default all")
    parser.add_argument("--quick", action="store_true", help="three models and small graphs, without the peer")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit", type=float, default=120, help="seconds of CPU that the peer may take for a model")
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--no-growth", action="store_true")
    parser.add_argument(
        "--out", type=Path, help="a JSON file that the numbers go to, and that a later call goes on from"
    )
    parser.add_argument("--write", action="store_true", help="put tables into README.md and the plot into docs/")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        (name,) = options.names
        works: dict[str, Callable[[], Any]] = {
            "ours": lambda: ours(name, options.runs),
            "peer": lambda: peer(name, 3),
            "scoring": lambda: {n: scoring(n) for n in EXAMPLES},
        }
        print(json.dumps(works.get(options.child, lambda: growth(name, int(options.child)))()))
        return
    options.names = options.names or list(QUICK if options.quick else MODELS)
    options.no_peer |= options.quick or importlib.util.find_spec("torch_pruning") is None
    found = json.loads(options.out.read_text()) if options.out and options.out.exists() else {}
    collect(options, found)
    print(tables(found))
    if options.write:
        publish(found)


if __name__ == "__main__":
    main()

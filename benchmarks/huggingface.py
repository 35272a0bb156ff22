"""The families of transformers, there and back: what their configs can hold, and whether it comes back.

    python benchmarks/huggingface.py             # all families, 15 to 30 minutes
    python benchmarks/huggingface.py Llama T5    # some
    python benchmarks/huggingface.py --layers 3 Llama T5    # of three layers, of which the second leaves

Every family is a small random model, of one layer or of one of each kind. It is captured, half of the units that its
config can do without leave, and the rest is saved. The folder is loaded by a second process, which has not imported
taylorfx: its outputs are compared with those of the pruned network, for the example and for another length and number
of examples, and `generate` with a cache is compared with `generate` without one.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _huggingface import DEPTHS, FAMILIES, LAYERS, captured, pruned, shallower
from _torchvision import library

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.loading import example_of

READ = """
import json, sys
import torch
schemas = torch.library.Library("torchvision", "FRAGMENT")  # where torchvision's compiled operators are missing
for name in ("nms", "qnms"):
    try:
        schemas.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:
        break
import transformers
assert not any(name.startswith("taylorfx") for name in sys.modules)
results = {}
for name in json.loads(sys.argv[2]):
    folder = f"{sys.argv[1]}/{name}"
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()
    calls = torch.load(f"{folder}.inputs")
    with torch.no_grad():
        outputs = [getattr(model(**call), output) for output, call in calls]
    texts = []
    if model.can_generate():
        call = {key: x for key, x in calls[0][1].items() if not key.startswith("decoder_input")}
        for cached in (True, False):
            texts.append(model.generate(**call, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cached))
    results[name] = outputs, texts
torch.save(results, f"{sys.argv[1]}/results")
"""
"""The second process: of the folder and the names of the families it reads what they give."""


def read(home: Path, names: list[str]) -> dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """What the models in these folders give on the calls beside them, and the texts with a cache and without."""
    command = [sys.executable, "-c", READ, str(home), json.dumps(names)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=home)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    results: dict[str, tuple[list[torch.Tensor], list[torch.Tensor]]] = torch.load(home / "results")
    return results


def saved(home: Path, name: str, layers: int = LAYERS) -> tuple[list[Any], tfx.Plan, tfx.Constraints]:
    """Prune a family into a folder, with its calls beside it; what its network gives on them.

    Of several layers the second one leaves, if it can.
    """
    model, params, spec, output = captured(name, layers)
    small, plan, constraints = (pruned if layers == 1 else shallower)(model, params, spec)
    example = {key: x for key, x in example_of(model).items() if key in spec.input_layers}
    huggingface.save_pretrained(home / name, small, plan.spec, like=model, example_inputs=example)
    calls = [example]
    if {"input_ids", "input_values"} & example.keys():  # fewer examples of another length
        shorter = {key: x[:2, : x.shape[1] * 5 // 8] if x.ndim == 2 else x[:2] for key, x in example.items()}
        with contextlib.suppress(tfx.ShapeError):  # a network that takes one length only
            tfx.apply(small, plan.spec, shorter)
            calls.append(shorter)
    torch.save([(output, call) for call in calls], home / f"{name}.inputs")
    given_out = [tfx.apply(small, plan.spec, call) for call in calls]
    return [x[output] if isinstance(x, dict) else x for x in given_out], plan, constraints


def roles(plan: tfx.Plan, constraints: tfx.Constraints) -> str:
    """What may leave, by role, and how many units of the first such scope stayed."""
    coupling, shown = plan.coupling, {}
    rules = constraints.on(coupling)
    for k, name in enumerate(coupling.scopes):
        units = coupling.scope == k
        whole = rules.protected[units].all() or rules.floors[k] >= coupling.sizes[k]
        if not whole and units.sum() > 1 and plan.keep[units].any():
            role = name.rpartition(": ")[2] if ": " in name else name.rpartition(".")[2]
            role = ".".join(name.split(".")[-2:]) if role in ("weight", "dense") else role
            shown.setdefault(role, f"{role} {int(units.sum())} to {int(plan.keep[units].sum())}")
    return ", ".join(shown.values())


def depths(folder: Path, before: dict[str, Any]) -> str:
    """What the config of a folder says of the number of layers, and what the config of the whole model says."""
    config = json.loads((folder / "config.json").read_text())
    names = [name for name in (*DEPTHS, "num_decoder_layers") if name in config]
    return ", ".join(f"{name} {before[name]} to {config[name]}" for name in names)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=", ".join(FAMILIES))
    parser.add_argument("--layers", type=int, default=LAYERS)
    options = parser.parse_args()
    names = options.names or [*FAMILIES]
    if importlib.util.find_spec("torchvision"):
        library()
    warnings.simplefilter("ignore")
    heads = ("family", "what its config lets leave, and what stayed", "units that may leave", "layers",
             "there and back", "another length", "generate with and without a cache")  # fmt: skip
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    with tempfile.TemporaryDirectory() as folder:
        home, results = Path(folder), {}
        for name in names:
            try:
                before = captured(name, options.layers)[0].config.to_dict()
                results[name] = (*saved(home, name, options.layers), depths(home / name, before))
            except Exception as error:  # the table shows what fails, and goes on
                print(f"| {name} | {type(error).__name__}: {str(error).splitlines()[0]} |", flush=True)
        outputs = read(home, [*results])
    for name, (expected, plan, constraints, layers) in results.items():
        received, texts = outputs[name]
        errors = [f"{float((a - b).abs().max()):.0e}" for a, b in zip(expected, received, strict=True)]
        rules, coupling = constraints.on(plan.coupling), plan.coupling
        whole = np.array(rules.floors)[coupling.scope] >= coupling.sizes[coupling.scope]
        share = 1 - (rules.protected | whole & (len(coupling.branches) > 0)).mean()
        equal = ("equal" if torch.equal(*texts) else "different") if texts else "no"
        row = (
            name,
            roles(plan, constraints),
            f"{share:.0%}",
            layers,
            errors[0],
            errors[1] if len(errors) > 1 else "fixed",
        )
        print(f"| {' | '.join((*row, equal))} |")


if __name__ == "__main__":
    main()

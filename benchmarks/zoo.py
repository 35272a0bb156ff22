"""Models of torchvision and transformers, captured, pruned at random, and checked.

    python benchmarks/zoo.py                  # a dozen of torchvision's classification models
    python benchmarks/zoo.py --all            # all of them: an hour
    python benchmarks/zoo.py resnet18 swin_t  # some
    python benchmarks/zoo.py --transformers   # small random ones of that library's families, if it is installed

For each architecture, with random weights and random running statistics in float64: the captured network computes what
the module computes; a plan that removes half of the units at random leaves a network that computes what the gated one
does (exact units), and that trains a step. The table says how many units there are, how much of the network they reach,
what is frozen, and how long capturing and coupling took.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _transformers import cases
from torch import nn

import taylorfx as tfx
from taylorfx.interop import from_torch, to_torch
from taylorfx.testing import random_plan

QUICK = (
    "alexnet", "resnet18", "vgg11_bn", "squeezenet1_0", "mobilenet_v3_small", "shufflenet_v2_x0_5", "mnasnet0_5",
    "efficientnet_b0", "regnet_y_400mf", "densenet121", "convnext_tiny", "swin_t",
)  # fmt: skip
SIZES = {
    "inception_v3": 96, "swin": 64, "swin_v2": 64, "maxvit_t": 224, "vit_l_32": 64, "vit_b_32": 64, "vit_h_14": 28,
    "vit": 32, "alexnet": 64,
}  # fmt: skip


def torchvision_models() -> Any:
    """torchvision.models, also where torchvision's compiled operators are missing: their schemas are enough."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        try:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:
            break  # the operators are there
    import torchvision.models as models

    LIBRARIES.append(library)  # a definition lasts as long as its library
    return models


LIBRARIES: list[torch.library.Library] = []


def randomized(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """In float64, everything in general position, so that nothing hides behind ones and zeros."""
    module = module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor.copy_(0.5 + noise)
            elif tensor.ndim < 2 or not tensor.any():
                tensor.add_(0.2 * (noise - 0.5))
    return module


def first(outputs: Any) -> torch.Tensor:
    """The first of a network's outputs, however they come."""
    return next(x for x in torch.utils._pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor))


def prove(module: nn.Module, *args: torch.Tensor, **kwargs: torch.Tensor) -> dict[str, Any]:
    """Capture, couple, cut and compare; the row of the table."""
    with torch.no_grad():
        expected = module(*args, **kwargs)
    start = time.perf_counter()
    params, spec = from_torch(module, args, example_kwargs=kwargs)
    captured = time.perf_counter() - start
    x = {node.name: kwargs.get(node.name, *args) for node in spec.inputs}
    with torch.no_grad():
        found = tfx.apply(params, spec, x)
    expected, found = first(expected), first(found)
    scale = expected.abs().max().item()
    difference = (found - expected).abs().max().item() / scale
    start = time.perf_counter()
    coupling = tfx.couple(params, spec)
    coupled = time.perf_counter() - start
    worst = 0.0
    for exact in (True, False):
        plan = random_plan(coupling, torch.Generator().manual_seed(1), 0.5, exact=exact)
        small = tfx.cut(params, plan)
        with torch.no_grad():
            one = tfx.apply(small, plan.spec, x)
            other = tfx.apply(params, spec, x, gates=plan.gates)
        one, other = first(one), first(other)
        if exact:
            worst = (one - other).abs().max().item() / max(scale, other.abs().max().item())
    trained = to_torch(small, plan.spec).train()
    y = trained(**x)
    first(y).square().mean().backward()
    cost = tfx.parameters(coupling)
    none = np.zeros(len(coupling), bool)
    kinds = Counter(type(node.layer).__name__ for node in spec)
    return {
        "units": len(coupling),
        "prunable": 1 - cost(none) / cost.total,
        "exact": float(coupling.exact.mean()) if len(coupling) else 1.0,
        "difference": difference,
        "cut against gated": worst,
        "capture, s": captured,
        "couple, s": coupled,
        "nodes": len(spec),
        "no rule": [str(n.layer) for n in spec if isinstance(n.layer, tfx.Captured)],
        "mixing": list(coupling.mixing),
        "frozen": dict(Counter(reason.split(": ", 1)[-1] for reason in coupling.frozen.values())),
        "layers": dict(kinds),
    }


def vision(name: str) -> dict[str, Any]:
    """The row of one of torchvision's models."""
    models = torchvision_models()
    size = next((n for key, n in SIZES.items() if name.startswith(key)), 64)
    extra = {"image_size": size} if name.startswith("vit") else {}
    extra |= {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    module = randomized(models.get_model(name, weights=None, **extra), torch.Generator().manual_seed(0))
    return prove(module, torch.randn(2, 3, size, size, dtype=torch.float64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    models = torchvision_models()
    makers = cases() if options.transformers else {}
    names = options.names or makers or (models.list_models(module=models) if options.all else QUICK)
    rows = {}
    for name in names:
        torch.manual_seed(0)
        try:
            if name in makers:
                module, kwargs = makers[name]()
                row = prove(randomized(module, torch.Generator().manual_seed(0)), **kwargs)
            else:
                row = vision(name)
        except Exception as error:  # the table shows what fails, and goes on
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        rows[name] = row
        shown = row.get("failed") or (
            f"{row['units']:7,} units  {row['prunable']:6.1%} prunable  {row['exact']:6.1%} exact  "
            f"{row['difference']:.0e} captured  {row['cut against gated']:.0e} cut  {row['capture, s']:5.1f} s + "
            f"{row['couple, s']:.2f} s  {', '.join(sorted(set(row['no rule'])))} {row['frozen']}"
        )
        print(f"{name:28} {shown}", flush=True)
    if options.out:
        options.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()

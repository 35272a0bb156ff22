"""The whole VGG11 with batch norm, pruned three ways: one feature map at a time, all at once, and by name.

The network is torchvision's ``vgg11_bn`` with a head for ten classes: 224 x 224 pixels, 129 million parameters, and a
parameter tree whose dotted paths are the keys of torchvision's ``state_dict``. It is pruned

1. as Molchanov et al. 2016 did it: measure, remove the feature map that matters least, ``--maps`` times;
2. in a single plan that halves the FLOPs;
3. by name: a feature map of the last convolution, whose 7 x 7 positions are 49 columns of the first linear layer, and a
   unit of each of the hidden linear layers, which are units like any other.

After each, the cut network is compared with the original under the plan's gates. Images are noise: this is about
structure. It takes one to two minutes on two cores; ``--width 0.125 --size 64`` takes seconds.

    python examples/vgg11_bn.py
    python examples/vgg11_bn.py --weights vgg11_bn.pth      # a state_dict of torchvision's
"""

from __future__ import annotations

import argparse
import math
from dataclasses import replace
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

import taylorfx as tfx
from taylorfx import layers as L

LAYOUT = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")
"""The channels of the convolutions; ``M`` halves the image."""


def vgg11_bn(*, classes: int = 10, width: float = 1.0, size: int = 224) -> tfx.Spec:
    """torchvision's VGG11 with batch norm, all channels scaled by ``width``, for square images."""
    features: list[tfx.Layer] = []
    channels = 3
    for entry in LAYOUT:
        if isinstance(entry, int):
            before, channels = channels, max(2, round(width * entry))
            features += [L.Conv2d(before, channels, 3, padding=1), L.BatchNorm2d(channels), L.ReLU()]
        else:
            features += [L.MaxPool2d(2, 2)]
    hidden = max(2, round(width * 4096))
    return tfx.serial(
        tfx.Input((3, size, size)),
        features=tfx.serial(*features),
        avgpool=L.AdaptiveAvgPool2d(7),
        flatten=L.Flatten(),
        classifier=tfx.serial(
            L.Linear(channels * 7 * 7, hidden),
            L.ReLU(),
            L.Dropout(),
            L.Linear(hidden, hidden),
            L.ReLU(),
            L.Dropout(),
            L.Linear(hidden, classes),
        ),
    )


def fresh(spec: tfx.Spec, x: Tensor, generator: torch.Generator) -> tfx.Params:
    """Fresh weights by He et al. 2015, and norms with the statistics of ``x``, so that no feature map is silent."""
    leaves = tfx.tree.flatten(tfx.init(spec, generator))
    for path, leaf in leaves.items():
        if leaf.ndim > 1:
            leaves[path] = torch.normal(0.0, math.sqrt(2 / leaf[0].numel()), leaf.shape, generator=generator)
    # A norm of momentum 1 remembers the last batch alone.
    nodes = (
        replace(node, layer=replace(node.layer, momentum=1.0)) if isinstance(node.layer, L.BatchNorm2d) else node
        for node in spec
    )
    return tfx.train(tfx.tree.unflatten(leaves), tfx.Spec(tuple(nodes)), x, generator=generator)[1]


def load(path: Path, params: tfx.Params) -> tfx.Params:
    """The weights of a ``state_dict`` file, the head excepted: it stays the fresh one, for its own number of classes.

    Files from before torch counted the batches of a norm have no ``num_batches_tracked``; it stays 0.
    """
    state = torch.load(path, map_location="cpu", weights_only=True)
    body = {name: tensor for name, tensor in state.items() if not name.startswith("classifier.6.")}
    return tfx.tree.unflatten({**tfx.tree.flatten(params), **body})


Batch = tuple[Tensor, Tensor]


def one_at_a_time(params: tfx.Params, spec: tfx.Spec, batch: Batch, maps: int) -> tfx.Plan:
    """Measure, remove the least feature map, again and again; the plans, said as one against the original network."""
    plans: list[tfx.Plan] = []
    for _ in track(range(maps), "one map at a time", transient=True):
        coupling = tfx.couple(params, spec)
        stats = tfx.measure(params, spec, batch, coupling)
        scores = tfx.taylor(
            stats, coupling, spatial_mean=True, normalizer=tfx.criteria.per_layer_l2
        )  # equations 8 and 9
        plan = tfx.select(scores, coupling, budget=tfx.Remove(1), protect=("classifier.*",))
        params, spec = tfx.cut(params, plan), plan.spec
        plans.append(plan)
    return replace(reduce(tfx.compose, plans), asked=f"{maps} feature maps less, one at a time")


def all_at_once(params: tfx.Params, spec: tfx.Spec, batch: Batch, share: float) -> tfx.Plan:
    """One measurement, one plan: feature maps and linear units together, down to a share of the FLOPs."""
    coupling = tfx.couple(params, spec)
    stats = tfx.measure(params, spec, batch, coupling)
    scores = tfx.taylor(stats, coupling, normalizer=tfx.criteria.per_layer_l2)
    return tfx.select(scores, coupling, budget=tfx.Flops(share))


def by_name(params: tfx.Params, spec: tfx.Spec, *names: str) -> tfx.Plan:
    """All stay but these."""
    coupling = tfx.couple(params, spec)
    return tfx.Plan(coupling, ~np.isin(coupling.names, names), f"all but {', '.join(names)}")


@torch.inference_mode()
def proof(params: tfx.Params, plan: tfx.Plan, x: Tensor) -> tfx.Params:
    """Cut, print what changed, and hold the cut network against the original under the plan's gates."""
    spec, small = plan.coupling.spec, tfx.cut(params, plan)
    gated = tfx.apply(params, spec, x, gates=plan.gates)
    moved = (gated - tfx.apply(params, spec, x)).abs().max().item()
    scale = gated.abs().max().item()
    difference = (tfx.apply(small, plan.spec, x) - gated).abs().max().item() / scale
    print(plan)
    print(f"outputs up to {scale:.2e}, moved by up to {moved:.2e}; cut and gated differ by {difference:.2e} of it\n")
    assert difference < 1e-4, "the cut network has to compute what the gated one computes"
    return small


def main() -> None:
    options = arguments()
    generator = torch.Generator().manual_seed(options.seed)
    spec = vgg11_bn(width=options.width, size=options.size)
    x = torch.randn(options.batch, 3, options.size, options.size, generator=generator)
    batch = x, torch.randint(10, (options.batch,), generator=generator)
    params = fresh(spec, x, generator)
    if options.weights:
        params = load(options.weights, params)

    print(f"1. One feature map at a time, {options.maps} times")
    proof(params, one_at_a_time(params, spec, batch, options.maps), x)

    print(f"2. All at once, down to {options.flops:.0%} of the FLOPs")
    proof(params, all_at_once(params, spec, batch, options.flops), x)

    print("3. By name: a map of the last convolution, a unit of each hidden linear layer")
    small = proof(params, by_name(params, spec, "features.25[0]", "classifier.0[1]", "classifier.3[2]"), x)
    for name in ("features.25", "classifier.0", "classifier.3", "classifier.6"):
        before, after = (tfx.tree.flatten(tree)[f"{name}.weight"].shape for tree in (params, small))
        print(f"{name}.weight: {tuple(before)} -> {tuple(after)}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--maps", type=int, default=5, help="feature maps to remove one at a time")
    parser.add_argument("--flops", type=float, default=0.5, help="share of the FLOPs that may remain (default: 0.5)")
    parser.add_argument("--width", type=float, default=1.0, help="scale of all channels (default: 1)")
    parser.add_argument("--size", type=int, default=224, help="pixels on a side, 32 or more (default: 224)")
    parser.add_argument("--batch", type=int, default=8, help="images to measure on (default: 8)")
    parser.add_argument("--weights", type=Path, help="a state_dict of torchvision's vgg11_bn, saved with torch.save")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


if __name__ == "__main__":
    main()

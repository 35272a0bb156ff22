"""How well does every criterion rank the units as the oracle does? A residual network on scikit-learn's digits.

For each seed a network is trained; every criterion scores its units on the same training images, and the oracle leaves
each unit out, on these images and on unseen ones. Prints rank correlations, their mean over the seeds with its 95 %
interval (Student's t); with ``--out`` also draws the first seed's. From the root of the repository, in some minutes:

    python benchmarks/fidelity.py
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from statistics import mean, stdev

import torch
from scipy.stats import t as student
from torch import Tensor

import taylorfx as tfx
from taylorfx.report.plots import plot_fidelity

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))  # the network and the training of the quickstart
from quickstart import digits, network
from training import accuracy, learn, some

TARGETS = (tfx.truth.Oracle.signed, tfx.truth.Oracle.absolute, tfx.truth.Oracle.mean_absolute)


def scores(params: tfx.Params, spec: tfx.Spec, batches: list, coupling: tfx.Coupling) -> dict[str, Tensor]:
    """Every criterion there is, by its name."""
    stats = tfx.measure(params, spec, batches, coupling, moments=True)
    raw = tfx.measure(params, spec, batches, coupling, at_writes=True, training=True)
    derivatives = (tfx.taylor, tfx.criteria.taylor_squared, tfx.fisher, tfx.criteria.signed, tfx.criteria.second_order)
    activations = (tfx.criteria.activation_mean, tfx.criteria.activation_std, tfx.criteria.apoz)
    weights = (tfx.criteria.weight_l1, tfx.criteria.weight_l2, tfx.criteria.batchnorm_scale)
    return {
        **{criterion.__name__: criterion(stats, coupling) for criterion in (*derivatives, *activations)},
        "taylor, as printed": tfx.taylor(stats, coupling, spatial_mean=True, normalizer=tfx.criteria.per_layer_l2),
        **{criterion.__name__: criterion(params, coupling) for criterion in weights},
        "compat": tfx.criteria.compat(raw, coupling),
        "random": tfx.criteria.random(coupling, torch.Generator().manual_seed(0)),
        "exact_second_order": tfx.truth.exact_second_order(params, spec, batches, coupling),
        "path_integral": tfx.truth.path_integral(params, spec, batches, coupling),
    }


def one(seed: int, options: argparse.Namespace) -> list[tfx.truth.Fidelity]:
    """The fidelities of one trained network: on the images of the scores by each target, and on unseen ones."""
    generator = torch.Generator().manual_seed(seed)
    images, targets, test_images, test_targets = digits()
    images, test_images = (x + options.noise * torch.randn(x.shape, generator=generator) for x in (images, test_images))
    spec = network(options.width)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator, label=f"seed {seed}")
    coupling = tfx.couple(params, spec)
    scored, rest = (images, targets), (test_images, test_targets)
    if options.held_out:
        scored, rest = ((test_images[half::2], test_targets[half::2]) for half in (0, 1))
    seen, unseen = (some(*part, options.examples, generator) for part in (scored, rest))
    start = time.process_time()
    same, other = (
        tfx.truth.oracle(params, spec, batches, coupling, progress=sys.stdout.isatty()) for batches in (seen, unseen)
    )
    middle = time.process_time()
    found = scores(params, spec, seen, coupling)
    print(
        f"seed {seed}: {len(coupling)} units, test accuracy {accuracy(params, spec, test_images, test_targets):.3f}, "
        f"{same.n} + {other.n} images; two oracles {middle - start:.0f} s, scores {time.process_time() - middle:.0f} s",
        flush=True,
    )
    by_target = [tfx.truth.fidelity(found, same, coupling, target=target) for target in TARGETS]
    return [*by_target, tfx.truth.fidelity(found, other, coupling)]


def interval(values: list[float]) -> str:
    """The mean and its 95 % interval."""
    spread = student.ppf(0.975, len(values) - 1) * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{mean(values):.2f} ± {spread:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--examples", type=int, default=256, help="images for the scores, and as many for each oracle")
    parser.add_argument("--held-out", action="store_true", help="score on images that were held out of training, too")
    parser.add_argument("--noise", type=float, default=0.0, help="of the images, which go from -1 to 1 (default: 0)")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage (default: 16)")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--out", type=Path, help="a plot of the first seed's network")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs = [one(seed, options) for seed in range(options.seeds)]
    print(f"\nThe first seed's network, by {TARGETS[0].__name__}:\n\n{runs[0][0]}\n")
    if options.out:
        plot_fidelity(runs[0][0]).savefig(options.out)
    heads = [f"`{target.__name__}`" for target in TARGETS]
    print(f"| criterion | {' | '.join(heads)} | {heads[0]}, Kendall | {heads[0]}, unseen images |")
    print("| --- " * (len(heads) + 3) + "|")
    columns = [*(("spearman", k) for k in range(len(TARGETS))), ("kendall", 0), ("spearman", len(TARGETS))]
    order = sorted(runs[0][0].spearman, key=lambda name: -mean(run[0].spearman[name].value for run in runs))
    for name in order:
        cells = [interval([getattr(run[k], kind)[name].value for run in runs]) for kind, k in columns]
        print(f"| {name if ',' in name else f'`{name}`'} | {' | '.join(cells)} |")
    ceilings = [interval([run[k].ceiling for run in runs]) for k in range(len(TARGETS))]
    unseen = interval([run[-1].ceiling for run in runs])
    print(f"| noise ceiling | {' | '.join(ceilings)} | | {unseen} |")


if __name__ == "__main__":
    main()

"""Which experts can a mixture do without? Criteria against the oracle, and what is left of the accuracy.

For each seed a small network learns scikit-learn's digits: the eight rows of an image are its tokens, and two mixtures
of 16 experts, of which every token goes through two, follow each other. Every criterion scores the experts on 256
training images; the oracle leaves each one out on the same images. Then both mixtures lose equal numbers of experts, by
each criterion, and nothing is repaired or trained. Prints the mean over the seeds with its 95 % interval (Student's
t). From the root of the repository, in some minutes:

    python benchmarks/experts.py
    python benchmarks/experts.py --language     # what may stand in for experts that a small Mixtral loses

The second command trains the Mixtral of ``language.py --experts 8`` (or takes it from the same cache) and prints its
perplexities without some of its experts: as cut, with constants in their place, and repaired.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from _tables import interval, markdown
from scipy.stats import spearmanr
from torch import Tensor

import taylorfx as tfx
from taylorfx import layers as L

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from quickstart import digits
from training import accuracy, learn, some

TOKENS, WIDTH, HIDDEN, TOP_K = 8, 32, 16, 2


def mixture(name: str, source: str, experts: int) -> list[tfx.Node]:
    """A norm, a router and its experts, each a linear layer, a GELU and a linear layer, beside a shortcut."""

    def node(part: str, layer: tfx.Layer, *inputs: str) -> tfx.Node:
        return tfx.Node(f"{name}.{part}", layer, tuple(f"{name}.{x}" if x != source else x for x in inputs))

    return [
        node("norm", L.LayerNorm(WIDTH), source),
        node("router", L.Linear(WIDTH, experts, bias=False), "norm"),
        node("ones", L.Ones(), "router"),
        node("weights", L.TopKWeights(TOP_K), "ones", "router"),
        node("column", L.View((1, TOKENS, TOP_K, 1)), "weights"),
        node("thin", L.View((1, TOKENS, 1, WIDTH)), "norm"),
        node("rows", L.Expand((-1, -1, TOP_K, -1)), "thin"),
        node("up", L.ExpertLinear(experts, WIDTH, HIDDEN, TOP_K), "ones", "router", "rows"),
        node("gelu", L.GELU(), "up"),
        node("down", L.ExpertLinear(experts, HIDDEN, WIDTH, TOP_K), "ones", "router", "gelu"),
        node("weighted", L.Multiply(), "down", "column"),
        node("sum", L.Reduce("sum", (2,)), "weighted"),
        node("add", L.Add(), source, "sum"),
    ]


def network(experts: int) -> tfx.Spec:
    """The rows of an image, their places, two mixtures, the mean over the rows, a linear layer."""
    nodes = [
        tfx.Node("image", L.Input((1, 8, 8))),
        tfx.Node("tokens", L.Reshape((TOKENS, 8)), ("image",)),
        tfx.Node("embed", L.Linear(8, WIDTH), ("tokens",)),
        tfx.Node("places", L.Parameter((TOKENS, WIDTH), std=0.5)),
        tfx.Node("stream", L.Add(), ("embed", "places")),
        *mixture("one", "stream", experts),
        *mixture("two", "one.add", experts),
        tfx.Node("mean", L.Reduce("mean", (1,)), ("two.add",)),
        tfx.Node("head", L.Linear(WIDTH, 10), ("mean",)),
    ]
    return tfx.Spec(tuple(nodes), ("head",))


def scores(params: tfx.Params, spec: tfx.Spec, batches: list, coupling: tfx.Coupling, seed: int) -> dict[str, Tensor]:
    """Every criterion that says something of experts, by its name."""
    stats = tfx.measure(params, spec, batches, coupling)
    derivatives = (tfx.taylor, tfx.criteria.taylor_squared, tfx.fisher, tfx.criteria.signed, tfx.criteria.second_order)
    return {
        "reap": tfx.criteria.reap(params, spec, batches, coupling),
        **{criterion.__name__: criterion(stats, coupling) for criterion in derivatives},
        "weight_l2": tfx.criteria.weight_l2(params, coupling),
        "random": tfx.criteria.random(coupling, torch.Generator().manual_seed(seed)),
    }


def one(seed: int, options: argparse.Namespace) -> tuple[dict[str, list[float]], float]:
    """By criterion its correlation with the oracle and the accuracies at all shares; the accuracy of the whole."""
    generator = torch.Generator().manual_seed(seed)
    images, targets, *test = digits()
    spec = network(options.experts)
    params = learn(spec, images, targets, epochs=options.epochs, generator=generator, label=f"seed {seed}")
    coupling = tfx.couple(params, spec)
    units = [k for k, scope in enumerate(coupling.scope) if coupling.scopes[scope].endswith("router")]
    seen = some(images, targets, 256, generator)
    truth = tfx.truth.oracle(params, spec, seen, coupling, units=units).signed()
    every = scores(params, spec, seen, coupling, seed)
    every["oracle"] = torch.zeros(len(coupling), dtype=truth.dtype).index_put((torch.tensor(units),), truth)
    others = [name for name in coupling.scopes if not name.endswith("router")]
    rows: dict[str, list[float]] = {}
    for name, values in every.items():
        row = [float(spearmanr(values[units], truth).statistic)]
        for left in options.left:
            plan = tfx.select(
                values, coupling, budget=tfx.Remove(2 * (options.experts - left)), protect=others, uniform="*router",
                per_cost=False,
            )  # fmt: skip
            row.append(100 * accuracy(tfx.cut(params, plan), plan.spec, *test))
        rows[name] = row
    return rows, 100 * accuracy(params, spec, *test)


def language(seeds: Sequence[int], steps: int) -> None:
    """Print what is left of Mixtrals without some of their experts, by what stands in for these."""
    from _language import Case, Size, Subject, documents, tokens
    from _lost_experts import COLUMNS, rows
    from _torchvision import library
    from quality import CACHE

    from taylorfx.interop.huggingface import perplexity

    if importlib.util.find_spec("torchvision"):
        library()
    streams = tokens(documents())
    for seed in seeds:
        model, scored, test = Subject.of(seed, streams, Size.of(128, experts=8), steps, CACHE.parent / "language")
        table = rows(Case.of(model, scored, seed, "parameters"), (0.7, 0.5), test)
        print(f"\nSeed {seed}, all experts: {perplexity(model, test):.2f}\n\n{markdown(COLUMNS, table)}\n", flush=True)


def criteria(options: argparse.Namespace) -> None:
    """Print the criteria by how well they agree with the oracle, and what each leaves of the accuracy."""
    runs = [one(seed, options) for seed in range(options.seeds)]

    def cell(values: list[float], digits: int) -> str:
        middle, least, _ = interval(values)
        return f"{middle:.{digits}f} ± {middle - least:.{digits}f}"

    def row(name: str, columns: Mapping[int, list[float]]) -> list[str]:
        return [f"`{name}`", *(cell(values, 1 if k else 2) for k, values in columns.items())]

    by_name = {
        name: {k: [rows[name][k] for rows, _ in runs] for k in range(len(options.left) + 1)} for name in runs[0][0]
    }
    ordered = sorted(by_name, key=lambda name: -sum(by_name[name][0]))
    print(f"All {options.experts} experts: {cell([whole for _, whole in runs], 1)} %\n")
    heads = ["criterion", "correlation", *(f"{left} of {options.experts} experts" for left in options.left)]
    print(markdown(heads, [row(name, by_name[name]) for name in ordered]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="how many")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--left", type=int, nargs="+", default=[8, 4, 3], help="how many experts each mixture keeps")
    parser.add_argument("--language", action="store_true", help="a small Mixtral, and what stands in for its experts")
    parser.add_argument("--train", type=int, default=1500, help="steps of training of the Mixtral")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.language:
        language(range(options.seeds), options.train)
    else:
        criteria(options)


if __name__ == "__main__":
    main()

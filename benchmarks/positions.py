"""Rows for every token, or for every sequence? Correlations with the oracle, and perplexities, on few sequences.

For each seed a small Llama learns for 400 steps what `language.py` teaches, on sequences of 64 tokens. Of 8, 16 or 64
sequences the derivatives are summed by example and by position (``per_position="input_ids.1"``). The loss of a sequence
is the sum of its tokens'. The oracle and the perplexities are of texts that nothing else has seen.

    python benchmarks/positions.py                   # three seeds: ten minutes of one core
    python benchmarks/positions.py --seeds 0 --steps 50 --sequences 8

Prints Markdown: means over the seeds with their 95 % intervals (Student's t).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from _language import INPUTS, Batch, Size, documents, learn, llama, sequences
from _language import tokens as tokenized
from _tables import interval, markdown
from _torchvision import library
from scipy.stats import spearmanr
from torch import Tensor

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.texts import batches

SIZE = Size(hidden=64, layers=3, intermediate=160, length=64)
ORACLE, TESTED, SHARES = 64, 128, (0.7,)
OBSERVATIONS = {"sequence": None, "token": "input_ids.1"}
CHOICES: dict[str, Callable[..., tfx.Plan]] = {
    "joint": partial(tfx.joint, cautious=True),
    "joint, not cautious": tfx.joint,
    "fisher": lambda stats, coupling, **options: tfx.select(tfx.fisher(stats, coupling), coupling, **options),
}


SUMMED = partial(huggingface.next_token, reduction="sum")


def one(seed: int, steps: int, counts: Sequence[int], learned: Tensor, unseen: Tensor) -> dict[str, list[float]]:
    """What is printed of a seed, by number of sequences and kind of observation."""
    generator = torch.Generator().manual_seed(seed)
    model = learn(llama(SIZE, seed), learned, SIZE, steps, 3e-3, generator)
    judged = batches(sequences(unseen, ORACLE, SIZE.length, generator), INPUTS, 16)
    tested: list[Batch] = batches(sequences(unseen, TESTED, SIZE.length, generator), INPUTS, 32)
    model, params, spec = huggingface.from_pretrained(model, judged[0][0], outputs="logits")
    held, coupling = huggingface.holdable(model, params, spec, judged[0][0]), tfx.couple(params, spec)
    truth = tfx.truth.oracle(params, spec, judged, coupling, loss=huggingface.next_token).signed()
    print(f"seed {seed}: {len(coupling)} units, perplexity {huggingface.perplexity(model, tested):.1f}", flush=True)
    found: dict[str, list[float]] = {}
    for count in counts:
        scored = batches(sequences(learned, count, SIZE.length, generator), INPUTS, 8)
        for name, axis in OBSERVATIONS.items():
            stats = tfx.measure(params, spec, scored, coupling, loss=SUMMED, rows=True, per_position=axis)
            numbers = [spearmanr(tfx.fisher(stats, coupling), truth).statistic]
            for share in SHARES:
                for choose in CHOICES.values():
                    plan = choose(stats, coupling, budget=tfx.Flops(share), constraints=held)
                    cut = tfx.to_torch(tfx.cut(params, plan), plan.spec)
                    numbers.append(huggingface.perplexity(cut, tested))
            found[f"{count}, {name}"] = numbers
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--sequences", type=int, nargs="+", default=[8, 16, 64])
    options = parser.parse_args()
    torch.set_num_threads(1)
    library()
    learned, unseen = tokenized(documents())
    found = [one(seed, options.steps, options.sequences, learned, unseen) for seed in options.seeds]

    def cell(values: Sequence[float], digits: int) -> str:
        middle, least, _ = interval(values)
        return f"{middle:.{digits}f} ± {middle - least:.{digits}f}"

    head = [
        "sequences, a row for each",
        "correlation",
        *(f"{name}, {share:.0%}" for share in SHARES for name in CHOICES),
    ]
    by_kind = {kind: [[each[kind][k] for each in found] for k in range(len(head) - 1)] for kind in found[0]}
    print(
        markdown(head, [(k, *(cell(x, 1 if n else 2) for n, x in enumerate(values))) for k, values in by_kind.items()])
    )


if __name__ == "__main__":
    main()

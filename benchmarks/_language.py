"""Text that comes with Python, a small Llama that learns it, and the contestants of the language benchmark."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import math
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

import numpy as np
import torch
from _shares import Shares
from torch import Tensor, nn

import taylorfx as tfx
from taylorfx.interop import huggingface
from taylorfx.interop.huggingface.texts import batches

VOCABULARY, INPUTS = 1024, ("input_ids", "attention_mask")
EXAMPLES = 64
"""How many sequences are scored and repaired with."""
TESTED = 128
"""How many others the models are tested on."""

Batch = tuple[dict[str, Tensor], Tensor]
Plans = dict[float, tfx.Plan]
Contestant = Callable[[Sequence[float]], Plans]


@dataclass(frozen=True)
class Size:
    """Of the model and of a batch."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    intermediate: int = 352
    length: int = 96
    batch: int = 16
    experts: int = 0

    @staticmethod
    def of(width: int, experts: int) -> Size:
        """With a stream of this width; two experts of a token have the width of a layer without any."""
        wide = width * 11 // 4
        return Size(width, intermediate=wide // 2 if experts else wide, experts=experts)

    def name(self, steps: int, seed: int) -> str:
        """That of a model of this size, trained for so many steps from this seed."""
        experts = f"x{self.experts}" if self.experts else ""
        return f"{self.hidden}{experts}-{steps}-{seed}"


class Subject(NamedTuple):
    """A language model, the sequences that it is scored and repaired on, and the batches that it is tested on."""

    model: Any
    scored: Tensor
    test: list[Batch]

    @staticmethod
    def of(seed: int, streams: tuple[Tensor, Tensor], size: Size, steps: int, cache: Path) -> Subject:
        """That of a seed, after so many steps of training; the model is kept.

        Args:
            streams: the tokens to learn from, and the others.
            cache: the folder of models.
        """
        cache.mkdir(parents=True, exist_ok=True)
        learned, judged = streams
        model = trained(seed, learned, size, steps, cache / f"{size.name(steps, seed)}.pt")
        scored = sequences(learned, EXAMPLES, size.length, torch.Generator().manual_seed(1000 + seed))
        test = sequences(judged, TESTED, size.length, torch.Generator().manual_seed(0))
        return Subject(model, scored, batches(test, INPUTS, 32))


def documents() -> list[str]:
    """Python's language reference and the docstrings of its standard library, each once, in a fixed order."""
    texts = set(topics.values())
    for file in Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"):
        if {"site-packages", "test", "tests", "idlelib"} & {*file.parts}:
            continue
        try:
            tree = ast.parse(file.read_text("utf8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        texts |= {ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)}
    return sorted(texts - {""}, key=digest)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The tokens of nine tenths of the texts, from which the byte pairs are learned, and of the others."""
    import tokenizers

    learned, judged = texts[len(texts) // 10 :], texts[: len(texts) // 10]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(learned, vocab_size=VOCABULARY, show_progress=False)
    parts = (
        [token for one in tokenizer.encode_batch([f"{text}\n\n" for text in part]) for token in one.ids]
        for part in (learned, judged)
    )
    one, two = (torch.tensor(part) for part in parts)
    return one, two


def sequences(stream: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """``(count, length)`` tokens, each sequence from a place drawn at random."""
    starts = torch.randint(len(stream) - length, (count, 1), generator=generator)
    return stream[starts + torch.arange(length)]


def llama(size: Size, seed: int) -> Any:
    """A Llama with random weights; with experts a Mixtral, of whose experts two work on each token."""
    import transformers

    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": size.hidden, "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads, "num_key_value_heads": size.heads // 2, "use_cache": False,
        "intermediate_size": size.intermediate, "max_position_embeddings": 2 * size.length,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if size.experts:
        config = transformers.MixtralConfig(
            num_local_experts=size.experts, num_experts_per_tok=2, sliding_window=None, **sizes
        )
        return transformers.MixtralForCausalLM(config)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))


def trained(seed: int, stream: Tensor, size: Size, steps: int, file: Path) -> Any:
    """The model of this seed, from the file if it was trained before."""
    model = llama(size, seed)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    start = time.process_time()
    learn(model, stream, size, steps, 3e-3, torch.Generator().manual_seed(seed))
    torch.save(model.state_dict(), file)
    print(f"seed {seed}: trained in {time.process_time() - start:.0f} s of CPU time", flush=True)
    return model


def learn(
    model: nn.Module, stream: Tensor, size: Size, steps: int, lr: float, generator: torch.Generator,
    teacher: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    """The model after so many steps of AdamW under a cosine; half of the loss is the teacher's if there is one."""
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    warm = max(1, min(100, steps // 10))

    def rate(k: int) -> float:
        return min((k + 1) / warm, 0.5 * (1 + math.cos(math.pi * k / steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for _ in range(steps):
        ((inputs, labels),) = batches(sequences(stream, size.batch, size.length, generator), INPUTS, size.batch)
        outputs = model(**inputs)
        loss = huggingface.next_token(outputs, labels).mean()
        if teacher is not None:
            with torch.no_grad():
                targets = teacher(**inputs)
            loss = 0.5 * loss + 0.5 * huggingface.distillation(outputs, targets).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@dataclass(frozen=True)
class Case:
    """What all contestants look at: a model, its network, the scored sequences and what its class can hold.

    Attributes:
        shares: what shares are of.
    """

    model: Any
    params: tfx.Params
    spec: tfx.Spec
    batches: list[Batch]
    constraints: tfx.Constraints
    seed: int
    shares: Shares = field(default_factory=partial(Shares.of, "FLOPs", 16))

    @staticmethod
    def of(model: Any, rows: Tensor, seed: int, by: str = "FLOPs") -> Case:
        scored = batches(rows, INPUTS, 16)
        model, params, spec = huggingface.from_pretrained(model, scored[0][0], outputs="logits")
        held = huggingface.holdable(model, params, spec, scored[0][0])
        return Case(model, params, spec, scored, held, seed, Shares.of(by, 16))

    @cached_property
    def deep(self) -> tfx.Constraints:
        """What the class can hold where whole layers may leave, too."""
        return huggingface.holdable(self.model, self.params, self.spec, self.batches[0][0], branches=True)

    @cached_property
    def coupling(self) -> tfx.Coupling:
        return tfx.couple(self.params, self.spec)

    @cached_property
    def stats(self) -> tfx.Statistics:
        return tfx.measure(
            self.params, self.spec, self.batches, self.coupling, loss=huggingface.next_token, rows=True
        )  # fmt: skip

    def ranked(self, scores: Tensor, *, per_cost: bool = False, per_layer: bool = False) -> Contestant:
        """By scores that are there, all at once."""

        def choose(shares: Sequence[float]) -> Plans:
            rules = replace(self.constraints, per_layer=per_layer)
            return {
                share: tfx.select(
                    scores, self.coupling, budget=self.shares.budget(share), constraints=rules, per_cost=per_cost
                )
                for share in shares
            }  # fmt: skip

        return choose

    def pruned(self, **options: Any) -> Contestant:
        """By `tfx.prune`."""

        def choose(shares: Sequence[float]) -> Plans:
            return {
                share: tfx.prune(
                    self.params, self.spec, self.batches, budget=self.shares.budget(share),
                    constraints=self.deep if options.get("branches") else self.constraints,
                    **{"loss": huggingface.next_token, **options},
                ).plan
                for share in shares
            }  # fmt: skip

        return choose


repair = partial(tfx.reconstruct, biases=False)
"""A Llama has no biases, so its class could not hold new ones."""


def contestants(case: Case) -> dict[str, Contestant]:
    """All of them by name, under the same constraints: what is left is a Llama again."""
    fisher, second = tfx.fisher(case.stats, case.coupling), tfx.criteria.second_order(case.stats, case.coupling)
    draw = torch.Generator().manual_seed(case.seed)
    slopes, squares = weights_times_slopes(case), leaving(case, torch.square)
    check_torch_pruning(case, slopes, squares)
    experts: dict[str, Contestant] = {}
    if any("experts" in name for name in case.coupling.scopes):  # which it ranks, before all other units
        scores = tfx.criteria.reap(
            case.params, case.spec, case.batches, case.coupling, loss=huggingface.next_token
        )  # fmt: skip
        experts["REAP"] = case.ranked(scores)
    narrow = replace(case, constraints=case.constraints.also(tfx.Constraints(protect="stream"), case.coupling))
    return {
        "prune": case.pruned(),
        "prune by summed losses": case.pruned(loss=partial(huggingface.next_token, reduction="sum")),
        "prune, repaired at every step": case.pruned(repair=repair),
        "prune, repaired at every step, stream stays": narrow.pruned(repair=repair),
        "prune, layers too, repaired at every step": case.pruned(repair=repair, branches=True),
        "prune, repaired once": case.pruned(repair=repair, steps=1),
        "joint, repaired at every step": case.pruned(repair=repair, steps=4, choose=partial(tfx.joint, cautious=True)),
        "prune by fisher": case.pruned(criterion=tfx.fisher),
        "prune, stream stays": narrow.pruned(),
        "prune by fisher, stream stays": narrow.pruned(criterion=tfx.fisher),
        "fisher per FLOP": case.ranked(fisher, per_cost=True),
        "fisher": case.ranked(fisher),
        "fisher, equal in all layers": case.ranked(fisher, per_layer=True),
        "second order per FLOP": case.ranked(second, per_cost=True),
        "taylor": case.ranked(tfx.taylor(case.stats, case.coupling)),
        "magnitude": case.ranked(tfx.criteria.weight_l2(case.params, case.coupling)),
        "magnitude, equal in all layers": case.ranked(
            tfx.criteria.weight_l2(case.params, case.coupling), per_layer=True
        ),
        "LLM-Pruner": case.ranked(slopes, per_layer=True),
        "Torch-Pruning GroupTaylor": case.ranked(tfx.criteria.per_layer_mean(slopes, case.coupling)),
        "Torch-Pruning GroupTaylor, stream stays": narrow.ranked(tfx.criteria.per_layer_mean(slopes, case.coupling)),
        "Torch-Pruning GroupMagnitude": case.ranked(tfx.criteria.per_layer_mean(squares, case.coupling)),
        "FLAP": case.ranked(fluctuation(case)),
        "ShortGPT": partial(without_layers, case, influence(case)),
        "random": case.ranked(tfx.criteria.random(case.coupling, draw)),
        **experts,
    }


def weights_times_slopes(case: Case) -> Tensor:
    """The sum of ``|w dL/dw|`` over the weights that leave with a unit (Ma et al. 2023, arXiv 2305.11627, first order).

    Its authors rank within each layer.
    """
    case.model.zero_grad()
    for inputs, labels in case.batches:
        (huggingface.next_token(case.model(**inputs), labels).mean() / len(case.batches)).backward()
    return leaving(case, lambda leaf: (leaf * leaf.grad).abs())


def leaving(case: Case, value: Callable[[Tensor], Tensor]) -> Tensor:
    """The sum of a value of each weight over those that leave with a unit, be they written or read."""
    scores = torch.zeros(len(case.coupling) + 1)
    for path, leaf in case.model.named_parameters():
        if path not in case.coupling.parameters:
            continue
        each = value(leaf).detach()
        for axis, _ in enumerate(each.shape):
            sums = each.movedim(axis, 0).flatten(1).sum(1) if each.ndim > 1 else each
            for ids in case.coupling.unit_ids(path, axis):
                scores.index_add_(0, torch.from_numpy(ids) % len(scores), sums)
    return scores[:-1]


def fluctuation(case: Case) -> Tensor:
    """How much what a unit feeds into a layer varies, times the square of its weights there (An et al. 2024, FLAP).

    ``Var(x_j) |W_j|^2`` for every input ``j`` of the projections that end attention and MLP, standardized within each
    layer (arXiv 2312.11983, equations 4 to 6), summed over the channels of a unit. All other units stay.
    """
    inputs: dict[str, list[Tensor]] = {}
    ends = {name: x for name, x in case.model.named_modules() if name.endswith(("o_proj", "down_proj"))}

    def keep(name: str) -> Callable[..., None]:
        return lambda _, args: inputs.setdefault(name, []).append(args[0].detach().flatten(0, 1))

    hooks = [module.register_forward_pre_hook(keep(name)) for name, module in ends.items()]
    with torch.no_grad():
        for batch, _ in case.batches:
            case.model(**batch)
    for hook in hooks:
        hook.remove()
    scores = torch.full((len(case.coupling) + 1,), -math.inf)
    for name, module in ends.items():
        raw = torch.cat(inputs[name]).var(0) * module.weight.detach().square().sum(0)
        each = (raw - raw.mean()) / raw.std()
        for ids in case.coupling.unit_ids(f"{name}.weight", 1):
            units = torch.from_numpy(ids)
            if (units >= 0).all():
                sums = torch.zeros(len(scores)).index_add_(0, units, each)
                scores[units] = torch.maximum(scores[units], sums[units])
    scores = scores[:-1]
    scores[scores == -math.inf] = scores.max() + 1
    return scores


def influence(case: Case) -> list[float]:
    """How much every layer turns the stream, its block influence: ``1 - E[cos(x, y)]`` over all positions.

    Here ``x`` is what the layer takes in, ``y`` what it gives out (Men et al. 2024, ShortGPT, arXiv 2403.03853, eq. 1).
    """
    layers = case.model.model.layers
    cosines: list[list[Tensor]] = [[] for _ in layers]

    def keep(k: int) -> Callable[..., None]:
        return lambda _, args, y: cosines[k].append(torch.cosine_similarity(args[0], y, -1).flatten())

    hooks = [layer.register_forward_hook(keep(k)) for k, layer in enumerate(layers)]
    with torch.no_grad():
        for batch, _ in case.batches:
            case.model(**batch)
    for hook in hooks:
        hook.remove()
    return [1 - torch.cat(each).mean().item() for each in cosines]


def without_layers(case: Case, influences: Sequence[float], shares: Sequence[float]) -> Plans:
    """The layers of least influence leave; for each share the nearest network, be it above or below."""
    coupling = tfx.couple(case.params, case.spec, branches=True)
    plans = list[tfx.Plan]()
    keep = np.ones(len(coupling), bool)
    for layer in sorted(range(len(influences)), key=influences.__getitem__)[:-1]:
        for branch in coupling.branches:
            if coupling.names[branch.unit].startswith(f"model.layers.{layer}."):
                keep[branch.unit] = False
        plans.append(tfx.Plan(coupling, coupling.settled(keep.copy())))
    return {share: min(plans, key=lambda plan: abs(case.shares.left(plan) - share)) for share in shares}


def check_torch_pruning(case: Case, slopes: Tensor, squares: Tensor) -> None:
    """Where Torch-Pruning is installed, its importances of the first MLP are ours, up to a factor.

    It sums over the weights that leave with a unit, too, and divides by the mean of a group. Its own pruner is not
    used: what it leaves of a Llama is of other sizes in every layer, which no config says.
    """
    if not importlib.util.find_spec("torch_pruning") or hasattr(case.model.model.layers[0].mlp, "experts"):
        return
    import torch_pruning

    model, mlp = case.model, case.model.model.layers[0].mlp
    example = {name: x[:1] for name, x in case.batches[0][0].items()}
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, example_inputs=example, output_transform=lambda out: out.logits
    )  # fmt: skip
    group = graph.get_pruning_group(
        mlp.up_proj, torch_pruning.prune_linear_out_channels, [*range(len(mlp.up_proj.weight))]
    )
    units = torch.from_numpy(case.coupling.unit_ids("model.layers.0.mlp.up_proj.weight", 0)[0])
    for kind, scores in (("Taylor", slopes), ("Magnitude", squares)):
        theirs = getattr(torch_pruning.importance, f"Group{kind}Importance")()(group)
        ours = scores[units]
        torch.testing.assert_close(theirs / theirs.mean(), ours / ours.mean(), rtol=1e-4, atol=1e-4)

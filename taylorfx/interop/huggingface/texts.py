"""Texts for language models in folders: what a folder's tokenizer makes of them, in sequences of one length."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taylorfx.interop.huggingface.fields import ConfigError, library
from taylorfx.interop.huggingface.loading import class_of

__all__ = [
    "Sequences", "attended", "batches", "causal_class_of", "foresees", "positions_of", "sequences", "tokenizer_of",
]  # fmt: skip

HELD_OUT = 10
"""One of so many sequences is held out."""


class Sequences(NamedTuple):
    """A text in sequences of one length.

    Attributes:
        measured: ``(examples, length)``, drawn from the first nine tenths of the text.
        held_out: ``(at most as many, length)``, from its last tenth.
    """

    measured: Tensor
    held_out: Tensor


def sequences(tokens: Sequence[int], length: int, examples: int, generator: torch.Generator) -> Sequences:
    """Cut a text's tokens into sequences, draw some, and hold its last tenth out.

    Raises:
        ValueError: for a text that is too short, with what it is long enough for.

    >>> drawn = sequences(range(100), 5, 4, torch.Generator().manual_seed(0))
    >>> drawn.measured.shape, drawn.held_out.tolist()
    (torch.Size([4, 5]), [[90, 91, 92, 93, 94], [95, 96, 97, 98, 99]])
    """
    count = len(tokens) // length
    held_out = -(-count // HELD_OUT)
    if count - held_out < max(examples, 1):
        needed = length * (examples + -(-examples // (HELD_OUT - 1)))
        raise ValueError(
            f"{examples} examples of {length} tokens, and a tenth that is held out, need a text of some {needed:,} "
            f"tokens; it has {len(tokens):,}, enough for {max(count - held_out, 0)} such examples"
        )
    rows = torch.tensor(tokens[: count * length]).reshape(count, length)
    chosen = torch.randperm(count - held_out, generator=generator)[:examples]
    return Sequences(rows[chosen], rows[count - held_out :][:examples])


def batches(rows: Tensor, names: Sequence[str], size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Sequences ``(n, length)`` as batches for `next_token`: inputs by name, of which a mask is ones, and labels.

    >>> [({name: x.shape for name, x in inputs.items()}, len(labels)) for inputs, labels in batches(
    ...     torch.zeros(3, 5, dtype=torch.int64), ["input_ids", "attention_mask"], 2)][1]
    ({'input_ids': torch.Size([1, 5]), 'attention_mask': torch.Size([1, 5])}, 1)
    """
    return [
        ({name: x if name == "input_ids" else torch.ones_like(x) for name in names}, x) for x in torch.split(rows, size)
    ]


def attended(inputs: Any) -> Tensor | None:
    """The positions of a batch that a model attends to, for ``positions=`` of repairs, so that padding does not count.

    Args:
        inputs: of a batch; all positions count where they have no ``"attention_mask"`` by name.
    """
    return inputs.get("attention_mask") if isinstance(inputs, Mapping) else None


def causal_class_of(folder: Path) -> Any:
    """The class that a folder's config names, where it predicts the next token.

    Raises:
        ConfigError: for any other class, with what to do.
    """
    cls = class_of(folder)
    known = library("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    names = {name for value in known for name in ([value] if isinstance(value, str) else value)}
    if cls.__name__ not in names:
        raise ConfigError(
            f"Models that predict the next token are pruned by a text alone, as LlamaForCausalLM; {folder} has a "
            f"{cls.__name__}. Encoders, classifiers and models of pictures or sound need batches and a loss of yours: "
            "taylorfx.interop.huggingface.from_pretrained, holdable, taylorfx.prune and save_pretrained take them."
        )
    return cls


def positions_of(folder: Path) -> int | None:
    """How many positions a config says that its model has; ``None`` where it says nothing."""
    config = library().AutoConfig.from_pretrained(str(folder)).get_text_config()
    positions: int | None = getattr(config, "max_position_embeddings", None)
    return positions


def tokenizer_of(folder: Path) -> Any:
    """The tokenizer of a folder; nothing is looked for elsewhere.

    Raises:
        ConfigError: if there is none, and if it has more tokens than the model.
    """
    transformers = library()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"A text needs the model's tokenizer; {folder} has none that loads ({first}).") from error
    size = transformers.AutoConfig.from_pretrained(str(folder)).get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values(), default=-1)
    if largest >= size:
        raise ConfigError(f"A tokenizer has no more tokens than its model, {size:,}; that of {folder} has {largest:,}.")
    return tokenizer


@torch.no_grad()
def foresees(model: Any, rows: Tensor) -> bool:
    """Whether scores depend on tokens behind them, so that the next token is no riddle; `False` for a decoder.

    Args:
        rows: ``(n, length)``, some tokens.
    """
    half, size = rows.shape[1] // 2, int(model.config.get_text_config().vocab_size)
    other = torch.cat([rows[:, :half], (rows[:, half:] + 1) % size], 1)
    one, two = (model(input_ids=x).logits[:, :half].float() for x in (rows, other))
    return bool((one - two).abs().max() > 1e-4 * one.abs().max())

"""Small language models in folders, with a tokenizer of their own, and a text: what ships with Python."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.testing import assert_close

TOKENS = 300
SPECIAL = ("<pad>", "<s>", "</s>", "<unk>")


@cache
def text() -> str:
    """Some pages of Python's own documentation."""
    import pydoc_data.topics

    return "\n".join(pydoc_data.topics.topics.values())[:60_000]


@cache
def tokenizer() -> Any:
    """Byte pairs of the text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    pairs = Tokenizer(models.BPE(unk_token="<unk>"))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=TOKENS, special_tokens=[*SPECIAL], initial_alphabet=alphabet)
    pairs.train_from_iterator([text()], trainer)
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, **names)


def saved(folder: Path, kind: str = "LlamaForCausalLM", **config: Any) -> Path:
    """A random model in a folder, with the tokenizer."""
    import transformers

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    given = {"vocab_size": TOKENS, "max_position_embeddings": 32, **sizes, **special, **config}
    cls(cls.config_class(**given)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def comes_back(outputs: list[Any], texts: list[Any], wanted: list[Any]) -> None:
    """What a second process computes is what was saved, and it generates the same with a cache and without."""
    for one, other in zip(outputs, wanted, strict=True):
        assert_close(one, other, rtol=1e-4, atol=1e-5)
    if texts:
        assert torch.equal(*texts), "with a cache and without"

"""Fewer tokens: the vocabulary of a model, its config and its tokenizer, cut to what some texts need."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from taylorfx.interop.huggingface.fields import ConfigError
from taylorfx.interop.rows import Rows, keep_rows
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["keep_tokens", "renumbered", "tokenizer_with", "tokens_of", "write_tokenizer"]

INPUTS = ("input_ids", "decoder_input_ids")
"""The inputs of models of transformers that are tokens."""

SUPPRESSED = ("suppress_tokens", "begin_suppress_tokens")
"""Entries of generation configs that list tokens which need not be there."""


def keep_tokens(model: Any, params: Params, spec: Spec, kept: Iterable[int]) -> Rows:
    """Keep some tokens, and the special ones of the model's config: the embedding and the head lose all others.

    ::

        rows = huggingface.keep_tokens(model, params, spec, huggingface.tokens_of(tokenizer, text))
        huggingface.save_pretrained(path, rows.params, rows.spec, like=model, tokens=rows.numbers)

    The network may have been pruned before. Kept tokens are numbered anew, in their order: ``rows.numbers[tokens]``
    are those of the smaller network, whose scores are the columns of the kept ones. What it takes is `keep_rows`.

    Args:
        model: the model that was captured, for the special tokens of its configs.
        kept: numbers of tokens.

    Raises:
        ValueError: for numbers that are no tokens.
        PlanError: where layers look at the numbers, by their names.
    """
    kept = {*kept, *(token for data in _configs(model) for _, token in _special(data))}
    return keep_rows(params, spec, sorted(kept), inputs=[name for name in INPUTS if name in spec.input_layers])


def tokens_of(tokenizer: Any, texts: str | Iterable[str]) -> list[int]:
    """The tokens that texts need of a tokenizer, and with which it still works.

    Besides those in the texts these are: the special and added ones; the single characters or bytes, by which other
    texts can be written, only longer; and, of byte pairs, those that the tokens in the texts are merged from.

    Args:
        tokenizer: a fast one, of the library tokenizers.

    Raises:
        ConfigError: for a tokenizer that is none of the library.
    """
    data = _document(tokenizer)
    used: set[int] = set()
    for text in [texts] if isinstance(texts, str) else texts:
        used.update(tokenizer(text, verbose=False)["input_ids"])
    used.update(tokenizer.all_special_ids, (token["id"] for token in data["added_tokens"]))
    vocabulary = _vocabulary(data)
    used.update(token for word, token in vocabulary.items() if len(word) == 1 or word.startswith("<0x"))
    words = {token: word for word, token in vocabulary.items()}
    parts = {"".join(pair): pair for pair in reversed([*_merges(data)])}  # the first merge to a word is the one made
    waiting = [words[token] for token in used if token in words]
    while waiting:
        for word in parts.get(waiting.pop(), ()):
            if vocabulary[word] not in used:
                used.add(vocabulary[word])
                waiting.append(word)
    return sorted(used)


def renumbered(data: Mapping[str, Any], numbers: Tensor) -> dict[str, Any]:
    """A config with the new numbers of its special tokens.

    >>> import torch
    >>> numbers = torch.tensor([0, -1, 1, -1, 2])
    >>> renumbered({"eos_token_id": [2, 4], "pad_token_id": None, "suppress_tokens": [1, 2]}, numbers)
    {'eos_token_id': [1, 2], 'pad_token_id': None, 'suppress_tokens': [1]}

    Raises:
        ConfigError: for special tokens that are gone, all of them.
    """
    if gone := [f"{name} {token}" for name, token in _special(data) if _new(token, numbers) < 0]:
        raise ConfigError(
            f"The special tokens of a config stay; {', '.join(gone)} left. taylorfx.interop.huggingface.keep_tokens "
            "keeps them."
        )

    def new(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return renumbered(value, numbers)
        if name in SUPPRESSED and value:
            return [n for n in (_new(token, numbers) for token in value) if n >= 0]
        if name.endswith("_token_id") and value is not None:
            return [_new(x, numbers) for x in value] if isinstance(value, list) else _new(value, numbers)
        return value

    return {name: new(str(name), value) for name, value in data.items()}


def tokenizer_with(data: Mapping[str, Any], numbers: Tensor) -> dict[str, Any]:
    """A ``tokenizer.json`` with the kept tokens, numbered anew: words, word pieces, byte pairs or a unigram model.

    A text of kept tokens becomes the same tokens as before.

    Raises:
        ConfigError: for byte pairs whose parts are gone, for tokens that are added to every text and gone, and for
            other kinds of models.
    """
    model, kind = dict(data["model"]), data["model"].get("type")
    if kind == "Unigram":
        model["vocab"] = [piece for k, piece in enumerate(model["vocab"]) if _new(k, numbers) >= 0]
        if model.get("unk_id") is not None:
            unknown = _new(model["unk_id"], numbers)
            model["unk_id"] = None if unknown < 0 else unknown
    elif kind in ("BPE", "WordLevel", "WordPiece"):
        model["vocab"] = {word: n for word, k in model["vocab"].items() if (n := _new(k, numbers)) >= 0}
    else:
        raise ConfigError(f"Tokenizers of words, word pieces, byte pairs and unigrams are cut; received a {kind}.")
    if kind == "BPE":
        kept, merges = model["vocab"], [*zip(data["model"]["merges"], _merges(data), strict=True)]
        model["merges"] = [given for given, (a, b) in merges if {a, b, a + b} <= kept.keys()]
        made = {"".join(pair) for _, pair in merges}
        left = {"".join(pair) for given, pair in merges if {*pair, "".join(pair)} <= kept.keys()}
        if lost := sorted((made & kept.keys()) - left):
            raise ConfigError(
                f"Byte pairs are merged from tokens that stay, too; of {', '.join(map(repr, lost[:8]))} they are gone. "
                "taylorfx.interop.huggingface.tokens_of(tokenizer, texts) tells what a text needs."
            )
    added = [{**token, "id": n} for token in data["added_tokens"] if (n := _new(token["id"], numbers)) >= 0]
    whole = {**data, "model": model, "added_tokens": added}
    for name in ("post_processor", "padding"):
        whole[name] = _added(data.get(name), numbers)
    return whole


def _added(data: Any, numbers: Tensor) -> Any:
    """A part of a document that adds tokens to texts, with their new numbers.

    >>> import torch
    >>> _added({"sep": ["</s>", 2], "special_tokens": {"<s>": {"id": "<s>", "ids": [0]}}}, torch.tensor([0, -1, 1]))
    {'sep': ['</s>', 1], 'special_tokens': {'<s>': {'id': '<s>', 'ids': [0]}}}
    """

    def new(token: int) -> int:
        if (n := _new(token, numbers)) < 0:
            raise ConfigError(f"The tokenizer adds token {token} to texts, which is gone; keep it.")
        return n

    if isinstance(data, list):
        return [_added(x, numbers) for x in data]
    if not isinstance(data, Mapping):
        return data
    result = {name: _added(value, numbers) for name, value in data.items()}
    for name, value in data.items():
        if name in ("sep", "cls") and isinstance(value, list):
            result[name] = [value[0], new(value[1])]
        elif name == "ids":
            result[name] = [new(token) for token in value]
        elif name == "pad_id":
            result[name] = new(value)
    return result


def write_tokenizer(source: Path, folder: Path, numbers: Tensor) -> None:
    """Write the tokenizer of a folder with the kept tokens into another one; nothing where it has no such file."""
    if not (source / "tokenizer.json").is_file():
        return
    data = tokenizer_with(json.loads((source / "tokenizer.json").read_text(encoding="utf-8")), numbers)
    (folder / "tokenizer.json").write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    if (source / "tokenizer_config.json").is_file():
        config = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
        if "added_tokens_decoder" in config:
            each = ((_new(int(token), numbers), value) for token, value in config["added_tokens_decoder"].items())
            config["added_tokens_decoder"] = {str(n): value for n, value in each if n >= 0}
        text = json.dumps(config, indent=2, ensure_ascii=False)
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _new(token: int, numbers: Tensor) -> int:
    """The new number of a token; -1 for one that is gone or never was."""
    return int(numbers[token]) if 0 <= token < len(numbers) else -1


def _configs(model: Any) -> Iterator[Mapping[str, Any]]:
    """The configs of a model, as dicts."""
    for name in ("config", "generation_config"):
        if getattr(model, name, None) is not None:
            yield getattr(model, name).to_dict()


def _special(data: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The special tokens of a config, and of those inside it, by their names."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _special(value)
        elif str(name).endswith("_token_id") and value is not None:
            yield from ((str(name), int(x)) for x in (value if isinstance(value, list) else [value]))


def _document(tokenizer: Any) -> Mapping[str, Any]:
    """The ``tokenizer.json`` of a tokenizer.

    Raises:
        ConfigError: for one that has none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"Fast tokenizers tell what they are made of; received a {type(tokenizer).__name__}. Give keep_tokens the "
            "tokens of the texts yourself."
        )
    data: Mapping[str, Any] = json.loads(backend.to_str())
    return data


def _vocabulary(data: Mapping[str, Any]) -> dict[str, int]:
    """The tokens of a document by their words."""
    vocab = data["model"]["vocab"]
    return dict(vocab) if isinstance(vocab, Mapping) else {piece: k for k, (piece, *_) in enumerate(vocab)}


def _merges(data: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The pairs that a document of byte pairs merges, in order; older ones are written in one string."""
    for pair in data["model"].get("merges", ()):
        first, second = pair.split(" ") if isinstance(pair, str) else pair
        yield first, second

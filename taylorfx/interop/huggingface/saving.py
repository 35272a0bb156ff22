"""Smaller models of transformers in folders, from which the library loads them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from taylorfx.distributed import refuse_shards
from taylorfx.interop.huggingface.by_layer import add_code
from taylorfx.interop.huggingface.making import Source
from taylorfx.interop.huggingface.vocabulary import write_tokenizer
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["save_pretrained"]

BESIDE = ("token", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "chat_template", "preprocessor",
          "processor", "added_tokens", "normalizer")  # fmt: skip
"""How the names of files begin that belong to tokenizers and processors."""

WITHOUT_NUMBERS = ("special_tokens", "chat_template", "preprocessor", "processor", "normalizer")
"""Those of them that say nothing about the numbers of tokens."""


def save_pretrained(
    path: str | Path,
    params: Params,
    spec: Spec,
    *,
    like: Any,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    overwrite: bool = False,
    tokens: Tensor | None = None,
    per_layer: bool = False,
    **options: Any,
) -> Any:
    """Write a pruned model as a folder that ``AutoModel.from_pretrained`` takes, and return the model loaded from it.

    The config gets the numbers with which the class has the shapes of the parameters. The model is made from it and
    proven equal to the spec: at the example, at other lengths and numbers of examples, with rows masked, and with a
    cache, as `taylorfx.to_torch` does. Then it is saved by its own ``save_pretrained``: the config, safetensors in
    shards with their index, the generation config; files of a tokenizer or processor are copied from the folder that
    ``like`` was loaded from. All goes to a temporary folder beside ``path``, which is then renamed. The files
    are written from the memory of ``params``: no tensor is copied.

    Args:
        path: the folder, which does not exist yet.
        params, spec: the pruned network.
        like: the model that was captured; it is left as it is.
        example_inputs, example_kwargs: what to compare on, as for `taylorfx.to_torch`.
        overwrite: replace a folder that exists, once the new one is written.
        tokens: the new numbers of all tokens, where some have left: ``numbers`` of `keep_tokens`. The special tokens in
            the config and the generation config get theirs. ``tokenizer.json`` is written with the kept tokens; a
            folder without one gets no tokenizer, as its other files would give the old numbers.
        per_layer: layers may differ (`holdable`): the config says in ``per_layer_config`` in which numbers. Beside it
            stands ``modeling_unequal.py``, a class that builds its layers by it, unless the model's own class does;
            the folder is loaded by ``AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)`` then.
        options: further arguments of the model's ``save_pretrained``: ``max_shard_size="2GB"``.

    Raises:
        ConfigError: if no config of the class describes the network, with the fields that stand against it.
        FileExistsError: if the folder exists; before anything else.
        ValueError: for parameters of which every process has a shard.
        OSError: if it cannot be written, as on a full disk. What was there is as it was.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; give another path, or overwrite=True to replace it.")
    refuse_shards(params)
    tokens = None if tokens is None else tokens.cpu()
    source = Source(like, params, spec, example_inputs, example_kwargs, tokens=tokens, per_layer=per_layer)
    made = source.make(params, spec)
    with _beside(target) as folder:
        try:
            if type(made.model) is not type(like):
                add_code(made.model, folder)
            made.model.save_pretrained(folder, **options)
        except SafetensorError as error:
            raise OSError(f"{target} could not be written: {error}") from error
        _copy_tokenizer(like, folder, tokens)
    return type(made.model).from_pretrained(target, variant=options.get("variant"))


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A folder beside the target that takes its place at the end; after an error there is nothing new."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    new, old = work / "new", work / "old"
    new.mkdir()
    try:
        yield new
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _copy_tokenizer(like: Any, folder: Path, tokens: Tensor | None) -> None:
    """Copy the files of the tokenizer or processor, where the model was loaded from a folder that has them."""
    name = getattr(like, "name_or_path", "") or ""
    if not name or not Path(name).is_dir():
        return
    if tokens is not None:
        write_tokenizer(Path(name), folder, tokens)
    for file in sorted(Path(name).iterdir()):
        kinds = BESIDE if tokens is None else WITHOUT_NUMBERS
        if file.is_file() and file.name.startswith(kinds) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)

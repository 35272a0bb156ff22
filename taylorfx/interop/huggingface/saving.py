"""Smaller models of transformers in folders, from which the library loads them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from taylorfx.interop.huggingface.making import Source
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["save_pretrained"]

BESIDE = ("token", "vocab", "merges", "spiece", "sentencepiece", "special_tokens", "chat_template", "preprocessor",
          "processor", "added_tokens", "normalizer")  # fmt: skip
"""How the names of files begin that belong to tokenizers and processors."""


def save_pretrained(
    path: str | Path,
    params: Params,
    spec: Spec,
    *,
    like: Any,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    overwrite: bool = False,
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
        options: further arguments of the model's ``save_pretrained``: ``max_shard_size="2GB"``.

    Raises:
        ConfigError: if no config of the class describes the network, with the fields that stand against it.
        FileExistsError: if the folder exists; before anything else.
    """
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; give another path, or overwrite=True to replace it.")
    made = Source(like, params, spec, example_inputs, example_kwargs).make(params, spec)
    with _beside(target) as folder:
        made.model.save_pretrained(folder, **options)
        _copy_tokenizer(like, folder)
    return type(like).from_pretrained(target, variant=options.get("variant"))


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


def _copy_tokenizer(like: Any, folder: Path) -> None:
    """Copy the files of the tokenizer or processor, where the model was loaded from a folder that has them."""
    source = Path(getattr(like, "name_or_path", "") or "")
    if not getattr(like, "name_or_path", "") or not source.is_dir():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.startswith(BESIDE) and not (folder / file.name).exists():
            shutil.copy2(file, folder / file.name)

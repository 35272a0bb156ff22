"""Models of transformers from folders, captured as networks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from taylorfx.interop.capture.export import from_torch
from taylorfx.interop.huggingface.fields import ConfigError, check_model, library
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["Pretrained", "class_of", "example_of", "from_pretrained", "load"]

EXAMPLES, LENGTH = 3, 8
"""The shape of the tokens that a model is captured with."""


class Pretrained(NamedTuple):
    """A model of transformers and its network.

    Attributes:
        model: the model itself, in inference mode.
        params: its parameters, by their own names.
        spec: the network.
    """

    model: Any
    params: Params
    spec: Spec


def from_pretrained(
    source: Any,
    example_inputs: Mapping[str, Tensor] | None = None,
    *,
    dtype: torch.dtype | None = None,
    outputs: str | list[str] | None = None,
    **options: Any,
) -> Pretrained:
    """Load a model by the class that its config names, and capture it without a cache.

    The parameters are those of the folder's safetensors, which the library maps into memory if no other dtype is asked
    for: they are read when they are used, and nothing is copied.

    Args:
        source: a folder with ``config.json``, a name on the hub, or a model.
        example_inputs: a batch as a tokenizer or processor gives it. By default random tokens with a mask of which the
            first row is padded on the left, random pictures, or random sound: what the model's ``forward`` takes.
        dtype: of the weights; by default that of the folder.
        outputs: which outputs are captured, as for `taylorfx.from_torch`.
        options: further arguments of the class's ``from_pretrained``.

    Raises:
        ConfigError: for a config that names no class, a module that has none, a checkpoint that has not all of the
            parameters or has them in other shapes, attention whose masks are no tensors, and inputs that cannot be
            invented.
        FileNotFoundError: for a path where there is no folder.
        CaptureError: if the model cannot be captured.
    """
    if isinstance(source, nn.Module):
        check_model(source)
        model: Any = source if dtype is None else source.to(dtype)
    else:
        model = load(source, {**options, **({"dtype": dtype} if dtype else {})})
    _refuse_attention(model)
    model.eval()
    if example_inputs is not None:
        return Pretrained(model, *from_torch(model, dict(example_inputs), outputs=outputs))
    inputs = example_of(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".* is captured for one example at a time")
        params, spec = from_torch(model, inputs, outputs=outputs)
    if "attention_mask" in inputs and any(layer.alone for layer in spec.input_layers.values()):
        del inputs["attention_mask"]  # GPT-2 makes of its shape what holds for one number of examples only
        params, spec = from_torch(model, inputs, outputs=outputs)
    return Pretrained(model, params, spec)


def class_of(source: str | Path, *, code: bool = False) -> Any:
    """The class that the config of a folder names.

    Args:
        code: run the code in the folder, if the config names some.

    Raises:
        ConfigError: for a config that names none, for one of unequal layers whose code is not run, and a folder
            without one.
        FileNotFoundError: for a path where there is no folder.
    """
    transformers, folder = library(), Path(source)
    local = isinstance(source, Path) or folder.is_absolute() or source.startswith(".")
    if local and not folder.is_dir():
        raise FileNotFoundError(f"A model is loaded from a folder with config.json; there is no folder {source}.")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ConfigError(f"A model is loaded from a folder with config.json; {source} has none.")
    config = transformers.AutoConfig.from_pretrained(str(source), trust_remote_code=code)
    coded = [name for name in getattr(config, "auto_map", None) or () if name.startswith("AutoModel")]
    if coded and code:
        cls = transformers.dynamic_module_utils.get_class_from_dynamic_module(config.auto_map[coded[0]], str(source))
        cls.register_for_auto_class(coded[0])  # so that what is saved has the code, too
        return cls
    if coded and config.is_heterogeneous:
        raise ConfigError(
            f"Layers of different sizes are built by the code in {source}. Look at it, and give trust_remote_code=True."
        )
    architectures = config.architectures
    kinds = [kind for kind in architectures or () if hasattr(transformers, kind)]
    if not kinds:
        raise ConfigError(
            f"A config names the class of its model; architectures of {source} is {architectures}. Load the model "
            "yourself and give it."
        )
    return getattr(transformers, kinds[0])


def load(source: str | Path, options: Mapping[str, Any]) -> Any:
    """The model of a folder, by the class that its config names, with arguments of the class's ``from_pretrained``.

    Raises:
        ConfigError: as `class_of` does; for damaged files, and for a checkpoint that has not all of the parameters or
            has them in other shapes: the library would give them random numbers.
    """
    cls = class_of(source, code=options.get("trust_remote_code", False))
    how = {"ignore_mismatched_sizes": True, **options, "output_loading_info": True}
    try:
        model, report = cls.from_pretrained(str(source), **how)
    except SafetensorError as error:
        raise ConfigError(f"The safetensors of {source} are damaged: {error}. Copy or download them again.") from error
    lines = [f"{path} is missing" for path in sorted(report["missing_keys"])]
    lines += [
        f"{path} is {tuple(there)} instead of {tuple(wanted)}"
        for path, there, wanted in sorted(report["mismatched_keys"])
    ]
    if lines:
        unknown = sorted(report["unexpected_keys"])
        lines += [f"{path} is there, which the class does not have" for path in unknown]
        shown = [*lines[:SHOWN], *[f"and {len(lines) - SHOWN} more"] * (len(lines) > SHOWN)]
        raise ConfigError(
            f"A checkpoint has all parameters of {cls.__name__} by their names; in {source}\n  "
            + "\n  ".join(shown)
            + "\nCompare config.json with the model that was saved, or load the model yourself and give it."
        )
    return model


SHOWN = 12
"""How many parameters an error lists."""

ATTENTION = ("eager", "sdpa")
"""The implementations of attention whose masks are tensors."""


def _refuse_attention(model: Any) -> None:
    """Refuse masks that are no tensors, or that leave no trace in a graph.

    Raises:
        ConfigError: with the way out.
    """
    configs = model.config, model.config.get_text_config()
    kinds = {str(x._attn_implementation) for x in configs if getattr(x, "_attn_implementation", None)}
    if strange := sorted(kinds.difference(ATTENTION)):
        raise ConfigError(
            f"Masks are captured where attention is {' or '.join(ATTENTION)}; that of {type(model).__name__} is "
            f'{", ".join(strange)}. Load it with attn_implementation="sdpa", or call '
            'model.set_attn_implementation("sdpa"): the weights are the same.'
        )


def example_of(model: Any) -> dict[str, Tensor]:
    """Random inputs of a model: what a tokenizer or a processor would give it."""
    names, config = inspect.signature(model.forward).parameters, model.config
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Tensor] = {}
    if "input_ids" in names:
        inputs["input_ids"] = _tokens(config, generator)
        if "attention_mask" in names:
            inputs["attention_mask"] = torch.ones(EXAMPLES, LENGTH, dtype=torch.int64)
            inputs["attention_mask"][0, :2] = 0
    if "pixel_values" in names:
        picture = getattr(config, "vision_config", config)
        size = picture.image_size if isinstance(picture.image_size, (list, tuple)) else [picture.image_size] * 2
        inputs["pixel_values"] = torch.randn(EXAMPLES, picture.num_channels, *size, generator=generator)
    if "input_features" in names:
        length = 2 * config.max_source_positions
        inputs["input_features"] = torch.randn(EXAMPLES, config.num_mel_bins, length, generator=generator)
    if "input_values" in names and hasattr(config, "inputs_to_logits_ratio"):  # a wave, of so many values a position
        length = (LENGTH + 1) * config.inputs_to_logits_ratio  # the first windows of its convolutions overlap
        inputs["input_values"] = torch.randn(EXAMPLES, length, generator=generator)
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(config, generator)
    if not inputs:
        raise ConfigError(
            f"{type(model).__name__} takes neither input_ids, pixel_values, input_features nor waves as "
            "input_values; give example_inputs."
        )
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens without the special ones."""
    text = config.get_text_config()
    special = [getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")]
    several = {token for x in special for token in (x if isinstance(x, list) else [x])}  # Llama 3 ends with any of some
    usual = [k for k in range(min(text.vocab_size, 1000)) if k not in several]
    return torch.tensor(usual)[torch.randint(len(usual), (EXAMPLES, LENGTH), generator=generator)]

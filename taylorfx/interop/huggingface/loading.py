"""Models of transformers from folders, captured as networks."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from taylorfx.interop.capture.export import from_torch
from taylorfx.interop.huggingface.fields import ConfigError, check_model, library
from taylorfx.network.spec import Spec
from taylorfx.tree import Params

__all__ = ["Pretrained", "from_pretrained"]

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
        ConfigError: for a config that names no class, a module that has none, and inputs that cannot be invented.
        CaptureError: if the model cannot be captured.
    """
    transformers = library()
    if isinstance(source, nn.Module):
        check_model(source)
        model: Any = source if dtype is None else source.to(dtype)
    else:
        name = str(source) if isinstance(source, Path) else source
        config = transformers.AutoConfig.from_pretrained(name)
        kinds = [kind for kind in config.architectures or () if hasattr(transformers, kind)]
        if not kinds:
            raise ConfigError(
                f"A config names the class of its model; architectures of {source} is {config.architectures}. Load the "
                "model yourself and give it."
            )
        model = getattr(transformers, kinds[0]).from_pretrained(name, **options, **({"dtype": dtype} if dtype else {}))
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
    if "decoder_input_ids" in names:
        inputs["decoder_input_ids"] = _tokens(config, generator)
    if not inputs:
        raise ConfigError(
            f"{type(model).__name__} takes neither input_ids, pixel_values nor input_features; give example_inputs."
        )
    return {name: x.to(model.device, model.dtype if x.is_floating_point() else x.dtype) for name, x in inputs.items()}


def _tokens(config: Any, generator: torch.Generator) -> Tensor:
    """Random tokens without the special ones."""
    text = config.get_text_config()
    special = {getattr(text, f"{name}_token_id", None) for name in ("pad", "bos", "eos")}
    usual = [k for k in range(min(text.vocab_size, 1000)) if k not in special]
    return torch.tensor(usual)[torch.randint(len(usual), (EXAMPLES, LENGTH), generator=generator)]

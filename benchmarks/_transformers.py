"""Small random networks of the families of the transformers library, and an example of their inputs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from _proof import Case
from _torchvision import library
from torch import Tensor, nn


class Logits(nn.Module):
    """A model of transformers that gives out a tensor."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        return self.module(input_ids=tokens).logits


def cases() -> dict[str, Callable[[], Case]]:
    """By name, what makes a module and its keyword arguments."""
    if importlib.util.find_spec("torchvision"):
        library()  # transformers imports it where it is installed
    import transformers as t

    tokens = torch.arange(21).reshape(3, 7) % 50 + 1
    image = torch.linspace(-1, 1, 3 * 3 * 32 * 32, dtype=torch.float64).reshape(3, 3, 32, 32).sin()
    sound = torch.linspace(-1, 1, 3 * 8 * 20, dtype=torch.float64).reshape(3, 8, 20).sin()
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    }  # fmt: skip
    text = {**sizes, "vocab_size": 60, "max_position_embeddings": 16}
    decoder = {**text, "num_key_value_heads": 2, "use_cache": False}
    picture = {**sizes, "image_size": 32, "patch_size": 8}
    words, pixels = {"input_ids": tokens}, {"pixel_values": image}
    distil = {"dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 24, "vocab_size": 60, "max_position_embeddings": 16}
    gpt2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 60, "n_positions": 16, "use_cache": False}
    gpt2 |= {"bos_token_id": 1, "eos_token_id": 2}
    opt = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 24, "vocab_size": 60}
    opt |= {"max_position_embeddings": 16, "word_embed_proj_dim": 16, "use_cache": False}
    t5 = {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4, "vocab_size": 60, "use_cache": False}
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    whisper = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (
        ("layers", 2), ("attention_heads", 4), ("ffn_dim", 24))}  # fmt: skip
    whisper |= {"d_model": 16, "vocab_size": 60, "num_mel_bins": 8, "max_source_positions": 10, "use_cache": False}
    whisper |= {"max_target_positions": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    whisper |= {"decoder_start_token_id": 1}
    mamba = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "vocab_size": 60, "use_cache": False}
    both = {**words, "decoder_input_ids": tokens}
    return {
        "bert": lambda: (t.BertModel(t.BertConfig(**text)), words),
        "bert, masked": lambda: (
            t.BertModel(t.BertConfig(**text)),
            {**words, "attention_mask": torch.ones_like(tokens)},
        ),
        "roberta": lambda: (t.RobertaModel(t.RobertaConfig(**text)), words),
        "distilbert": lambda: (t.DistilBertModel(t.DistilBertConfig(**distil)), words),
        "albert": lambda: (t.AlbertModel(t.AlbertConfig(**text, embedding_size=8)), words),
        "gpt2": lambda: (t.GPT2Model(t.GPT2Config(**gpt2)), words),
        "opt": lambda: (t.OPTModel(t.OPTConfig(**opt)), words),
        "llama": lambda: (t.LlamaModel(t.LlamaConfig(**decoder)), words),
        "mistral": lambda: (t.MistralModel(t.MistralConfig(**decoder)), words),
        "qwen2": lambda: (t.Qwen2Model(t.Qwen2Config(**decoder)), words),
        "t5": lambda: (t.T5Model(t.T5Config(**t5)), both),
        "vit": lambda: (t.ViTModel(t.ViTConfig(**picture)), pixels),
        "swin": lambda: (t.SwinModel(t.SwinConfig(**swin)), pixels),
        "clip": lambda: (t.CLIPVisionModel(t.CLIPVisionConfig(**picture)), pixels),
        "whisper": lambda: (
            t.WhisperModel(t.WhisperConfig(**whisper)),
            {"input_features": sound, "decoder_input_ids": tokens},
        ),
        "mamba": lambda: (t.MambaModel(t.MambaConfig(**mamba)), words),
    }

"""Models of the library transformers, there and back: from a folder to a network, and to a smaller folder."""

from taylorfx.interop.huggingface.fields import ConfigError
from taylorfx.interop.huggingface.holding import holdable
from taylorfx.interop.huggingface.loading import Pretrained, from_pretrained
from taylorfx.interop.huggingface.losses import distillation, next_token, perplexity
from taylorfx.interop.huggingface.saving import save_pretrained
from taylorfx.interop.huggingface.texts import attended, batches, sequences
from taylorfx.interop.huggingface.vocabulary import keep_tokens, tokens_of

__all__ = [
    "ConfigError", "Pretrained", "attended", "batches", "distillation", "from_pretrained", "holdable", "keep_tokens",
    "next_token", "perplexity", "save_pretrained", "sequences", "tokens_of",
]  # fmt: skip

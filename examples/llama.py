"""A language model from a folder to a smaller folder: a Llama, what it writes before and after, and how well it reads.

The folder has what transformers saves: a config, safetensors, a tokenizer. Heads, hidden units and channels leave
within what the config can say, by the next token of a text. What stays is repaired by least squares, without training,
and is saved as a folder that ``AutoModelForCausalLM.from_pretrained`` loads. Where there is no folder, a tiny Llama is
made and taught Python's own documentation first, so that the example runs anywhere, in 20 seconds on one core:

    python examples/llama.py
    python examples/llama.py --folder MODEL --text text.txt --flops 0.8 --out SMALLER
"""

from __future__ import annotations

import pydoc_data.topics
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from training import arguments
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import taylorfx as tfx
from taylorfx.interop import huggingface

SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}


def documentation() -> str:
    """Python's own documentation of its statements and types, which ships with it."""
    return "\n".join(pydoc_data.topics.topics.values())


def tiny_tokenizer(text: str, size: int) -> Any:
    """A tokenizer of byte pairs, learned from a text."""
    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=[*SPECIAL.values()], initial_alphabet=alphabet)
    pairs.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=pairs, **SPECIAL)


def tiny_llama(folder: Path, text: str, *, width: int, steps: int, generator: torch.Generator) -> None:
    """Make a Llama and a tokenizer, teach it a text, and save both."""
    tokenizer = tiny_tokenizer(text, 512)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), 4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in track(range(steps), "a tiny Llama reads Python's documentation", transient=True):
        starts = torch.randint(len(tokens) * 9 // 10 - 64, (16,), generator=generator)  # the last tenth is for tests
        batch = torch.stack([tokens[k : k + 64] for k in starts.tolist()])
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def written(folder: Path, prompt: str) -> str:
    """What a model in a folder goes on to write, by the library alone."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    prompted = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    tokens = model.generate(**prompted, max_new_tokens=24, do_sample=False, repetition_penalty=1.2)
    return repr(tokenizer.decode(tokens[0]))


def main() -> None:
    options = arguments(
        __doc__, {"steps": 60, "width": 32, "examples": 32},
        folder=(Path("llama"), "of the model; a tiny one is made where there is none"),
        out=(Path("llama-smaller"), "the smaller folder, which does not exist yet"),
        text=(Path, "to measure on, its last tenth to test on; by default Python's documentation"),
        flops=(0.7, "what may remain of the FLOPs"), length=(64, "tokens of a sequence"),
        examples=(128, "sequences to measure on"), prompt=("The statement", "that both models continue"),
        width=(64, "of the tiny model"), steps=(300, "that it is trained"),
    )  # fmt: skip
    if options.out.exists():
        raise SystemExit(f"{options.out} exists; give another folder as --out.")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    text = options.text.read_text(encoding="utf-8") if options.text else documentation()
    if not options.folder.exists():
        tiny_llama(options.folder, text, width=options.width, steps=options.steps, generator=generator)

    tokens = AutoTokenizer.from_pretrained(options.folder)(text, verbose=False)["input_ids"]
    measured, held_out = huggingface.sequences(tokens, options.length, options.examples, generator)
    llama, params, spec = huggingface.from_pretrained(options.folder, outputs="logits")
    whole = spec.at(*[(options.length,)] * len(spec.inputs))  # FLOPs are of sequences of this length

    def batches(rows: Tensor) -> list[tuple[dict[str, Tensor], Tensor]]:
        return huggingface.batches(rows, [*spec.input_layers], 16)

    small_params, small_spec = tfx.prune(
        params, whole, batches(measured), budget=tfx.Flops(options.flops), loss=huggingface.next_token,
        constraints=huggingface.holdable(llama, params, spec), repair=partial(tfx.reconstruct, biases=False),
    )  # fmt: skip
    small = huggingface.save_pretrained(options.out, small_params, small_spec, like=llama)

    for name, model, folder in (("before", llama, options.folder), ("after", small, options.out)):
        count = sum(x.numel() for x in model.parameters())
        print(f"{name}: {count:,} parameters, perplexity {huggingface.perplexity(model, batches(held_out)):.2f}")
        print(f"  {written(folder, options.prompt)}")
    flops = [tfx.cost.flops(tfx.couple(*network)).total for network in ((params, whole), (small_params, small_spec))]
    print(f"{flops[1] / flops[0]:.1%} of the FLOPs in {options.out}")


if __name__ == "__main__":
    main()

"""How much memory a checkpoint takes, there and back, beside its size.

A Llama of 271 MB in bfloat16 with random weights is loaded, captured and pruned within what its config can hold, to
70 % of its parameters, and saved. For every step the table has the peak of the process's memory as a multiple of the
checkpoint, beyond what libraries and a first small capture take: all of it, and without the pages of mapped files,
which the system drops when it needs the memory. Linux only; a minute:

    MALLOC_MMAP_THRESHOLD_=1048576 python benchmarks/memory.py    # so that freed tensors are given back at once
"""

from __future__ import annotations

import gc
import multiprocessing
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from _huggingface import DECODER, made, random_model
from _tables import markdown
from _torchvision import library

import taylorfx as tfx
from taylorfx.interop import huggingface

T = TypeVar("T")

SIZES = {"vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 8, "head_dim": 64,
         "num_attention_heads": 16, "num_key_value_heads": 8}  # fmt: skip


def make(folder: str) -> None:
    """Write the checkpoint, in a process of its own."""
    library()
    random_model("LlamaForCausalLM", DECODER | SIZES).bfloat16().save_pretrained(folder, max_shard_size="100MB")


def status() -> dict[str, int]:
    """Bytes of this process's memory: its peak, all of it, and that of no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {x.partition(":")[0]: 1024 * int(x.split()[1]) for x in lines if x.startswith(("VmHWM", "VmRSS", "RssAnon"))}


class Watch:
    """Peaks of memory, step by step."""

    def __init__(self, size: int) -> None:
        self.size, self.before, self.peak, self.rows = size, status(), 0, list[tuple[str, str, str, str]]()
        threading.Thread(target=self._look, daemon=True).start()

    def _look(self) -> None:
        while True:
            self.peak = max(self.peak, status()["RssAnon"])
            time.sleep(0.005)

    def step(self, name: str, run: Callable[[], T]) -> T:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.peak, start = 0, time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        every = (status()["VmHWM"] - self.before["VmRSS"]) / self.size
        own = (self.peak - self.before["RssAnon"]) / self.size
        self.rows.append((name, f"{every:.2f}", f"{own:.2f}", f"{seconds:.1f}"))
        return result


def main() -> None:
    library()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as home:
        folder, smaller = f"{home}/whole", f"{home}/smaller"
        process = multiprocessing.get_context("spawn").Process(target=make, args=(folder,))
        process.start()
        process.join()
        huggingface.from_pretrained(made("Llama"), outputs="logits")
        watch = Watch(sum(x.stat().st_size for x in Path(folder).glob("*.safetensors")))
        model, params, spec = watch.step(
            "`from_pretrained`", lambda: huggingface.from_pretrained(folder, outputs="logits")
        )
        held = watch.step("`holdable`", lambda: huggingface.holdable(model, params, spec))
        coupling = watch.step("`couple`", lambda: tfx.couple(params, spec))
        scores = watch.step("`weight_l2`", lambda: tfx.criteria.weight_l2(params, coupling))
        plan = watch.step(
            "`select`",
            lambda: tfx.select(scores, coupling, budget=tfx.Parameters(0.7), constraints=held, per_cost=False),
        )
        small = watch.step("`cut`", lambda: tfx.cut(params, plan))
        watch.step("`save_pretrained`", lambda: huggingface.save_pretrained(smaller, small, plan.spec, like=model))
    print(markdown(["step", "peak", "peak without mapped files", "seconds"], watch.rows))


if __name__ == "__main__":
    main()

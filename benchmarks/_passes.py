"""What the scoring benchmark times: the passes of one model and batch, by their kind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from _torchvision import library
from _transformers import Logits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

import taylorfx as tfx
from taylorfx.rewrite.lean import lean

Size = tuple[int, int]
"""Examples, and their height and width or their tokens."""
MODELS: dict[str, list[Size]] = {
    "resnet50": [(8, 160), (32, 160)], "mobilenet_v2": [(8, 160), (32, 160)], "densenet121": [(8, 160), (32, 160)],
    "vgg16_bn": [(4, 128), (16, 128)], "convnext_tiny": [(8, 160), (32, 160)], "bert": [(4, 128), (16, 128)],
    "vit_b_16": [(4, 224), (16, 224)], "llama": [(1, 2048), (1, 4096)], "llama_bfloat16": [(1, 2048)],
    "llama_float16": [(1, 2048)],
}  # fmt: skip
QUICK: dict[str, list[Size]] = {"resnet18": [(4, 96)], "mobilenet_v2": [(4, 96)], "convnext_tiny": [(2, 96)]}
LONG = ("llama", "llama_bfloat16", "llama_float16")  # 4 layers, 8 heads of 64, a loss for every token
TOKENS = ("bert", "vit_b_16", *LONG)  # where no image goes through convolutions

KINDS = {
    "full": "the forward and backward pass of the module, with the gradients of its weights",
    "hooks": "the original's way",
    "peer": "Torch-Pruning's Taylor",
    "plain": "the network as it is",
    "same": "the lean copy, images as they are",
    "measure": "the lean copy, images in channels-last memory",
    "micro": "the same, an example at a time (micro_batch=1)",
    "limit": "its convolutions and matrix products alone",
    "copy": "the making of the lean copy, once per call",
}

_ATEN = torch.ops.aten
PRODUCTS = {
    _ATEN.convolution, _ATEN.convolution_backward, _ATEN.mm, _ATEN.bmm, _ATEN.addmm, _ATEN.baddbmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu, _ATEN._scaled_dot_product_flash_attention_for_cpu_backward,
}  # fmt: skip


class Products(TorchDispatchMode):
    """Keeps every convolution and matrix product that runs, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in PRODUCTS:
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @torch.no_grad()
    def again(self) -> None:
        for func, args, kwargs in self.calls:
            func(*args, **kwargs)


def model(name: str, size: Size) -> tuple[nn.Module, Tensor, Tensor]:
    """The module in inference mode, with random weights, and a batch."""
    torch.manual_seed(0)
    count, length = size
    models = library()  # before transformers, which imports it, too
    if name == "bert":
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(num_labels=10)
        tokens = torch.randint(999, (count, length))
        return Logits(BertForSequenceClassification(config)).eval(), tokens, torch.arange(count) % 10
    if name in LONG:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
        config = LlamaConfig(vocab_size=1000, max_position_embeddings=8192, use_cache=False, **sizes)
        tokens = torch.randint(999, (count, length + 1))
        dtype = getattr(torch, name.removeprefix("llama").removeprefix("_") or "float32")
        return Logits(LlamaForCausalLM(config)).eval().to(dtype), tokens[:, :-1], tokens[:, 1:]
    module = models.get_model(name, weights=None).eval()
    return module, torch.randn(count, 3, length, length), torch.arange(count) % 10


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean over examples, or over all their tokens."""
    return cross_entropy(outputs.flatten(0, -2), targets.flatten())


def hooks(module: nn.Module, full: Callable[[], object]) -> Callable[[], object]:
    """The original's way: hooks keep what every convolution gives out, and multiply it by its gradient.

    The mean over examples and positions is taken of the product, its absolute value is divided by the layer's norm.
    """
    scores: dict[nn.Module, Tensor] = {}
    convolutions = [part for part in module.modules() if isinstance(part, nn.Conv2d)]

    def keep(part: nn.Module, inputs: Any, output: Tensor) -> None:
        def score(gradient: Tensor) -> None:
            mean = (output.detach() * gradient).mean((0, 2, 3)).abs()
            scores[part] = mean / mean.norm()

        if output.requires_grad:
            output.register_hook(score)

    def run() -> None:
        handles = [part.register_forward_hook(keep) for part in convolutions]
        full()
        for handle in handles:
            handle.remove()

    return run


def peer(module: nn.Module, x: Tensor, full: Callable[..., object]) -> Callable[[], object]:
    """Torch-Pruning's Taylor importance of every group of the model, after a full pass."""
    import torch_pruning

    with torch.enable_grad():
        graph = torch_pruning.DependencyGraph().build_dependency(module, x[:1])
    groups = list(graph.get_all_groups(ignored_layers=[list(module.modules())[-1]]))
    importance = torch_pruning.importance.GroupTaylorImportance()

    def run() -> None:
        full(keep=True)
        for group in groups:
            importance(group)
        module.zero_grad(set_to_none=True)

    return run


def passes(name: str, size: Size, kinds: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """What runs, by its kind; a kind that a model does not have is left out."""
    module, x, y = model(name, size)

    def full(keep: bool = False) -> None:
        loss(module(x), y).backward()
        if not keep:
            module.zero_grad(set_to_none=True)

    found: dict[str, Callable[[], object]] = {"full": full}
    if name not in TOKENS:
        found["hooks"] = hooks(module, full)
    if "peer" in kinds and name not in LONG:
        try:
            found["peer"] = peer(module, x, full)
        except Exception as error:  # the table shows what fails, and goes on
            print(f"{name}: no peer, {type(error).__name__}: {str(error)[:200]}", file=sys.stderr)
    if {*kinds} - {"full", "hooks", "peer"}:
        found |= ours(name, module, x, y, kinds)
    return {kind: found[kind] for kind in kinds if kind in found}


def ours(name: str, module: nn.Module, x: Tensor, y: Tensor, kinds: tuple[str, ...]) -> dict[str, Callable[[], object]]:
    """Our own passes. The lean copy is made beforehand, as `taylorfx.measure` does once for all batches of a call."""
    params, spec = tfx.from_torch(module, (x[:, :64] if name in LONG else x,))  # which holds at any length
    coupling = tfx.couple(params, spec)
    copies = {last: lean(params, coupling, channels_last=last) for last in (False, True)}
    again = tfx.couple(*copies[True])  # which has the same reads

    def plain() -> object:
        return tfx.derivatives(params, spec, x, y, coupling, loss=loss, fold=False, channels_last=False)

    def scored(last: bool, size: int | None = None) -> Callable[[], object]:
        options = {"loss": loss, "fold": False, "channels_last": last, "micro_batch": size}
        return lambda: tfx.derivatives(*copies[last], x, y, again, **options)

    found = {"plain": plain, "same": scored(False), "measure": scored(True), "micro": scored(True, 1)}
    found["copy"] = lambda: lean(params, coupling, channels_last=True)
    if name in TOKENS:
        del found["same"]
    if name in LONG:
        del found["plain"]  # which has a number for every pair of tokens and head
    if "limit" in kinds:
        with Products() as products:
            found["measure"]()
        found["limit"] = products.again
    return found

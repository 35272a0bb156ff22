"""Private names of torch: all that this package uses of them, so that a new torch is checked in one place.

Tested with torch 2.13. For each, what is public does not do:

- ``torch._C._functorch``: whether ``torch.func.vmap`` or ``grad`` sees a tensor. Layers choose an operator that vmap
  has, and what writes over tensors refuses or avoids those that a transform still looks at.
- ``temporarily_clear_interpreter_stack``: what a transform differentiates communicates with other processes.
- ``_SingleLevelFunction``: an autograd function at the cost of one, see `Function`.
- ``OpOverload`` and the list of schemas: operators that a network names are looked up without running any code.
- ``torch._logging.structured``: the file names behind the numbers in a report of ``torch.export``.
- ``_optimizer_*_hooks``, ``_opt_called``: an optimizer that takes the place of another one keeps its hooks, and
  schedulers see that it has stepped.
- ``backed_size_oblivious``, ``_conv_determine_backend_memory_format``: what makes ``torch.export`` ask less of sizes.
- ``is_contiguous_or_false``: asks about the order of values in memory without fixing a size.
- ``torch._check``: tells ``torch.export`` that two sizes are equal.
- ``_scaled_dot_product_flash_attention_for_cpu``: the kernel behind ``scaled_dot_product_attention``. It takes a mask
  and causality at once, and a mask for its derivative that is made when that is computed.
- ``_is_mkldnn_bf16_supported``: whether the processor has instructions for products in bfloat16.
- ``torch.utils._pytree``: the trees of arguments and results that ``torch.export`` itself makes.

More are kept where they are used, in `taylorfx.interop.capture`, which is imported when a module is captured:
``torch.utils._sympy`` reads the guards of ``torch.export``, and loads sympy; ``ShapeEnv._get_sloc`` is told the lines
that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from unittest.mock import patch

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

__all__ = [
    "Attended", "Function", "OpOverload", "alike_sizes", "attended", "attended_backward", "attends", "attends_in",
    "below", "differentiated", "equal_sizes", "file_names", "follow", "in_order", "pytree", "schemas", "vectorized",
    "without_transforms", "wrapped",
]  # fmt: skip


def wrapped(x: Tensor) -> bool:
    """Any transform of ``torch.func`` sees this tensor."""
    return _functorch.is_functorch_wrapped_tensor(x)


def vectorized(x: Tensor) -> bool:
    """``torch.func.vmap`` sees this tensor, at any depth of nested transforms.

    >>> from torch.func import grad, vmap
    >>> x, seen = torch.zeros(2), []
    >>> _ = vmap(grad(lambda x: (seen.append(vectorized(x)), x)[1]))(x), vectorized(x)
    >>> seen, vectorized(x)
    ([True], False)
    """
    return any(map(_functorch.is_batchedtensor, _layers(x)))


def differentiated(x: Tensor) -> bool:
    """``torch.func.grad``, ``vjp`` or ``jvp`` sees this tensor, at any depth of nested transforms."""
    return any(map(_functorch.is_gradtrackingtensor, _layers(x)))


def _layers(x: Tensor) -> Iterator[Tensor]:
    """A tensor as every running transform of ``torch.func`` has it, from the innermost transform on."""
    while _functorch.is_functorch_wrapped_tensor(x):
        yield x
        x = _functorch.get_unwrapped(x)


def below(x: Tensor) -> Tensor:
    """A tensor as autograd has it: without the transforms of ``torch.func`` that see it."""
    return _functorch.get_unwrapped([*_layers(x)][-1]) if wrapped(x) else x


def without_transforms() -> AbstractContextManager[object]:
    """No transform of ``torch.func`` sees what is computed inside, of tensors that none of them has seen."""
    return temporarily_clear_interpreter_stack()


if TYPE_CHECKING:

    class _Function:
        """What is used of an autograd function: torch's has no types."""

        @classmethod
        def apply(cls, *args: Any) -> Any: ...

else:
    _Function = _SingleLevelFunction


class Function(_Function):
    """An autograd function that is used right under one ``torch.func.vjp``, and differentiated once.

    It is written as a ``torch.autograd.Function`` with ``setup_context``. That, torch.func would make into a new class
    at every call, so that a second transform could differentiate it; which takes more time than many a layer.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """The result of ``forward``."""
        with enable_single_level_autograd_function():
            return super().apply(*args)


class Attended(NamedTuple):
    """What fused attention gives: its value, and the logarithms of the sums by which weights are normalized."""

    value: Tensor
    logsumexp: Tensor


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """`attended` takes these: ``(N, h, T, k)``, ``(N, h, S, k)`` and ``(N, h, S, k)`` on the CPU, of one dtype.

    Other than the public operator it does not look at ``torch.autocast``, and ``torch.func.vmap`` does not know it.
    """
    tensors = (q, k, v)
    alike = len({(x.dtype, x.ndim, x.shape[:2], x.shape[-1]) for x in tensors}) == 1 and q.ndim == 4
    return (
        alike
        and q.is_floating_point()
        and all(x.device.type == "cpu" and x.numel() > 0 and x.stride(-1) == 1 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and not any(map(vectorized, tensors))
    )


def attends_in(dtype: torch.dtype) -> bool:
    """`attended` is as fast in this dtype as in single precision: there are instructions for its products.

    >>> attends_in(torch.float32), attends_in(torch.float16)
    (True, False)
    """
    if dtype == torch.bfloat16:
        mkldnn: Any = torch.backends.mkldnn
        return bool(mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype != torch.float16


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, causal: bool, scale: float) -> Attended:
    """Attention by torch's kernel for the CPU; the mask is added to the scores and broadcasts against them."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return Attended(*kernel(q, k, v, 0.0, causal, attn_mask=mask, scale=scale))


def attended_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Attended,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by queries, keys and values of `attended`, given that by its value."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    by_q, by_k, by_v = kernel(gradient, q, k, v, *result, 0.0, causal, attn_mask=mask, scale=scale)
    return by_q, by_k, by_v


class Schema(Protocol):
    """The declaration of one overload of an operator."""

    overload_name: str


def schemas(name: str) -> Sequence[Schema]:
    """The declarations of the operator ``namespace::name``; none if torch has no such operator."""
    found: Sequence[Schema] = torch._C._jit_get_schemas_for_operator(name)
    return found


def file_names() -> Mapping[int, str]:
    """The names of source files, by the numbers that stand for them in reports of ``torch.export``."""
    return {number: name for name, number in torch._logging.structured.INTERN_TABLE.items()}


def follow(after: Optimizer, before: Optimizer) -> None:
    """Give an optimizer the hooks of another one, and let schedulers know whether that one has stepped."""
    for name, hooks in vars(before).items():
        if name.startswith("_optimizer_") and name.endswith("_hooks"):
            vars(after)[name].update(hooks)
    if hasattr(before, "_opt_called"):
        vars(after)["_opt_called"] = before._opt_called


def equal_sizes(one: int | torch.SymInt, other: int | torch.SymInt) -> None:
    """Have ``torch.export`` take two sizes for one."""
    check: Any = torch._check
    check(one == other)


@contextmanager
def alike_sizes() -> Iterator[None]:
    """Have ``torch.export`` treat a size of one like any other, where this version of torch can."""
    from torch.fx.experimental import _config

    config: Any = _config
    # Of a map of one position, torch asks in which order its channels lie: it is the same at that size alone.
    order = patch.object(torch._C, "_conv_determine_backend_memory_format", lambda *args, **kwargs: None)
    with order, config.patch({"backed_size_oblivious": True} if hasattr(config, "backed_size_oblivious") else {}):
        yield


def in_order(x: Tensor) -> bool:
    """Whether the values of a tensor lie in memory in their order, as far as ``torch.export`` knows for all sizes."""
    from torch._prims_common import is_contiguous_or_false

    return bool(is_contiguous_or_false(x))

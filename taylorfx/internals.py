"""Private names of torch: all that this package uses of them, so that a new torch is checked in one place.

Tested with torch 2.13. For each, what is public does not do:

- ``torch._C._functorch``: whether ``torch.func.vmap`` or ``grad`` sees a tensor. Layers choose an operator that vmap
  has, and what writes over tensors refuses or avoids those that a transform still looks at.
- ``_SingleLevelFunction``: an autograd function at the cost of one, see `Function`.
- ``OpOverload`` and the list of schemas: operators that a network names are looked up without running any code.
- ``torch._logging.structured``: the file names behind the numbers in a report of ``torch.export``.
- ``_optimizer_*_hooks``, ``_opt_called``: an optimizer that takes the place of another one keeps its hooks, and
  schedulers see that it has stepped.
- ``backed_size_oblivious``: an option of ``torch.export`` that asks less of sizes.
- ``torch.utils._pytree``: the trees of arguments and results that ``torch.export`` itself makes.

More are kept where they are used, in `taylorfx.interop.capture`, which is imported when a module is captured:
``torch.utils._sympy`` reads the guards of ``torch.export``, and loads sympy; ``ShapeEnv._get_sloc`` is told the lines
that they come from.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.utils import enable_single_level_autograd_function
from torch._ops import OpOverload
from torch.autograd.function import _SingleLevelFunction
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

__all__ = [
    "Function", "OpOverload", "alike_sizes", "differentiated", "file_names", "follow", "pytree", "schemas",
    "vectorized", "wrapped",
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


def alike_sizes() -> AbstractContextManager[None]:
    """Have ``torch.export`` treat a size of one like any other, where this version of torch can."""
    from torch.fx.experimental import _config

    config: Any = _config
    patched: AbstractContextManager[None] = config.patch(
        {"backed_size_oblivious": True} if hasattr(config, "backed_size_oblivious") else {}
    )
    return patched

"""The operators that a network may name: a closed list, derived from torch's own schemas.

A network is data and may come from a file. So a name is never looked up among Python's attributes. It has to be the
name of an operator that torch has registered, ``"relu.default"`` for one of ``aten`` or
``"torchvision.roi_align.default"`` with its namespace. And this operator has to be a function of tensors and numbers
alone. Its schema says whether it is: no argument is written to, every argument that the network fills is data (no file,
device, storage or generator), and the results are tensors.

Operators that draw random numbers are allowed. They advance torch's global generator, as they do in the module that
they were captured from, and change nothing else.

A file may name everything of ``aten`` and ``prims`` that `operator` accepts. An operator of another namespace is code
of another library: the program that reads the file has to allow it, by a rule or by name (`admit`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any, Protocol, TypeAlias

import torch

from taylorfx.internals import OpOverload, schemas
from taylorfx.layers.base import ShapeError

__all__ = [
    "COUNT", "DEVICE", "DTYPE", "DTYPES", "SLOT", "OperatorError", "admit", "admitted", "check_arguments", "operator"
]  # fmt: skip

SLOT = "$"
"""``("$", k)`` in a template of arguments stands for input ``k`` of the node, counted from 0."""

DTYPE = "dtype"
"""``("dtype", "float32")`` stands for ``torch.float32``."""

COUNT = "examples"
"""``("examples", 4)`` stands for four times the number of examples, which is the length of the last input."""

DEVICE = "device"
"""``("device", k)`` stands for the device of input ``k``, where an operator makes a tensor of numbers alone."""

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""torch's dtypes by name."""

OWN = ("aten", "prims")
"""The namespaces of torch's functions of tensors."""

SYSTEM = re.compile(
    r"prim|profiler|inductor|export|debug\w*|rngprims|higher_order|_?c10d\w*|_?dtensor|dist\w*|rpc|streams|symm_mem"
)
"""The namespaces of torch's own machinery: processes, profiles, the compiler."""

PRIVATE = re.compile(
    r"__(and|or|xor|lshift|rshift)__|_adaptive_avg_pool[23]d|_aminmax|_batch_norm_(no_update|with_update_functional)|"
    r"_cdist_forward|_chunk_cat|_conj(_copy|_physical)?|_convolution|_embedding_bag(_forward_only)?|_euclidean_dist|"
    r"_fft_(c2c|c2r|r2c)|_foreach_\w+|_fused_rms_norm|_grouped_mm|_int_mm|_linalg_(det|eigh|eigvals|slogdet|solve_ex|"
    r"svd)|_log_softmax|_logcumsumexp|_masked_softmax|_native_batch_norm_legit(_functional|_no_training)?|"
    r"_native_multi_head_attention|_neg_view(_copy)?|_pdist_forward|_prelu_kernel|"
    r"_reshape_(alias|copy)|_safe_softmax|_scaled_dot_product_(attention_math|cudnn_attention|efficient_attention|"
    r"flash_attention(_for_cpu)?|fused_attention_overrideable)|_scaled_(grouped_)?mm|_slow_conv2d_forward|_softmax|"
    r"_stack|_to_copy|_transformer_encoder_layer_fwd|_trilinear|_unique2?|_unsafe_(index|index_put|masked_index|"
    r"masked_index_put_accumulate|view)|_upsample_\w+|_weight_norm(_interface)?"
)
"""The operators of ``aten`` with private names that decompositions leave in captured networks; they may be named."""

REFUSED = re.compile(
    r"from_file|.*[^_]_|.*_backward.*|.*_jvp|.*sparse.*|.*_to_(mk|csr|csc|bsr|bsc).*|to_mkldnn|mkldnn_.*|.*nested.*|"
    r"(de)?quantize.*|quantized_.*|.*_quantized|fbgemm_.*|choose_qparams.*|q_per_.*|int_repr|set|resize.*|cpu|cuda|"
    r"pin_memory|data|device_put|copy_(to|strided)|keys|sorted|tensor|as_tensor|grad|get_gradients|segment_reduce|"
    r".*(lu|ldl)_(solve|unpack)|batch_norm_(update|gather)_stats.*|(cudnn|miopen|mps)_.*|_foreach_copy|item"
)
"""Operators that may not be named although their schema looks harmless: they open files, write to arguments, move
tensors to another device, use tensors that are not dense, or read at positions that they do not check."""

DATA = ("Tensor", "int", "float", "number", "bool", "complex", "str", "ScalarType")
"""The types of arguments that are data; lists of them and ``None`` are data, too."""

Operator: TypeAlias = OpOverload[..., Any]
"""An operator of torch, with its schema."""

_OPERATORS: dict[str, Operator] = {}
"""The operators that were looked up, by name."""

_ADMITTED: set[str] = set()
"""The operators of other libraries that the program allows, as ``"namespace::name"``."""


class _Argument(Protocol):
    """An argument of a schema, as torch describes it."""

    name: str

    @property
    def real_type(self) -> object: ...

    def has_default_value(self) -> bool: ...


class OperatorError(ShapeError):
    """An operator that a network may not name, or arguments that the operator does not take."""


def admit(name: str) -> None:
    """Allow files to name the operator ``"namespace::name"`` from here on."""
    _ADMITTED.add(name)


def admitted(name: str, also: Collection[str] = ()) -> bool:
    """Whether a file may name this operator: it is one of torch's own, or the program allows it.

    Args:
        name: a name that `operator` accepts.
        also: further operators that are allowed, as ``"namespace::name"``.
    """
    space, packet, _ = _parts(name)
    return space in OWN or f"{space}::{packet}" in _ADMITTED or f"{space}::{packet}" in also


def operator(name: str) -> Operator:
    """The operator of this name, ``"add.Tensor"`` or ``"namespace.name.overload"``.

    >>> operator("add.Tensor")(torch.ones(2), 1)
    tensor([2., 2.])

    Raises:
        OperatorError: if torch has no such operator, or it is not a function of tensors and numbers alone.
    """
    function = _OPERATORS.get(name)
    if function is None:
        function = _OPERATORS[name] = _resolve(name)
    return function


def _parts(name: str) -> tuple[str, str, str]:
    """Namespace, name and overload."""
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 2:
        parts = ["aten", *parts]
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise OperatorError(f'An operator is named "name.overload" or "namespace.name.overload"; received {name!r}.')
    space, packet, overload = parts
    return space, packet, overload


def _resolve(name: str) -> Operator:
    space, packet, overload = _parts(name)
    # torch's namespaces are Python objects with attributes of their own. Its list of schemas says which names are
    # operators; no other name is looked up.
    found: Any = None
    if any((schema.overload_name or "default") == overload for schema in schemas(f"{space}::{packet}")):
        found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    if not isinstance(found, OpOverload):
        library = "" if space in OWN else f" Import the library that registers {space}::{packet}."
        raise OperatorError(f"torch has no operator {name!r}.{library}")
    private = packet.startswith("_") and PRIVATE.fullmatch(packet) is None
    if SYSTEM.fullmatch(space) or (space in OWN and (private or REFUSED.fullmatch(packet))):
        raise OperatorError(f"{name!r} is not among the operators that a network may name.")
    arguments, returns = found._schema.arguments, found._schema.returns
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
        raise OperatorError(f"The operators of a network change nothing; {name!r} writes to its arguments.")
    other = [a.name for a in arguments if _base(a) not in DATA and not a.has_default_value()]
    if other or not {str(r.type) for r in returns} & {"Tensor", "List[Tensor]"}:
        raise OperatorError(
            f"The operators of a network are functions from tensors and numbers to tensors; {name!r} is not."
        )
    return found


def _base(argument: _Argument) -> str:
    """The type of an argument's elements: ``Tensor`` for ``Optional[List[Tensor]]``."""
    return re.sub(r"^(?:Optional\[|List\[)+|\]+$", "", str(argument.real_type))


def check_arguments(
    name: str, args: tuple[object, ...], kwargs: tuple[tuple[str, object], ...], item: int | None = None
) -> None:
    """Refuse arguments that the operator of this name does not take.

    Args:
        args, kwargs: templates, in which `SLOT`, `DTYPE` and `COUNT` mark what is filled in later.
        item: which of several results is used; none if there is only one.

    Raises:
        OperatorError: if arguments are missing, unknown, or no data of the right kind; lists all of them.
    """
    schema = operator(name)._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    known = {a.name: a for a in schema.arguments}
    values = {a.name: value for a, value in zip(positional, args, strict=False)}
    errors = [f"{len(args)} arguments, where it takes {len(positional)}"] if len(args) > len(positional) else []
    for key, value in kwargs:
        if key not in known or key in values:
            errors.append(f"{key!r}, {'given twice' if key in values else 'which it does not have'}")
        values[key] = value
    errors += [f"no {a.name}" for a in schema.arguments if a.name not in values and not a.has_default_value()]
    errors += [f"{values[key]!r} for {key}" for key in values if key in known and not _takes(known[key], values[key])]
    if values.get("running_mean") is not None and not name.split(".")[-2].endswith("functional"):
        flags = [key for key in ("training", "train", "use_input_stats") if values.get(key)]
        errors += [f"{key}=True, by which it writes to the running statistics" for key in flags]
    types = [str(r.type) for r in schema.returns]
    several = len(types) > 1 or types == ["List[Tensor]"]
    if several != (item is not None) or (len(types) > 1 and not 0 <= (item or 0) < len(types)) or (item or 0) < 0:
        errors.append(f"item={item!r} of {len(types)} results ({', '.join(types)})")
    elif len(types) > 1 and types[item or 0] != "Tensor":
        errors.append(f"item={item!r}, which is no tensor")
    if errors:
        raise OperatorError(f"{schema.name} takes other arguments ({schema}); received {'; '.join(errors)}.")


def _takes(argument: _Argument, value: object) -> bool:
    """Whether an argument of a schema may have this value of a template."""
    if value is None:
        return argument.has_default_value() or str(argument.real_type).startswith("Optional")
    base = _base(argument)
    if base == "Device":
        return isinstance(value, tuple) and len(value) == 2 and value[0] == DEVICE and type(value[1]) is int
    return base in DATA and _holds(base, value)


def _holds(base: str, value: object) -> bool:
    """Whether a value of a template is of the type ``base``, or a list of such values."""
    if isinstance(value, tuple):
        if len(value) == 2 and value[0] == SLOT and type(value[1]) is int:
            return base == "Tensor" and value[1] >= 0
        if len(value) == 2 and value[0] == DTYPE and isinstance(value[1], str):
            return base == "ScalarType" and value[1] in DTYPES
        if len(value) == 2 and value[0] == COUNT:
            return base in ("int", "number", "float", "Tensor") and isinstance(value[1], int)
        return all(_holds(base, item) for item in value)
    if isinstance(value, str):
        return base == "str"
    if value is None:
        return base == "Tensor"  # an axis that an index leaves as it is
    kind = next((x for x in (bool, int, float) if isinstance(value, x)), type(value))
    return kind in _NUMBERS.get(base, ())


_NUMBERS: dict[str, tuple[type, ...]] = {
    "Tensor": (bool, int, float), "number": (bool, int, float), "complex": (bool, int, float), "bool": (bool, int),
    "float": (int, float), "int": (int,),
}  # fmt: skip
"""The Python types of numbers that torch takes for each type of a schema; it converts numbers to tensors by itself."""

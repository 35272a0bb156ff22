"""The operators that a network may name: a closed list, by torch's own schemas.

A network is data, and data may come from a file. So a name is never followed through Python's attributes: it is one of
torch's operators, ``"relu.default"`` of ``aten`` or ``"torchvision.roi_align.default"`` with its namespace, and that
operator is a function of tensors and numbers alone. torch's schemas say so: no argument is written to, every argument
that is given is data (no file, device, storage or generator), and what comes out is tensors.

Operators that draw random numbers are taken. They advance torch's own generator, as they do in the module that they
were captured from, and change nothing else.

Of ``aten`` and ``prims`` a file may name what `operator` takes. An operator of another namespace is code of some
library's: the program that reads the file says that it may run, by a rule or by name (`admit`).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

import torch

from taylorfx.internals import OpOverload, schemas
from taylorfx.layers.base import ShapeError

__all__ = [
    "COUNT", "DTYPE", "DTYPES", "SLOT", "OperatorError", "admit", "admitted", "check_arguments", "operator"
]  # fmt: skip

SLOT = "$"
"""``("$", k)`` in a template of arguments stands for input ``k``."""

DTYPE = "dtype"
"""``("dtype", "float32")`` stands for ``torch.float32``."""

COUNT = "examples"
"""``("examples", 4)`` stands for four times the number of examples, that is the length of the last input."""

DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
"""torch's dtypes by name."""

OWN = ("aten", "prims")
"""The namespaces of torch's functions of tensors."""

SYSTEM = re.compile(
    r"prim|profiler|inductor|export|debug\w*|rngprims|higher_order|_?c10d\w*|_?dtensor|dist\w*|rpc|streams|symm_mem"
)
"""Namespaces in which torch keeps what it does itself with: processes, profiles, the compiler's own."""

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
"""The operators of ``aten`` with a private name that decompositions leave in captured networks."""

REFUSED = re.compile(
    r"from_file|.*[^_]_|.*_backward.*|.*_jvp|.*sparse.*|.*_to_(mk|csr|csc|bsr|bsc).*|to_mkldnn|mkldnn_.*|.*nested.*|"
    r"(de)?quantize.*|quantized_.*|.*_quantized|fbgemm_.*|choose_qparams.*|q_per_.*|int_repr|set|resize.*|cpu|cuda|"
    r"pin_memory|data|device_put|copy_(to|strided)|keys|sorted|tensor|as_tensor|grad|get_gradients|segment_reduce|"
    r".*(lu|ldl)_(solve|unpack)|batch_norm_(update|gather)_stats.*|(cudnn|miopen|mps)_.*|_foreach_copy|item"
)
"""Operators whose schema does not say what they do (open a file, write to an argument, move to another device), whose
tensors are not plain ones, or that trust positions which they are given."""

DATA = ("Tensor", "int", "float", "number", "bool", "complex", "str", "ScalarType")
"""The types of arguments that are data; lists of them and ``None`` are, too."""

_OPERATORS: dict[str, OpOverload[..., Any]] = {}
_ADMITTED: set[str] = set()


class OperatorError(ShapeError):
    """The name of an operator that a network may not have, or arguments that it does not take."""


def admit(name: str) -> None:
    """Let files name the operator ``"namespace::name"`` from now on."""
    _ADMITTED.add(name)


def admitted(name: str, also: Collection[str] = ()) -> bool:
    """A file may name this operator of `operator`'s: it is torch's own, or the program says so."""
    space, packet, _ = _parts(name)
    return space in OWN or f"{space}::{packet}" in _ADMITTED or f"{space}::{packet}" in also


def operator(name: str) -> OpOverload[..., Any]:
    """The operator of this name, ``"add.Tensor"`` or ``"namespace.name.overload"``.

    Raises:
        OperatorError: if torch has no such operator, or it is no function of tensors and numbers alone.
    """
    found = _OPERATORS.get(name)
    if found is None:
        found = _OPERATORS[name] = _resolve(name)
    return found


def _parts(name: str) -> tuple[str, str, str]:
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 2:
        parts = ["aten", *parts]
    if len(parts) != 3 or not all(part.isidentifier() for part in parts):
        raise OperatorError(f'An operator is named "name.overload" or "namespace.name.overload"; received {name!r}.')
    space, packet, overload = parts
    return space, packet, overload


def _resolve(name: str) -> OpOverload[..., Any]:
    space, packet, overload = _parts(name)
    # torch's namespaces are Python objects with attributes of their own. Its list of schemas says which names are
    # operators; no other name is looked up.
    found: Any = None
    if any((schema.overload_name or "default") == overload for schema in schemas(f"{space}::{packet}")):
        found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    if not isinstance(found, OpOverload):
        library = "" if space in OWN else f" Import the library that registers {space}::{packet}."
        raise OperatorError(f"A network names operators that torch has; {name!r} is none.{library}")
    private = packet.startswith("_") and PRIVATE.fullmatch(packet) is None
    if SYSTEM.fullmatch(space) or (space in OWN and (private or REFUSED.fullmatch(packet))):
        raise OperatorError(f"{name!r} is not among the operators that a network may name.")
    arguments, returns = found._schema.arguments, found._schema.returns
    if any(a.alias_info is not None and a.alias_info.is_write for a in arguments):
        raise OperatorError(f"A network names operators that change nothing; {name!r} writes to its arguments.")
    strange = [a.name for a in arguments if _base(a) not in DATA and not a.has_default_value()]
    if strange or not {str(r.type) for r in returns} & {"Tensor", "List[Tensor]"}:
        raise OperatorError(f"A network names operators from tensors and numbers to tensors; {name!r} is none.")
    return found


def _base(argument: Any) -> str:
    """``Tensor`` of ``Optional[List[Tensor]]``."""
    return re.sub(r"^(?:Optional\[|List\[)+|\]+$", "", str(argument.real_type))


def check_arguments(
    name: str, args: tuple[Any, ...], kwargs: tuple[tuple[str, Any], ...], item: int | None = None
) -> None:
    """Refuse a template that the operator of this name does not take.

    Raises:
        OperatorError: listing every argument that is missing, unknown or no data of the right kind.
    """
    schema = operator(name)._schema
    positional = [a for a in schema.arguments if not a.kwarg_only]
    known = {a.name: a for a in schema.arguments}
    given = {a.name: value for a, value in zip(positional, args, strict=False)}
    errors = [f"{len(args)} arguments, where it takes {len(positional)}"] if len(args) > len(positional) else []
    for key, value in kwargs:
        if key not in known or key in given:
            errors.append(f"{key!r}, {'given twice' if key in given else 'which it does not have'}")
        given[key] = value
    errors += [f"no {a.name}" for a in schema.arguments if a.name not in given and not a.has_default_value()]
    errors += [f"{given[key]!r} for {key}" for key in given if key in known and not _takes(known[key], given[key])]
    if "running_mean" in given and given["running_mean"] is not None and not name.split(".")[-2].endswith("functional"):
        flags = [key for key in ("training", "train", "use_input_stats") if given.get(key)]
        errors += [f"{key}=True, by which it writes to the running statistics" for key in flags]
    types = [str(r.type) for r in schema.returns]
    several = len(types) > 1 or types == ["List[Tensor]"]
    if several != (item is not None) or (len(types) > 1 and not 0 <= (item or 0) < len(types)) or (item or 0) < 0:
        errors.append(f"item={item!r} of {len(types)} results ({', '.join(types)})")
    elif len(types) > 1 and types[item or 0] != "Tensor":
        errors.append(f"item={item!r}, which is no tensor")
    if errors:
        raise OperatorError(f"{schema.name} takes other arguments ({schema}); received {'; '.join(errors)}.")


def _takes(argument: Any, value: Any) -> bool:
    """A value of a template is one that this argument of a schema may have."""
    if value is None:
        return argument.has_default_value() or str(argument.real_type).startswith("Optional")
    base = _base(argument)
    return base in DATA and _holds(base, value)


def _holds(base: str, value: Any) -> bool:
    if isinstance(value, tuple):
        if len(value) == 2 and value[0] == SLOT and type(value[1]) is int:
            return base == "Tensor" and value[1] >= 0
        if len(value) == 2 and value[0] == DTYPE and isinstance(value[1], str):
            return base == "ScalarType" and value[1] in DTYPES
        if len(value) == 2 and value[0] == COUNT:
            return base in ("int", "number", "float", "Tensor") and type(value[1]) is int
        return all(_holds(base, item) for item in value)
    if isinstance(value, str):
        return base == "str"
    if value is None:
        return base == "Tensor"  # an axis that an index leaves as it is
    return type(value) in _NUMBERS.get(base, ())


_NUMBERS: dict[str, tuple[type, ...]] = {
    "Tensor": (bool, int, float), "number": (bool, int, float), "complex": (bool, int, float), "bool": (bool, int),
    "float": (int, float), "int": (int,),
}  # fmt: skip
"""What may stand in the place of an argument's type; torch makes a tensor of a number."""

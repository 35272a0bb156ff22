"""Modules in: ``torch.export`` captures any module as a graph of ATen operators, which are mapped to layers.

The graph is made functional first (no in-place operators, few composite ones). Parametric operators whose weights are
the module's own become the real layers, with the module's names; data movement, products, reductions and pointwise
operators become those of `taylorfx.layers.tensor`; what has no rule stays as it was captured, runs, and freezes the
units that touch it. Nothing is guessed from a number: where examples run is read from the symbol of the exported batch.
A module that is made for a fixed number of examples is captured for one at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taylorfx.internals import file_names, pytree
from taylorfx.interop.calls import bind, dotted, interface_of, off_path
from taylorfx.interop.capture.functional import functional
from taylorfx.interop.capture.optional import Call, merge
from taylorfx.interop.capture.programs import (
    Axis,
    Example,
    Opened,
    cumulative,
    each_tensor,
    exported,
    first_line,
    tensors,
    trained,
)
from taylorfx.interop.capture.proof import proven
from taylorfx.interop.capture.reader import CaptureError, OutputsError, Reader, Wanted
from taylorfx.interop.capture.tracing import quiet, tracing
from taylorfx.interop.capture.training import twin
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG, bar
from taylorfx.tree import Params

__all__ = ["from_torch"]


def from_torch(
    module: nn.Module,
    example_inputs: object = None,
    *,
    example_kwargs: Mapping[str, object] | None = None,
    examples: Sequence[object] | None = None,
    outputs: Wanted = None,
    sizes: bool | Sequence[str] = (),
    progress: bool = False,
) -> tuple[Params, Spec]:
    """Capture a module in inference mode as parameters and a spec; the module itself is left as it was.

    Args:
        module: any module that ``torch.export`` captures.
        example_inputs: a tensor, a tuple of the positional arguments, or a dict of arguments by name; every tensor's
            axis 0 runs over examples.
        example_kwargs: keyword arguments.
        examples: instead of one example, several calls that differ in which tensors are there: each as
            ``example_inputs``, or as it is written, ``taylorfx.interop.Call(x, mask=mask)``. The network then stands
            for all of them, and what is not in every call is an input that may be left out. FLOPs and memory are those
            of the first call.
        outputs: which of the outputs are captured, by default all: names or globs of names
            (``["logits", "hidden_states.*"]``), or numbers where they have no names. What only the others need is left
            out. A copy of a residual stream that is given out keeps the stream at its width.

        sizes: axes that have to come out open, by input and number (``["tokens.1"]``; axis 0, that of the examples,
            always is), however long that takes: where the formulas of sizes have more than 60 operations, they stay
            the example's otherwise. False keeps all at those, where that is wanted; the capture is faster.
        progress: draw a bar, by rich.

    Returns:
        Parameters by the module's own names (the tensors are shared, not copied), and the network. The inputs of the
        spec are named after the arguments of ``forward``. The outputs are the tensors that it returns: one, a tuple in
        their order, or a dict by the names that a dict or dataclass gives them (``"hidden_states.0"`` where nested).

    A module that is made for a fixed number of examples is captured for one at a time, with a warning, and `measure`
    goes through a batch by itself. A batch is then run example by example, if the module gives the example batch what
    it gives its examples one by one; otherwise, and in training, the spec takes batches of one. None among the outputs
    is left out.

    Raises:
        CaptureError: if the module, the example or the captured graph cannot be taken; every cause is listed.
    """
    if not isinstance(module, nn.Module):
        raise CaptureError(f"from_torch captures a torch.nn.Module; received {type(module).__name__}.")
    calls = [_arguments(example_inputs, example_kwargs)] if examples is None else _calls(examples, example_inputs)
    for example in calls:
        _refuse(module, example)
    networks = []
    with bar(progress, "from_torch", len(calls)) as advance:
        for example in calls:
            LOG.info("from_torch: torch.export reads %s", type(module).__name__)
            original = twin(module)
            _leave_cache(original, example[1])
            networks.append(_opened(original, example, module, outputs, sizes))
            advance(1)
    _refuse_fixed(module, networks[0][1], sizes if isinstance(sizes, Sequence) else ())
    network = networks[0] if len(networks) == 1 else _merged(networks, calls)
    LOG.info("from_torch: %d nodes, %d parameters", len(network[1]), len(network[1].shapes))
    if unused := off_path(module, network[1].shapes):
        warnings.warn(
            f"{type(module).__name__} does not use all of its parameters in inference; no part of the network, nor of "
            f"what to_torch returns without `like`: {', '.join(unused)}.",
            stacklevel=2,
        )
    return network


def _calls(examples: Sequence[object], alone: object) -> list[Example]:
    """The arguments of several calls."""
    if alone is not None or not isinstance(examples, Sequence) or not examples:
        received = "both" if alone is not None else f"a {type(examples).__name__}" if len(examples) else "no example"
        raise CaptureError(
            "from_torch captures one call, from_torch(module, example_inputs), or several, "
            f"from_torch(module, examples=[...]); received {received}."
        )
    return [_arguments(x.args, x.kwargs) if isinstance(x, Call) else _arguments(x, None) for x in examples]


def _merged(networks: Sequence[tuple[Params, Spec]], examples: Sequence[Example]) -> tuple[Params, Spec]:
    """One network of several captured calls."""
    inputs = []
    for (_, spec), (args, kwargs) in zip(networks, examples, strict=True):
        several = not any(layer.alone for layer in spec.input_layers.values())
        tensors = bind(interface_of(spec), args, kwargs)
        inputs.append({name: x if several else x[:1] for name, x in tensors.items()})
    return merge(networks, inputs)


def _refuse_fixed(module: nn.Module, spec: Spec, sizes: Sequence[str]) -> None:
    """Refuse a network in which axes that have to be open are not."""
    layers = spec.input_layers
    ranges = {f"{name}.{k}": span for name, layer in layers.items() for k, span in enumerate(layer.ranges, 1)}
    causes = {f"{name}.{k}": line for name, layer in layers.items() for k, line in enumerate(layer.causes, 1)}
    named = (sizes,) if isinstance(sizes, str) else sizes
    wrong = [
        f"{axis}: it is held at {ranges[axis][0]}" + f" by {causes[axis]}" * bool(causes.get(axis))
        if axis in ranges
        else f"{axis}: there is no such axis; there are {', '.join(ranges)}"
        for axis in named
        if axis not in ranges or ranges[axis][0] == ranges[axis][1]
    ]
    if wrong:
        raise CaptureError(
            f"The axes that sizes= names have to come out open; of {type(module).__name__} they do not:\n  "
            + "\n  ".join(wrong)
        )


def _opened(
    twin: nn.Module, example: Example, module: nn.Module, outputs: Wanted, sizes: bool | Sequence[str]
) -> tuple[Params, Spec]:
    """Capture with as many sizes left open as possible; where ``sizes`` is false, only the number of examples."""
    # An example of one would be taken for a constant: two of it say the same.
    several = each_tensor(lambda x: x.repeat(2, *[1] * (x.ndim - 1)) if len(x) == 1 else x, example)
    patient = isinstance(sizes, Sequence) and len(sizes) > 0
    every = _axes(several)
    causes: dict[Axis, str] = {}
    fewer: Iterable[frozenset[Axis]] = ()
    for alike in () if sizes is False else (True, False):
        try:
            return _network(twin, several, Opened(frozenset(every), alike=alike, patient=patient), module, outputs)
        except OutputsError:
            raise
        except Exception as error:  # the next try raises it again, unless the open sizes were its cause
            causes = dict.fromkeys(every, f"{first_line(error):.200}")
            if isinstance(error, OverflowError):  # some of the axes would take as long
                break
            fewer = _fewer(twin, several, causes)
    try:
        for axes in fewer:
            with suppress(Exception):
                return _held(_network(twin, several, Opened(axes, patient=patient), module, outputs), causes)
        return _held(_network(twin, several, Opened(), module, outputs), causes)
    except OutputsError:
        raise
    except Exception as error:  # torch.export raises whatever the module's own code raises
        try:
            one = each_tensor(lambda x: x[:1], example)
            network = _network(twin, one, Opened(examples=False), module, outputs)
        except OutputsError:
            raise
        except Exception:
            raise CaptureError(_causes(twin, several, error)) from error
        warnings.warn(
            f"{type(module).__name__} is captured for one example at a time, since its number of examples is fixed: "
            f"{first_line(error)}",
            stacklevel=3,
        )
        if _separates(twin, several):
            params, spec = network
            return params, spec.declared({node.name: {"apart": True} for node in spec.inputs})
        return network


def _fewer(twin: nn.Module, example: Example, causes: dict[Axis, str]) -> Iterator[frozenset[Axis]]:
    """The axes that can be open by themselves: all of them, then one at a time; the others' errors become causes."""
    alone: list[Axis] = []
    for axis in causes if len(causes) > 1 else ():
        try:
            exported(twin.eval(), example, Opened(frozenset({axis})))
            alone.append(axis)
        except Exception as error:  # whatever the module's own code raises
            causes[axis] = f"{first_line(error):.200}"
    yield from dict.fromkeys([frozenset(alone), *(frozenset({axis}) for axis in alone)])


def _held(network: tuple[Params, Spec], causes: Mapping[Axis, str]) -> tuple[Params, Spec]:
    """A network whose inputs say why their axes are held at one size, where nothing is known by now."""
    params, spec = network
    fields = {}
    for k, (name, layer) in enumerate(spec.input_layers.items()):
        known = layer.causes or ("",) * len(layer.ranges)
        lines = [
            line or causes.get((k, axis), "") * (least == most)
            for axis, (line, (least, most, _)) in enumerate(zip(known, layer.ranges, strict=True), 1)
        ]
        fields[name] = {"causes": tuple(lines) if any(lines) else ()}
    return params, spec.declared(fields)


def _axes(example: Example) -> list[Axis]:
    """The axes of all tensors, but for those of the examples."""
    return [(k, axis) for k, x in enumerate(tensors(example)) for axis in range(1, x.ndim)]


def _separates(twin: nn.Module, several: Example) -> bool:
    """The module computes for a batch what it computes for its examples one by one."""

    def run(example: Example) -> list[Tensor]:
        args, kwargs = example
        return tensors(twin(*args, **kwargs))

    count = len(tensors(several)[0])
    try:
        with torch.no_grad(), quiet():
            whole = run(several)
            parts = [run(each_tensor(partial(_only, k), several)) for k in range(count)]
            joined = [torch.cat(pieces) for pieces in zip(*parts, strict=True)]
        return all(torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(whole, joined, strict=True))
    except Exception:  # whatever the module's own code raises for fewer examples
        return False


def _only(k: int, x: Tensor) -> Tensor:
    """The k-th example, as a batch of one."""
    return x[k : k + 1]


def _arguments(inputs: object, kwargs: Mapping[str, object] | None) -> Example:
    """Positional and keyword arguments; a dict of inputs names them. Views become tensors with memory of their own."""
    positional: tuple[object, ...] = ()
    named = dict(kwargs or {})
    if isinstance(inputs, Tensor):
        positional = (inputs,)
    elif isinstance(inputs, Mapping):
        named = {**inputs, **named}
    elif isinstance(inputs, Sequence) and not isinstance(inputs, str):
        positional = tuple(inputs)
    else:
        raise CaptureError(
            "Example inputs are a tensor, a tuple of the positional arguments or a dict of arguments by name; "
            f"received {type(inputs).__name__}."
        )
    return each_tensor(lambda x: x.contiguous() if x.layout is torch.strided else x, (positional, named))


def _leave_cache(module: nn.Module, kwargs: Mapping[str, object]) -> None:
    """Have models of ``transformers`` return no cache, unless the call asks for one: it is no tensor."""
    for part in module.modules() if "use_cache" not in kwargs else ():
        config = vars(part).get("config")
        if config is not None and getattr(config, "use_cache", False):
            config.use_cache = False


def _network(
    twin: nn.Module, example: Example, opened: Opened, module: nn.Module, outputs: Wanted
) -> tuple[Params, Spec]:
    """Capture the twin of a module, in inference and in training."""
    names = {id(leaf): path for path, leaf in twin.named_buffers()}
    tracked = {names[id(part.running_mean)]: part for part in twin.modules() if cumulative(part)}
    program, said = trained(twin, example, opened, [*tracked.values()])
    with tracing(twin, alike=opened.alike, patient=opened.patient):
        program = functional(program)
    alone = not opened.examples
    params, spec = Reader(program, alone=alone, cumulative=frozenset(tracked), wanted=outputs).read(module)
    spec = proven(params, spec, twin, *example)
    if said:
        warnings.warn(
            f"{type(module).__name__} does something else in training than in inference, at {said}: there, the "
            "captured network does in training what it does in inference.",
            stacklevel=4,
        )
    return params, spec


def _refuse(module: nn.Module, example: Example) -> None:
    """Refuse what could be captured wrongly or not at all, all of it at once."""
    leaves = pytree.tree_flatten_with_path(example)[0]
    inputs = {f"input {dotted(path[1:])}": x for path, x in leaves if isinstance(x, Tensor)}
    if not inputs:
        raise CaptureError("from_torch runs the module on an example; received no tensor. Pass example inputs.")
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers()), **inputs}
    errors: list[str] = []
    for name, x in tensors.items():
        plain = type(x) in (Tensor, nn.Parameter, nn.Buffer) and x.layout is torch.strided and not x.is_quantized
        if not plain:
            kind = "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            errors.append(f"{name}: {type(x).__name__} ({kind}), where a plain dense tensor is needed")
    errors += [f"{name}: has no axis of examples, its axis 0" for name, x in inputs.items() if not x.ndim]
    counts = {name: len(x) for name, x in inputs.items() if x.ndim}
    if len(set(counts.values())) > 1:
        errors.append(f"as many examples in every input: {', '.join(f'{name} has {n}' for name, n in counts.items())}")
    devices: dict[str, list[str]] = {}
    for name, x in tensors.items():
        devices.setdefault(str(x.device), []).append(name)
    if len(devices) > 1:
        listed = "; ".join(
            f"{kind}: {', '.join(names[:4])}{', ...' * (len(names) > 4)}" for kind, names in devices.items()
        )
        errors.append(f"one device for the module and its inputs, received {listed}; move them, x.to(...)")
    dtypes = {x.dtype for x in module.parameters() if x.is_floating_point()}
    strange = {
        name: x.dtype for name, x in inputs.items() if x.is_floating_point() and dtypes and x.dtype not in dtypes
    }
    errors += [
        f"{name}: {dtype}, the module {', '.join(map(str, dtypes))}; convert one" for name, dtype in strange.items()
    ]
    if errors:
        raise CaptureError(f"from_torch cannot take {type(module).__name__}:\n  " + "\n  ".join(errors))


def _causes(module: nn.Module, example: Example, error: Exception) -> str:
    """Why a module cannot be captured: every cause with its line, as far as torch finds them."""
    if isinstance(error, CaptureError):
        return f"{error}"
    lines: list[str] = []
    try:
        with torch.no_grad(), quiet():
            report: Any = torch.export.draft_export(module, *example, strict=False)._report  # type: ignore[attr-defined]
        files = file_names()
        for failure in report.failures:
            frames = [*failure.data.get("stack", ()), *failure.data.get("user_stack", ())]
            places = [(files[f["filename"]], f["line"], f.get("loc", "")) for f in frames]
            users = [f"{file}:{line}: {code}" for file, line, code in places if "/torch/" not in file]
            lines.append(
                f"{failure.failure_type.name.lower().replace('_', ' ')} at {users[-1] if users else 'unknown'}"
            )
    except Exception:  # the first cause is known already
        lines.clear()
    if not lines:
        said = [line for line in str(error).splitlines() if line.strip()]
        more = f"\n  (and {len(said) - 12} lines more: see __cause__)" if len(said) > 12 else ""
        return f"torch.export cannot capture {type(module).__name__}: " + "\n  ".join(said[:12]) + more
    listed = "\n  ".join(dict.fromkeys(lines))
    return f"torch.export cannot capture {type(module).__name__}; all that it found:\n  {listed}"

"""Modules out: a plain ``torch.nn.Module`` that runs a spec and has the parameters' own names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from taylorfx.interop.calls import bind, generator_of, interface_of
from taylorfx.interop.like import Original, resized
from taylorfx.network.interface import Interface
from taylorfx.network.parameters import check, fits
from taylorfx.network.run import run
from taylorfx.network.spec import Spec
from taylorfx.progress import LOG
from taylorfx.tree import Params, flatten, unflatten

__all__ = ["SpecModule", "to_torch"]

M = TypeVar("M", bound=nn.Module)


class SpecModule(nn.Module):
    """A network as a module: it trains, moves, copies, pickles, compiles and saves like any other.

    ``spec`` is the network; parameters and buffers lie in submodules by the paths that they have in the tree. In
    training mode it moves its running statistics and draws dropout from torch's own generator. ``forward`` has the
    arguments of the module that was captured, or one for every input, by its name.
    """

    def __new__(cls, params: Params | None = None, spec: Spec | None = None) -> SpecModule:
        # Each interface has a class: torch.export, compilers and trainers read the signature from the class's forward.
        kind: Any = cls  # which mypy does not take for hashable
        return super().__new__(cls if spec is None else _called(kind, interface_of(spec)))

    def __init__(self, params: Params, spec: Spec) -> None:
        super().__init__()
        check(params, spec)
        self.spec = spec
        self._interface = interface = interface_of(spec)
        buffers = {node.path(leaf) for node in spec.nodes for leaf in node.layer.buffers}
        leaves = flatten(params)
        for path, leaf in leaves.items():
            owner, name = _owner(self, path, create=True)
            leaf = leaf.detach().clone()
            if path not in buffers and (leaf.is_floating_point() or leaf.is_complex()):
                owner.register_parameter(name, nn.Parameter(leaf, requires_grad=path not in interface.frozen))
            else:
                saved = not path.startswith("constants.") and path not in interface.transient
                owner.register_buffer(name, leaf, persistent=saved)
        _tie(self, interface, leaves)

    def __reduce__(self) -> tuple[object, ...]:
        base = next(cls for cls in type(self).__mro__ if "_interface_of_class" not in vars(cls))
        return _blank, (base, self._interface), self.__dict__

    def tree(self) -> Params:
        """The parameters and buffers as they are now, as a tree."""
        return unflatten(zip(self.spec.layout.paths, self._leaves(), strict=True))

    def _leaves(self) -> list[Tensor]:
        """The parameters and buffers as they are now, in the order of the layout."""
        layout = self.spec.layout
        modules: list[Any] = [self]
        try:
            for parent, key in layout.subtrees:
                modules.append(modules[parent]._modules[key])
            return layout.leaves([{**module._parameters, **module._buffers} for module in modules])
        except (KeyError, AttributeError):  # computed from others (torch.nn.utils.parametrize), or a plain attribute
            return [getattr(*_owner(self, path)) for path in layout.paths]

    def forward(self, *args: object, **kwargs: object) -> Any:
        """The network's outputs: a tensor, a tuple of tensors, or a dict of them.

        Raises:
            TypeError: naming every argument that was not captured.
            ShapeError: if the inputs do not fit.
        """
        inputs = bind(self._interface, args, kwargs, self.spec.calls)
        leaves, compiling = self._leaves(), torch.compiler.is_compiling()
        if not compiling and not fits(leaves, self.spec):
            check(self.tree(), self.spec)
        if not self.training:
            return run(leaves, self.spec, (inputs,))[0]
        device = next((x.device for x in inputs.values()), torch.device("cpu"))
        generator = None if compiling else generator_of(device)
        outputs, moved = run(leaves, self.spec, (inputs,), training=True, generator=generator)
        with torch.no_grad():
            for k, leaf in moved.items():
                leaves[k].copy_(leaf)
        return outputs


@overload
def to_torch(
    params: Params,
    spec: Spec,
    *,
    like: M,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    unchanged: Sequence[str] = (),
    progress: bool = False,
) -> M: ...


@overload
def to_torch(params: Params, spec: Spec, *, like: None = None) -> SpecModule: ...


def to_torch(
    params: Params,
    spec: Spec,
    *,
    like: nn.Module | None = None,
    example_inputs: object = None,
    example_kwargs: Mapping[str, object] | None = None,
    unchanged: Sequence[str] = (),
    progress: bool = False,
) -> nn.Module:
    """A module that computes what the spec computes; its ``state_dict`` has the parameters' paths as names.

    It comes in inference mode, has the arguments of the captured module's ``forward`` (what was not captured is refused
    by name), keeps names that share a tensor tied, and does not train what was captured frozen.

    Args:
        like: the module that was captured. The result is then of its own class, its layers made smaller: their
            tensors, the fields that say their sizes, and every other attribute of whole numbers that has to change
            so that its ``forward`` computes what the spec does. Which those are is found out by trying, and proven: at
            the example, at two other sizes and numbers of examples where the network takes them, with optional
            arguments that change nothing for the whole module, with rows that are masked, with a cache, in training
            with equal seeds, and by its other public methods with the required arguments of ``forward``: what gives
            values of the network gives them again, and the others run. Methods that change the module's tensors are
            not tried. Modes and ``requires_grad`` are those of ``like``, which is left as it is.
            `taylorfx.interop.holdable` says beforehand what a class can hold.
        example_inputs, example_kwargs: what to compare on, as for `from_torch`; by default random numbers of the
            shapes and types that the spec's inputs declare.
        unchanged: parameters and submodules of ``like`` that are not in the network and stay as they are, by name:
            an auxiliary head whose inputs keep their sizes. Those that training mode uses need not be named: whether
            they fit is seen there. Also methods that need not work with smaller layers.
        progress: draw a bar over the calls on which a module ``like`` another is proven, by rich.

    Raises:
        SpecError: if the parameters do not fit the spec.
        LikeError: if the module's own ``forward`` fails with smaller layers, or computes something else, whatever its
            attributes are: with the line of its code. Without ``like`` there is always a module. Also if something was
            cut and the module has parameters that are neither in the network nor fit in training; all are listed.
    """
    if like is None:
        return SpecModule(params, spec).eval()
    original, kind = Original(like, params, spec, example_inputs, example_kwargs), type(like).__name__
    LOG.info("to_torch: looks for the sizes of a smaller %s", kind)
    module = resized(original, params, spec, unchanged, progress=progress)
    LOG.info("to_torch: the smaller %s is proven on %d calls", kind, len(original.calls))
    return module


@lru_cache(maxsize=256)
def _called(cls: type[SpecModule], interface: Interface) -> type[SpecModule]:
    """The same class with a ``forward`` of these arguments."""

    def forward(self: SpecModule, *args: object, **kwargs: object) -> object:
        return cls.forward(self, *args, **kwargs)

    vars(forward)["__signature__"], forward.__doc__ = interface.signature("self"), cls.forward.__doc__
    names = ("__module__", "__qualname__", "__doc__")
    members = {"forward": forward, "_interface_of_class": interface, **{name: getattr(cls, name) for name in names}}
    return type(cls.__name__, (cls,), members)


def _blank(cls: Any, interface: Interface) -> SpecModule:
    """A module before its state comes, for copies and pickles."""
    blank: SpecModule = nn.Module.__new__(_called(cls, interface))
    return blank


def _tie(module: SpecModule, interface: Interface, leaves: Mapping[str, Tensor]) -> None:
    """Give submodules and tensors their second names; a name whose first one is gone has no second."""
    known = dict(module.named_modules())
    for second, first in sorted(interface.ties, key=lambda tie: tie[1] not in leaves):  # tensors before submodules
        if second in leaves or not (first in leaves or first in known):
            continue
        owner, name = _owner(module, second, create=True)
        if first in leaves:
            home, leaf = _owner(module, first)
            if leaf in home._parameters:
                owner.register_parameter(name, home._parameters[leaf])
            else:
                saved = leaf not in home._non_persistent_buffers_set
                owner.register_buffer(name, getattr(home, leaf), persistent=saved)
        else:
            owner.add_module(name, known[first])


def _owner(module: nn.Module, path: str, *, create: bool = False) -> tuple[nn.Module, str]:
    """The submodule that holds a path, and the name under which it does."""
    *parents, name = path.split(".")
    for parent in parents:
        if create and parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    return module, name

"""A smaller model of a class of transformers: a config with other numbers, the parameters, and the proof."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor, nn

from taylorfx.interop.huggingface.by_layer import differing
from taylorfx.interop.huggingface.depth import Layers, Stack, shallower, stacks_of
from taylorfx.interop.huggingface.fields import (
    Changes,
    ConfigError,
    Form,
    Shapes,
    check_model,
    config_of,
    refusal,
    shapes_of,
)
from taylorfx.interop.huggingface.vocabulary import renumbered
from taylorfx.interop.like import Original, renewed, used
from taylorfx.interop.nearness import apart, only_rounding
from taylorfx.interop.proof import Call, copied, differs, truth
from taylorfx.layers import ShapeError
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, flatten

__all__ = ["Made", "Source"]


class Made(NamedTuple):
    """A smaller model, and the layers that it still has."""

    model: Any
    layers: Layers


class Candidate(NamedTuple):
    """A config with which the class has the shapes of these tensors, by the paths of that config."""

    layers: Layers
    changes: Changes
    tensors: Mapping[str, Tensor]


class Source:
    """A model before anything was cut, and the calls on which smaller ones are compared with it.

    Args:
        model: the model that was captured; it is left as it is.
        params, spec: a network of it, which may be smaller.
        network: the whole network; without one the model is captured when it is needed.
        tokens: the new numbers of tokens, of a network that has kept some (`keep_tokens`).
        per_layer: whether layers may differ, by ``per_layer_config``.

    Raises:
        ConfigError: for a module that is no model of transformers, and for special tokens that are gone.
    """

    def __init__(
        self,
        model: Any,
        params: Params,
        spec: Spec,
        example_inputs: object = None,
        example_kwargs: Mapping[str, object] | None = None,
        network: tuple[Params, Spec] | None = None,
        tokens: Tensor | None = None,
        *,
        per_layer: bool = False,
    ) -> None:
        check_model(model)
        self.model, self.tokens, self.per_layer = model, tokens, per_layer
        self.form = Form(type(model), model.config if tokens is None else _renumbered(model.config, tokens))
        self.original = Original(model, params, spec, example_inputs, example_kwargs, network)
        self.usual = shapes_of(model)

    @cached_property
    def stacks(self) -> Sequence[Stack]:
        """The layers that fields of the config count."""
        return stacks_of(self.form)

    @cached_property
    def _used(self) -> set[str]:
        """The parameters that the model uses at the example."""
        return used(self.original.whole, self.original.calls[0])

    def lost(self, params: Params) -> list[str]:
        """The parameters that the model uses at the example and a smaller network does not have, under any name."""
        known = self.original.tensors
        there = {id(known[path]) for path in flatten(params) if path in known}
        missing = [path for path in self.usual if id(known[path]) not in there]
        return [path for path in missing if path in self._used] if missing else []

    def left(self, params: Params) -> dict[Stack, Sequence[int]]:
        """By stack, the layers that a smaller network still has, where it has not all of them.

        A layer has left without all the parameters that every layer of the stack has.
        """
        stay = dict[Stack, Sequence[int]]()
        if lost := {*self.lost(params)}:
            for stack in self.stacks:
                layers = stack.common([path for path in self.usual if path in self._used])
                here = tuple(k for k, paths in layers.items() if not paths or not lost.issuperset(paths))
                if len(here) < stack.size:
                    stay[stack] = here
        return stay

    def candidates(self, params: Params) -> Iterator[Candidate]:
        """Configs with which the class has the shapes of a smaller network's parameters.

        Raises:
            ConfigError: if a field had to have several values, and for parameters that the model does not have.
        """
        if foreign := self.original.foreign(flatten(params)):
            raise ConfigError(foreign)
        stay = self.left(params)
        forms = [*shallower(self.form, stay)] if stay else [Layers(self.form, {})]
        if not forms:
            raise ConfigError(refusal(self.form.cls, self.form.config, [f"{_said(stay)}: no config has them"]))
        for layers in forms:
            try:
                tensors = self._tensors(params, layers)
                shapes = {path: tuple(x.shape) for path, x in tensors.items()}
                yield from (Candidate(*config, tensors) for config in self._configs(layers, shapes))
            except ConfigError:
                if layers is forms[-1]:
                    raise

    def _configs(self, layers: Layers, shapes: Shapes) -> Iterator[tuple[Layers, Changes]]:
        """Configs with which the class has these shapes, those of equal layers first.

        Raises:
            ConfigError: if a field had to have several values.
        """
        refused = None
        try:
            yield from ((layers, changes) for changes in layers.form.solutions(shapes))
        except ConfigError as error:
            refused = error
        if self.per_layer and len(self.stacks) == 1:
            stack = self.stacks[0]
            stack = stack._replace(size=len(layers.stay.get(stack, range(stack.size))))
            for form in differing(layers.form, stack, shapes):
                refused = None
                yield Layers(form, layers.stay), {}
        if refused:
            raise refused

    def _tensors(self, params: Params, layers: Layers) -> dict[str, Tensor]:
        """What the smaller model saves, by path: the network's tensors, under all of their names, and what it left out.

        Raises:
            ConfigError: for parameters of the class that the model does not have.
        """
        leaves, known = flatten(params), self.original.tensors
        new = {id(known[path]): leaf for path, leaf in leaves.items() if path in known}
        detached = {id(x): new.get(id(x), x).detach() for x in known.values()}
        if not layers.stay:
            return {path: detached[id(known[path])] for path in self.usual}
        former = {path: layers.former(path, self.usual) for path in layers.form.shapes({}) or ()}
        if not former or (strange := [path for path, old in former.items() if old not in self.usual]):
            said = f"the class has {', '.join(strange[:6])} besides" if former else "the class cannot be built"
            raise ConfigError(refusal(self.form.cls, self.form.config, [f"{_said(layers.stay)}: {said}"]))
        return {path: detached[id(known[old])] for path, old in former.items()}

    def make(self, params: Params, spec: Spec, *, every_call: bool = True) -> Made:
        """The smaller model of the same class, by the config that is right; if several may be, the nearest.

        Two heads of four dimensions and four of two have the same shapes. Where attention looks at all positions nearly
        alike, their outputs hardly differ.

        Args:
            every_call: compare on all calls, of other lengths, masked and cached ones, too; otherwise at the example.

        Raises:
            ConfigError: if there is no such config.
        """
        causes: list[str] = []
        right: list[tuple[float, Candidate]] = []
        example = self.original.calls[0]
        for candidate in self.candidates(params):
            wrong = next(self._wrong(self._filled(candidate), params, spec, every_call=every_call), "")
            if not wrong:
                right.append((apart(self._filled(candidate), params, spec, example), candidate))
                if not right[-1][0]:
                    break
                continue
            said = [f"{'.'.join(map(str, key))}={value}" for key, value in candidate.changes.items()]
            said += [_said(candidate.layers.stay)] * bool(candidate.layers.stay)
            causes.append(f"with {', '.join(said) or 'the same config'} it computes something else, {wrong}")
        for share, candidate in sorted(right, key=lambda each: each[0]):
            if not share or only_rounding(share, self._filled(candidate), params, spec, example):
                return Made(self._filled(candidate), candidate.layers)  # without what a call may have left in it
            causes.append(f"its outputs differ by {share:.0e} of the largest, and do so in double precision, too")
        if lost := [path for path in self.lost(params) if not self._in_layers(path, self.left(params))]:
            more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
            causes.append(f"it has no {', '.join(lost[:3])}{more}; a config says how many whole layers there are")
        if not causes:
            names = ", ".join(x.name for x in self.form.fields)
            leaves = flatten(params)
            changed = [f"{path} of {tuple(x.shape)}" for path, x in leaves.items() if self.usual.get(path) != x.shape]
            causes = [f"no values of {names} give {', '.join(changed[:6])}"]
        raise ConfigError(refusal(type(self.model), self.model.config, causes))

    def _in_layers(self, path: str, stay: Mapping[Stack, Sequence[int]]) -> bool:
        """Whether a parameter is in a layer that has left."""
        numbers = [(stack.layer(path), layers) for stack, layers in stay.items()]
        return any(k is not None and k not in layers for k, layers in numbers)

    def resized(self, params: Params, spec: Spec) -> Made:
        """A copy of the model itself with smaller layers, to be trained on: with its modes, hooks, frozen parameters.

        Its numbers, and those of its config, are those of the model that `make` proves.

        Raises:
            ConfigError: if there is no such config.
        """
        made, layers = self.make(params, spec)
        leaves, known = flatten(params), self.original.tensors
        new = {id(known[path]): renewed(known[path], leaf) for path, leaf in leaves.items() if path in known}
        small = copied(self.model, new)
        for stack, stay in layers.stay.items():
            for home in stack.homes:
                _keep_layers(small.get_submodule(home), stay)
        parts: dict[str, Any] = dict(small.named_modules())
        for name, part in made.named_modules():
            _take_numbers(vars(parts[name]), vars(part))
            for key, buffer in part.named_buffers(recurse=False):
                if parts[name].get_buffer(key).shape != buffer.shape:
                    parts[name]._buffers[key] = buffer
        _take_numbers(vars(parts[""].config), vars(made.config))
        probe = copied(small, {id(x): x for x in small.parameters()})
        if wrong := next(self._wrong(probe, params, spec, every_call=False), ""):
            raise ConfigError(refusal(type(self.model), self.model.config, [f"the model that was trained: {wrong}"]))
        return Made(small, layers)

    def _filled(self, candidate: Candidate) -> Any:
        """A model with this config whose parameters are these tensors themselves; those of one tensor are tied.

        What the class allocates for its own is never written, and so takes no memory.
        """
        tensors = candidate.tensors
        model: Any = candidate.layers.form.build(candidate.changes, "cpu")
        trained = {path for path, _ in model.named_parameters(remove_duplicate=False)}
        parameters = {id(x): nn.Parameter(x, requires_grad=False) for path, x in tensors.items() if path in trained}
        state = {path: parameters[id(x)] if id(x) in parameters else x.clone() for path, x in tensors.items()}
        model.load_state_dict(state, assign=True)
        if len(parameters) < len(trained):
            model.tie_weights()
        usual = dict(self.model.named_buffers())
        for path, x in [*model.named_buffers()]:
            if path not in tensors and path in usual:  # what the class computes, as rotary frequencies
                home, _, name = path.rpartition(".")
                setattr(model.get_submodule(home), name, x.to(usual[path]))
        generation = getattr(self.model, "generation_config", None)
        if generation is not None:
            known = copy.deepcopy(generation)
            vars(model)["generation_config"] = known if self.tokens is None else _renumbered(known, self.tokens)
        return model

    def _wrong(self, model: nn.Module, params: Params, spec: Spec, *, every_call: bool) -> Iterator[str]:
        """Calls on which the model does not give what the network gives, and how it differs."""
        calls = self.original.calls if every_call else self.original.calls[:1]
        for call in calls:
            try:
                wrong = self._difference(model, params, spec, call)
            except ShapeError as error:
                wrong = "" if call is not calls[0] else f"{error}"
            if wrong and (call is calls[0] or self.original.certain(call)):
                yield f"{call.title}: {wrong.splitlines()[0]}"

    def _difference(self, model: nn.Module, params: Params, spec: Spec, call: Call) -> str:
        expected = truth(params, spec, call)
        try:
            results = call.outputs(model)
        except Exception as error:  # whatever the model's own code raises
            return f"{type(error).__name__}: {error}"
        finally:
            model.eval()
        return differs(results, expected, call, spec)


def _take_numbers(old: dict[str, Any], new: Mapping[str, Any]) -> None:
    """Write the numbers among some attributes over those of the same names; of a config within a config, too.

    >>> attributes = {"hidden": 8, "depths": (2, 2), "training": True, "name": "a"}
    >>> _take_numbers(attributes, {"hidden": 6, "depths": (2, 1), "training": False, "name": "b"})
    >>> attributes
    {'hidden': 6, 'depths': (2, 1), 'training': True, 'name': 'a'}
    """
    for name, value in new.items():
        if hasattr(value, "to_dict") and name in old and type(old[name]) is type(value):
            _take_numbers(vars(old[name]), vars(value))
        elif type(value) in (int, float) or (
            isinstance(value, (tuple, list)) and {*map(type, value)} <= {int, float, str}
        ):
            old[name] = copy.copy(value)


def _keep_layers(layers: nn.Module, stay: Sequence[int]) -> None:
    """Leave only some of a module's numbered parts, which get new numbers.

    >>> module = nn.ModuleList([nn.Linear(k, 1) for k in (1, 2, 3)])
    >>> _keep_layers(module, (0, 2))
    >>> module
    ModuleList(
      (0): Linear(in_features=1, out_features=1, bias=True)
      (1): Linear(in_features=3, out_features=1, bias=True)
    )
    """
    parts = [layers.get_submodule(str(k)) for k in stay]
    for name in [name for name, _ in layers.named_children() if name.isdecimal()]:
        delattr(layers, name)
    for k, part in enumerate(parts):
        layers.add_module(str(k), part)


def _said(stay: Mapping[Stack, Sequence[int]]) -> str:
    """What layers stay, in words."""
    return ", ".join(f"layers {', '.join(map(str, stay))} of {stack.homes[0]}" for stack, stay in stay.items())


def _renumbered(config: Any, tokens: Tensor) -> Any:
    """A copy of a config with the new numbers of its special tokens."""
    return config_of(config, renumbered(config.to_dict(), tokens))

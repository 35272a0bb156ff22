"""A smaller model of a class of transformers: a config with other numbers, the parameters, and the proof."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from taylorfx.interop.huggingface.fields import (
    IMPLEMENTATIONS,
    Changes,
    ConfigError,
    Form,
    check_model,
    refusal,
    shapes_of,
)
from taylorfx.interop.huggingface.vocabulary import renumbered
from taylorfx.interop.like import Original, renewed
from taylorfx.interop.proof import Call, copied, differs, truth
from taylorfx.layers import ShapeError
from taylorfx.network.spec import Spec
from taylorfx.tree import Params, flatten

__all__ = ["Made", "Source"]


class Made(NamedTuple):
    """A smaller model, and the fields of its config that are new."""

    model: Any
    changes: Changes


class Source:
    """A model before anything was cut, and the calls on which smaller ones are compared with it.

    Args:
        model: the model that was captured; it is left as it is.
        params, spec: a network of it, which may be smaller.
        network: the whole network; without one the model is captured when it is needed.
        tokens: the new numbers of tokens, of a network that has kept some (`keep_tokens`).

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
    ) -> None:
        check_model(model)
        self.model, self.tokens = model, tokens
        self.form = Form(type(model), model.config if tokens is None else _renumbered(model.config, tokens))
        self.original = Original(model, params, spec, example_inputs, example_kwargs, network)
        self.usual = shapes_of(model)

    def tensors(self, params: Params) -> dict[str, Tensor]:
        """What the smaller model saves, by path: the network's tensors, under all of their names, and what it left out.

        Raises:
            ConfigError: for parameters that the model does not have.
        """
        leaves, known = flatten(params), self.original.tensors
        if foreign := self.original.foreign(leaves):
            raise ConfigError(foreign)
        new = {id(known[path]): leaf for path, leaf in leaves.items() if path in known}
        detached = {id(x): new.get(id(x), x).detach() for x in known.values()}
        return {path: detached[id(known[path])] for path in self.usual}

    def make(self, params: Params, spec: Spec, *, every_call: bool = True) -> Made:
        """The smaller model of the same class, by the first config that is right.

        Args:
            every_call: compare on all calls, of other lengths, masked and cached ones, too; otherwise at the example.

        Raises:
            ConfigError: if there is no such config.
        """
        tensors = self.tensors(params)
        causes: list[str] = []
        for changes in self.form.solutions({path: tuple(x.shape) for path, x in tensors.items()}):
            model = self._filled(changes, tensors)
            wrong = next(self._wrong(model, params, spec, every_call=every_call), "")
            if not wrong:
                return Made(self._filled(changes, tensors), changes)  # without what a call may have left in it
            said = ", ".join(f"{'.'.join(map(str, key))}={value}" for key, value in changes.items())
            causes.append(f"with {said or 'the same config'} it computes something else, {wrong}")
        if not causes:
            changed = [f"{path} of {tuple(x.shape)}" for path, x in tensors.items() if self.usual[path] != x.shape]
            causes = [f"no values of {', '.join(x.name for x in self.form.fields)} give {', '.join(changed[:6])}"]
        raise ConfigError(refusal(type(self.model), self.model.config, causes))

    def resized(self, params: Params, spec: Spec) -> Any:
        """A copy of the model itself with smaller layers, to be trained on: with its modes, hooks, frozen parameters.

        Its numbers, and those of its config, are those of the model that `make` proves.

        Raises:
            ConfigError: if there is no such config.
        """
        made = self.make(params, spec).model
        leaves, known = flatten(params), self.original.tensors
        new = {id(known[path]): renewed(known[path], leaf) for path, leaf in leaves.items() if path in known}
        small = copied(self.model, new)
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
        return small

    def _filled(self, changes: Changes, tensors: Mapping[str, Tensor]) -> Any:
        """A model with this config whose parameters are these tensors themselves; those of one tensor are tied.

        What the class allocates for its own is never written, and so takes no memory.
        """
        model: Any = self.form.build(changes, "cpu")
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
        elif type(value) in (int, float) or (isinstance(value, (tuple, list)) and {*map(type, value)} <= {int, float}):
            old[name] = copy.copy(value)


def _renumbered(config: Any, tokens: Tensor) -> Any:
    """A copy of a config with the new numbers of its special tokens."""
    data = renumbered(config.to_dict(), tokens)
    new = type(config).from_dict(data)
    for name in IMPLEMENTATIONS:
        if getattr(config, name, None) is not None:
            setattr(new, name, getattr(config, name))
    return new

"""Models of transformers whose layers differ in size: every layer is built from its own ``config.per_layer_config``.

Most classes read one number for all layers, and refuse a config that has several. `unequal` makes of such a class one
that builds each layer from the config of that layer. This file needs nothing but torch and transformers: it stands
beside the config of a saved model, and ``from_pretrained(..., trust_remote_code=True)`` runs it.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

__all__ = ["unequal"]


def unequal(cls: Any) -> Any:
    """A class like this one whose layers are built from ``config.per_layer_config``, each from its own.

    What is outside the layers is built from the config of the whole model, in which the numbers that differ between
    layers are those of the largest.
    """

    class Unequal(cls):  # type: ignore[misc]
        def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
            differing = config.to_dict().get("per_layer_config")
            config.per_layer_config = None
            super().__init__(config, *args, **kwargs)
            config.per_layer_config = differing
            if differing:
                for layers in _stacks(self, config.num_hidden_layers):
                    for k, own in enumerate(config.per_layer_config):
                        layers[k] = _layer(type(layers[k]), own, k, config)
                self.init_weights()

    Unequal.__name__, Unequal.__qualname__ = cls.__name__, cls.__qualname__
    return Unequal


def _stacks(model: Any, size: int) -> list[nn.ModuleList]:
    """The lists of layers, but for those within layers, as a list of as many experts."""
    lists = {name: x for name, x in model.named_modules() if isinstance(x, nn.ModuleList) and len(x) == size}
    return [x for name, x in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]


def _layer(cls: Any, own: Any, number: int, whole: Any) -> nn.Module:
    """A layer of its own config; its parts refer to the config of the model, by which attention is chosen."""
    names = inspect.signature(cls.__init__).parameters
    known = {"config": own, "layer_idx": number, "layer_id": number, "layer_number": number}
    layer: nn.Module = cls(**{name: x for name, x in known.items() if name in names})
    for module in layer.modules():
        if getattr(module, "config", None) is own:
            vars(module)["config"] = whole
    return layer

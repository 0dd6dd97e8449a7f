"""The decoder layers of a model of transformers, whatever its family calls their list."""

from __future__ import annotations

from typing import Any

from torch import nn

from honed.kit.errors import FailedPrecondition


def decoder_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """The list of layers of the model's body, and the name that it has there.

    Raises:
        FailedPrecondition: There is no single list with as many layers as the configuration says.
    """
    body, depth = model.base_model, int(model.config.num_hidden_layers)
    lists = [(n, module) for n, module in body.named_children() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if len(lists) != 1:
        raise FailedPrecondition(f"{type(body).__name__} has no single list of layers: it can only be taken whole")
    return lists[0]


def keep_layers(model: Any, kept: slice) -> None:
    """Drops all other layers, from the configuration too.

    Raises:
        FailedPrecondition: See `decoder_layers`.
    """
    name, layers = decoder_layers(model)
    setattr(model.base_model, name, layers[kept])
    config = model.config
    config.num_hidden_layers = len(layers[kept])
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[kept]

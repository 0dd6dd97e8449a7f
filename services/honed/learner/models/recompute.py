"""Gradient checkpointing: of a layer's forward pass only what enters it is kept; the rest is computed again on the way back."""

from __future__ import annotations

from typing import Any, Final

from honed.models import lean  # noqa: F401  before transformers

# isort: split
from transformers.modeling_layers import GradientCheckpointingLayer

from honed.kit.errors import FailedPrecondition

SETTING: Final = "learner.gradient_checkpointing"


def recompute_layers(language_model: Any) -> None:
    """Switches it on for every layer of a model of transformers; the model stays in evaluation mode.

    Raises:
        FailedPrecondition: transformers has no layers of this model that it could compute again.
    """
    layers = [module for module in language_model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers or not language_model.supports_gradient_checkpointing:
        raise FailedPrecondition(
            f"{SETTING}: {type(language_model).__name__} has no layers that can be computed again; set it to false"
        )
    # Nothing here draws random numbers: there is no dropout.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    language_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    for layer in layers:
        layer.training = True  # asked by the layer alone, not by the attention and the dropout inside of it

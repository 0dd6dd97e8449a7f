"""One kernel for an activation that transformers computes in eight.

GPT-2's "new" GELU, `0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))` (Hendrycks and Gimpel 2016, equation 2), is written out
in transformers as powers, products and a tanh: each makes a tensor as wide as the widest of a layer, and one more on the way
back. torch has the same function as one kernel, and its gradient as another.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from honed.models import lean  # noqa: F401  before transformers

# isort: split
from transformers.activations import AccurateGELUActivation, FastGELUActivation, NewGELUActivation

_WRITTEN_OUT = (NewGELUActivation, FastGELUActivation, AccurateGELUActivation)


def fuse_activations(model: Any) -> None:
    """Puts torch's kernel in the place of each GELU by tanh that is written out; a model without one stays as it is.

    The function is the same; results differ by rounding. Weights and configuration are not touched.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, _WRITTEN_OUT):
                setattr(module, name, nn.GELU(approximate="tanh"))

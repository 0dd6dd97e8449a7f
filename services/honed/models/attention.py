"""Attention in float32 inside a bfloat16 model, for CPUs.

PyTorch's CPU kernel for attention's gradient is about five times slower in bfloat16 than in float32
(62 sequences of 33 tokens, 4 heads of 64: 26 ms against 5 ms on one core), while matrix products
are more than twice as fast. So products run in bfloat16 and attention does not.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from honed.models import lean  # noqa: F401  before transformers

# isort: split
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_float32"

Precision = Literal["float32", "bfloat16"]
"""What a transformer computes in. Weights, logits and log-probabilities are float32 either way."""


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    with torch.autocast(query.device.type, enabled=False):
        result: tuple[Tensor, None] = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, **kwargs
        )
    return result


def use_float32_attention(language_model: Any) -> None:
    """Makes a model of transformers that attends by SDPA attend in float32; no other changes."""
    if language_model.config._attn_implementation != "sdpa":
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    language_model.set_attn_implementation(NAME)

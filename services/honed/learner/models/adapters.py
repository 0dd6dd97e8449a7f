"""Low-rank adapters (Hu et al. 2021): a matrix W becomes `W + alpha / rank * B A`, of which A and B alone train.

A is random and B zero at first, so that the model begins as it was. When training ends the product is added to W: what is left
is a model like any other, and no slower. Adapters are on all matrices of the decoder layers; embeddings and norms stay as they
are. That leaves an optimizer's state of a small part of the weights, and more of what the model knew.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers.pytorch_utils import Conv1D

from honed.kit.errors import FailedPrecondition
from honed.models.layers import decoder_layers

_WEIGHT: Final = "weight"


class LowRank(nn.Module):
    """What is added to one matrix."""

    def __init__(self, weight: Tensor, *, transposed: bool, rank: int, alpha: float, rng: torch.Generator) -> None:
        """Adds nothing at first.

        Args:
            weight: `[out, in]`, or `[in, out]` if `transposed`, as GPT-2 has it.
            transposed: See there.
            rank: Of the product.
            alpha: The product counts `alpha / rank`.
            rng: Of A, uniform within 1 / sqrt(in), as nn.Linear begins; on the host.
        """
        super().__init__()
        width, fan_in = weight.shape[::-1] if transposed else weight.shape
        bound = 1.0 / math.sqrt(fan_in)
        first = torch.empty(rank, fan_in).uniform_(-bound, bound, generator=rng)
        self.a = nn.Parameter(first.to(weight.device))
        self.b = nn.Parameter(torch.zeros(width, rank, device=weight.device))
        self._transposed, self._scale = transposed, alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix with the product added, float32 whatever the passes compute in."""
        with torch.autocast(weight.device.type, enabled=False):
            product = self.b @ self.a
            return weight + self._scale * (product.T if self._transposed else product)


@contextmanager
def adapted(model: Any, head: nn.Module, *, rank: int, alpha: float, rng: torch.Generator) -> Iterator[None]:
    """Has only adapters, and a head, train while the block runs; then the adapters are part of the weights.

    Args:
        model: Of transformers; what trains of it is all that asks for a gradient.
        head: Of the model; trains as it is.
        rank: Of each adapter.
        alpha: See `LowRank`.
        rng: Of the adapters' beginnings.

    Raises:
        FailedPrecondition: The model has no list of decoder layers, or no matrices in them.
    """
    _, layers = decoder_layers(model)
    matrices = [module for module in layers.modules() if isinstance(module, nn.Linear | Conv1D)]
    if not matrices:
        raise FailedPrecondition(f"{type(model).__name__} has no matrices that adapters could be on: train all of it")
    model.requires_grad_(False)
    head.requires_grad_(True)
    try:
        for module in matrices:
            added = LowRank(module.weight, transposed=isinstance(module, Conv1D), rank=rank, alpha=alpha, rng=rng)
            parametrize.register_parametrization(module, _WEIGHT, added)
        yield
    finally:
        for module in matrices:
            if parametrize.is_parametrized(module, _WEIGHT):
                parametrize.remove_parametrizations(module, _WEIGHT, leave_parametrized=True)
        model.requires_grad_(True)

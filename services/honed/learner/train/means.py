"""Means of per-token figures over all passes of an update."""

from __future__ import annotations

import torch
from torch import Tensor


class MeanOverTokens:
    """Sums of per-token figures over micro-batches, minibatches and epochs, divided once at the end."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, **per_token: Tensor) -> None:
        """Takes note of one micro-batch: equally long tensors `[N]`, all of them at each call."""
        for name, terms in per_token.items():
            # Summed in float64: thousands of small float32 numbers over many micro-batches lose digits otherwise. Kept as a
            # tensor: reading it here would make the host wait for the device at each micro-batch.
            total = terms.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._tokens += next(iter(per_token.values())).numel()

    def all(self) -> dict[str, float]:
        """Every mean so far, by name."""
        return {name: self[name] for name in self._sums}

    def __getitem__(self, name: str) -> float:
        """The mean so far."""
        return float(self._sums[name]) / self._tokens

"""Rows that step together: requests whose keys and values lie in one cache of transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from honed.generation.hf.row import Row

ROOM: Final = 1.5
"""How much larger than its parts padding may make a batch: a long prompt does not pad all others to its length."""


@dataclass(slots=True)
class Cohort:
    """Rows with one cache. Shorter prefixes are padded on the left: `mask` [rows, length] is 0 there.

    Attributes:
        rows: The requests.
        mask: Int64, of all tokens that the cache holds.
        cache: A cache of transformers; None before the first pass.
    """

    rows: list[Row]
    mask: torch.Tensor
    cache: Any = None

    def keep(self, wanted: Callable[[Row], bool]) -> None:
        """Drops the other rows, and the padding that none of those left needs."""
        indices = [i for i, row in enumerate(self.rows) if wanted(row)]
        if 0 < len(indices) < len(self.rows):
            kept = torch.tensor(indices, device=self.mask.device)
            self.mask = self.mask[kept]
            self.cache.batch_select_indices(kept)
            unneeded = int(self.mask.any(0).int().argmax())
            if unneeded and self._plain:
                self.mask = self.mask[:, unneeded:]
                for layer in self.cache.layers:
                    layer.keys, layer.values = layer.keys[:, :, unneeded:], layer.values[:, :, unneeded:]
        self.rows = [self.rows[i] for i in indices]

    def reach(self) -> torch.Tensor:
        """Makes room for one more token of each row, and returns the last ones, [rows, 1]."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], dim=1)
        return torch.tensor([[row.token_ids[-1]] for row in self.rows], device=self.mask.device)

    def join(self, other: Cohort) -> bool:
        """Takes in the rows of another, if that is possible and costs little padding; says whether it did."""
        width = max(self.mask.shape[1], other.mask.shape[1])
        apart = self.mask.numel() + other.mask.numel()
        if not (self._plain and other._plain) or width * (len(self.rows) + len(other.rows)) > ROOM * apart:
            return False
        self.mask = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in (self.mask, other.mask)])
        for mine, its in zip(self.cache.layers, other.cache.layers, strict=True):
            mine.keys, mine.values = _stacked(mine.keys, its.keys, width), _stacked(mine.values, its.values, width)
        self.rows = self.rows + other.rows
        return True

    @property
    def _plain(self) -> bool:
        """Whether the cache is one of keys and values of all tokens, and of nothing else (as a sliding window's is)."""
        layers = getattr(self.cache, "layers", ())
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def _stacked(first: torch.Tensor, second: torch.Tensor, width: int) -> torch.Tensor:
    """Two tensors [rows, heads, length, size] as one, padded on the left."""
    return torch.cat([pad(part, (0, 0, width - part.shape[2], 0)) for part in (first, second)])

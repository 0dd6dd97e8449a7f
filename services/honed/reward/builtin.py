"""Functions that honed itself offers in the entry-point group `honed.scorers`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from honed.reward.function_scorer import Sample


def length(samples: Sequence[Sample]) -> list[float]:
    """Words in the response, divided by 100. With a negative weight: a price on length."""
    return [len(sample.response.split()) / 100 for sample in samples]


def repetition(samples: Sequence[Sample]) -> list[float]:
    """Share of the response's word pairs that stood in it before, 0 to 1. With a negative weight: a price on repetition."""
    return [_repeated_pairs(sample.response.split()) for sample in samples]


def _repeated_pairs(words: Sequence[str]) -> float:
    pairs = list(pairwise(words))
    return 1 - len(set(pairs)) / len(pairs) if pairs else 0.0

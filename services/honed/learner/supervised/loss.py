"""The loss of judgements that share texts, prepared once and computed for any scores of the texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from honed.learner.data.judgement import SharedTexts
from honed.learner.objectives.preference import best_of_k, bradley_terry, ranked_pairs, scalar_compare, scalar_rating

Objective = Literal["ranked_pairs", "best_of_k", "scalar_compare"]
_Part = tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]


class SummedLoss:
    """Sum of losses over judgements, each by its weight."""

    def __init__(self, shared: SharedTexts, objective: Objective, device: torch.device) -> None:
        """Prepares it.

        Args:
            shared: The judgements; with "best_of_k" one response is the best of each, with "scalar_compare" none ranks
                more than two.
            objective: Of rankings; see `RewardTrainingSettings`. Two responses are a comparison by Bradley-Terry with the
                first two.
            device: Of the scores.
        """
        self._shared, self._objective, self._device = shared, objective, device
        sizes = sorted({len(places) for places, _ in shared.rankings})
        self._parts = [self._rankings(size) for size in sizes]
        if shared.ratings:
            self._parts.append(self._ratings())

    def __call__(self, scores: Tensor) -> Tensor:
        """The sum for scores of the texts, `[len(shared.texts)]`."""
        total = scores.new_zeros(())
        for places, weights, loss in self._parts:
            total = total + loss(scores[places]) * weights.sum()
        return total

    def _rankings(self, size: int) -> _Part:
        """Those of so many responses: their loss is a function of scores `[n, size]`."""
        places, rankings = zip(*(each for each in self._shared.rankings if len(each[0]) == size), strict=True)
        weights = self._tensor([ranking.weight for ranking in rankings])
        margins = self._tensor([ranking.margin for ranking in rankings])
        ranks = torch.tensor([ranking.ranks or range(size) for ranking in rankings], device=self._device)
        best = torch.zeros(len(rankings), dtype=torch.int64, device=self._device)

        def loss(ranked: Tensor) -> Tensor:
            if self._objective == "scalar_compare":
                return scalar_compare(ranked[:, 0], ranked[:, 1], margins, weights=weights)
            if size == 2:
                return bradley_terry(ranked[:, 0], ranked[:, 1], margins, weights=weights)
            if self._objective == "ranked_pairs":
                return ranked_pairs(ranked, ranks, weights=weights)
            return best_of_k(ranked, best, weights=weights)

        return torch.tensor(places, device=self._device), weights, loss

    def _ratings(self) -> _Part:
        places, ratings = zip(*self._shared.ratings, strict=True)
        weights = self._tensor([rating.weight for rating in ratings])
        values = self._tensor([rating.value for rating in ratings])
        return torch.tensor(places, device=self._device), weights, lambda rated: scalar_rating(rated, values, weights=weights)

    def _tensor(self, numbers: list[float]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.float32, device=self._device)

"""Losses of reward models: pure functions of scores.

`best_of_k` and the two scalar forms are those of lm-human-preferences (2019), `ranked_pairs` is InstructGPT's (2022); with two
responses all of best-of-K and ranked pairs are Bradley-Terry. Each is a mean over judgements. With `weights`, `[n]`, none
negative and not all zero, it is `sum(w loss) / sum(w)`: weights that are all the same change nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected - margin).

    Args:
        chosen: `[n]` scores of the responses that were preferred.
        rejected: `[n]` scores of their rivals.
        margin: `[n]`, how far apart their scores should at least be: larger where people said that the response was much
            better (Llama 2, Touvron et al. 2023, eq. 2). None stands for zeros.
        weights: `[n]`, how much each judgement counts.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return _mean(-functional.logsigmoid(difference), weights)


def best_of_k(scores: Tensor, best: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean softmax cross-entropy of the response that was picked.

    Args:
        scores: `[n, K]` scores of the K responses to each prompt.
        best: `[n]` int64 index of the one picked.
        weights: `[n]`, how much each judgement counts.
    """
    if weights is None:
        return functional.cross_entropy(scores, best)
    return _mean(functional.cross_entropy(scores, best, reduction="none"), weights)


def ranked_pairs(ranked: Tensor, ranks: Tensor | None = None, *, weights: Tensor | None = None) -> Tensor:
    """Mean over prompts of the mean of -log sigmoid(better - worse) over all C(K, 2) pairs of a ranking, less its ties.

    Args:
        ranked: `[n, K]` scores in the order of the ranking, best first; K at least 2.
        ranks: `[n, K]`, rising, equal where responses tie; in each row some differ. None: all differ.
        weights: `[n]`, how much each ranking counts.
    """
    better, worse = torch.triu_indices(ranked.shape[1], ranked.shape[1], offset=1, device=ranked.device)
    losses = -functional.logsigmoid(ranked[:, better] - ranked[:, worse])
    if ranks is None:
        return _mean(losses.mean(1), weights)
    ordered = ranks[:, better] < ranks[:, worse]
    return _mean((losses * ordered).sum(1) / ordered.sum(1), weights)


def scalar_rating(scores: Tensor, ratings: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean squared error against the ratings that people gave; all `[n]`."""
    if weights is None:
        return functional.mse_loss(scores, ratings)
    return _mean((scores - ratings).square(), weights)


def scalar_compare(left: Tensor, right: Tensor, difference: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Mean squared error of score differences against rated differences; all `[n]`."""
    return scalar_rating(left - right, difference, weights=weights)


def _mean(losses: Tensor, weights: Tensor | None) -> Tensor:
    return losses.mean() if weights is None else (losses * weights).sum() / weights.sum()

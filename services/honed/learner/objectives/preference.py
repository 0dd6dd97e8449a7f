"""Losses of reward models: pure functions of scores.

`best_of_k` and the two scalar forms are those of lm-human-preferences (2019), `ranked_pairs` is InstructGPT's (2022); with two
responses all of best-of-K and ranked pairs are Bradley-Terry.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected).

    Args:
        chosen: `[n]` scores of the responses that were preferred.
        rejected: `[n]` scores of their rivals.
    """
    return -functional.logsigmoid(chosen - rejected).mean()


def best_of_k(scores: Tensor, best: Tensor) -> Tensor:
    """Mean softmax cross-entropy of the response that was picked.

    Args:
        scores: `[n, K]` scores of the K responses to each prompt.
        best: `[n]` int64 index of the one picked.
    """
    return functional.cross_entropy(scores, best)


def ranked_pairs(ranked: Tensor) -> Tensor:
    """Mean over prompts of the mean of -log sigmoid(better - worse) over all C(K, 2) pairs of a ranking.

    Args:
        ranked: `[n, K]` scores in the order of the ranking, best first; K at least 2.
    """
    better, worse = torch.triu_indices(ranked.shape[1], ranked.shape[1], offset=1, device=ranked.device)
    return -functional.logsigmoid(ranked[:, better] - ranked[:, worse]).mean()


def scalar_rating(scores: Tensor, ratings: Tensor) -> Tensor:
    """Mean squared error against the ratings that people gave; both `[n]`."""
    return functional.mse_loss(scores, ratings)


def scalar_compare(left: Tensor, right: Tensor, difference: Tensor) -> Tensor:
    """Mean squared error of score differences against rated differences; all `[n]`."""
    return functional.mse_loss(left - right, difference)

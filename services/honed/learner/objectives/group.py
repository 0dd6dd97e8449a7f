"""Advantages of responses among others to the same prompt: no value head is needed.

Scores and groups are `[B]`: one entry a response. Every response of a group shares its number.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a deviation before dividing by it, as TRL does."""


def group_means(scores: Tensor, groups: Tensor) -> Tensor:
    """The mean score of each response's group, `[B]`."""
    sums = torch.zeros_like(scores).index_add(0, groups, scores)
    return (sums / _sizes(groups, scores))[groups]


def group_deviations(scores: Tensor, groups: Tensor) -> Tensor:
    """The deviation of each response's group, unbiased (divided by n - 1) as TRL's, `[B]`; 0 in a group of one."""
    squares = torch.zeros_like(scores).index_add(0, groups, (scores - group_means(scores, groups)).square())
    return (squares / (_sizes(groups, scores) - 1).clamp(min=1)).sqrt()[groups]


def relative_advantages(scores: Tensor, groups: Tensor, scale: str = "group") -> Tensor:
    """GRPO's advantage: a response's score above its group's mean.

    `A_i = (r_i - mean) / (std + 1e-4)` (Shao et al. 2024), the deviation that of the group, or of the batch; `scale` "none"
    does not divide (Dr. GRPO, Liu et al. 2025: a division favours prompts that are nearly solved or nearly hopeless).

    Args:
        scores: `[B]`.
        groups: `[B]`, numbers from 0.
        scale: "group", "batch" or "none".
    """
    centred = scores - group_means(scores, groups)
    if scale == "none":
        return centred
    deviation = group_deviations(scores, groups) if scale == "group" else scores.std()
    return centred / (deviation + EPSILON)


def leave_one_out_advantages(scores: Tensor, groups: Tensor) -> Tensor:
    """RLOO's advantage: a response's score above the mean of the *other* responses to its prompt (Ahmadian et al. 2024).

    `A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean)`.
    """
    size = _sizes(groups, scores)[groups]
    return (scores - group_means(scores, groups)) * size / (size - 1).clamp(min=1)


def best_of_groups(scores: Tensor, groups: Tensor, eligible: Tensor, share: float | None = None) -> Tensor:
    """Which responses are the best of their groups, `[B]`; of equal scores the earlier one.

    Args:
        scores: `[B]`.
        groups: `[B]`, numbers from 0.
        eligible: Which may be chosen at all, `[B]`.
        share: How many of a group are chosen, of all its responses, rounded up; None for one.
    """
    sizes, places = torch.bincount(groups).tolist(), groups.tolist()
    left = [1 if share is None else math.ceil(share * size) for size in sizes]
    chosen = torch.zeros_like(eligible)
    for index in torch.sort(scores, descending=True, stable=True).indices.tolist():
        if eligible[index] and left[places[index]]:
            left[places[index]] -= 1
            chosen[index] = True
    return chosen


def constant_share(scores: Tensor, groups: Tensor) -> float:
    """The share of groups whose scores are all the same, which teach nothing."""
    spread = torch.zeros_like(scores).index_add(0, groups, (scores - group_means(scores, groups)).abs())
    number = int(groups.max()) + 1
    return float((spread[:number] <= 1e-8).double().mean())


def _sizes(groups: Tensor, like: Tensor) -> Tensor:
    """How many responses each group has, `[B]`; 1 for a number that no group has."""
    return torch.zeros_like(like).index_add(0, groups, torch.ones_like(like)).clamp(min=1)

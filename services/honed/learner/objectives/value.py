"""Losses of a value head: one term for each action token, as in `policy_gradient`."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss_terms(values: Tensor, old_values: Tensor, returns: Tensor, *, clip: float) -> Tensor:
    """Clipped squared error of each token's value.

    `0.5 max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2)`, as lm-human-preferences.

    Args:
        values: predictions of the model being trained, `[N]`, with gradient.
        old_values: predictions before the update, `[N]`.
        returns: unwhitened advantages plus `old_values`, `[N]`.
        clip: how far a prediction may move from the old one and still lower the loss.

    Returns:
        Loss of each token, `[N]`.
    """
    clipped = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())

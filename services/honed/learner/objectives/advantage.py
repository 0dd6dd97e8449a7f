"""From scores to advantages: rewards per token, generalised advantage estimation, whitening.

All tensors here are `[B, T]`: one row a response, padded on the right, with a boolean mask that is True on action tokens. Pads
carry zero in every output. Formulas are lm-human-preferences' (Ziegler et al. 2019): rewards are whitened without shifting
their mean, advantages are whitened, returns are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Advantages:
    """What one minibatch trains on, each `[B, T]`, zero on pads."""

    advantages: Tensor
    """Whitened."""
    returns: Tensor
    """Unwhitened advantages plus values."""


def whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """Scales the masked entries to unit population variance, and to zero mean if `shift_mean`.

    `(x - mean) / sqrt(var + eps)`, plus the mean again unless it is to be shifted. The variance is the population's (divided
    by n), as in lm-human-preferences; TRL and trlx divide by n - 1.

    Args:
        values: `[B, T]`.
        mask: `[B, T]`, boolean, at least one True.
        shift_mean: whether the result has mean zero.
        eps: added to the variance.
    """
    chosen = values[mask]
    mean = chosen.mean()
    variance = (chosen - mean).square().mean()
    whitened = (values - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return whitened.masked_fill(~mask, 0.0)


def token_rewards(
    logprobs: Tensor, reference: Tensor, scores: Tensor, mask: Tensor, *, beta: float, placed: Tensor | None = None
) -> Tensor:
    """`-beta (logp - ref_logp)` at each action token, plus the score at the last one, or where it is placed.

    The score lands on the last token that was sampled, wherever the row ends, never on a pad.

    Args:
        logprobs: of the policy before the update, `[B, T]`, nats.
        reference: of the frozen reference policy, `[B, T]`, nats.
        scores: normalised score of each response, `[B]`.
        mask: `[B, T]`, boolean; each row True from 0 to the response's length, which is at least 1.
        beta: KL coefficient, reward per nat.
        placed: normalised rewards of tokens, `[B, T]`, which stand in place of the scores; None for scores at the last tokens.
    """
    rewards = (-beta * (logprobs - reference)).masked_fill(~mask, 0.0)
    if placed is not None:
        return rewards + placed.to(rewards.dtype).masked_fill(~mask, 0.0)
    last = mask.sum(dim=1, keepdim=True) - 1
    return rewards.scatter_add(1, last, scores.unsqueeze(1).to(rewards.dtype))


def returns_to_go(rewards: Tensor, mask: Tensor, *, gamma: float) -> Tensor:
    """Discounted sum of each token's reward and all that follow in its response, `[B, T]`.

    Args:
        rewards: `[B, T]`.
        mask: `[B, T]`, boolean.
        gamma: discount.
    """
    return generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma=gamma, lam=1.0)


def generalised_advantages(rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimation; the state after the last token is worth zero.

    `delta_t = r_t + gamma V_{t+1} - V_t`, `A_t = delta_t + gamma lam A_{t+1}` (Schulman et al. 2016).

    Args:
        rewards: `[B, T]`.
        values: `[B, T]`.
        mask: `[B, T]`, boolean.
        gamma: discount; 1 for text.
        lam: trade of bias for variance; 0.95 in lm-human-preferences.
    """
    rewards = rewards.masked_fill(~mask, 0.0)
    # Zero values on pads are the zero value of the state after the last token, so ragged rows need no case of their own.
    values = values.masked_fill(~mask, 0.0)
    following = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * following - values
    advantages = torch.empty_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages.masked_fill(~mask, 0.0)


def estimate(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float, whiten_rewards: bool = True
) -> Advantages:
    """One minibatch's advantages and returns, in the order that lm-human-preferences fixed.

    Whiten the rewards without shifting their mean, estimate advantages, add the values for the returns, then whiten the
    advantages.

    Args:
        rewards: `[B, T]`, see `token_rewards`.
        values: `[B, T]`, before the update.
        mask: `[B, T]`, boolean.
        gamma: discount.
        lam: see `generalised_advantages`.
        whiten_rewards: False leaves the rewards as they are.
    """
    if whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    raw = generalised_advantages(rewards, values, mask, gamma=gamma, lam=lam)
    returns = (raw + values).masked_fill(~mask, 0.0)
    return Advantages(advantages=whiten(raw, mask), returns=returns)

"""Losses of a policy by the advantages of its tokens, decoupled for stale data, and what is reported of them.

Every function takes tensors that hold action tokens only, flat and without padding, in any one order, and returns a term for
each token. The aggregate is the algorithm's: the mean over all action tokens of the minibatch (lm-human-preferences), or the
mean over responses of the means over their tokens (GRPO). Micro-batches sum their terms and divide by the count of the whole
minibatch, so their losses and gradients add up to that mean however it was split.
"""

from __future__ import annotations

import torch
from torch import Tensor


def behaviour_weights(proximal: Tensor, behaviour: Tensor, cap: float) -> Tensor:
    """Truncated importance weights of the sampler's tokens under the proximal policy.

    `min(exp(proximal - behaviour), cap)`, each token on its own, without gradient (Espeholt et al. 2018; decoupled PPO,
    Hilton et al. 2022). Exactly 1 where both agree.

    Args:
        proximal: log-probabilities under the learner before the update, `[N]`, nats.
        behaviour: log-probabilities that the sampler recorded, `[N]`, nats.
        cap: the largest weight, at least 1.

    Returns:
        Weights, `[N]`.
    """
    # Clamped before the exponential: a token that the sampler found all but impossible must not become inf.
    return (proximal - behaviour).detach().clamp(max=_log(cap, proximal)).exp().clamp(max=cap)


def policy_loss_terms(
    logprobs: Tensor,
    proximal: Tensor,
    advantages: Tensor,
    *,
    clip: float,
    weights: Tensor | None = None,
    dual: float | None = None,
) -> Tensor:
    """Clipped surrogate of each token, to be minimised.

    `max(-A r, -A clip(r, 1 - clip, 1 + clip))` with `r = exp(logp - proximal)` (Schulman et al. 2017), times the behaviour
    weight when one is given. With weights of 1 this is plain PPO.

    Args:
        logprobs: log-probabilities under the policy being trained, `[N]`, with gradient.
        proximal: log-probabilities that the ratio is clipped against, `[N]`.
        advantages: `[N]`.
        clip: half-width of the ratio's clip range.
        weights: behaviour weights, `[N]`; None stands for ones.
        dual: see `clipped_surrogate`.

    Returns:
        Loss of each token, `[N]`.
    """
    loss = clipped_surrogate((logprobs - proximal).exp(), advantages, low=clip, high=clip, dual=dual)
    return loss if weights is None else loss * weights


def clipped_surrogate(ratio: Tensor, advantages: Tensor, *, low: float, high: float, dual: float | None = None) -> Tensor:
    """`max(-A r, -A clip(r, 1 - low, 1 + high))` of each token, `[N]`; bounds of their own as in DAPO (Yu et al. 2025).

    Where A is negative this grows with the ratio without end. `dual`, c > 1, bounds it there (dual-clip PPO, Ye et al. 2020,
    who take 3): the loss is at most `-c A`, and a token past that has no gradient.

    Args:
        ratio: `[N]`, with gradient.
        advantages: `[N]`.
        low: how far under 1 the ratio may go.
        high: how far over 1.
        dual: c; None sets no bound.
    """
    loss = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1.0 - low, 1.0 + high))
    if dual is None:
        return loss
    return torch.where(advantages < 0.0, torch.minimum(loss, -dual * advantages), loss)


def clipped_importance_loss(logprobs: Tensor, ratio: Tensor, advantages: Tensor, *, high: float) -> Tensor:
    """CISPO's loss of each token, `[N]`: `-sg(min(r, 1 + high)) A logp` (MiniMax-M1, 2025); every token keeps a gradient."""
    return -ratio.detach().clamp(max=1.0 + high) * advantages * logprobs


def response_ratios(logprobs: Tensor, proximal: Tensor, response: Tensor, *, mean: bool) -> Tensor:
    """The ratio of a whole response, the same at each of its tokens, `[N]`.

    `exp(sum over the response of (logp - proximal))`, or of the mean (GSPO, Zheng et al. 2025), which lengths do not move.

    Args:
        logprobs: log-probabilities under the policy being trained, `[N]`, with gradient.
        proximal: before the update, `[N]`.
        response: number of each token's response, `[N]`; every token of a response is there.
        mean: whether to take the mean.
    """
    _, place = torch.unique(response, return_inverse=True)
    count = int(place.max()) + 1
    ratios = logprobs.new_zeros(count).index_add(0, place, logprobs - proximal)
    if mean:
        ratios = ratios / logprobs.new_zeros(count).index_add(0, place, torch.ones_like(logprobs))
    return ratios.exp()[place]


def score_function_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE's loss of each token, `[N]`: `-A logp`, whose gradient is that of the expected reward (Williams 1992)."""
    return -advantages * logprobs


def reference_kl_terms(logprobs: Tensor, reference: Tensor) -> Tensor:
    """`exp(ref - logp) - (ref - logp) - 1` of each token, `[N]`: Schulman's k3 estimate of the KL, with gradient."""
    difference = reference - logprobs
    return difference.exp() - difference - 1.0


def approximate_kl_terms(logprobs: Tensor, proximal: Tensor) -> Tensor:
    """`0.5 (logp - old)^2` of each token, `[N]`; its mean is the `approxkl` of lm-human-preferences."""
    return 0.5 * (logprobs - proximal).square()


def clipped_terms(logprobs: Tensor, proximal: Tensor, advantages: Tensor, *, clip: float) -> Tensor:
    """1 where the clipped branch of the policy loss is strictly the larger, else 0, `[N]`; its mean is the clip fraction."""
    ratio = (logprobs - proximal).exp()
    return (-advantages * ratio.clamp(1.0 - clip, 1.0 + clip) > -advantages * ratio).to(logprobs.dtype)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of each categorical distribution, `[..., V]` to `[...]`.

    Args:
        logits: already divided by the temperature; minus infinity marks an impossible token.
    """
    log_p = logits.log_softmax(-1)
    # 0 log 0 is 0: a masked token adds nothing.
    return -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)


def _log(cap: float, like: Tensor) -> float:
    return float(torch.tensor(cap, dtype=like.dtype).log())

"""Log-probabilities of chosen tokens from hidden states, without keeping more than one `[N, V]` tensor alive.

Autograd through `log_softmax` and `gather` keeps the normalised logits and makes two more tensors of that size on the way
back. The gradient is known in closed form, `d logp_y / d logits = onehot(y) - p`, so one buffer serves from first to last.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _ChosenLogprobs(torch.autograd.Function):
    """`log softmax(h W^T / temperature)` at the targets, `[N]`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cold: Tensor, low: torch.dtype
    ) -> Tensor:
        log_probs = _log_probs(hidden, weight, bias, cold)
        ctx.save_for_backward(hidden, weight, targets, cold)
        ctx.log_probs, ctx.low, ctx.has_bias = log_probs, low, bias is not None
        return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, cold = ctx.saved_tensors
        if ctx.log_probs is None:
            raise RuntimeError("token log-probabilities can be differentiated once only: the buffer was reused")
        gradient, ctx.log_probs = ctx.log_probs, None
        scale = (upstream * cold).unsqueeze(1)
        gradient.exp_().mul_(-scale).scatter_add_(1, targets.unsqueeze(1), scale)
        to_bias = gradient.sum(0) if ctx.has_bias else None
        gradient = gradient.to(ctx.low)
        to_hidden = (gradient @ weight.to(ctx.low)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
        to_weight = (gradient.t() @ hidden.to(ctx.low)).to(weight.dtype) if ctx.needs_input_grad[1] else None
        return to_hidden, to_weight, to_bias, None, None, None


def chosen_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    temperatures: Tensor,
    *,
    backward_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-probability of each target, differentiable once.

    Args:
        hidden: `[N, d]`, float32.
        weight: of the output layer, `[V, d]`, float32.
        bias: of the output layer, `[V]`, or None.
        targets: `[N]`.
        temperatures: divide the logits, `[N]`.
        backward_dtype: in which the two products of the way back are made; bfloat16 for mixed precision. The way forward is
            float32 always: the ratio of two policies is exp of a small difference of its results.

    Returns:
        `[N]`, float32, nats.
    """
    cold = temperatures.reciprocal()
    result: Tensor = _ChosenLogprobs.apply(hidden, weight, bias, targets, cold, backward_dtype)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def chosen_logprobs_and_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    """As `chosen_logprobs` without gradient, with the entropy of each distribution, both `[N]`, nats."""
    log_probs = _log_probs(hidden, weight, bias, temperatures.reciprocal())
    chosen = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    # vecdot multiplies and sums without a third [N, V] tensor. -inf times 0 cannot occur: no logit is masked here.
    return chosen, -torch.linalg.vecdot(log_probs.exp(), log_probs)


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, cold: Tensor) -> Tensor:
    # The temperature scales the small factor of the product, not the large result.
    logits = (hidden * cold.unsqueeze(1)) @ weight.t()
    if bias is not None:
        logits += bias * cold.unsqueeze(1)
    return logits.log_softmax(-1)

"""Log-probabilities of chosen tokens from hidden states, with as few `[N, V]` tensors as can be.

Autograd through `log_softmax` and `gather` keeps the normalised logits and makes two more tensors
of that size on the way back. The gradient is known in closed form, `d logp_y / d logits = onehot(y)
- p`, so one buffer serves from first to last; a head that caps its logits needs a second one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass(frozen=True)
class TokenHead:
    """How a language model makes logits of a hidden state: `cap(scale * (W h + b))`.

    Attributes:
        weight: Of the output layer, `[V, d]`, float32.
        bias: Of the output layer, `[V]`, or None.
        scale: Multiplies the logits; 1 in most models (Granite divides by `logits_scaling`, Cohere
            multiplies by `logit_scale`).
        cap: Soft cap, `cap * tanh(logits / cap)` (Gemma 2's `final_logit_softcapping`); None for
            none.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, language_model: Any) -> TokenHead:
        """The head of a causal language model of transformers, as its configuration describes it.

        Whoever uses it compares it with the model's own logits once: a family may do something that
        is not known here.
        """
        layer, config = language_model.get_output_embeddings(), language_model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
        cap = getattr(config, "final_logit_softcapping", None)
        return cls(layer.weight, layer.bias, scale, float(cap) if cap else None)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[..., d]` to `[..., V]`."""
        logits = torch.nn.functional.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


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
        gradient = _to_logits(ctx, upstream, targets, cold)
        return (*_to_head(ctx, gradient, hidden, weight), None, None, None)


class _CappedLogprobs(torch.autograd.Function):
    """`log softmax(cap tanh(h W^T / cap) / temperature)` at the targets, `[N]`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        cold: Tensor,
        low: torch.dtype,
        cap: float,
    ) -> Tensor:
        bent, log_probs = _capped_log_probs(hidden, weight, bias, cold, cap)
        ctx.save_for_backward(hidden, weight, targets, cold)
        ctx.log_probs, ctx.bent, ctx.low, ctx.has_bias = log_probs, bent, low, bias is not None
        return log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, cold = ctx.saved_tensors
        gradient = _to_logits(ctx, upstream, targets, cold)
        bent, ctx.bent = ctx.bent, None
        gradient.mul_(bent.square_().neg_().add_(1.0))  # d cap tanh(x / cap) / dx = 1 - tanh^2
        return (*_to_head(ctx, gradient, hidden, weight), None, None, None, None)


def chosen_logprobs(
    hidden: Tensor,
    head: TokenHead,
    targets: Tensor,
    temperatures: Tensor,
    *,
    backward_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Log-probability of each target, differentiable once.

    Args:
        hidden: `[N, d]`, float32.
        head: Of the model.
        targets: `[N]`.
        temperatures: Divide the logits, `[N]`.
        backward_dtype: In which the two products of the way back are made; bfloat16 for mixed
            precision. The way forward is float32 always: the ratio of two policies is exp of a
            small difference of its results.

    Returns:
        `[N]`, float32, nats.
    """
    cold = temperatures.reciprocal()
    hidden = _scaled(hidden, head)
    arguments = (hidden, head.weight, _scaled_bias(head), targets, cold, backward_dtype)
    if head.cap is None:
        result: Tensor = _ChosenLogprobs.apply(*arguments)  # type: ignore[no-untyped-call]
    else:
        result = _CappedLogprobs.apply(*arguments, head.cap)  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def chosen_logprobs_and_entropy(
    hidden: Tensor, head: TokenHead, targets: Tensor, temperatures: Tensor
) -> tuple[Tensor, Tensor]:
    """As `chosen_logprobs` without gradient, and each entropy, both `[N]`, nats."""
    arguments = (_scaled(hidden, head), head.weight, _scaled_bias(head), temperatures.reciprocal())
    log_probs = _log_probs(*arguments) if head.cap is None else _capped_log_probs(*arguments, head.cap)[1]
    chosen = log_probs.gather(1, targets.unsqueeze(1)).squeeze(1)
    # vecdot multiplies and sums without a third [N, V] tensor. -inf times 0 cannot occur: no logit is masked here.
    return chosen, -torch.linalg.vecdot(log_probs.exp(), log_probs)


def _scaled(hidden: Tensor, head: TokenHead) -> Tensor:
    return hidden if head.scale == 1.0 else hidden * head.scale


def _scaled_bias(head: TokenHead) -> Tensor | None:
    return head.bias if head.bias is None or head.scale == 1.0 else head.bias * head.scale


def _log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, cold: Tensor) -> Tensor:
    # The temperature scales the small factor of the product, not the large result.
    logits = (hidden * cold.unsqueeze(1)) @ weight.t()
    if bias is not None:
        logits += bias * cold.unsqueeze(1)
    return logits.log_softmax(-1)


def _capped_log_probs(hidden: Tensor, weight: Tensor, bias: Tensor | None, cold: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """`tanh(logits / cap)` and the log-probabilities."""
    bent = (hidden / cap) @ weight.t()
    if bias is not None:
        bent += bias / cap
    bent.tanh_()
    return bent, (bent * (cap * cold).unsqueeze(1)).log_softmax(-1)


def _to_logits(ctx: Any, upstream: Tensor, targets: Tensor, cold: Tensor) -> Tensor:
    """Gradient of the logits before the temperature, in the buffer of the log-probabilities."""
    if ctx.log_probs is None:
        raise RuntimeError("token log-probabilities can be differentiated once only: the buffer was reused")
    gradient, ctx.log_probs = ctx.log_probs, None
    scale = (upstream * cold).unsqueeze(1)
    gradient.exp_().mul_(-scale).scatter_add_(1, targets.unsqueeze(1), scale)
    result: Tensor = gradient
    return result


def _to_head(ctx: Any, gradient: Tensor, hidden: Tensor, weight: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    to_bias = gradient.sum(0) if ctx.has_bias else None
    gradient = gradient.to(ctx.low)
    to_hidden = (gradient @ weight.to(ctx.low)).to(hidden.dtype) if ctx.needs_input_grad[0] else None
    to_weight = (gradient.t() @ hidden.to(ctx.low)).to(weight.dtype) if ctx.needs_input_grad[1] else None
    return to_hidden, to_weight, to_bias

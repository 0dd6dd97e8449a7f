"""Log-probabilities of chosen tokens from hidden states, with one `[N, V]` tensor at most.

Autograd through `log_softmax` and `gather` keeps the normalised logits and makes two more tensors
of that size on the way back. The gradient is known in closed form, `d logp_y / d logits = onehot(y)
- p`, so all is computed in chunks of rows that fit a cache. What a chunk ends with is kept for the
way back in one buffer, or computed again there; without gradient nothing is kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS: Final = {"cpu": (256, 1 << 19), "cuda": (1024, 1 << 24)}
"""By device: rows of a chunk at least, so that a product pays for reading the output layer; its numbers, if rows are short."""


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


@dataclass(frozen=True)
class _Plan:
    """How `_ChosenLogprobs` works: the head's cap, the dtype of the way back, whether its buffer is kept, entropies made."""

    cap: float | None
    low: torch.dtype
    keep: bool
    entropy: bool


class _ChosenLogprobs(torch.autograd.Function):
    """`log softmax(logits / temperature)` at the targets, `[N]`, and entropies, `[N]`, or `[0]` if they are not asked for."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, cold: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor]:
        chosen = hidden.new_empty(len(targets))
        entropies = hidden.new_empty(len(targets) if plan.entropy else 0)
        kept = hidden.new_empty(len(targets), len(weight)) if plan.keep else None
        for rows in _chunks(len(targets), weight):
            scores = _scores(hidden[rows], weight, bias, cold[rows], plan.cap, None if kept is None else kept[rows])
            log_probs = _log_probs(scores, cold[rows], plan.cap)
            chosen[rows] = log_probs.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
            if plan.entropy:
                # vecdot multiplies and sums without one more tensor. -inf times 0 cannot occur: no logit is masked here.
                entropies[rows] = -torch.linalg.vecdot(log_probs.exp(), log_probs)
        ctx.save_for_backward(hidden, weight, bias, targets, cold)
        ctx.kept, ctx.plan = kept, plan
        ctx.mark_non_differentiable(entropies)
        return chosen, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, cold = ctx.saved_tensors
        plan, kept = ctx.plan, ctx.kept
        if plan.keep and kept is None:
            raise RuntimeError("token log-probabilities can be differentiated once only: the buffer was reused")
        ctx.kept = None
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        to_bias = None if bias is None else torch.zeros_like(bias)
        low_weight, scale = weight.to(plan.low), (upstream * cold).unsqueeze(1)
        for rows in _chunks(len(targets), weight):
            scores = _scores(hidden[rows], weight, bias, cold[rows], plan.cap) if kept is None else kept[rows]
            gradient = _log_probs(scores, cold[rows], plan.cap).exp_().mul_(-scale[rows])
            gradient.scatter_add_(1, targets[rows].unsqueeze(1), scale[rows])
            if plan.cap is not None:
                gradient.mul_(scores.square_().neg_().add_(1.0))  # d cap tanh(x / cap) / dx = 1 - tanh^2
            if to_bias is not None:
                to_bias += gradient.sum(0)
            gradient = gradient.to(plan.low)
            if to_hidden is not None:
                to_hidden[rows] = gradient @ low_weight
            if to_weight is not None:
                _add_product(to_weight, gradient.t(), hidden[rows].to(plan.low))
        return to_hidden, to_weight, to_bias, None, None, None


def chosen_logprobs(
    hidden: Tensor,
    head: TokenHead,
    targets: Tensor,
    temperatures: Tensor,
    *,
    backward_dtype: torch.dtype = torch.float32,
    keep: bool = True,
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
        keep: Keep `[N, V]` numbers for the way back; False computes them again, chunk by chunk.

    Returns:
        `[N]`, float32, nats.
    """
    return _apply(hidden, head, targets, temperatures, backward_dtype, keep, entropy=False)[0]


def chosen_logprobs_and_entropy(
    hidden: Tensor,
    head: TokenHead,
    targets: Tensor,
    temperatures: Tensor,
    *,
    backward_dtype: torch.dtype = torch.float32,
    keep: bool = True,
) -> tuple[Tensor, Tensor]:
    """As `chosen_logprobs`, and the entropy of each distribution, `[N]`, nats, without gradient."""
    return _apply(hidden, head, targets, temperatures, backward_dtype, keep, entropy=True)


def _apply(
    hidden: Tensor, head: TokenHead, targets: Tensor, temperatures: Tensor, low: torch.dtype, keep: bool, *, entropy: bool
) -> tuple[Tensor, Tensor]:
    scaled = head.scale != 1.0
    bias = head.bias * head.scale if head.bias is not None and scaled else head.bias
    plan = _Plan(head.cap, low, keep and torch.is_grad_enabled(), entropy)
    result: tuple[Tensor, Tensor] = _ChosenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden * head.scale if scaled else hidden, head.weight, bias, targets, temperatures.reciprocal(), plan
    )
    return result


def _chunks(count: int, weight: Tensor) -> Iterator[slice]:
    least, numbers = _ROWS.get(weight.device.type, _ROWS["cuda"])
    step = max(least, numbers // len(weight))
    return (slice(start, start + step) for start in range(0, count, step))


def _scores(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, cold: Tensor, cap: float | None, out: Tensor | None = None
) -> Tensor:
    """Log-probabilities; of a capped head `tanh(logits / cap)`, from which `_log_probs` makes them. `[n, V]`, in `out`."""
    # The temperature scales the small factor of the product, not the large result.
    factor = cold.unsqueeze(1) if cap is None else torch.full_like(cold, 1.0 / cap).unsqueeze(1)
    logits = torch.mm(hidden * factor, weight.t(), out=None if cap is None else out)
    if bias is not None:
        logits += bias * factor
    result: Tensor = torch.log_softmax(logits, -1, out=out) if cap is None else logits.tanh_()
    return result


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += a @ b


def _log_probs(scores: Tensor, cold: Tensor, cap: float | None) -> Tensor:
    return scores if cap is None else (scores * (cap * cold).unsqueeze(1)).log_softmax(-1)

"""Draws the next token of many requests at once, each with its own sampling and its own source of randomness."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from honed.generation.requests import Sampling


def sample(
    logits: torch.Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]
) -> tuple[list[int], list[float]]:
    """Draws one token a row, by the inverse of the cumulative distribution: one random number a row, whatever the vocabulary.

    Args:
        logits: Float32, shape [rows, vocabulary].
        samplings: Temperature, top-k and top-p of each row.
        generators: Where each row's randomness comes from; may be shared.

    Returns:
        The tokens, and their log-probabilities in the distributions that they were drawn from (nats): after temperature,
        top-k and top-p, in this order; at temperature 0 the model's own.

    Raises:
        FloatingPointError: A row has no distribution: its logits are not finite.
    """
    device = logits.device
    greedy = torch.tensor([[sampling.temperature == 0] for sampling in samplings], device=device)
    own, logits = logits, logits / torch.tensor([[sampling.temperature or 1.0] for sampling in samplings], device=device)
    if any(sampling.top_k or sampling.top_p < 1 for sampling in samplings):
        logits = torch.where(greedy, own, _narrowed(logits, samplings))
    logprobs = logits.log_softmax(-1)
    # In float64, or the last of a large vocabulary's tokens would be drawn too often or never.
    cumulative = logprobs.double().exp().cumsum(-1)
    total = cumulative[:, -1:]
    if not bool(total.isfinite().all()):
        raise FloatingPointError("the model's logits are not finite: there is nothing to sample from")
    points = total * torch.tensor([[_share(generator)] for generator in generators], dtype=torch.float64, device=device)
    # Below the total even when the product is rounded: a token without probability is never drawn.
    points = torch.minimum(points, total.nextafter(torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, points, right=True)
    tokens = torch.where(greedy, own.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0].tolist(), logprobs.gather(1, tokens)[:, 0].tolist()


def _share(generator: torch.Generator) -> float:
    """A number from 0 to below 1."""
    return float(torch.rand((), dtype=torch.float64, generator=generator, device=generator.device))


def _narrowed(logits: torch.Tensor, samplings: Sequence[Sampling]) -> torch.Tensor:
    """The logits with -inf for what top-k and top-p leave out. A greedy row's are not for use."""
    vocabulary = logits.shape[-1]
    counts = [1 if s.temperature == 0 else min(s.top_k or vocabulary, vocabulary) for s in samplings]
    masses = [s.top_p if s.top_p < 1 else torch.inf for s in samplings]  # a sum of all may be above 1 when rounded
    ordered, order = logits.topk(max(counts))
    worst = ordered.gather(1, torch.tensor([[count - 1] for count in counts], device=logits.device))
    ordered = ordered.masked_fill(ordered < worst, -torch.inf)
    probabilities = ordered.softmax(-1)
    beyond = probabilities.cumsum(-1) - probabilities >= torch.tensor([[mass] for mass in masses], device=logits.device)
    ordered = ordered.masked_fill(beyond, -torch.inf)  # the first is never beyond
    return torch.full_like(logits, -torch.inf).scatter(1, order, ordered)

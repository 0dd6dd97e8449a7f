"""What one update reports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.learner.episodes import Episode

SAMPLER_GAP_ALARM = 1.05
"""Mean exp|difference| between sampler and learner on the same weights above which one of the two computes something else."""


@dataclass(frozen=True)
class UpdateStats:
    """Figures of one update. Means are over action tokens unless another base is named."""

    episodes: int
    tokens: int
    """Action tokens."""
    reward_mean: float
    """Mean over episodes of the summed token rewards: normalised score minus beta times KL."""
    score_mean: float
    """Mean over episodes of the score as it came, before normalisation."""
    score_std: float
    """Population deviation of the same."""
    reward_constant: float
    """1 if all scores of the batch were the same, so that they taught nothing; else 0."""
    kl: float
    """Nats a response: mean over episodes of the sum over tokens of `logp - ref_logp` (k1), before the update."""
    entropy: float
    """Nats a token, before the update."""
    approxkl: float
    """`0.5 (logp - proximal)^2`, over all epochs."""
    clip_fraction: float
    """Share of tokens whose ratio was clipped, over all epochs."""
    policy_loss: float
    value_loss: float
    """Before the coefficient, over all epochs."""
    ratio_max: float
    """Largest ratio to the proximal policy in all epochs."""
    ratio_mean: float
    """Mean of the same; a batch is refused when it leaves the bounds."""
    behaviour_weight: float
    """Mean truncated importance weight of the sampler's tokens."""
    behaviour_truncated: float
    """Share of tokens whose importance weight reached the cap."""
    sampler_gap: float
    """Mean exp|proximal - behaviour| over all tokens: staleness and numerical difference together."""
    sampler_gap_same_weights: float | None
    """The same over tokens that the weights before this update sampled; None when there were none or the version is unknown."""
    beta: float
    """KL coefficient that this update used."""
    next_beta: float
    lr: float
    grad_norm: float
    """Mean over optimizer steps of the gradient's 2-norm, before any clipping."""
    optimizer_steps: int
    padding_share: float
    """Share of the tokens read by the model that were padding."""
    masked_share: float
    """Share of the B x T action positions without a token; rises when responses collapse."""
    seconds: float

    @property
    def sampler_alarm(self) -> bool:
        """Whether sampler and learner disagree on the same weights."""
        return self.sampler_gap_same_weights is not None and self.sampler_gap_same_weights > SAMPLER_GAP_ALARM

    def as_metrics(self) -> dict[str, float]:
        """The numbers by name, without those that are None."""
        return {name: float(value) for name, value in asdict(self).items() if value is not None}


class MeanOverTokens:
    """Sums of per-token figures over micro-batches, minibatches and epochs, divided once at the end."""

    def __init__(self) -> None:
        """Starts empty."""
        self._sums: dict[str, Tensor] = {}
        self._tokens = 0

    def add(self, **per_token: Tensor) -> None:
        """Takes note of one micro-batch: equally long tensors `[N]`, all of them at each call."""
        for name, terms in per_token.items():
            # Summed in float64: thousands of small float32 numbers over many micro-batches lose digits otherwise. Kept as a
            # tensor: reading it here would make the host wait for the device at each micro-batch.
            total = terms.detach().sum(dtype=torch.float64)
            self._sums[name] = self._sums[name] + total if name in self._sums else total
        self._tokens += next(iter(per_token.values())).numel()

    def __getitem__(self, name: str) -> float:
        """The mean so far."""
        return float(self._sums[name]) / self._tokens


def same_weights_mask(episodes: Sequence[Episode], version: VersionId, mask: Tensor) -> Tensor:
    """Which tokens of the rows `[B, T]` were sampled by `version`."""
    same = torch.zeros_like(mask)
    for row, episode in enumerate(episodes):
        for span in episode.spans:
            if span.version == version:
                same[row, span.start : span.end] = True
    return same & mask

"""Sampled responses as the models saw them before an update, and what can be told of them without a model.

Rows are `[B, T]` on the host, T the longest response, zero where none is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.learner.data.episode import Episode
from honed.learner.loop.records import OF_SCORER


@dataclass(frozen=True)
class Sampled:
    """A batch of sampled responses as the models saw it before the update.

    Attributes:
        mask: True on action tokens.
        behaviour: The sampler's log-probabilities, nats.
        proximal: The policy's, nats.
        reference: The frozen reference's, nats; the policy's own where the algorithm needs no reference.
        values: Of the value head; zero without one.
        weights: Truncated importance weights of the sampler's tokens under the proximal policy.
        scores: The normalised score of each response, `[B]`.
        raw_scores: The score as it came, `[B]`, float64.
        repeated: True where an earlier response to the same prompt has the same tokens, `[B]`.
        groups: The number of each response's prompt in the batch, `[B]`, from 0.
        cut: True where a response reached the limit of its length and did not end by itself, `[B]`.
        beta: KL coefficient, reward per nat.
        placed: The normalised scores at the tokens that scorers gave them for; None where all are for whole responses.
    """

    mask: Tensor
    behaviour: Tensor
    proximal: Tensor
    reference: Tensor
    values: Tensor
    weights: Tensor
    scores: Tensor
    raw_scores: Tensor
    repeated: Tensor
    groups: Tensor
    cut: Tensor
    beta: float
    placed: Tensor | None = None

    @property
    def kl(self) -> float:
        """Mean over responses of the sum over tokens of `logp - ref_logp` (k1), nats a response."""
        return float((self.proximal - self.reference).sum(1).mean())


def rows_of(values: Sequence[Sequence[float]] | None, mask: Tensor) -> Tensor | None:
    """Values of each response's tokens as rows `[B, T]`, zero on pads."""
    if values is None:
        return None
    rows = torch.zeros(mask.shape)
    rows[mask] = torch.tensor([value for row in values for value in row])
    return rows


def score_means(episodes: Sequence[Episode]) -> dict[str, float]:
    """The mean of what each scorer said, by `score/NAME`, over the responses that it scored."""
    said: dict[str, list[float]] = {}
    for episode in episodes:
        for name, value in episode.scores:
            said.setdefault(name, []).append(value)
    return {f"{OF_SCORER}{name}": math.fsum(values) / len(values) for name, values in sorted(said.items())}


def repeated_of(episodes: Sequence[Episode]) -> list[bool]:
    """Of each response, whether an earlier one to the same prompt has the same tokens."""
    seen: set[tuple[str, tuple[int, ...]]] = set()
    found = []
    for episode in episodes:
        found.append((episode.group_id, episode.response) in seen)
        seen.add((episode.group_id, episode.response))
    return found


def sampled_by(version: VersionId | None, episodes: Sequence[Episode], mask: Tensor) -> Tensor:
    """Which tokens of the rows a version sampled; none if it is None."""
    same = torch.zeros_like(mask)
    for row, episode in enumerate(episodes):
        for span in episode.spans:
            if span.version == version:
                same[row, span.start : span.end] = True
    return same & mask

"""What the tests of parity share: ragged batches of random float32 numbers, our losses on them, and how near is near enough."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from honed.learner.algorithms.base import make_algorithm
from honed.learner.models.policy import TokenEvaluation
from honed.learner.objectives.policy_gradient import behaviour_weights
from honed.learner.settings import LearnerSettings
from honed.learner.train.sampled import Sampled

LIMIT = 1e-6
"""The largest absolute difference, float32."""

GROUP = 2
"""Responses to one prompt."""

CAP = 1.1
"""Of behaviour weights: small enough that some of each batch are truncated, and some are not."""

SHAPES = {
    "ragged": (5, 1, 7, 3, 2, 9, 4, 6),
    "one token each": (1, 1, 1, 1),
    "full rows": (6, 6, 6, 6),
    "one long among short": (1, 13, 2, 1, 1, 2),
    "a pair": (3, 4),
}
"""Tokens of each response of a batch."""

_LARGEST: dict[tuple[str, str], float] = {}


def same(ours: Tensor, theirs: Tensor, *, what: str, peer: str) -> None:
    """Asserts that no number differs by more than `LIMIT`, and remembers the largest difference under both names."""
    assert ours.shape == theirs.shape, f"{what}: {tuple(ours.shape)} and {tuple(theirs.shape)}"
    assert ours.dtype == theirs.dtype == torch.float32, f"{what}: {ours.dtype} and {theirs.dtype}"
    difference = float((ours - theirs).abs().max())
    _LARGEST[what, peer] = max(_LARGEST.get((what, peer), 0.0), difference)
    assert difference <= LIMIT, f"{what}: {difference} from {peer}"


def table() -> Iterator[str]:
    """What was compared, and the largest difference of each."""
    for (what, peer), difference in _LARGEST.items():
        yield f"{difference:.1e}  {what}  =  {peer}"


@dataclass(frozen=True)
class Batch:
    """Responses in rows `[B, T]` with two columns of pads behind the longest, unless they are full."""

    mask: Tensor
    logprobs: Tensor
    proximal: Tensor
    reference: Tensor
    behaviour: Tensor
    values: Tensor
    old_values: Tensor
    rewards: Tensor
    advantages: Tensor
    scores: Tensor

    @staticmethod
    def random(shape: str, seed: int = 0) -> Batch:
        """Log-probabilities of about -0.5, old ones near enough that some ratios are clipped and some are not."""
        lengths = torch.tensor(SHAPES[shape])
        width = int(lengths.max()) + (0 if shape == "full rows" else 2)
        mask = torch.arange(width).unsqueeze(0) < lengths.unsqueeze(1)
        source = torch.Generator().manual_seed(seed)

        def noise(scale: float) -> Tensor:
            return (scale * torch.randn(mask.shape, generator=source)).masked_fill(~mask, 0.0)

        logprobs = (noise(0.2) - 0.5).masked_fill(~mask, 0.0)
        return Batch(
            mask=mask,
            logprobs=logprobs,
            proximal=logprobs + noise(0.25),
            reference=logprobs + noise(0.25),
            behaviour=logprobs + noise(0.25),
            values=noise(1.0),
            old_values=noise(1.0),
            rewards=noise(1.0),
            advantages=noise(1.0),
            scores=torch.randn(len(lengths), generator=source),
        )

    @property
    def groups(self) -> Tensor:
        """The number of each response's prompt, `[B]`."""
        return torch.arange(len(self.scores)) // GROUP

    def with_gradient(self) -> Batch:
        """The same numbers; `logprobs` and `values` collect gradients."""
        return replace(self, logprobs=self.logprobs.clone().requires_grad_(), values=self.values.clone().requires_grad_())


def weights_of(batch: Batch) -> Tensor:
    """Behaviour weights of stale tokens, `[B, T]`, truncated at `CAP`."""
    weights = behaviour_weights(batch.proximal, batch.behaviour, CAP)
    truncated = weights[batch.mask] == CAP
    assert truncated.any()
    assert not truncated.all()
    return weights


def loss_of(
    learner: LearnerSettings, batch: Batch, rows: dict[str, Tensor] | None = None, *, decoupled: bool = False
) -> Tensor:
    """The loss of an algorithm on one minibatch, a scalar, as the trainer adds it up.

    Args:
        learner: The algorithm and its settings.
        batch: The batch; gradients flow to its `logprobs` and `values`.
        rows: What replaces rows that the algorithm computed, to compare its loss alone.
        decoupled: Whether its sampler had the behaviour's weights, and not the proximal ones.
    """
    algorithm, mask = make_algorithm(learner), batch.mask
    sampled = Sampled(
        mask=mask,
        behaviour=batch.behaviour if decoupled else batch.proximal,
        proximal=batch.proximal,
        reference=batch.reference,
        values=batch.old_values,
        weights=weights_of(batch) if decoupled else torch.ones_like(batch.proximal),
        scores=batch.scores,
        raw_scores=batch.scores.double(),
        repeated=torch.zeros(len(mask), dtype=torch.bool),
        groups=batch.groups,
        cut=torch.zeros(len(mask), dtype=torch.bool),
        beta=learner.kl.coefficient,
    )
    known: dict[str, Any] = {
        "proximal": sampled.proximal,
        "reference": sampled.reference,
        "values": sampled.values,
        "weights": sampled.weights,
        "response": torch.arange(len(mask)).unsqueeze(1).expand(mask.shape),
        **algorithm.rows(sampled),
        **(rows or {}),
    }
    losses = algorithm.losses(
        sampled,
        TokenEvaluation(logprobs=batch.logprobs[mask], values=batch.values[mask]),
        {name: row[mask] for name, row in known.items()},
    )
    denominators = {"tokens": int(mask.sum()), "responses": len(mask)}
    return torch.stack([total / denominators[name] for name, total in losses.sums.items()]).sum()

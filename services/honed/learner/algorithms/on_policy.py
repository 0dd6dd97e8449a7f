"""What every algorithm that learns from sampled responses does first: the models read the batch once, without gradient.

The policy before the update is the *proximal* policy; the one that sampled, perhaps some versions ago, is the *behaviour*
policy, whose log-probabilities came with the episodes. Rows are `[B, T]` on the host, zero on pads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.learner.data.batches import MicroBatch, Rows, micro_batches, padding_share
from honed.learner.data.episode import Episode
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.objectives.normalise import is_constant
from honed.learner.train.algorithm import BadLoss, UpdateContext
from honed.learner.train.means import MeanOverTokens


@dataclass(frozen=True)
class Reading:
    """A batch as the models saw it before the update.

    Attributes:
        rows: Mask and the sampler's log-probabilities.
        packed: The whole batch as the models read it.
        proximal: Log-probabilities of the policy, nats.
        reference: Of the frozen reference, nats.
        values: Of the value head.
        entropy: Mean of the policy's distributions, nats a token.
    """

    rows: Rows
    packed: Sequence[MicroBatch]
    proximal: Tensor
    reference: Tensor
    values: Tensor
    entropy: float

    @property
    def kl(self) -> float:
        """Mean over episodes of the sum over tokens of `logp - ref_logp` (k1), nats a response."""
        return float((self.proximal - self.reference).sum(1).mean())


def pack(episodes: Sequence[Episode], chosen: Sequence[int], max_tokens: int, device: torch.device) -> list[MicroBatch]:
    """Micro-batches of the chosen episodes on a device; their slots lead into rows of all episodes."""
    width = max(len(episode.response) for episode in episodes)
    return [batch.to(device) for batch in micro_batches(episodes, chosen, max_tokens=max_tokens, width=width)]


@torch.no_grad()
def read(episodes: Sequence[Episode], policy: PolicyModel, reference: ReferenceModel, context: UpdateContext) -> Reading:
    """One pass of policy and reference over the batch."""
    rows = Rows.of(episodes)
    packed = pack(episodes, range(len(episodes)), context.microbatch_tokens, policy.device)
    proximal, of_reference, values = (torch.zeros(rows.mask.shape) for _ in range(3))
    means = MeanOverTokens()
    for batch in packed:
        context.stop_if_asked()
        measured = policy.measure(batch)
        slots = batch.slots.cpu()
        proximal.view(-1)[slots] = measured.logprobs.cpu()
        values.view(-1)[slots] = measured.values.cpu()
        of_reference.view(-1)[slots] = reference.logprobs(batch).cpu()
        means.add(entropy=measured.entropies)
    return Reading(rows, packed, proximal, of_reference, values, means["entropy"])


def at_tokens(rows: Tensor, batch: MicroBatch) -> Tensor:
    """What rows `[B, T]` hold of a micro-batch's action tokens, `[N]`, on its device."""
    return rows.view(-1)[batch.slots.cpu()].to(batch.tokens.device)


def check_ratio(to: str, mean: float, bound: float) -> None:
    """Refuses a batch whose mean importance ratio leaves the bounds.

    Raises:
        BadLoss: It does.
    """
    if not 1 / bound <= mean <= bound:
        raise BadLoss(f"the mean ratio to the {to} is {mean:.3g}, learner.max_ratio allows {1 / bound:g} to {bound:g}")


def figures(reading: Reading, episodes: Sequence[Episode], version: VersionId | None) -> Mapping[str, float]:
    """What is told of every batch of sampled responses. Means are over action tokens unless another base is named.

    - `episodes`, `tokens`: how many.
    - `score_mean`, `score_std`: over episodes, of the score as it came; the population deviation.
    - `reward_constant`: 1 if all scores of the batch were the same, so that they taught nothing; else 0.
    - `kl`: see `Reading.kl`. `entropy`: nats a token. Both before the update.
    - `sampler_gap`: exp|proximal - behaviour|: staleness and numerical difference together. `sampler_gap_same_weights`: the
      same over tokens that the weights before this update sampled; not there if there were none or `version` is not known.
    - `padding_share`: of the tokens read by the model. `masked_share`: of the B x T action positions without a token; it rises
      when responses collapse.
    """
    mask = reading.rows.mask
    scores = torch.tensor([episode.reward for episode in episodes], dtype=torch.float64)
    gap = (reading.proximal - reading.rows.behaviour).abs().exp()
    same = _sampled_by(version, episodes, mask)
    return {
        "episodes": float(len(episodes)),
        "tokens": float(mask.sum()),
        "score_mean": float(scores.mean()),
        "score_std": float(scores.std(correction=0)),
        "reward_constant": float(is_constant([episode.reward for episode in episodes])),
        "kl": reading.kl,
        "entropy": reading.entropy,
        "sampler_gap": float(gap[mask].mean()),
        **({"sampler_gap_same_weights": float(gap[same].mean())} if bool(same.any()) else {}),
        "padding_share": padding_share(reading.packed),
        "masked_share": reading.rows.empty_share,
    }


def _sampled_by(version: VersionId | None, episodes: Sequence[Episode], mask: Tensor) -> Tensor:
    """Which tokens of the rows `[B, T]` a version sampled; none if it is None."""
    same = torch.zeros_like(mask)
    for row, episode in enumerate(episodes):
        for span in episode.spans:
            if span.version == version:
                same[row, span.start : span.end] = True
    return same & mask

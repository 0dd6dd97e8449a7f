"""PPO: lm-human-preferences' algorithm (Ziegler et al. 2019), decoupled for stale data.

1. Token rewards: `-beta (proximal - reference)`, and the normalised score at the last action token.
2. For each minibatch: whiten rewards, estimate advantages, whiten them; the clipped losses of policy and value, the policy's
   weighted by the truncated ratio of proximal to behaviour policy.
3. The KL controller moves once a batch.

On fresh data from the same weights the behaviour weight is 1 and this is plain PPO.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from honed.kit.errors import InvalidArgument
from honed.learner.algorithms import on_policy
from honed.learner.algorithms.on_policy import Reading, at_tokens, check_ratio
from honed.learner.data.batches import MicroBatch
from honed.learner.data.episode import Episode
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.objectives import advantage, policy_gradient
from honed.learner.objectives.advantage import Advantages
from honed.learner.objectives.kl import KLController
from honed.learner.objectives.normalise import RewardNormaliser, batch_rewards
from honed.learner.objectives.value import value_loss_terms
from honed.learner.train.algorithm import BadLoss, State, UpdateContext
from honed.learner.train.means import MeanOverTokens


@dataclass(frozen=True)
class PPOSettings:
    """The numbers of the algorithm; defaults are lm-human-preferences' for stylistic tasks.

    Attributes:
        clip_ratio: Half-width of the range of the policy's ratio.
        clip_value: How far a value may move in an update and still lower the loss.
        value_coefficient: Of the value's loss.
        gamma: Discount.
        lam: Of generalised advantage estimation.
        whiten_rewards: See `advantage.estimate`.
        importance_cap: Cap of a stale token's importance weight.
        max_ratio: A batch whose mean ratio to the sampler's or the proximal policy passes this, or falls under its inverse, is
            refused.
    """

    clip_ratio: float = 0.2
    clip_value: float = 0.2
    value_coefficient: float = 0.1
    gamma: float = 1.0
    lam: float = 0.95
    whiten_rewards: bool = True
    importance_cap: float = 2.0
    max_ratio: float = 100.0

    def __post_init__(self) -> None:
        """Refuses numbers that cannot work."""
        if self.importance_cap < 1.0:
            raise InvalidArgument("importance_cap", f"must be at least 1, got {self.importance_cap}")
        for name in ("clip_ratio", "clip_value"):
            if not getattr(self, name) > 0:
                raise InvalidArgument(name, f"must be positive, got {getattr(self, name)}")


class PPO:
    """The algorithm with its models, its KL coefficient and its reward normalisation."""

    def __init__(
        self,
        policy: PolicyModel,
        reference: ReferenceModel,
        settings: PPOSettings,
        *,
        kl: KLController,
        normaliser: RewardNormaliser,
    ) -> None:
        """Takes the parts; the trainer moves `policy`."""
        self.policy, self.reference, self.settings = policy, reference, settings
        self.kl, self.normaliser = kl, normaliser

    def prepare(self, batch: Sequence[Episode], context: UpdateContext) -> _Batch:
        """See `Algorithm`."""
        reading = on_policy.read(batch, self.policy, self.reference, context)
        scores = torch.tensor(batch_rewards(self.normaliser, batch))
        rows = reading.rows
        check_ratio("sampler", float((reading.proximal - rows.behaviour)[rows.mask].exp().mean()), self.settings.max_ratio)
        rewards = advantage.token_rewards(reading.proximal, reading.reference, scores, rows.mask, beta=self.kl.value)
        weights = policy_gradient.behaviour_weights(reading.proximal, rows.behaviour, self.settings.importance_cap)
        return _Batch(self, batch, reading, rewards, weights, context)

    def state(self) -> State:
        """See `Algorithm`."""
        return {"kl": self.kl.state(), "normaliser": self.normaliser.state()}

    def load_state(self, state: State) -> None:
        """See `Algorithm`."""
        self.kl.load_state(state["kl"])
        self.normaliser.load_state(state["normaliser"])


class _Batch:
    """A batch with its token rewards and the behaviour weights of its tokens, rows `[B, T]`."""

    def __init__(
        self,
        algorithm: PPO,
        episodes: Sequence[Episode],
        reading: Reading,
        rewards: Tensor,
        weights: Tensor,
        context: UpdateContext,
    ) -> None:
        self.algorithm, self.episodes, self.reading = algorithm, episodes, reading
        self.rewards, self.weights = rewards, weights
        self.means = MeanOverTokens()
        self.largest_ratio = 0.0
        self._context = context

    def minibatch(self, chosen: Sequence[int]) -> _Minibatch:
        """See `Prepared`."""
        settings, reading = self.algorithm.settings, self.reading
        index = torch.tensor(sorted(chosen))
        estimated = advantage.estimate(
            self.rewards[index],
            reading.values[index],
            reading.rows.mask[index],
            gamma=settings.gamma,
            lam=settings.lam,
            whiten_rewards=settings.whiten_rewards,
        )
        everything = len(chosen) == len(self.episodes)
        device = self.algorithm.policy.device
        packed = (
            reading.packed if everything else on_policy.pack(self.episodes, chosen, self._context.microbatch_tokens, device)
        )
        return _Minibatch(self, index, packed, estimated)

    def finish(self) -> Mapping[str, float]:
        """See `Prepared`. It adds to `on_policy.figures`.

        - `reward_mean`: over episodes, of the summed token rewards: normalised score minus beta times KL.
        - `approxkl`, `clip_fraction`, `policy_loss`, `value_loss` (before its coefficient): over all epochs.
        - `ratio_max`, `ratio_mean`: of the ratio to the proximal policy over all epochs.
        - `behaviour_weight`, `behaviour_truncated`: mean importance weight, and the share of tokens at its cap.
        - `beta`, `next_beta`: KL coefficient of this update and of the next.
        """
        kl, reading = self.algorithm.kl, self.reading
        figures = on_policy.figures(reading, self.episodes, self._context.version)
        if not math.isfinite(figures["kl"]):
            raise BadLoss(f"the KL is {figures['kl']}")
        beta = kl.value
        kl.update(figures["kl"], len(self.episodes))
        mask = reading.rows.mask
        return {
            **figures,
            "reward_mean": float(self.rewards.sum(1).mean()),
            "approxkl": self.means["approxkl"],
            "clip_fraction": self.means["clipped"],
            "policy_loss": self.means["policy_loss"],
            "value_loss": self.means["value_loss"],
            "ratio_max": self.largest_ratio,
            "ratio_mean": self.means["ratio"],
            "behaviour_weight": float(self.weights[mask].mean()),
            "behaviour_truncated": float((self.weights[mask] >= self.algorithm.settings.importance_cap).float().mean()),
            "beta": beta,
            "next_beta": kl.value,
        }


class _Minibatch:
    """Some episodes of a batch with their advantages and returns, in rows of the whole batch."""

    def __init__(self, batch: _Batch, index: Tensor, packed: Sequence[MicroBatch], estimated: Advantages) -> None:
        self.micro_batches = packed
        self._batch, self._settings, self._policy = batch, batch.algorithm.settings, batch.algorithm.policy
        self._advantages, self._returns = (torch.zeros_like(batch.reading.values) for _ in range(2))
        self._advantages[index], self._returns[index] = estimated.advantages, estimated.returns
        self._tokens = int(batch.reading.rows.mask[index].sum())
        device = self._policy.device
        # Read once, at the end: reading them at each micro-batch would make the host wait for the device.
        self._largest, self._ratios = torch.zeros((), device=device), torch.zeros((), dtype=torch.float64, device=device)

    @property
    def denominators(self) -> Mapping[str, int]:
        """See `Minibatch`."""
        return {"tokens": self._tokens}

    def losses(self, micro: MicroBatch) -> Mapping[str, Tensor]:
        """See `Minibatch`."""
        settings, reading = self._settings, self._batch.reading
        proximal, advantages = at_tokens(reading.proximal, micro), at_tokens(self._advantages, micro)
        now = self._policy.evaluate(micro)
        policy_loss = policy_gradient.policy_loss_terms(
            now.logprobs, proximal, advantages, clip=settings.clip_ratio, weights=at_tokens(self._batch.weights, micro)
        )
        value_loss = value_loss_terms(
            now.values, at_tokens(reading.values, micro), at_tokens(self._returns, micro), clip=settings.clip_value
        )
        detached = now.logprobs.detach()
        ratio = (detached - proximal).exp()
        self._largest = torch.maximum(self._largest, (detached - proximal).max())
        self._ratios += ratio.sum(dtype=torch.float64)
        self._batch.means.add(
            policy_loss=policy_loss,
            value_loss=value_loss,
            approxkl=policy_gradient.approximate_kl_terms(detached, proximal),
            clipped=policy_gradient.clipped_terms(detached, proximal, advantages, clip=settings.clip_ratio),
            ratio=ratio,
        )
        return {"tokens": (policy_loss + settings.value_coefficient * value_loss).sum()}

    def check(self) -> None:
        """See `Minibatch`."""
        check_ratio("proximal policy", float(self._ratios) / self._tokens, self._settings.max_ratio)
        self._batch.largest_ratio = max(self._batch.largest_ratio, float(self._largest.exp()))

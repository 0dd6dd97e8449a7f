"""A2C (Mnih et al. 2016), as RL4LMs offers it: the advantages of PPO without its ratio, and a value head.

The policy's loss is `-A logp`, the value's the squared error to the return. Made for one pass over a batch: with more of them,
the policy's gradient is no longer that of what was sampled.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from honed.learner import objectives
from honed.learner.algorithms.base import OF_VALUES, Losses, Needs, OnPolicy, algorithm
from honed.settings import Section

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.models.policy import TokenEvaluation
    from honed.learner.settings import LearnerSettings
    from honed.learner.train.sampled import Sampled


class Options(Section):
    """What A2C has of its own."""

    whiten: bool = Field(True, description="Advantages of a minibatch have mean 0 and deviation 1.")


@algorithm("a2c", Options, reads=("gamma", "lam", *OF_VALUES))
class A2C(OnPolicy):
    """Advantage actor-critic."""

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPolicy`."""
        self._learner, self._options = learner, options
        self.needs = Needs(reference=learner.kl.coefficient > 0)

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """Token rewards."""
        rewards = objectives.advantage.token_rewards(
            batch.proximal, batch.reference, batch.scores, batch.mask, beta=batch.beta, placed=batch.placed
        )
        return {"rewards": rewards}

    def minibatch_rows(self, batch: Sampled, rows: Mapping[str, Tensor], index: Tensor) -> Mapping[str, Tensor]:
        """Advantages and returns."""
        values, mask = batch.values[index], batch.mask[index]
        raw = objectives.advantage.generalised_advantages(
            rows["rewards"][index], values, mask, gamma=self._learner.gamma, lam=self._learner.lam
        )
        advantages = objectives.advantage.whiten(raw, mask) if self._options.whiten else raw
        return {"advantages": advantages, "returns": raw + values * mask}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """The losses of policy and value."""
        policy_loss = objectives.policy_gradient.score_function_loss(now.logprobs, at["advantages"]) * at["weights"]
        value_loss = 0.5 * (now.values - at["returns"]).square()
        loss = policy_loss + self._learner.value_coefficient * value_loss
        return Losses({"tokens": loss.sum()}, {"policy_loss": policy_loss, "value_loss": value_loss})

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`reward_mean`: over responses, of the summed token rewards."""
        return {"reward_mean": float(rows["rewards"].sum(1).mean())}

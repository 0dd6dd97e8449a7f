"""PPO: lm-human-preferences' algorithm (Ziegler et al. 2019), decoupled for stale data.

1. Token rewards: `-beta (proximal - reference)`, and the normalised score at the last action token, or where scorers placed it.
2. For each minibatch: whiten rewards, estimate advantages, whiten them.
3. The clipped losses of policy and value (Schulman et al. 2017), the policy's weighted by the truncated ratio of proximal to
   behaviour policy, as their mean over all tokens of the minibatch.

On fresh data from the same weights the behaviour weight is 1 and this is plain PPO.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

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
    """What PPO has of its own."""

    whiten_rewards: bool = True
    dual_clip: Annotated[float, Field(gt=1)] | None = Field(
        None, description="A token with a negative advantage costs at most this times it (Ye et al. 2020); null: no bound."
    )


@algorithm("ppo", Options, reads=("clip_ratio", "clip_value", "gamma", "lam", *OF_VALUES), epochs=4)
class PPO(OnPolicy):
    """Proximal policy optimisation."""

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
        """Whitened advantages, and returns."""
        estimated = objectives.advantage.estimate(
            rows["rewards"][index],
            batch.values[index],
            batch.mask[index],
            gamma=self._learner.gamma,
            lam=self._learner.lam,
            whiten_rewards=self._options.whiten_rewards,
        )
        return {"advantages": estimated.advantages, "returns": estimated.returns}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """The clipped losses of policy and value."""
        learner = self._learner
        clip = {"clip": learner.clip_ratio}
        policy_loss = objectives.policy_gradient.policy_loss_terms(
            now.logprobs, at["proximal"], at["advantages"], weights=at["weights"], dual=self._options.dual_clip, **clip
        )
        value_loss = objectives.value.value_loss_terms(now.values, at["values"], at["returns"], clip=learner.clip_value)
        clipped = objectives.policy_gradient.clipped_terms(now.logprobs.detach(), at["proximal"], at["advantages"], **clip)
        return Losses(
            {"tokens": (policy_loss + learner.value_coefficient * value_loss).sum()},
            {"policy_loss": policy_loss, "value_loss": value_loss, "clip_fraction": clipped},
        )

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`reward_mean`: over responses, of the summed token rewards: normalised score minus beta times KL."""
        return {"reward_mean": float(rows["rewards"].sum(1).mean())}

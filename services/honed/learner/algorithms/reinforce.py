"""REINFORCE (Williams 1992) with a baseline, and REINFORCE++ (Hu 2025), which clips as PPO does. Neither needs a value head.

Token rewards are `-beta (logp - ref_logp)` and the score at the last token (the sum, where a scorer rewards each token); a
token's return is the sum of its own and all that follow. The baseline is the batch's mean return (`baseline: mean`), or mean
and deviation (`baseline: whiten`, REINFORCE++).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from honed.learner import objectives
from honed.learner.algorithms.base import Losses, Needs, OnPolicy, algorithm
from honed.settings import Section

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.models.policy import TokenEvaluation
    from honed.learner.settings import LearnerSettings
    from honed.learner.train.sampled import Sampled


class Options(Section):
    """What REINFORCE has of its own; `baseline: whiten` and `clipped: true` make it REINFORCE++."""

    baseline: Literal["none", "mean", "whiten"] = Field("mean", description="What is taken from the returns of a batch.")
    clipped: bool = Field(False, description="The clipped surrogate of PPO, for more than one step on a batch.")


@algorithm("reinforce", Options, reads=("clip_ratio", "gamma"))
class Reinforce(OnPolicy):
    """The score function's gradient."""

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPolicy`."""
        self._learner, self._options = learner, options
        self.needs = Needs(reference=learner.kl.coefficient > 0)

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """Returns above the baseline of the whole batch."""
        mask = batch.mask
        rewards = objectives.advantage.token_rewards(batch.proximal, batch.reference, batch.scores, mask, beta=batch.beta)
        returns = objectives.advantage.returns_to_go(rewards, mask, gamma=self._learner.gamma)
        match self._options.baseline:
            case "none":
                advantages = returns
            case "mean":
                advantages = (returns - returns[mask].mean()) * mask
            case "whiten":
                advantages = objectives.advantage.whiten(returns, mask)
        return {"rewards": rewards, "advantages": advantages}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """`-A logp`, or the clipped surrogate."""
        gradient, advantages, clip = objectives.policy_gradient, at["advantages"], self._learner.clip_ratio
        if self._options.clipped:
            ratio = (now.logprobs - at["proximal"]).exp()
            loss = gradient.clipped_surrogate(ratio, advantages, low=clip, high=clip) * at["weights"]
        else:
            loss = gradient.score_function_loss(now.logprobs, advantages) * at["weights"]
        return Losses({"tokens": loss.sum()}, {"policy_loss": loss})

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`reward_mean`: over responses, of the summed token rewards."""
        return {"reward_mean": float(rows["rewards"].sum(1).mean())}

"""RLOO (Ahmadian et al. 2024): REINFORCE whose baseline is the mean score of the *other* responses to the same prompt.

A response is one action: its score less `beta` times its KL to the reference (k1, summed over its tokens) is its reward, and
the clipped ratio is that of the whole response. With one epoch and one minibatch the ratio is 1 and this is REINFORCE.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

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
    """What RLOO has of its own."""

    normalise: bool = Field(False, description="Advantages of a batch have mean 0 and deviation 1.")


@algorithm("rloo", Options, reads=("clip_ratio",), epochs=4)
class RLOO(OnPolicy):
    """REINFORCE, leave one out."""

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPolicy`."""
        self._learner, self._options = learner, options
        self.needs = Needs(reference=learner.kl.coefficient > 0, group=2)

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """Advantages, the behaviour weight of whole responses, and what each token counts: a response counts 1."""
        mask = batch.mask
        rewards = batch.scores - batch.beta * (batch.proximal - batch.reference).sum(1)
        advantages = objectives.group.leave_one_out_advantages(rewards, batch.groups)
        if self._options.normalise:
            advantages = (advantages - advantages.mean()) / (advantages.std() + objectives.group.EPSILON)
        weights = objectives.policy_gradient.behaviour_weights(
            batch.proximal.sum(1), batch.behaviour.sum(1), self._learner.importance_cap
        )
        return {
            "advantages": advantages.unsqueeze(1) * mask,
            "response_weights": weights.unsqueeze(1) * mask,
            "share": mask / mask.sum(1, keepdim=True),
        }

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """The clipped surrogate of whole responses, at each token its share of it."""
        clip, advantages = self._learner.clip_ratio, at["advantages"]
        ratio = objectives.policy_gradient.response_ratios(now.logprobs, at["proximal"], at["response"], mean=False)
        loss = objectives.policy_gradient.clipped_surrogate(ratio, advantages, low=clip, high=clip)
        figures = {"policy_loss": loss, "clip_fraction": (loss > -advantages * ratio).to(loss.dtype)}
        return Losses({"responses": (loss * at["response_weights"] * at["share"]).sum()}, figures)

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`constant_groups`: the share of prompts whose responses all had the same score."""
        return {"constant_groups": objectives.group.constant_share(batch.scores, batch.groups)}

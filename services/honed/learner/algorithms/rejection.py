"""Rejection fine-tuning (RAFT, Dong et al. 2023; RFT of trlx): imitates the best of the policy's own responses.

Of the responses to a prompt those with the highest scores are kept, equal responses once, and learned as demonstrations
are: the loss is `-log p` of each of their tokens, and tokens of all kept responses weigh the same. There is no baseline and no
ratio; what holds the policy back is that it imitates nobody but itself. The loss has no KL term, so that no
reference is loaded and no KL is told, and scores are compared as they came: `learner.kl`, `importance_cap`, `reward_clip` and
`reward_normalisation` are refused beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

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
    """What rejection fine-tuning has of its own."""

    keep: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Share of the responses to a prompt that is kept, one at the least; null: the best one alone."
    )
    least_score: float | None = Field(None, description="Responses that score less are never kept; null: no bound.")


@algorithm("rejection", Options, ignores=("kl", "importance_cap", "reward_clip", "reward_normalisation"))
class RejectionFineTuning(OnPolicy):
    """Maximum likelihood of the best responses."""

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPolicy`."""
        self._options = options
        self.needs = Needs(reference=False, group=2)

    def rows(self, batch: Sampled) -> Mapping[str, Tensor]:
        """Which tokens are of a response that is kept."""
        eligible, least = ~batch.repeated, self._options.least_score
        if least is not None:
            eligible = eligible & (batch.raw_scores >= least)
        kept = objectives.group.best_of_groups(batch.raw_scores, batch.groups, eligible, self._options.keep)
        return {"trained": (batch.mask & kept.unsqueeze(1)).to(batch.proximal.dtype)}

    def losses(self, batch: Sampled, now: TokenEvaluation, at: Mapping[str, Tensor]) -> Losses:
        """Cross-entropy of kept responses."""
        loss = -now.logprobs * at["trained"]
        return Losses({"tokens": loss.sum()}, {"policy_loss": loss})

    def figures(self, batch: Sampled, rows: Mapping[str, Tensor]) -> Mapping[str, float]:
        """`kept`: the share of responses that was imitated; `kept_score`: their mean score, as it came."""
        kept = rows["trained"].any(1)
        score = {"kept_score": float(batch.raw_scores[kept].mean())} if bool(kept.any()) else {}
        return {"kept": float(kept.float().mean()), **score}

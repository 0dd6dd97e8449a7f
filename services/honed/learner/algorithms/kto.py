"""KTO (Ethayarajh et al. 2024): learns from single responses that people called good or bad, without pairs.

A response's gain over a reference point is `log_ratio - z` if it is desirable, `z - log_ratio` if not, `log_ratio` the sum
over its tokens of `logp - ref_logp`, and its loss `w (1 - sigmoid(beta gain))` with the weight w of its kind. z, the KL between
policy and reference, is estimated from the minibatch's prompts with responses to others; see `train.on_labelled`. The mean is
over all responses of a minibatch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from honed.kit.errors import InvalidArgument
from honed.learner import objectives
from honed.learner.algorithms.base import Needs, OnLabelled, ResponseLosses, algorithm
from honed.settings import Rate, Section, Weight

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.settings import LearnerSettings


class Options(Section):
    """What KTO has of its own."""

    beta: Rate = Field(0.1, description="How dear it is to leave the reference; small is cheap.")
    desirable_weight: Weight = Field(
        1.0,
        description="Of the loss of a response that was called good. The paper keeps the sum of these weights over the data "
        "between 1 and 4/3 of that of the others.",
    )
    undesirable_weight: Weight = Field(1.0, description="Of the loss of one that was called bad.")


@algorithm("kto", Options, learns_from="labels")
class KTO(OnLabelled):
    """Kahneman-Tversky optimisation."""

    needs = Needs(reference=True)

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnLabelled`."""
        if not options.desirable_weight and not options.undesirable_weight:
            raise InvalidArgument("learner.options.desirable_weight", "is 0, and undesirable_weight too: nothing is learned")
        if learner.batch < 2:
            raise InvalidArgument("learner.batch", "kto judges each response against others of its batch: take at least 2")
        self._options = options

    def losses(self, log_ratios: Tensor, desirable: Tensor, mismatched: Tensor) -> ResponseLosses:
        """The loss of the gain over the KL of mismatched responses."""
        options, kl = self._options, objectives.direct.mismatched_kl(mismatched)
        loss = objectives.direct.kto(
            log_ratios,
            desirable,
            kl,
            beta=options.beta,
            desirable_weight=options.desirable_weight,
            undesirable_weight=options.undesirable_weight,
        )
        reached = log_ratios.detach()
        return ResponseLosses(
            loss, {"reward": options.beta * reached, "accuracy": ((reached > kl) == desirable).to(reached.dtype)}
        )

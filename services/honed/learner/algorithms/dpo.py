"""DPO (Rafailov et al. 2023): learns from what people preferred directly, without a reward model and without sampling.

A pair's margin is `beta ((logp - ref_logp)(chosen) - (logp - ref_logp)(rejected))`, and its loss `-log sigmoid(margin)`.
Relatives are options: IPO (Azar et al. 2023), the hinge of SLiC (Zhao et al. 2023), and labels that are wrong with a known
share (`label_smoothing`, Mitchell 2023). Judgements are read from the preference service; versions reach the generators all the
same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from honed.learner import objectives
from honed.learner.algorithms.base import Needs, OnPairs, PairLosses, algorithm
from honed.settings import Rate, Section

if TYPE_CHECKING:
    from torch import Tensor

    from honed.learner.settings import LearnerSettings


class Options(Section):
    """What DPO has of its own."""

    beta: Rate = Field(0.1, description="How dear it is to leave the reference; small is cheap.")
    loss: Literal["sigmoid", "ipo", "hinge"] = Field("sigmoid", description="sigmoid: DPO's own.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = Field(0.0, description="Share of judgements taken for wrong.")


@algorithm("dpo", Options, learns_from="preferences")
class DPO(OnPairs):
    """Direct preference optimisation."""

    needs = Needs(reference=True)

    def __init__(self, learner: LearnerSettings, options: Options) -> None:
        """See `OnPairs`."""
        self._options = options
        self.mean = options.loss == "ipo"  # as its authors' correction, and TRL, have it: long responses weigh as short ones

    def losses(self, chosen: Tensor, rejected: Tensor) -> PairLosses:
        """The loss of the margin."""
        options, margins = self._options, chosen - rejected
        loss = objectives.direct.direct_preference(
            margins, beta=options.beta, kind=options.loss, label_smoothing=options.label_smoothing
        )
        figures = {
            "margin": options.beta * margins,
            "accuracy": (margins > 0).to(loss.dtype),
            "chosen_reward": options.beta * chosen,
            "rejected_reward": options.beta * rejected,
        }
        return PairLosses(loss, figures)

"""Online DPO (Guo et al. 2024): DPO on pairs of the policy's own responses, of which the run's scorers prefer one.

Of the responses to a prompt the one with the highest score is the better of a pair and the one with the lowest score the worse;
responses whose scores are equal make no pair. The loss and its relatives are DPO's: see `algorithms.dpo`. The reference stays
the policy that the run began with.
"""

from __future__ import annotations

from honed.learner.algorithms.base import Needs, algorithm
from honed.learner.algorithms.dpo import DPO, Options


@algorithm("online_dpo", Options)
class OnlineDPO(DPO):
    """DPO from scored rollouts."""

    needs = Needs(reference=True, group=2)

"""Admits prompts into the loop, as many as may start and never one more.

All that the decision needs stands in Redis, so a conductor that starts again knows at once where it is. The formula (see
`honed.queue.admission`) counts a trained rollout both in version * batch and in `accepted`; here both leave it out.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from honed.conductor.prompts import PromptSequence
from honed.queue.admission import Admission, AdmissionPolicy
from honed.queue.keys import PROMPTS, ROLLOUTS, SCORED
from honed.queue.lease import Claim
from honed.queue.stream import WorkQueue

TICK_S = 0.05


@dataclass(frozen=True)
class Depths:
    """Rollouts in each stage, those in hand included, those that have trained for good, and the dead letters of all stages."""

    prompts: int
    rollouts: int
    scored: int
    trained: int
    dead: int = 0

    @property
    def in_flight(self) -> int:
        """Admitted and not yet trained or dropped."""
        return self.prompts + self.rollouts + self.scored


class Admitter:
    """Feeds one run until its steps are covered."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        admission: Admission,
        claim: Claim,
        queues: dict[str, WorkQueue],
        prompts: PromptSequence,
        *,
        samples_per_prompt: int,
        target: int,
    ) -> None:
        """Feeds the run.

        Args:
            policy: how many may start.
            admission: puts them into the stream.
            claim: the conductor's lease.
            queues: a consumer of each stage, to read its books.
            prompts: what to admit.
            samples_per_prompt: rollouts of one prompt.
            target: rollouts that the run trains on in all.
        """
        self._policy, self._admission, self._claim = policy, admission, claim
        self._queues, self._prompts = queues, prompts
        self._samples, self._target = samples_per_prompt, target
        self.position = 0
        """Prompts admitted so far."""

    async def depths(self) -> Depths:
        """Where the rollouts of the run are."""
        prompts, rollouts, scored = await asyncio.gather(
            *(self._queues[stage].stats() for stage in (PROMPTS, ROLLOUTS, SCORED))
        )
        dead = prompts.dead + rollouts.dead + scored.dead
        return Depths(prompts.depth * self._samples, rollouts.depth, scored.depth, scored.acked, dead)

    async def run(self, stopping: asyncio.Event) -> None:
        """Admits until `stopping` is set.

        Raises:
            LeaseLost: another conductor has taken over.
            Unavailable: Redis is gone for good.
        """
        self.position = await self._admission.position()
        while not stopping.is_set():
            depths = await self.depths()
            fresh = self._policy.capacity(0, depths.scored, depths.prompts + depths.rollouts)
            wanted = self._target - depths.trained - depths.in_flight
            count = min(fresh // self._samples, -(-wanted // self._samples))
            if count > 0:
                messages = list(self._prompts.messages(self.position, count))
                self.position = await self._admission.admit(self._claim, self.position, messages)
            else:
                await asyncio.sleep(TICK_S)

"""Feeds the loop: admits prompts as late as the learner's waiting allows, and never more than stay fresh.

All that a decision needs is read from Redis at one instant, so a conductor that starts again knows at once where it is. When
Redis has lost its last seconds, or everything, the run goes on behind the highest turn that anybody remembers: the learner
(`LearnerProgress.turn`) or this process. So a rollout's id never names another prompt's rollout.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Final

from honed.conductor.accounts import Accounts, RunCounters, read_accounts
from honed.conductor.freshness import FreshnessController
from honed.conductor.prompts import PromptMix
from honed.kit.errors import Unavailable
from honed.queue.admission import AdmissionPolicy, Cursor, CursorMoved, LoopState, PromptAdmitter
from honed.queue.connection import RedisLink
from honed.queue.inbox import PromptInbox
from honed.queue.keys import APPLICATION, PROMPTS, ROLLOUTS, SCORED, SUBMITTED, RunKeys
from honed.queue.lease import HeldLease
from honed.queue.progress import LearnerProgress
from honed.queue.snapshot import LoopReader, LoopSnapshot
from honed.queue.spans import admitted

logger = logging.getLogger(__name__)

TICK_S: Final = 0.05
_MOST_AT_ONCE: Final = 256  # prompts of one step, so that Redis is never held up


@dataclass(frozen=True)
class Depths:
    """Rollouts in each stage, those in hand included, and the dead letters of all stages.

    Attributes:
        prompts: Of prompts that are not sampled yet.
        rollouts: Sampled, not scored.
        scored: Scored, not trained on.
        dead: Dead letters.
    """

    prompts: int
    rollouts: int
    scored: int
    dead: int = 0

    @property
    def in_flight(self) -> int:
        """Admitted and not yet trained on or dropped."""
        return self.prompts + self.rollouts + self.scored


class Feeder:
    """Feeds one run.

    Attributes:
        snapshot: What was read last; None before the first look.
        cursor: How far the prompts have come.
        lead: Updates by which rollouts start ahead of the learner now.
        refused: Waiting prompts that could not be used.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: RunKeys,
        lease: HeldLease,
        prompts: PromptMix,
        policy: AdmissionPolicy,
        *,
        steps: int | None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Connects to nothing yet.

        Args:
            link: Redis.
            keys: The run's keys.
            lease: The conductor's.
            prompts: What to admit.
            policy: How many may start.
            steps: Updates of the run; None when it has no end.
            clock: Seconds, monotonic.
            sleep: How to pause between looks.
        """
        self._admitter, self._reader, self._inbox = PromptAdmitter(link, keys), LoopReader(link, keys), PromptInbox(link, keys)
        self._lease, self._prompts, self._policy, self._steps = lease, prompts, policy, steps
        self._clock, self._sleep = clock, sleep
        self._freshness = FreshnessController(policy.batch, policy.max_staleness)
        self._counters: RunCounters | None = None
        self._one_at_a_time = asyncio.Lock()  # a look in the middle of a step would take it for one that Redis lost
        self._attempted = 0  # one more than the highest turn that this process may have admitted
        self._progress: LearnerProgress | None = None  # what the learner said last, corrected
        self._said_unsaved = self._vanished = 0
        self.snapshot: LoopSnapshot | None = None
        self.cursor = self._seen_cursor = Cursor()
        self.lead = self._freshness.lead
        self.refused = 0

    @property
    def admitted(self) -> int:
        """Prompts admitted so far."""
        return self.cursor.position - self.cursor.skipped

    @property
    def depths(self) -> Depths:
        """Where the rollouts were at the last look."""
        if self.snapshot is None:
            return Depths(0, 0, 0)
        stages = self.snapshot.stages
        unsaved = self._progress.unsaved if self._progress else 0
        return Depths(
            stages[PROMPTS].depth * self._policy.samples,
            stages[ROLLOUTS].depth,
            max(0, stages[SCORED].depth - unsaved),
            sum(stats.dead for stats in stages.values()),
        )

    @property
    def figures(self) -> dict[str, float]:
        """Figures for people, as `Run.figures` of the contract has them."""
        waiting = self.snapshot.waiting if self.snapshot else {}
        return {
            "lead": self.lead,
            "prompts_submitted_waiting": waiting.get(SUBMITTED, 0),
            "prompts_application_waiting": waiting.get(APPLICATION, 0),
            "prompts_refused": self.refused,
            "duplicates": self.accounts.duplicates,
        }

    @property
    def accounts(self) -> Accounts:
        """Where every admitted rollout was at the last look."""
        if self.snapshot is None or self._counters is None:
            return Accounts()
        return read_accounts(
            self.snapshot.stages,
            self._progress,
            self._seen_cursor,
            self._counters.totals,
            samples=self._policy.samples,
            batch=self._policy.batch,
        )

    async def run(self, stopping: asyncio.Event) -> None:
        """Admits until `stopping` is set. Outages, a Redis that lost something, and a learner that is away only cost time.

        Raises:
            LeaseLost: another conductor has taken over.
            ValueError: the prompt file has been changed.
            FailedPrecondition: Redis refuses the operations.
        """
        while not stopping.is_set():
            try:
                admitted = await self.step()
            except CursorMoved as error:
                logger.warning("the prompt cursor has moved", extra={"reason": str(error)})
                admitted = False
            except Unavailable as error:
                logger.warning("nothing is admitted; Redis does not serve", extra={"reason": str(error)})
                admitted = False
            if not admitted:
                await self._sleep(TICK_S)

    async def look(self) -> LoopSnapshot:
        """Reads where the loop stands, without admitting anything."""
        async with self._one_at_a_time:
            return await self._look()

    async def _look(self) -> LoopSnapshot:
        snapshot = await self._reader.read()
        if self._counters is None:
            self._counters = RunCounters(snapshot.cursor.carried)
        if self._counters.observe(snapshot.stages):
            logger.warning("Redis has lost everything; going on by what the learner and this process know")
            self._vanished = self._said_unsaved
        self._progress = self._corrected(snapshot.progress)
        self.snapshot = snapshot
        self.cursor = self._seen_cursor = self._place(snapshot)
        return snapshot

    def _corrected(self, progress: LearnerProgress | None) -> LearnerProgress | None:
        """The learner's progress, where `unsaved` counts only rollouts whose entries Redis still has."""
        if progress is None:
            return replace(self._progress, unsaved=0) if self._progress else None
        if progress.unsaved < self._said_unsaved:
            self._vanished = 0  # a checkpoint: the learner expects them in the stream no longer
        self._said_unsaved = progress.unsaved
        return replace(progress, unsaved=max(0, progress.unsaved - self._vanished))

    async def step(self) -> bool:
        """Looks once and admits what may start; returns whether anything was admitted.

        Raises:
            CursorMoved: Redis lost or made a step since the look; look again.
        """
        async with self._one_at_a_time:
            return await self._step()

    async def _step(self) -> bool:
        snapshot = await self._look()
        progress = self._progress
        if snapshot.progress is None or progress is None or progress.finished:
            return False  # without the learner's counts nobody knows what is fresh
        if (count := self._count(snapshot, progress)) <= 0:
            return False
        count = min(count, _MOST_AT_ONCE)
        waiting = {
            source: await self._inbox.peek(source, count) for source in self._prompts.sources if snapshot.waiting[source]
        }
        start = self.cursor
        plan = await asyncio.to_thread(self._prompts.plan, start.position, count, start.file, waiting)
        if not plan.messages and not plan.taken:
            return False
        cursor = replace(start, position=start.position + len(plan.messages), file=plan.file)
        self._attempted = max(self._attempted, cursor.position)
        with admitted(plan.messages) as prompts:
            await self._admitter.admit(self._lease.claim, snapshot.cursor.position, prompts, cursor, plan.taken)
        self.cursor = cursor
        self.refused += plan.refused
        return bool(plan.messages)

    def _count(self, snapshot: LoopSnapshot, progress: LearnerProgress) -> int:
        """Prompts that may start now."""
        depths = self.depths
        running = depths.prompts + depths.rollouts
        self.lead = self._freshness.observe(self._clock(), progress, running, snapshot.stages[PROMPTS].waiting)
        state = LoopState(progress.update, min(progress.served, progress.update), depths.scored, running)
        wanted = None
        if self._steps is not None:
            wanted = (self._steps - progress.update) * self._policy.batch - depths.in_flight
        return self._policy.prompts(state, self.lead, wanted)

    def _place(self, snapshot: LoopSnapshot) -> Cursor:
        """The cursor to go on from: Redis' own, unless Redis has lost some of it."""
        found, last = snapshot.cursor, self.cursor
        assert self._counters is not None
        trained = snapshot.progress.turn if snapshot.progress else 0
        if found.position >= max(self._attempted, trained):
            return found
        carried = self._counters.carried
        if self._attempted >= trained and self._attempted:
            # What this process tried and was not told about was either not admitted or is lost: it is not asked for again.
            return replace(
                last, position=self._attempted, skipped=last.skipped + self._attempted - last.position, carried=carried
            )
        # A conductor that has just started. What its predecessor admitted beyond the learner's highest turn may still be in
        # the learner's hands: no more than may be on the way.
        policy = self._policy
        margin = -(-(policy.max_in_flight + (policy.max_staleness + 1) * policy.batch) // policy.samples)
        return Cursor(trained + margin, found.skipped + margin, found.file + trained - found.position, carried)

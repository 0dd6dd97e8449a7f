"""Where the learner stands, for its service, its metrics, and those who feed it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from honed.artifacts.version import VersionId
from honed.kit.busy import BusyTime
from honed.kit.errors import HonedError
from honed.kit.health import Pulse
from honed.queue.progress import LearnerProgress, ProgressBoard
from honed.queue.promotions import PromotedScorers
from honed.v1 import learner_pb2

logger = logging.getLogger(__name__)

EVERY_S: Final = 2.0


@dataclass
class LearnerStatus:
    """Where the learner stands. Its parts write here; the service and the progress report read.

    Attributes:
        state: What it does now.
        fence: Of its lease.
        update: Updates behind its weights.
        version: What its weights are, or will be, published as.
        served: The last version that a generator has committed.
        checkpoint_update: Update of the last durable checkpoint.
        unsaved: Rollouts that have trained and have no durable checkpoint yet.
        turn: First turn of the prompt sequence after all that have trained.
        waited_s: Seconds that the last update waited for its batch.
        spare: Rollouts that were waiting beside the batch when the last update took it.
        update_s: Seconds that the last update took.
        finished: Whether the updates of the run are done.
        undone: Rollouts whose training was undone, over the whole run.
        alarms: What is in trouble, by subject.
        dropped: Rollouts that did not train, by reason, as read from Redis last.
        scorers: Version of each scorer whose scores are trained on.
        busy: Time in updates.
        waiting: Time waiting for batches.
        pulse: Of what the learner does in threads: updates, and whatever a hung disk would hold up. Waiting for rollouts,
            for Redis or for a person is idle.
    """

    state: learner_pb2.LearnerState.ValueType = learner_pb2.LEARNER_STATE_STARTING
    fence: int = 0
    update: int = 0
    version: VersionId = field(default_factory=lambda: VersionId(0, 0))
    served: VersionId | None = None
    checkpoint_update: int = 0
    unsaved: int = 0
    turn: int = 0
    waited_s: float = 0.0
    spare: int = 0
    update_s: float = 0.0
    finished: bool = False
    undone: int = 0
    alarms: dict[str, str] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    scorers: Mapping[str, str] = field(default_factory=dict)
    busy: BusyTime = field(default_factory=BusyTime)
    waiting: BusyTime = field(default_factory=BusyTime)
    pulse: Pulse = field(default_factory=lambda: Pulse("training", math.inf, idle=True))

    @property
    def alarm(self) -> str:
        """All that is in trouble, in one text."""
        return "; ".join(self.alarms.values())

    def progress(self, samples: int) -> LearnerProgress:
        """What those who feed the learner need; `samples` are the rollouts of one turn."""
        return LearnerProgress(
            fence=self.fence,
            update=self.update,
            # After a roll-back the generators may serve a version beyond it until the next push has arrived.
            served=min(self.served.step if self.served else 0, self.update),
            version=self.served.label if self.served else "",
            unsaved=self.unsaved,
            turn=self.turn,
            samples=samples,
            waited_s=self.waited_s,
            spare=self.spare,
            update_s=self.update_s,
            finished=self.finished,
            undone=self.undone,
            scorers=tuple(f"{name}@{version}" for name, version in sorted(self.scorers.items())),
        )


class Promotions(Protocol):
    """Which version of each scorer is promoted."""

    async def promoted(self) -> Mapping[str, str]:
        """Version by name of the scorer; empty when it is not known."""


class NoPromotions:
    """Every score is taken, whichever version gave it."""

    async def promoted(self) -> Mapping[str, str]:
        """Nothing is known."""
        return {}


class AnnouncedPromotions:
    """What the reward service has recorded and announced."""

    def __init__(self, scorers: PromotedScorers) -> None:
        """Reads through `scorers`."""
        self._scorers = scorers

    async def promoted(self) -> Mapping[str, str]:
        """Version by name of the scorer; while that cannot be read, what was read last holds."""
        try:
            await self._scorers.refresh()
        except HonedError as error:
            logger.warning("promotions cannot be read; what was read last holds", extra={"reason": str(error)})
        return self._scorers.promoted()


class Reporter:
    """Writes the progress to Redis at every change and every two seconds, and reads there what the status shows.

    An outage of Redis ends nothing; it holds up whoever waits for `write`.
    """

    def __init__(
        self,
        status: LearnerStatus,
        board: ProgressBoard,
        *,
        samples: int,
        dropped: Callable[[], Awaitable[Mapping[str, int]]],
        promotions: Promotions,
        identify: Callable[[], Awaitable[None]],
    ) -> None:
        """Writes nothing yet.

        Args:
            status: What to write, and where to put what is read.
            board: Where to write.
            samples: Rollouts of one turn.
            dropped: Counts the rollouts that did not train, by reason.
            promotions: Which scorers are promoted.
            identify: Says in Redis what this run is, in case Redis has forgotten.
        """
        self._status, self._board, self._samples = status, board, samples
        self._dropped, self._promotions, self._identify = dropped, promotions, identify
        self._writing = asyncio.Lock()
        self._due = asyncio.Event()

    def soon(self) -> None:
        """Has the progress written without waiting for it."""
        self._due.set()

    async def write(self) -> None:
        """Writes the progress now."""
        async with self._writing:  # an older report must not arrive after a newer one
            written = await self._board.write(self._status.progress(self._samples))
        if not written:
            logger.warning("a learner with a higher fence reports its progress", extra={"fence": self._status.fence})

    async def refresh(self) -> None:
        """Reads the drops and the promoted scorers, and says whose run this is."""
        await self._identify()
        self._status.dropped = await self._dropped()
        self._status.scorers = await self._promotions.promoted()

    async def run(self) -> None:
        """Writes and reads every two seconds, and writes when it is due, until cancelled."""
        while True:
            await self.refresh()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(EVERY_S):
                    while True:
                        self._due.clear()
                        await self.write()
                        await self._due.wait()

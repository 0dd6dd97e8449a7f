"""Where a run's loop stands, read at one instant."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from honed.queue.admission import Cursor
from honed.queue.connection import RedisLink
from honed.queue.keys import APPLICATION, STAGES, SUBMITTED, RunKeys
from honed.queue.progress import LearnerProgress
from honed.queue.scripts import GROUP, Scripts
from honed.queue.stats import StageStats


@dataclass(frozen=True)
class LoopSnapshot:
    """Everything that the conductor decides by.

    Attributes:
        progress: What the learner said last; None before it says anything, or when Redis lost it.
        cursor: How far the prompts have come.
        stages: The counts of each stage.
        waiting: Prompts of each source that wait to be admitted.
    """

    progress: LearnerProgress | None
    cursor: Cursor
    stages: Mapping[str, StageStats]
    waiting: Mapping[str, int]


class LoopReader:
    """Reads snapshots."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        self._scripts = Scripts(link, "feed.lua")
        self._keys = [keys.progress(), keys.cursor(), keys.inbox(SUBMITTED), keys.inbox(APPLICATION)]
        for stage in STAGES:
            self._keys += [keys.stream(stage), keys.tally(stage), keys.dead(stage)]

    async def read(self) -> LoopSnapshot:
        """One snapshot; raises as `RedisLink.call` does."""
        progress, cursor, submitted, application, *stages = await self._scripts.run("snapshot", self._keys, [GROUP])
        return LoopSnapshot(
            LearnerProgress.from_json(progress) if progress else None,
            Cursor.from_fields(dict(zip(cursor[::2], cursor[1::2], strict=True))),
            {name: StageStats.from_reply(reply) for name, reply in zip(STAGES, stages, strict=True)},
            {SUBMITTED: submitted, APPLICATION: application},
        )

"""How far the learner is, for those who feed it: written by the learner, read by the conductor and the generators."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Self

from honed.kit.rows import read_row
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.scripts import Argument, Scripts


@dataclass(frozen=True)
class LearnerProgress:
    """The learner's own counts; the depths of the streams alone do not tell them.

    Attributes:
        fence: Of the learner's lease.
        update: Updates behind its weights.
        served: Updates behind the version that generators have committed last.
        version: Label of that version; empty before the first.
        unsaved: Rollouts that have trained and whose entries still stand in stream `scored`, because no checkpoint has
            their effect yet.
        undone: Rollouts of updates that a rollback or a damaged checkpoint undid, over the whole run.
        turn: First turn of the prompt sequence after all that have trained. The prompt cursor is never behind it, whatever
            Redis lost.
        samples: Rollouts of one turn.
        waited_s: Seconds that the last update waited for its batch.
        spare: Rollouts that were waiting beside the batch when the last update took it.
        update_s: Seconds that the last update took.
        finished: Whether the updates of the run are done.
        scorers: `name@version` of each scorer whose scores are trained on.
    """

    fence: int = 0
    update: int = 0
    served: int = 0
    version: str = ""
    unsaved: int = 0
    undone: int = 0
    turn: int = 0
    samples: int = 1
    waited_s: float = 0.0
    spare: int = 0
    update_s: float = 0.0
    finished: bool = False
    scorers: tuple[str, ...] = ()

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Reads what `ProgressBoard.write` wrote. Keys of a newer build are passed over."""
        row: dict[str, Any] = json.loads(text)
        return read_row(cls, {**row, "scorers": tuple(row.get("scorers", ()))})


class ProgressBoard:
    """Where a run's learner writes its progress."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        """Connects to nothing yet."""
        self._link = link
        self._key = keys.progress()
        self._scripts = Scripts(link, "registry.lua")

    async def write(self, progress: LearnerProgress) -> bool:
        """Writes the progress; False, and no change, if a learner with a higher fence has written."""
        arguments: list[Argument] = [progress.fence, json.dumps(asdict(progress))]
        return bool(await self._scripts.run("report", [self._key], arguments))

    async def read(self) -> LearnerProgress | None:
        """What the learner wrote last; None if none has, or Redis lost it."""
        found = await self._link.command("HGET", self._key, "progress")
        return None if found is None else LearnerProgress.from_json(found)

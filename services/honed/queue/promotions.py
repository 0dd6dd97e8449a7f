"""How the replicas of the reward service, and the learner, hear of promotions.

The record of truth is a file in the store (`honed.artifacts.promotions`). What Redis loses is announced anew by whichever
replica sees that the file has a higher number.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final

from honed.kit.errors import HonedError
from honed.kit.rows import read_row
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.scripts import Argument, Scripts

logger = logging.getLogger(__name__)

CANDIDATES: Final = 2
"""How many loaded versions of one scorer wait for a promotion at most."""


@dataclass(frozen=True)
class Candidate:
    """A version of a scorer that each replica loads beside the one that serves."""

    name: str
    version: str
    source: str


@dataclass(frozen=True)
class Announced:
    """What was announced last.

    Attributes:
        number: Of the newest promotion; 0 if there was none, or Redis lost it.
        promoted: The version that serves, by scorer; only scorers that were promoted.
        candidates: Newest first.
    """

    number: int = 0
    promoted: Mapping[str, str] = field(default_factory=dict)
    candidates: tuple[Candidate, ...] = ()


class PromotionBoard:
    """The announcements of one run."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        """Connects to nothing yet."""
        self._link = link
        self._key = keys.promotions()
        self._scripts = Scripts(link, "promotions.lua")

    async def read(self) -> Announced:
        """What stands there."""
        number, promoted, candidates = await self._link.command("HMGET", self._key, "number", "promoted", "candidates")
        return Announced(
            int(number or 0),
            json.loads(promoted or "{}"),
            tuple(read_row(Candidate, row) for row in json.loads(candidates or "[]")),
        )

    async def announce(self, number: int, promoted: Mapping[str, str]) -> int:
        """Announces a promotion; an older number than the one that stands changes nothing. Returns the one that stands."""
        arguments: list[Argument] = [number, json.dumps(dict(promoted))]
        return int(await self._scripts.run("announce", [self._key], arguments))

    async def offer(self, candidate: Candidate) -> None:
        """Asks each replica to load a version."""
        arguments: list[Argument] = [candidate.name, candidate.version, candidate.source, CANDIDATES]
        await self._scripts.run("offer", [self._key], arguments)


class PromotedScorers:
    """The promoted version of each scorer, for whoever asks often.

    Redis says when to read the record of truth again. What it announces itself is not enough: whether a promotion still
    stands depends on the run file, which may name another source by now.
    """

    def __init__(self, board: PromotionBoard, record: Callable[[], Mapping[str, str]]) -> None:
        """Knows nothing until `following`.

        Args:
            board: The run's.
            record: Reads the record of truth: the promotions that stand, version by scorer; blocks.
        """
        self._board = board
        self._record = record
        self._number = 0
        self._promoted: Mapping[str, str] = {}

    def promoted(self) -> Mapping[str, str]:
        """Scorer's name to version, as of about a second ago; a scorer that was never promoted is not in it."""
        return self._promoted

    async def refresh(self) -> None:
        """Reads once.

        Raises:
            HonedError: Redis or the record cannot be read.
        """
        number = (await self._board.read()).number
        if number == 0 or number != self._number:  # 0: nothing was promoted, or Redis lost it
            self._promoted = await asyncio.to_thread(self._record)
            self._number = number

    @asynccontextmanager
    async def following(self, every_s: float = 1.0) -> AsyncIterator[PromotedScorers]:
        """Reads at once and then every `every_s` seconds. While Redis is away, what was read last holds."""

        async def follow() -> None:
            while True:
                await asyncio.sleep(every_s)
                await self._try()

        await self._try()
        task = asyncio.create_task(follow())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _try(self) -> None:
        try:
            await self.refresh()
        except HonedError as error:
            logger.warning("promotions cannot be read; what was read last holds", extra={"reason": str(error)})

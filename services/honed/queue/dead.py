"""Dead letters: list them, look at one, send one back to work when its cause is gone, or delete it.

The stream of dead letters has no bound: each one is work that nobody has done, and somebody must decide about it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Self

from honed.kit.errors import InvalidArgument, NotFound
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.messages import Message, from_fields
from honed.queue.scripts import Scripts

_REPLAY_KNOWN_S: Final = 86_400
_PAGE: Final = 200


@dataclass(frozen=True)
class Death:
    """One time that an entry was given up.

    Attributes:
        reason: Why.
        deliveries: How often it had been delivered.
        consumer: Who held it last; empty if its lease ran out.
        at: When, by the Redis server's clock.
    """

    reason: str
    deliveries: int
    consumer: str
    at: datetime

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Reads what the script `bury` wrote."""
        return cls(
            reason=str(facts["reason"]),
            deliveries=int(facts["deliveries"]),
            consumer=str(facts["consumer"]),
            at=datetime.fromtimestamp(int(facts["at_ms"]) / 1000, tz=UTC),
        )


@dataclass(frozen=True)
class DeadLetter:
    """An entry that was given up.

    Attributes:
        letter: Its id among the stage's dead letters: what `show` and `replay` take.
        stage: The stage that gave it up.
        entry: The id that it had in the stage's stream.
        message: What was to be worked on.
        death: Why and when.
        history: Earlier deaths of the same message, oldest first: it was replayed after each.
    """

    letter: str
    stage: str
    entry: str
    message: Message
    death: Death
    history: tuple[Death, ...] = ()


class DeadLetters:
    """The dead letters of one stage of a run."""

    def __init__(self, link: RedisLink, keys: RunKeys, stage: str) -> None:
        """Connects to nothing yet."""
        self._link = link
        self._scripts = Scripts(link, "dead.lua")
        self._stage = stage
        self._dead = keys.dead(stage)
        self._replay_keys = [self._dead, keys.stream(stage), keys.tally(stage), keys.replayed(stage)]
        self._delete_keys = [self._dead, keys.tally(stage), keys.replayed(stage)]

    async def count(self) -> int:
        """How many there are."""
        return int(await self._link.command("XLEN", self._dead))

    async def recent(self, window_s: float, at_most: int = 10_000) -> int:
        """How many were given up within the last `window_s` seconds and are still here; counting stops at `at_most`."""
        return int(await self._scripts.run("recent", [self._dead], [int(window_s * 1000), at_most]))

    async def list(self, limit: int = 50, after: str | None = None) -> list[DeadLetter]:
        """One page, oldest first. For the next page pass the last letter's id as `after`; a short page is the last.

        Raises:
            InvalidArgument: `limit` is not 1 to 1000, or `after` is no letter's id.
        """
        if not 1 <= limit <= 1000:
            raise InvalidArgument("limit", f"must be 1 to 1000, is {limit}")
        start = f"({_checked('after', after)}" if after else "-"
        found = await self._link.command("XRANGE", self._dead, start, "+", "COUNT", limit)
        return [_read(letter.decode(), fields) for letter, fields in found]

    async def show(self, letter: str) -> DeadLetter:
        """One letter.

        Raises:
            NotFound: there is no such letter; it may have been replayed.
        """
        found = await self._link.command("XRANGE", self._dead, _checked("letter", letter), letter)
        if not found:
            raise self._missing(letter)
        return _read(letter, found[0][1])

    async def replay(self, letter: str) -> str:
        """Sends a letter back to its stage as a fresh entry with its history; returns the entry's id.

        Atomic, and safe to repeat: for a day a second replay of the same letter answers with the same entry.

        Raises:
            NotFound: there is no such letter.
        """
        entry = await self._scripts.run("replay", self._replay_keys, [_checked("letter", letter), _REPLAY_KNOWN_S])
        if not entry:
            raise self._missing(letter)
        return str(entry.decode())

    async def delete(self, letter: str) -> None:
        """Removes a letter for good: nobody will do this work. Counted as `deleted`; safe to repeat for a day.

        Raises:
            NotFound: there is no such letter.
        """
        if not await self._delete([_checked("letter", letter)]):
            raise self._missing(letter)

    async def delete_all(self) -> int:
        """Removes the letters that are here now; returns how many. Those that come meanwhile stay."""
        newest = await self._link.command("XREVRANGE", self._dead, "+", "-", "COUNT", 1)
        if not newest:
            return 0
        deleted = 0
        while page := await self._link.command("XRANGE", self._dead, "-", newest[0][0], "COUNT", _PAGE):
            deleted += await self._delete([letter.decode() for letter, _ in page])
        return deleted

    async def _delete(self, letters: Sequence[str]) -> int:
        return sum(await self._scripts.run("delete", self._delete_keys, [_REPLAY_KNOWN_S, *letters]))

    def _missing(self, letter: str) -> NotFound:
        return NotFound(f"stage {self._stage} has no dead letter {letter}: list them, it may have been replayed")


def _checked(field: str, letter: str) -> str:
    milliseconds, dash, sequence = letter.partition("-")
    if not (dash and milliseconds.isdecimal() and sequence.isdecimal()):
        raise InvalidArgument(field, f"{letter!r} is no dead letter's id, which looks like 1718000000000-0")
    return letter


def _read(letter: str, fields: Mapping[bytes, bytes]) -> DeadLetter:
    facts = {name.decode(): value.decode(errors="replace") for name, value in fields.items() if name != b"body"}
    return DeadLetter(
        letter=letter,
        stage=facts["stage"],
        entry=facts["entry"],
        message=from_fields(fields),
        death=Death.from_facts(facts),
        history=tuple(Death.from_facts(earlier) for earlier in json.loads(facts.get("history", "[]"))),
    )

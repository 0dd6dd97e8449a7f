"""The operations of the package's Lua files, and how a consumer runs those of `hop.lua`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Final, TypeVar

import redis.exceptions as rex

from honed.queue.connection import RedisLink, needs_group
from honed.queue.keys import RunKeys

T = TypeVar("T")
Argument = str | bytes | int

GROUP: Final = "workers"
"""The one consumer group of each stream: an entry that is finished is deleted, so no second group could read it."""

# Longer than an outage should last: a call that is repeated later than this may be told `lost` of what it did itself.
_ANSWERS_LIVE_S: Final = 86_400
_OPENING: Final = re.compile(r"^-- @operation ([a-z_]+)\n", re.MULTILINE)


@cache
def operations(file: str) -> dict[str, str]:
    """The operations of a Lua file by name (`-- @operation NAME` opens one), each with the file's shared head in front."""
    text = files(__package__).joinpath(file).read_text(encoding="utf-8")
    head, *parts = _OPENING.split(text)
    return {name: head + body for name, body in zip(parts[::2], parts[1::2], strict=True)}


class Scripts:
    """Runs a Lua file's operations by their digests; a server that forgot one gets it again."""

    def __init__(self, link: RedisLink, file: str) -> None:
        """`file` is a Lua file of this package."""
        self._link = link
        self._scripts = {name: link.redis.register_script(text) for name, text in operations(file).items()}

    async def run(self, operation: str, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """Runs one operation, through an outage if need be.

        Raises:
            redis.exceptions.ResponseError: the consumer group is missing (`connection.needs_group`).
            HonedError: as `RedisLink.call` does.
        """
        script = self._scripts[operation]
        return await self._link.call(lambda: script(keys, arguments))


class HopScripts:
    """Runs the operations of `hop.lua` for one consumer of one stage: tokens, and the group when it is missing."""

    def __init__(self, link: RedisLink, keys: RunKeys, stage: str, consumer: str, token_prefix: str) -> None:
        """`token_prefix` tells this object's calls from those of every other, a namesake's after a restart too."""
        self._link = link
        self._scripts = Scripts(link, "hop.lua")
        self._stream = keys.stream(stage)
        self._keys = [self._stream, keys.tally(stage), keys.answers(stage, consumer), keys.failures(stage)]
        self._consumer = consumer
        self._tokens = (f"{token_prefix}-{n}" for n in itertools.count())
        self._seen: list[str] = []

    async def change(self, operation: str, arguments: Sequence[Argument], keys: Sequence[str] = ()) -> Any:
        """Runs an operation whose repeat must be given the first answer: it changes who has what."""
        token = next(self._tokens)
        answer = await self._run(operation, token, arguments, keys)
        self._seen.append(token)
        return answer

    async def read(self, operation: str, arguments: Sequence[Argument] = (), keys: Sequence[str] = ()) -> Any:
        """Runs an operation whose repeat may answer afresh."""
        return await self._run(operation, "", arguments, keys)

    async def with_group(self, operation: Callable[[], Awaitable[T]]) -> T:
        """Runs an operation; if the consumer group is missing, makes it and runs the operation again.

        The group begins at the stream's first entry: what was pending when a group got lost is delivered anew.
        """
        for _ in range(3):
            try:
                return await operation()
            except rex.ResponseError as error:
                if not needs_group(error):
                    raise
                await self._make_group()
        return await operation()

    async def _run(self, operation: str, token: str, arguments: Sequence[Argument], keys: Sequence[str]) -> Any:
        seen, self._seen = self._seen, []
        shared: list[Argument] = [GROUP, self._consumer, _ANSWERS_LIVE_S, " ".join(seen), token]
        try:
            return await self.with_group(lambda: self._scripts.run(operation, [*self._keys, *keys], [*shared, *arguments]))
        except BaseException:
            self._seen += seen
            raise

    async def _make_group(self) -> None:
        async def make() -> None:
            try:
                await self._link.redis.xgroup_create(self._stream, GROUP, id="0", mkstream=True)
            except rex.ResponseError as error:
                if "BUSYGROUP" not in str(error):  # another consumer was faster
                    raise

        await self._link.call(make)

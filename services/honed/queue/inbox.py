"""Prompts that wait to be admitted beside the prompt file: those that people submit, and those taken from applications.

They live in Redis streams, as serialised `honed.v1.Prompt`, and leave in the step that admits them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from honed.kit.errors import Conflict, Overloaded
from honed.queue.connection import RedisLink
from honed.queue.keys import APPLICATION, SUBMITTED, RunKeys
from honed.queue.scripts import Scripts
from honed.v1 import generation_pb2

_ANSWERS_LIVE_S: Final = 86_400
_RETRY_AFTER_S: Final = 10.0


@dataclass(frozen=True)
class WaitingPrompt:
    """One prompt that waits.

    Attributes:
        entry: Its id in the stream.
        prompt: Text, token ids, or messages.
    """

    entry: str
    prompt: generation_pb2.Prompt


class PromptInbox:
    """The waiting prompts of a run."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        self._link = link
        self._keys = keys
        self._scripts = Scripts(link, "feed.lua")

    async def submit(self, prompts: Sequence[generation_pb2.Prompt], *, limit: int, key: str = "") -> int:
        """Adds submitted prompts, all or none; returns how many wait then.

        Args:
            prompts: What to add.
            limit: Most that may wait.
            key: The same key again, within a day, adds nothing and returns the first answer. Empty: no such promise.

        Raises:
            Overloaded: there is no room for all of them.
            Conflict: the key was used for other prompts.
        """
        bodies = [prompt.SerializeToString(deterministic=True) for prompt in prompts]
        digest = hashlib.sha256()
        for body in bodies:
            digest.update(len(body).to_bytes(8, "big") + body)
        keys = [self._keys.inbox(SUBMITTED), self._keys.submission(hashlib.sha256(key.encode()).hexdigest())]
        outcome, waiting = await self._scripts.run(
            "submit", keys, [limit, digest.hexdigest() if key else "", _ANSWERS_LIVE_S, *bodies]
        )
        if outcome == b"full":
            raise Overloaded(
                f"{waiting} submitted prompts wait and {limit} may (conductor.prompt_mix.submitted_limit): there is no room "
                f"for {len(bodies)} more now",
                _RETRY_AFTER_S,
            )
        if outcome == b"other":
            raise Conflict("the idempotency key was used for other prompts: give these a key of their own")
        return int(waiting)

    async def offer(self, prompt: generation_pb2.Prompt, *, limit: int) -> None:
        """Adds a prompt of an application; beyond `limit` the oldest goes."""
        key, body = self._keys.inbox(APPLICATION), prompt.SerializeToString()
        await self._link.command("XADD", key, "MAXLEN", limit, "*", "body", body)

    async def peek(self, source: str, count: int) -> list[WaitingPrompt]:
        """The oldest prompts of a source; they stay until `PromptAdmitter.admit` takes them."""
        found = await self._link.command("XRANGE", self._keys.inbox(source), "-", "+", "COUNT", count)
        return [
            WaitingPrompt(entry.decode(), generation_pb2.Prompt.FromString(fields[b"body"]))
            for entry, fields in found
            if b"body" in fields
        ]

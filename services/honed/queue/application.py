"""Takes a share of the prompts that applications send as training prompts. Opt-in; never delays or fails a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import entry_points
from typing import Final

from honed.kit.errors import HonedError, InvalidArgument
from honed.queue.connection import RedisLink
from honed.queue.inbox import PromptInbox
from honed.queue.keys import RunKeys
from honed.queue.settings import ApplicationPromptsSettings
from honed.v1 import generation_pb2

logger = logging.getLogger(__name__)

GROUP: Final = "honed.redactors"
Redactor = Callable[[str], str | None]
"""Takes a text, returns it without what must not be trained on; None: do not train on it at all."""

_BACKLOG: Final = 256


def load_redactor(name: str) -> Redactor:
    """The function that a package offers under `name` in the entry point group `honed.redactors`.

    Raises:
        InvalidArgument: nobody offers it, or it cannot be loaded.
    """
    field = "conductor.application_prompts.redact"
    offered = {point.name: point for point in entry_points(group=GROUP)}
    if name not in offered:
        known = ", ".join(sorted(offered)) or "none"
        raise InvalidArgument(field, f"no installed package offers {name!r} in the group {GROUP}; there are: {known}")
    try:
        found: Redactor = offered[name].load()
    except Exception as error:
        raise InvalidArgument(field, f"{name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    return found


class ApplicationPrompts:
    """Offers prompts. `offer` only draws the sample and puts the prompt aside; redaction and Redis follow in the background.

    Attributes:
        outcomes: Counts: `offered`, `redacted_away`, `redactor_failed`, `no_text`, `overflow`, `redis`.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: RunKeys,
        settings: ApplicationPromptsSettings,
        *,
        decode: Callable[[Sequence[int]], str] | None = None,
        redactor: Redactor | None = None,
        rng: random.Random | None = None,
        on_outcome: Callable[[str], None] = lambda outcome: None,
    ) -> None:
        """Loads the redactor that the settings name.

        Args:
            link: Redis. Give it a finite outage deadline: a prompt that cannot be added within it is forgotten.
            keys: The run's keys.
            settings: `conductor.application_prompts`.
            decode: Makes text of token ids, for the redactor. Without it prompts of token ids are not offered when there is
                a redactor.
            redactor: In place of the one that the settings name.
            rng: Draws the sample.
            on_outcome: Is told each outcome as it is counted.

        Raises:
            InvalidArgument: the redactor cannot be loaded.
        """
        self._inbox = PromptInbox(link, keys)
        self._settings, self._decode = settings, decode
        self._redactor = redactor or (load_redactor(settings.redact) if settings.redact else None)
        self._rng = rng or random.Random()
        self._backlog: asyncio.Queue[generation_pb2.Prompt] = asyncio.Queue(_BACKLOG)
        self._on_outcome = on_outcome
        self.outcomes: Counter[str] = Counter()

    def offer(self, prompt: generation_pb2.Prompt) -> None:
        """Considers the prompt of one request; returns at once and raises nothing."""
        if not self._settings.share or self._rng.random() >= self._settings.share:
            return
        try:
            self._backlog.put_nowait(prompt)
        except asyncio.QueueFull:
            self._count("overflow")

    def _count(self, outcome: str) -> None:
        self.outcomes[outcome] += 1
        self._on_outcome(outcome)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Works on what was offered as long as the block runs."""
        work = asyncio.create_task(self._work())
        try:
            yield
        finally:
            work.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await work

    async def _work(self) -> None:
        while True:
            prompt = await self._backlog.get()
            if (clean := await self._redacted(prompt)) is None:
                continue
            try:
                await self._inbox.offer(clean, limit=self._settings.limit)
            except HonedError as error:
                self._count("redis")
                logger.warning("a prompt of an application is forgotten; Redis does not serve", extra={"reason": str(error)})
            else:
                self._count("offered")

    async def _redacted(self, prompt: generation_pb2.Prompt) -> generation_pb2.Prompt | None:
        if self._redactor is None:
            return prompt
        clean = generation_pb2.Prompt()
        try:
            match prompt.WhichOneof("content"):
                case "text":
                    texts = [prompt.text]
                case "messages":
                    texts = [message.content for message in prompt.messages.messages]
                case _ if self._decode is not None:
                    texts = [self._decode(prompt.token_ids.ids)]
                case _:
                    self._count("no_text")
                    return None
            redactor = self._redactor
            redacted = await asyncio.to_thread(lambda: [redactor(text) for text in texts])
            kept = [text for text in redacted if text]
            if len(kept) < len(texts):
                self._count("redacted_away")
                return None
            if prompt.HasField("messages"):
                clean.messages.CopyFrom(prompt.messages)  # without the reference, which nobody has redacted
                for message, text in zip(clean.messages.messages, kept, strict=True):
                    message.content = text
            else:
                clean.text = kept[0]
        except Exception as error:  # the redactor is foreign code; without it nothing may be kept
            self._count("redactor_failed")
            # The error's own text may quote the prompt.
            logger.warning("the redactor failed; the prompt is not kept", extra={"error": type(error).__name__})
            return None
        return clean

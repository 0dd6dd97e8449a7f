"""Which prompt a turn of the run gets: from the file, from those submitted, or from those of applications, by weight."""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from honed.conductor.prompt_file import FilePrompt, PromptFile
from honed.conductor.settings import ConductorSettings
from honed.kit.errors import InvalidArgument
from honed.models.prompts import PromptEncoder
from honed.queue.inbox import WaitingPrompt
from honed.queue.keys import APPLICATION, SUBMITTED
from honed.queue.messages import Message
from honed.v1 import common_pb2

logger = logging.getLogger(__name__)

FILE: Final = "file"
SOURCES: Final = (FILE, SUBMITTED, APPLICATION)
_SEED_SPACE: Final = 1 << 48
_GOLDEN: Final = 0x9E3779B97F4A7C15  # 2**64 / the golden ratio: its multiples spread evenly over every stretch of turns
_MASK: Final = (1 << 64) - 1


@dataclass
class Plan:
    """The prompts of the next turns.

    Attributes:
        messages: Entries of the stream `prompts`, a turn each.
        file: Prompts that the file has given after them.
        taken: For each other source, the entries that are used up.
        refused: Prompts among those taken that cannot be used, too long ones say.
    """

    messages: list[Message]
    file: int
    taken: dict[str, list[str]] = field(default_factory=dict)
    refused: int = 0


class PromptMix:
    """Draws each turn's prompt from the sources that have one, each in proportion to its weight.

    The draw is a function of seed and turn alone, and even over every stretch of turns. A source without prompts leaves its
    share to the others. The file's prompts come in their own order, whatever comes between them.
    """

    def __init__(
        self, run: str, file: PromptFile | None, encoder: PromptEncoder, seed: int, settings: ConductorSettings
    ) -> None:
        """Of one run.

        Args:
            run: Its name.
            file: The prompt file, if there is one.
            encoder: For the prompts of the other sources.
            seed: Of order, mixture and samples.
            settings: How to mix and how to sample.

        Raises:
            InvalidArgument: no source could ever give a prompt.
        """
        self._run, self._file, self._encoder, self._seed, self._settings = run, file, encoder, seed, settings
        weights = settings.prompt_mix
        self._weights = {FILE: weights.file, SUBMITTED: weights.submitted, APPLICATION: weights.application}
        if file is None:
            self._weights[FILE] = 0.0
        if not any(self._weights.values()):
            raise InvalidArgument("conductor.prompt_mix", "gives no source a weight, so nothing would ever be trained on")
        self._offset = int.from_bytes(hashlib.blake2b(f"{seed}/mix".encode(), digest_size=8).digest(), "big")

    @property
    def sources(self) -> list[str]:
        """The sources beside the file that have a weight."""
        return [source for source in (SUBMITTED, APPLICATION) if self._weights[source] > 0]

    def plan(self, turn: int, count: int, file: int, waiting: Mapping[str, Sequence[WaitingPrompt]]) -> Plan:
        """The prompts of up to `count` turns from `turn` on; fewer when no source has any more.

        Args:
            turn: The first turn.
            count: Turns.
            file: Prompts that the file has given before.
            waiting: Prompts of the other sources, oldest first.

        Raises:
            ValueError: the prompt file has been changed.
        """
        plan = Plan([], file)
        left = {source: list(reversed(waiting.get(source, ()))) for source in self.sources}
        while len(plan.messages) < count:
            source = self._draw(turn, left)
            if source is None:
                break
            if source == FILE:
                assert self._file is not None
                prompt = self._file.at(plan.file, self._seed)
                plan.file += 1
            else:
                one = left[source].pop()
                plan.taken.setdefault(source, []).append(one.entry)
                try:
                    prompt = FilePrompt(self._encoder.prompt(one.prompt), one.prompt.reference)
                except InvalidArgument as error:
                    plan.refused += 1
                    logger.warning("a prompt cannot be used", extra={"source": source, "field": error.field})
                    continue
            plan.messages.append(self._message(turn, prompt, source))
            turn += 1
        return plan

    def _draw(self, turn: int, left: Mapping[str, Sequence[WaitingPrompt]]) -> str | None:
        open_ = [(name, weight) for name, weight in self._weights.items() if weight > 0 and (name == FILE or left[name])]
        if not open_:
            return None
        point = ((self._offset + turn * _GOLDEN) & _MASK) / (_MASK + 1) * sum(weight for _, weight in open_)
        for name, weight in open_:
            point -= weight
            if point < 0:
                return name
        return open_[-1][0]

    def _message(self, turn: int, prompt: FilePrompt, source: str) -> Message:
        task = common_pb2.PromptTask(
            group_id=f"{self._run}-{turn}",
            run=self._run,
            prompt_token_ids=prompt.token_ids,
            sampling=common_pb2.SamplingParams(
                max_tokens=self._settings.response_tokens,
                temperature=self._settings.temperature,
                seed=random.Random(f"{self._seed}/{turn}").randrange(_SEED_SPACE),
                fixed_length=self._settings.fixed_length,
            ),
            samples=self._settings.samples_per_prompt,
            source=source,
            reference=prompt.reference,
        )
        return Message(task.group_id, task.SerializeToString())

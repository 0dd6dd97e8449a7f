"""A request being decoded, and what was sampled of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from honed.artifacts.version import VersionId
from honed.generation.requests import Chunk, EngineRequest, FinishReason, Span
from honed.models.text_stream import TextStream


@dataclass(slots=True, eq=False)
class Row:
    """A request being decoded. Whoever asked sets `cancelled` when the answer is no longer wanted."""

    request: EngineRequest
    text: TextStream | None
    generator: torch.Generator
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[tuple[VersionId, int]] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    sent: int = 0
    cancelled: bool = False

    @property
    def prefix(self) -> list[int]:
        """All tokens that the next one follows."""
        return [*self.request.prompt_token_ids, *self.token_ids]

    @property
    def length(self) -> int:
        """How many they are."""
        return len(self.request.prompt_token_ids) + len(self.token_ids)

    def take(self) -> Chunk:
        """What was sampled since the last call."""
        start, end = self.sent, len(self.token_ids)
        self.sent = end
        return Chunk(
            token_ids=tuple(self.token_ids[start:]),
            logprobs=tuple(self.logprobs[start:]) if self.request.want_logprobs else (),
            spans=self._spans(start, end),
            text=self.text.take() if self.text is not None and self.request.want_text else "",
            finish_reason=self.finish_reason,
        )

    def _spans(self, start: int, end: int) -> tuple[Span, ...]:
        ends = [first for _, first in self.versions[1:]] + [end]
        return tuple(
            Span(version, max(first, start), min(last, end))
            for (version, first), last in zip(self.versions, ends, strict=True)
            if max(first, start) < min(last, end)
        )


def make_row(request: EngineRequest, decode: Callable[[list[int]], str], generator: torch.Generator) -> Row:
    """A row for `request`; it decodes text only if someone needs it."""
    needs_text = request.want_text or bool(request.sampling.stop)
    text = TextStream(decode, request.prompt_token_ids, request.sampling.stop) if needs_text else None
    return Row(request, text, generator)

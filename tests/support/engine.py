"""An engine without a model, for tests of what stands around it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from pathlib import Path

from honed.artifacts.version import VersionId
from honed.generation.engine import CommitReport
from honed.generation.gate import RequestGate
from honed.generation.requests import Chunk, EngineLimits, EngineRequest, FinishReason, Span
from honed.kit.errors import FailedPrecondition


class FakeEngine:
    """Answers each request with `max_tokens` times the token 7, once `go_on` is set.

    Attributes:
        go_on: Samples wait for it in the engine.
        fault: Raised in place of an answer while it is set.
        begun: Requests in the order in which they got into the engine.
        cancelled: Ids of requests whose caller left.
        broken: Versions that a commit refuses, with the error.
    """

    description = "fake 1.0"
    longest_token = 4

    def __init__(self, gate: RequestGate, version: VersionId | None = None) -> None:
        self.gate = gate
        self.version = version or VersionId(1, 0)
        self.limits = EngineLimits(max_model_len=4096, vocab_size=1000)
        self.refused: Mapping[VersionId, str] = {}
        self.disagreeing: frozenset[VersionId] = frozenset()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.fault: Exception | None = None
        self.progress = 0
        self.begun: list[EngineRequest] = []
        self.cancelled: list[str] = []
        self.broken: dict[VersionId, Exception] = {}
        self.prepared: list[VersionId] = []
        self.tokenise: Callable[[str], list[int]] = lambda text: [5] * (len(text) // 4)

    @property
    def in_flight(self) -> int:
        return self.gate.in_flight

    async def start(self) -> None:
        self.gate.open()

    async def complete(self, request: EngineRequest) -> Chunk:
        async with self.gate.enter(request.kind):
            self.begun.append(request)
            try:
                await self.go_on.wait()
            except asyncio.CancelledError:
                self.cancelled.append(request.request_id)
                raise
            if self.fault is not None:
                raise self.fault
            self.progress += 1
            count = request.sampling.max_tokens
            return Chunk((7,) * count, (-0.5,) * count, (Span(self.version, 0, count),), "", FinishReason.LENGTH)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        yield await self.complete(request)

    async def prepare(self, version: VersionId, directory: Path) -> None:
        self.prepared.append(version)

    async def commit(self, version: VersionId) -> CommitReport:
        if version in self.broken:
            raise self.broken[version]
        if version not in self.prepared:
            raise FailedPrecondition("not prepared")
        self.version = version
        return CommitReport(version, 0.01, 0.0, 0)

    async def abort_version(self, version: VersionId) -> None:
        self.prepared.remove(version)

    async def pause(self) -> None:
        self.gate.shut()

    async def resume(self) -> None:
        self.gate.open()

    async def wait_dead(self) -> str:
        await asyncio.Event().wait()
        return ""

    async def close(self) -> None:
        self.gate.end("the engine is closed")

    def encode(self, text: str) -> list[int]:
        return self.tokenise(text)

    def decode(self, token_ids: Sequence[int]) -> str:
        return ""

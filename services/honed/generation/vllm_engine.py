"""The engine on vLLM.

Requests pass straight through. A push pauses the scheduler (requests stay), loads the weights, makes every request in flight
compute its prefix anew, and lets the canaries run alone (`vllm_scheduler`), so that nothing is sampled by unverified weights;
`swap` has the order of events and what happens on failure.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from time import monotonic
from typing import cast

from honed.artifacts.version import VersionId
from honed.generation.admission import Admission
from honed.generation.candidate import Candidate, read_candidate
from honed.generation.engine import (
    Chunk,
    CommitReport,
    CommitSettings,
    EngineLimits,
    EngineRequest,
    InitialVersion,
    check_request,
)
from honed.generation.swap import VersionSwap, finish
from honed.generation.vllm_adapter import VLLM, Sampled, VLLMSettings
from honed.generation.vllm_plugin import CANARY_PREFIX
from honed.kit.errors import DeadlineExceeded, Unavailable

__all__ = ["VLLMEngine", "VLLMSettings"]

_SHUTDOWN_S = 10.0


class VLLMEngine:
    """`GenerationEngine` on vLLM's `AsyncLLM`, whose engine runs in a child process."""

    def __init__(
        self,
        initial: InitialVersion,
        settings: VLLMSettings | None = None,
        commits: CommitSettings | None = None,
        *,
        max_in_flight: int = 1024,
        request_timeout_s: float = 600.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Nothing starts yet.

        Args:
            initial: What to serve first.
            settings: How to run vLLM.
            commits: Bounds of a push.
            max_in_flight: Requests beyond this are refused as `Overloaded`.
            request_timeout_s: The longest that the engine may take for a request, or for the next chunk of a stream.
            clock: Counts seconds.
        """
        self._initial = initial
        self._settings = settings or VLLMSettings()
        self._commits = commits or CommitSettings()
        self._admission = Admission(max_in_flight)
        self._request_timeout_s = request_timeout_s
        self._clock = clock
        self._started: tuple[VLLM, VersionSwap] | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def version(self) -> VersionId:
        """See `GenerationEngine`."""
        return self._swap.version if self._started else self._initial.version

    @property
    def in_flight(self) -> int:
        """See `GenerationEngine`."""
        return self._admission.in_flight

    @property
    def limits(self) -> EngineLimits:
        """See `GenerationEngine`."""
        return self._vllm.limits

    @property
    def description(self) -> str:
        """See `GenerationEngine`."""
        return f"vllm {self._vllm.version}"

    async def start(self) -> None:
        """See `GenerationEngine`. Takes about half a minute."""
        candidate = await asyncio.to_thread(read_candidate, self._initial.version, self._initial.directory)
        starting = asyncio.create_task(asyncio.to_thread(VLLM.create, self._settings, candidate.directory))
        try:
            vllm = await finish(starting)
        except asyncio.CancelledError:
            if not starting.cancelled() and starting.exception() is None:
                await asyncio.to_thread(starting.result().shutdown, _SHUTDOWN_S)
            raise
        host = _Host(vllm)
        swap = VersionSwap(host, candidate, self._admission, self._commits, self._clock)
        self._started = (vllm, swap)
        try:
            await swap.verify_first()
        except BaseException:
            await self.close()
            raise
        self._watch = asyncio.create_task(self._watch_process())

    async def complete(self, request: EngineRequest) -> Chunk:
        """See `GenerationEngine`."""
        check_request(request, self.limits)
        async with self._admission.enter():
            sampled = await self._vllm.submit(request, self.version.label, stream=False)
            try:
                async with asyncio.timeout(self._request_timeout_s):
                    part = await sampled.next()
            except BaseException as error:
                await self._give_up(sampled, error)
                raise
        return part

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """See `GenerationEngine`."""
        check_request(request, self.limits)
        async with self._admission.enter():
            sampled = await self._vllm.submit(request, self.version.label, stream=True)
            try:
                while True:
                    async with asyncio.timeout(self._request_timeout_s):
                        part = await sampled.next()
                    yield part
                    if part.finish_reason is not None:
                        return
            except BaseException as error:
                await self._give_up(sampled, error)
                raise

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """See `GenerationEngine`."""
        await self._swap.prepare(version, directory)

    async def commit(self, version: VersionId) -> CommitReport:
        """See `GenerationEngine`."""
        return await self._swap.commit(version)

    async def abort_version(self, version: VersionId) -> None:
        """See `GenerationEngine`."""
        self._swap.forget(version)

    async def pause(self) -> None:
        """See `GenerationEngine`."""
        await self._swap.pause()

    async def resume(self) -> None:
        """See `GenerationEngine`."""
        await self._swap.resume()

    async def wait_dead(self) -> str:
        """See `GenerationEngine`."""
        return await self._swap.wait_dead()

    async def close(self) -> None:
        """See `GenerationEngine`."""
        self._admission.end("the engine is closed")
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None
        if self._started is not None:
            await self._swap.die("the engine is closed")

    def encode(self, text: str) -> list[int]:
        """See `GenerationEngine`."""
        return cast("list[int]", self._vllm.tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `GenerationEngine`."""
        return cast(str, self._vllm.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def _vllm(self) -> VLLM:
        if self._started is None:
            raise Unavailable("the engine has not started")
        return self._started[0]

    @property
    def _swap(self) -> VersionSwap:
        if self._started is None:
            raise Unavailable("the engine has not started")
        return self._started[1]

    async def _watch_process(self) -> None:
        await self._vllm.wait_dead()
        await self._swap.die("the vLLM engine process died; the service must restart. The log above has the cause")

    async def _give_up(self, sampled: Sampled, error: BaseException) -> None:
        await sampled.abort()
        if isinstance(error, TimeoutError):
            raise DeadlineExceeded(f"the engine gave nothing within {self._request_timeout_s:g} s") from error


class _Host:
    """vLLM as the transaction of a push sees it."""

    def __init__(self, vllm: VLLM) -> None:
        self._vllm = vllm
        self._numbers = itertools.count()

    async def freeze(self) -> None:
        await self._vllm.pause()

    async def load(self, candidate: Candidate) -> None:
        await self._vllm.load(candidate.directory, candidate.weight_files, candidate.version.label)

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        async with asyncio.TaskGroup() as group:
            tasks = []
            for token_ids in prompts:
                name = f"{CANARY_PREFIX}{next(self._numbers)}"
                tasks.append(group.create_task(self._vllm.prompt_logprobs(name, token_ids, name)))
        return [task.result() for task in tasks]

    async def thaw(self) -> None:
        await self._vllm.resume()

    async def halt(self, reason: str) -> None:
        self._vllm.fail_all()
        await asyncio.to_thread(self._vllm.shutdown, _SHUTDOWN_S)

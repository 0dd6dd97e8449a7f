"""The engine on vLLM.

Requests pass straight through. A push loads the weights beside those that serve, pauses the
scheduler (requests stay), exchanges the two sets, makes every request in flight compute its prefix
anew, and lets the canaries run alone (`scheduler`), so that nothing is sampled by unverified
weights; `swap` has the order of events and what happens on failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import multiprocessing
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Unpack

from honed.artifacts.version import VersionId
from honed.generation.candidate import Candidate
from honed.generation.engine import CommitSettings, InitialVersion
from honed.generation.requests import Chunk, EngineLimits, EngineRequest, check_request
from honed.generation.swap import VersionSwap, WeightHost, finish
from honed.generation.swapping import EngineOptions, SwappingEngine
from honed.generation.vllm.adapter import VLLM
from honed.generation.vllm.plugin import CANARY_PREFIX
from honed.generation.vllm.settings import VLLMSettings
from honed.kit.errors import Unavailable

__all__ = ["VLLMEngine", "VLLMSettings"]

logger = logging.getLogger(__name__)

_SHUTDOWN_S = 10.0
_LOOK_AGAIN_S = 0.2


class VLLMEngine(SwappingEngine):
    """`GenerationEngine` on vLLM's `AsyncLLM`, whose engine runs in a child process."""

    def __init__(
        self,
        initial: InitialVersion | Iterable[InitialVersion],
        settings: VLLMSettings | None = None,
        commits: CommitSettings | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Nothing starts yet.

        Args:
            initial: See `SwappingEngine`.
            settings: How to run vLLM.
            commits: Bounds of a push.
            options: See `SwappingEngine`.
        """
        self._settings = settings or VLLMSettings()
        super().__init__(initial, commits, dtype=self._settings.dtype, **options)
        self._vllm_or_none: VLLM | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def limits(self) -> EngineLimits:
        """See `GenerationEngine`."""
        return self._vllm.limits

    @property
    def description(self) -> str:
        """See `GenerationEngine`."""
        return f"vllm {self._vllm.version}"

    @property
    def progress(self) -> int:
        """See `GenerationEngine`."""
        return self._vllm.tokens_in_flight

    async def complete(self, request: EngineRequest) -> Chunk:
        """See `GenerationEngine`."""
        check_request(request, self.limits)
        async with self._gate.enter(request.kind) as claim:
            sampled = await self._vllm.submit(request, self.version.label, claim.release, stream=False)
            try:
                return await self._in_time(sampled.next)
            except BaseException:
                await sampled.abort()
                raise

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """See `GenerationEngine`."""
        check_request(request, self.limits)
        async with self._gate.enter(request.kind) as claim:
            sampled = await self._vllm.submit(request, self.version.label, claim.release, stream=True)
            try:
                while True:
                    part = await self._in_time(sampled.next)
                    yield part
                    if part.finish_reason is not None:
                        return
            except BaseException:
                await sampled.abort()
                raise

    async def _launch(self, candidate: Candidate) -> WeightHost:
        """Takes about half a minute."""
        others = multiprocessing.active_children()
        starting = asyncio.create_task(asyncio.to_thread(VLLM.create, self._settings, candidate.directory))
        try:
            vllm = await asyncio.shield(starting)
        except asyncio.CancelledError:
            await finish(asyncio.create_task(_give_up(starting, others)))
            raise
        try:
            async with asyncio.timeout(self._commits.call_timeout_s):
                await vllm.open()
        except BaseException:
            await asyncio.to_thread(vllm.shutdown, _SHUTDOWN_S)
            raise
        if vllm.unstaged_because:
            logger.info("a push holds the whole load in its pause: %s", vllm.unstaged_because)
        self._vllm_or_none = vllm
        return VLLMHost(vllm, candidate.version)

    def _swapping(self, swap: VersionSwap) -> None:
        self._watch = asyncio.create_task(self._watch_process(swap))

    async def _stop(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.wait([self._watch])
            self._watch = None

    @property
    def _tokenizer(self) -> Any:
        return self._vllm.tokenizer

    @property
    def _vllm(self) -> VLLM:
        if self._vllm_or_none is None:
            raise Unavailable("the engine has not started")
        return self._vllm_or_none

    async def _watch_process(self, swap: VersionSwap) -> None:
        await self._vllm.wait_dead()
        await swap.die("the vLLM engine process died; the service must restart. The log above has the cause")


class VLLMHost:
    """vLLM as the transaction of a push sees it."""

    def __init__(self, vllm: VLLM, loaded: VersionId) -> None:
        """`loaded` is the version that vLLM started with."""
        self._vllm = vllm
        self._numbers = itertools.count()
        self._live: VersionId | None = loaded
        self._second: tuple[int, VersionId] | None = None  # the ticket of the second set, and what it holds

    async def freeze(self) -> None:
        """See `WeightHost`."""
        await self._vllm.pause()

    async def stage(self, candidate: Candidate) -> None:
        """See `WeightHost`. Does nothing where no second set is possible."""
        if self._vllm.unstaged_because:
            return
        self._second, ticket = None, next(self._numbers)
        try:
            await self._vllm.stage(ticket, candidate.directory, candidate.weight_files)
        except BaseException:
            # Also when the caller gave up: the workers must not go on reading.
            with contextlib.suppress(Exception):
                await finish(asyncio.create_task(self._vllm.unstage()))
            raise
        self._second = (ticket, candidate.version)

    async def unstage(self) -> None:
        """See `WeightHost`."""
        self._second = None
        if not self._vllm.unstaged_because:
            await self._vllm.unstage()

    async def load(self, candidate: Candidate) -> None:
        """See `WeightHost`."""
        live, second = self._live, self._second
        self._live = self._second = None  # so they stay if this ends half-way: then only the files are to be trusted
        label = candidate.version.label
        if candidate.version == live:
            await self._vllm.relabel(label)
        elif second is not None and candidate.version == second[1]:
            await self._vllm.exchange(second[0], label)
            second = None if live is None else (second[0], live)
        else:
            await self._vllm.load(candidate.directory, candidate.weight_files, label)
            second = None
        self._live, self._second = candidate.version, second

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `WeightHost`."""
        async with asyncio.TaskGroup() as group:
            tasks = []
            for token_ids in prompts:
                name = f"{CANARY_PREFIX}{next(self._numbers)}"
                tasks.append(group.create_task(self._vllm.prompt_logprobs(name, token_ids, name)))
        return [task.result() for task in tasks]

    async def thaw(self) -> None:
        """See `WeightHost`."""
        await self._vllm.resume()

    async def halt(self, reason: str) -> None:
        """See `WeightHost`."""
        self._vllm.fail_all()
        await asyncio.to_thread(self._vllm.shutdown, _SHUTDOWN_S)


async def _give_up(starting: asyncio.Task[VLLM], others: Sequence[multiprocessing.process.BaseProcess]) -> None:
    """Ends a start. Its thread cannot be interrupted, so the processes that it waits for are killed: all but `others`."""
    while not starting.done():
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        await asyncio.wait([starting], timeout=_LOOK_AGAIN_S)
    if not starting.cancelled() and starting.exception() is None:
        await asyncio.to_thread(starting.result().shutdown, _SHUTDOWN_S)

"""Requests of the contract, checked against the server's caps and sampled by the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from honed.artifacts.version import VersionId
from honed.generation.engine import Chunk, EngineRequest, FinishReason, GenerationEngine, Sampling
from honed.kit.busy import BusyTime
from honed.kit.errors import HonedError, InvalidArgument, Overloaded, Unavailable
from honed.v1 import common_pb2, generation_pb2

_FINISH = {
    None: common_pb2.FINISH_REASON_UNSPECIFIED,
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: common_pb2.FINISH_REASON_ABORTED,
}


@dataclass(frozen=True)
class Caps:
    """What one request may ask for.

    Attributes:
        max_samples: cap on n.
        max_tokens: cap on the tokens of a response.
        default_max_tokens: what a request without max_tokens gets.
        max_prompt_tokens: cap on the prompt.
        max_in_flight: samples in flight at most, training included; beyond it a request is told to come back.
    """

    max_samples: int
    max_tokens: int
    default_max_tokens: int
    max_prompt_tokens: int
    max_in_flight: int


class Sampler:
    """Draws samples for applications and for training alike, and counts them."""

    def __init__(self, engine: GenerationEngine, caps: Caps, run: str) -> None:
        """`run` names the run in the versions that go out."""
        self.engine = engine
        self.caps = caps
        self.run = run
        self.busy = BusyTime()
        self.finished = 0
        self.failed = 0
        self.tokens = 0
        self.draining = False
        self._ids = itertools.count()
        self._last_version = (VersionId(0, 0), common_pb2.PolicyVersion(run=run))

    def requests(
        self, prompt: generation_pb2.Prompt, sampling: common_pb2.SamplingParams, n: int, *, text: bool, logprobs: bool
    ) -> list[EngineRequest]:
        """Checks a request and splits it into its samples; sample i gets seed + i.

        Raises:
            InvalidArgument: a cap is exceeded; names the field.
            Overloaded: too many samples are in flight.
            Unavailable: the service drains.
        """
        if self.draining:
            raise Unavailable("this generator is draining: ask another one, or wait for its successor")
        n = n or 1
        if n > self.caps.max_samples:
            raise InvalidArgument("n", f"{n} is over this server's cap of {self.caps.max_samples}")
        ids = self._prompt_ids(prompt)
        first = self.sampling(sampling)
        if self.engine.in_flight + n > self.caps.max_in_flight:
            raise Overloaded(f"{self.engine.in_flight} samples are in flight, of {self.caps.max_in_flight} at most", 1.0)
        return [
            EngineRequest(
                request_id=f"s{next(self._ids)}",
                prompt_token_ids=ids,
                sampling=first if first.seed is None or i == 0 else replace(first, seed=first.seed + i),
                want_text=text,
                want_logprobs=logprobs,
            )
            for i in range(n)
        ]

    def sampling(self, params: common_pb2.SamplingParams) -> Sampling:
        """Sampling parameters with the server's defaults applied.

        Raises:
            InvalidArgument: a value is over the cap or contradicts another; names the field.
        """
        max_tokens = params.max_tokens or self.caps.default_max_tokens
        if max_tokens > self.caps.max_tokens:
            raise InvalidArgument("sampling.max_tokens", f"{max_tokens} is over this server's cap of {self.caps.max_tokens}")
        return Sampling(
            max_tokens=max_tokens,
            temperature=params.temperature if params.HasField("temperature") else 1.0,
            top_p=params.top_p if params.HasField("top_p") else 1.0,
            top_k=params.top_k,
            seed=params.seed if params.HasField("seed") else None,
            stop=tuple(params.stop),
            stop_token_ids=tuple(params.stop_token_ids),
            fixed_length=params.fixed_length,
        )

    async def complete(self, requests: Sequence[EngineRequest]) -> list[Chunk]:
        """Draws all samples and returns them in their order; the first failure cancels the others and is raised."""
        if len(requests) == 1:  # the common case needs no task group
            return [await self._complete(requests[0])]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._complete(request)) for request in requests]
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures
        return [task.result() for task in tasks]

    async def stream(self, requests: Sequence[EngineRequest]) -> AsyncIterator[tuple[int, Chunk]]:
        """Draws all samples at once and yields (index, chunk) as tokens come."""
        if len(requests) == 1:  # the common case needs no queue between the engine and the caller
            with self._counted():
                async for chunk in self.engine.generate(requests[0]):
                    self.tokens += len(chunk.token_ids)
                    yield 0, chunk
            return
        ready: asyncio.Queue[tuple[int, Chunk] | None] = asyncio.Queue(maxsize=4 * len(requests))

        async def pump(index: int, request: EngineRequest) -> None:
            with self._counted():
                async for chunk in self.engine.generate(request):
                    self.tokens += len(chunk.token_ids)
                    await ready.put((index, chunk))
            await ready.put(None)

        try:
            async with asyncio.TaskGroup() as group:
                # Whoever leaves this generator early ends the group, and the group its pumps: the engine forgets the requests.
                pumps = [group.create_task(pump(i, request)) for i, request in enumerate(requests)]
                try:
                    running = len(pumps)
                    while running:
                        item = await ready.get()
                        if item is None:
                            running -= 1
                        else:
                            yield item
                finally:
                    for task in pumps:
                        task.cancel()
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from failures

    def spans(self, chunk: Chunk) -> list[common_pb2.VersionSpan]:
        """The version spans of a chunk, as messages."""
        return [
            common_pb2.VersionSpan(version=self._version(span.version), start=span.start, end=span.end) for span in chunk.spans
        ]

    def _version(self, version: VersionId) -> common_pb2.PolicyVersion:
        """The version as a message; the last one asked for is kept, because nearly every span has it."""
        if version != self._last_version[0]:
            message = common_pb2.PolicyVersion(run=self.run, fence=version.fence, step=version.step)
            self._last_version = (version, message)
        return self._last_version[1]

    def message(self, index: int, chunk: Chunk) -> generation_pb2.Sample:
        """A chunk as the contract's message."""
        return generation_pb2.Sample(
            index=index,
            text=chunk.text,
            token_ids=chunk.token_ids,
            logprobs=chunk.logprobs,
            version_spans=self.spans(chunk),
            finish_reason=_FINISH[chunk.finish_reason],
        )

    async def _complete(self, request: EngineRequest) -> Chunk:
        with self._counted():
            chunk = await self.engine.complete(request)
            self.tokens += len(chunk.token_ids)
            return chunk

    @contextmanager
    def _counted(self) -> Iterator[None]:
        try:
            with self.busy.working():
                yield
            self.finished += 1
        except (InvalidArgument, Overloaded):
            raise
        except (HonedError, OSError, RuntimeError):
            self.failed += 1
            raise

    def _prompt_ids(self, prompt: generation_pb2.Prompt) -> Sequence[int]:
        is_text = prompt.WhichOneof("content") == "text"
        ids: Sequence[int] = self.engine.encode(prompt.text) if is_text else list(prompt.token_ids.ids)
        field = "prompt.text" if is_text else "prompt.token_ids"
        if not ids:
            raise InvalidArgument(field, "is empty; give at least one token")
        if len(ids) > self.caps.max_prompt_tokens:
            raise InvalidArgument(field, f"has {len(ids)} tokens; this server takes {self.caps.max_prompt_tokens} at most")
        return ids

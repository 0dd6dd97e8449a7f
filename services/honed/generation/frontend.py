"""Requests of the contract: checked, tokenised, and sampled by the engine."""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Final

from honed.generation.codec import Codec
from honed.generation.engine import GenerationEngine
from honed.generation.gate import RequestGate, RequestKind
from honed.generation.requests import Chunk, EngineRequest, Sampling
from honed.kit.busy import BusyTime
from honed.kit.errors import HonedError, InvalidArgument, Overloaded, Unavailable
from honed.v1 import common_pb2, generation_pb2

_INLINE_BYTES: Final = 4096
"""A text up to here is tokenised on the event loop, in about a millisecond: cheaper than a thread."""

_PAUSES: Final = 64
"""Changes of weights whose pauses are remembered."""

RenderChat = Callable[[Sequence[generation_pb2.ChatMessage]], list[int]]
"""Token ids of a conversation, by the policy's chat template. Blocks."""


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for.

    Attributes:
        max_samples: Cap on n.
        max_tokens: Cap on the tokens of a response.
        default_max_tokens: What a request without max_tokens gets.
        max_prompt_tokens: Cap on the prompt.
    """

    max_samples: int
    max_tokens: int
    default_max_tokens: int
    max_prompt_tokens: int


class SamplingFrontend:
    """Draws samples for applications and for training alike, and counts them.

    Attributes:
        pauses: How long requests stood still at the last changes of weights, seconds.
    """

    def __init__(
        self,
        engine: GenerationEngine,
        gate: RequestGate,
        limits: RequestLimits,
        run: str,
        *,
        render_chat: RenderChat | None = None,
        on_prompt: Callable[[generation_pb2.Prompt], None] | None = None,
    ) -> None:
        """Nothing is sampled before the engine has started.

        Args:
            engine: What samples.
            gate: The gate that the engine's requests pass.
            limits: Of one request.
            run: Names the run in the versions that go out.
            render_chat: Tokenises conversations; None refuses them.
            on_prompt: Sees the prompt of each request that was taken; must return at once.
        """
        self.engine = engine
        self.gate = gate
        self.limits = limits
        self.codec = Codec(run)
        self.busy = BusyTime()
        self.finished = 0
        self.failed = 0
        self.tokens = 0
        self.draining = False
        self.pauses: deque[float] = deque(maxlen=_PAUSES)
        self._render_chat = render_chat
        self._on_prompt = on_prompt
        self._ids = itertools.count()
        # One thread: a tokenizer must not be used by two at once.
        self._tokenising = ThreadPoolExecutor(1, thread_name_prefix="tokenise")

    @property
    def run(self) -> str:
        """The run that is served."""
        return self.codec.run

    async def requests(
        self,
        prompt: generation_pb2.Prompt,
        params: common_pb2.SamplingParams,
        n: int,
        *,
        text: bool,
        logprobs: bool,
        field: str = "n",
    ) -> list[EngineRequest]:
        """Checks a request and splits it into its samples; sample i gets seed + i.

        What costs nothing is checked first: a request that is refused has not been tokenised. `field` is where the request says
        `n`.

        Raises:
            InvalidArgument: A cap is exceeded; names the field.
            Overloaded: Too many samples are in flight.
            Unavailable: The service drains, or has not started.
        """
        if self.draining:
            raise Unavailable("this generator is draining: ask another one, or wait for its successor")
        n = n or 1
        most = min(self.limits.max_samples, self.gate.queue_limit)  # more would find no room however often it came back
        if n > most:
            raise InvalidArgument(field, f"{n} is over this server's cap of {most}")
        sampling = self.sampling(params)
        self.gate.check_application(n)
        ids = await self._prompt_ids(prompt)
        if self._on_prompt is not None:
            self._on_prompt(prompt)
        return [
            EngineRequest(
                request_id=f"s{next(self._ids)}",
                prompt_token_ids=ids,
                sampling=_seeded(sampling, i),
                want_text=text,
                want_logprobs=logprobs,
            )
            for i in range(n)
        ]

    def training_requests(self, task: common_pb2.PromptTask, name: str) -> list[EngineRequest]:
        """The samples of a training prompt; `name` tells this delivery of it from every other.

        Raises:
            InvalidArgument: A cap is exceeded; names the field.
        """
        sampling = self.sampling(task.sampling)
        prompt = list(task.prompt_token_ids)
        self._check_length("prompt_token_ids", prompt)
        return [
            EngineRequest(
                request_id=f"{task.group_id}/{i}@{name}",
                prompt_token_ids=prompt,
                sampling=_seeded(sampling, i),
                want_text=False,
                want_logprobs=True,
                kind=RequestKind.TRAINING,
            )
            for i in range(task.samples)
        ]

    def sampling(self, params: common_pb2.SamplingParams) -> Sampling:
        """Sampling parameters with the server's defaults applied.

        Raises:
            InvalidArgument: A value is over the cap or contradicts another; names the field.
        """
        max_tokens = params.max_tokens or self.limits.default_max_tokens
        if max_tokens > self.limits.max_tokens:
            raise InvalidArgument("sampling.max_tokens", f"{max_tokens} is over this server's cap of {self.limits.max_tokens}")
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
        """Draws all samples, in their order; the first failure cancels the others and is raised."""
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
                # Whoever leaves this generator early ends the group, and the group its pumps.
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

    async def _prompt_ids(self, prompt: generation_pb2.Prompt) -> Sequence[int]:
        kind = prompt.WhichOneof("content")
        ids: Sequence[int]
        if kind == "token_ids":
            field, ids = "prompt.token_ids", list(prompt.token_ids.ids)
        elif kind == "messages":
            field, messages = "prompt.messages", prompt.messages.messages
            if self._render_chat is None:
                raise InvalidArgument(field, "this generator takes no conversations: send text or token_ids")
            render = self._render_chat
            ids = await self._tokenised(
                field, sum(len(m.content) + _INLINE_BYTES // 64 for m in messages), lambda: render(messages)
            )
        else:
            field = "prompt.text"
            ids = await self._tokenised(field, len(prompt.text), lambda: self.engine.encode(prompt.text))
        if not ids:
            raise InvalidArgument(field, "is empty; give at least one token")
        self._check_length(field, ids)
        return ids

    async def _tokenised(self, field: str, size: int, tokenise: Callable[[], list[int]]) -> list[int]:
        """Tokenises `size` characters, unless they are too many for any tokens that would fit."""
        if size <= _INLINE_BYTES:
            return tokenise()
        longest = self.engine.longest_token
        most = self.limits.max_prompt_tokens * longest
        if size > most:
            raise InvalidArgument(
                field,
                f"has {size} characters; {self.limits.max_prompt_tokens} tokens, the most that this server takes, hold at most "
                f"{most}, for the longest token has {longest}",
            )
        return await asyncio.get_running_loop().run_in_executor(self._tokenising, tokenise)

    def _check_length(self, field: str, ids: Sequence[int]) -> None:
        if len(ids) > self.limits.max_prompt_tokens:
            raise InvalidArgument(field, f"has {len(ids)} tokens; this server takes {self.limits.max_prompt_tokens} at most")


def _seeded(sampling: Sampling, index: int) -> Sampling:
    return sampling if sampling.seed is None or index == 0 else replace(sampling, seed=sampling.seed + index)

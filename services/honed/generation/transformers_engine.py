"""The engine on transformers, for machines without vLLM: one background task steps all running requests together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any, cast

import torch
import transformers

from honed.artifacts.version import VersionId
from honed.generation.admission import Admission
from honed.generation.candidate import Candidate, read_candidate
from honed.generation.decoder import Decoder, Row, make_row
from honed.generation.engine import (
    Chunk,
    CommitReport,
    CommitSettings,
    EngineLimits,
    EngineRequest,
    InitialVersion,
    check_request,
)
from honed.generation.swap import VersionSwap
from honed.kit.errors import DeadlineExceeded, Unavailable
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransformersSettings:
    """How to run the model.

    Attributes:
        dtype: Of weights and activations: `float32`, `bfloat16`, or `auto` for the checkpoint's own.
        max_model_len: The most tokens of prompt and response together; None takes the model's.
        max_batch: Requests that one step may serve.
        device: Where the model runs, for example `cpu` or `cuda`.
        seed: Of requests that bring none.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    max_batch: int = 64
    device: str = "cpu"
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists only between `start` and `close`."""

    swap: VersionSwap
    host: _Host
    tokenizer: Any
    limits: EngineLimits
    stepping: asyncio.Task[None]


class TransformersEngine:
    """`GenerationEngine` on transformers, in this process."""

    def __init__(
        self,
        initial: InitialVersion,
        settings: TransformersSettings | None = None,
        commits: CommitSettings | None = None,
        *,
        max_in_flight: int = 1024,
        request_timeout_s: float = 600.0,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        """Nothing is loaded yet.

        Args:
            initial: What to serve first.
            settings: How to run the model.
            commits: Bounds of a push.
            max_in_flight: Requests beyond this are refused as `Overloaded`.
            request_timeout_s: The longest that the engine may take for a request, or for the next chunk of a stream.
            clock: Counts seconds.
        """
        self._initial = initial
        self._settings = settings or TransformersSettings()
        self._commits = commits or CommitSettings()
        self._admission = Admission(max_in_flight)
        self._request_timeout_s = request_timeout_s
        self._clock = clock
        self._running: _Running | None = None
        self._tickets: dict[Row, _Ticket] = {}
        self._unseeded = torch.Generator(self._settings.device).manual_seed(self._settings.seed)

    @property
    def version(self) -> VersionId:
        """See `GenerationEngine`."""
        return self._running.swap.version if self._running else self._initial.version

    @property
    def in_flight(self) -> int:
        """See `GenerationEngine`."""
        return self._admission.in_flight

    @property
    def limits(self) -> EngineLimits:
        """See `GenerationEngine`."""
        return self._it.limits

    @property
    def description(self) -> str:
        """See `GenerationEngine`."""
        return f"transformers {transformers.__version__}"

    async def start(self) -> None:
        """See `GenerationEngine`."""
        candidate = await asyncio.to_thread(read_candidate, self._initial.version, self._initial.directory)
        model = await asyncio.to_thread(self._load_model, candidate.directory)
        tokenizer = await asyncio.to_thread(
            transformers.AutoTokenizer.from_pretrained, candidate.directory, local_files_only=True, trust_remote_code=False
        )
        config = model.config
        longest = min(self._settings.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        ends = ModelFacts.read(candidate.directory).end_token_ids
        decoder = Decoder(model, candidate.version, ends, self._settings.max_batch)
        host = _Host(decoder, self._load_model, self._fail_all)
        swap = VersionSwap(host, candidate, self._admission, self._commits, self._clock)
        stepping = asyncio.create_task(self._step(host, swap))
        self._running = _Running(swap, host, tokenizer, EngineLimits(longest, config.vocab_size), stepping)
        try:
            await swap.verify_first()
        except BaseException:
            await self.close()
            raise

    async def complete(self, request: EngineRequest) -> Chunk:
        """See `GenerationEngine`."""
        async with self._ticket(request, whole=True) as ticket:
            return await ticket.next()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """See `GenerationEngine`."""
        async with self._ticket(request, whole=False) as ticket:
            while True:
                part = await ticket.next()
                yield part
                if part.finish_reason is not None:
                    return

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """See `GenerationEngine`."""
        await self._it.swap.prepare(version, directory)

    async def commit(self, version: VersionId) -> CommitReport:
        """See `GenerationEngine`."""
        return await self._it.swap.commit(version)

    async def abort_version(self, version: VersionId) -> None:
        """See `GenerationEngine`."""
        self._it.swap.forget(version)

    async def pause(self) -> None:
        """See `GenerationEngine`."""
        await self._it.swap.pause()

    async def resume(self) -> None:
        """See `GenerationEngine`."""
        await self._it.swap.resume()

    async def wait_dead(self) -> str:
        """See `GenerationEngine`."""
        return await self._it.swap.wait_dead()

    async def close(self) -> None:
        """See `GenerationEngine`."""
        self._admission.end("the engine is closed")
        if self._running is not None:
            self._running.stepping.cancel()
            await asyncio.wait([self._running.stepping])
            await self._running.swap.die("the engine is closed")

    def encode(self, text: str) -> list[int]:
        """See `GenerationEngine`."""
        return cast("list[int]", self._it.tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `GenerationEngine`."""
        return cast(str, self._it.tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def _it(self) -> _Running:
        if self._running is None:
            raise Unavailable("the engine has not started")
        return self._running

    @asynccontextmanager
    async def _ticket(self, request: EngineRequest, *, whole: bool) -> AsyncIterator[_Ticket]:
        it = self._it
        check_request(request, it.limits)
        async with self._admission.enter():
            seed = request.sampling.seed
            generator = self._unseeded if seed is None else torch.Generator(self._settings.device).manual_seed(seed)
            row = make_row(request, self.decode, generator)
            ticket = _Ticket(whole, asyncio.Queue(), self._request_timeout_s)
            self._tickets[row] = ticket
            it.host.add(row)
            try:
                yield ticket
            finally:
                row.cancelled = True  # the decoder drops it before its next step
                del self._tickets[row]

    async def _step(self, host: _Host, swap: VersionSwap) -> None:
        try:
            while True:
                for row in await host.step():
                    ticket = self._tickets.get(row)
                    if ticket is not None and (row.finish_reason is not None or not ticket.whole):
                        ticket.inbox.put_nowait(row.take())
        except Exception as error:
            logger.exception("a decoding step failed")
            await swap.die(f"a decoding step failed: {error}; the service must restart")

    def _fail_all(self) -> None:
        for ticket in self._tickets.values():
            ticket.inbox.put_nowait(None)

    def _load_model(self, directory: Path) -> Any:
        return load_language_model(directory, device=torch.device(self._settings.device), dtype=self._settings.dtype)


@dataclass(frozen=True, slots=True)
class _Ticket:
    """Where a request's chunks arrive. `whole`: only one, at the end. None: the engine died."""

    whole: bool
    inbox: asyncio.Queue[Chunk | None]
    timeout_s: float

    async def next(self) -> Chunk:
        try:
            async with asyncio.timeout(self.timeout_s):
                chunk = await self.inbox.get()
        except TimeoutError as error:
            raise DeadlineExceeded(f"the engine gave nothing within {self.timeout_s:g} s") from error
        if chunk is None:
            raise Unavailable("the engine died or was closed")
        return chunk


class _Host:
    """The decoder as the transaction of a push sees it. Whoever uses the decoder holds `_device`."""

    def __init__(self, decoder: Decoder, load_model: Callable[[Path], Any], fail_all: Callable[[], None]) -> None:
        self._decoder = decoder
        self._load_model = load_model
        self._fail_all = fail_all
        self._device = asyncio.Lock()
        self._work = asyncio.Event()
        self._thawed = asyncio.Event()
        self._arrivals: list[Row] = []

    def add(self, row: Row) -> None:
        self._arrivals.append(row)
        self._work.set()

    async def step(self) -> list[Row]:
        """The rows that got a token; waits until there is something to do and it is allowed."""
        await self._work.wait()
        await self._thawed.wait()
        async with self._device:
            if not self._thawed.is_set():
                return []
            arrivals, self._arrivals = self._arrivals, []
            stepped = await asyncio.to_thread(self._decoder.step, arrivals)
            if not self._decoder.busy and not self._arrivals:
                self._work.clear()
            return stepped

    async def freeze(self) -> None:
        self._thawed.clear()
        async with self._device:
            pass  # the step that was running has ended

    async def load(self, candidate: Candidate) -> None:
        async with self._device:
            model = await asyncio.to_thread(self._load_model, candidate.directory)
            self._decoder.replace(model, candidate.version)

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        async with self._device:
            return await asyncio.to_thread(self._decoder.prompt_logprobs, prompts)

    async def thaw(self) -> None:
        self._thawed.set()

    async def halt(self, reason: str) -> None:
        self._thawed.clear()
        self._fail_all()

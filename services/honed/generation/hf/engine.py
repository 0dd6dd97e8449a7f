"""The engine on transformers, for machines without vLLM: one background task steps all running requests together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import torch

from honed.models import lean  # noqa: F401  before transformers

# isort: split
import transformers

from honed.artifacts.version import VersionId
from honed.generation.candidate import Candidate
from honed.generation.engine import CommitSettings, InitialVersion
from honed.generation.gate import Claim
from honed.generation.hf.decoder import Decoder
from honed.generation.hf.row import Row, make_row
from honed.generation.requests import Chunk, EngineLimits, EngineRequest, check_request
from honed.generation.swap import VersionSwap, WeightHost
from honed.generation.swapping import EngineOptions, SwappingEngine
from honed.kit.errors import Unavailable
from honed.models.facts import ModelFacts
from honed.models.loader import load_language_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TransformersSettings:
    """How to run the model.

    Attributes:
        dtype: Of weights and activations: `float32`, `bfloat16`, or `auto` for the checkpoint's
            own.
        max_model_len: The most tokens of prompt and response together; None takes the model's.
        max_batch: Requests that one step may serve.
        max_batched_tokens: Prompt tokens that one pass reads, padding included; a longer prompt has a
            pass of its own.
        threads: Compute threads on a CPU, of the whole process.
        device: Where the model runs, for example `cpu` or `cuda`.
        staged_load: Load new weights beside those that serve. It takes the memory of a second model
            between prepare and commit; without it, the pause holds the whole load.
        seed: Of requests that bring none.
    """

    dtype: str = "float32"
    max_model_len: int | None = None
    max_batch: int = 64
    max_batched_tokens: int = 2048
    threads: int = 1
    device: str = "cpu"
    staged_load: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Running:
    """What exists only after `_launch`."""

    host: TransformersHost
    tokenizer: Any
    limits: EngineLimits


class TransformersEngine(SwappingEngine):
    """`GenerationEngine` on transformers, in this process."""

    def __init__(
        self,
        initial: InitialVersion | Iterable[InitialVersion],
        settings: TransformersSettings | None = None,
        commits: CommitSettings | None = None,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Nothing is loaded yet.

        Args:
            initial: See `SwappingEngine`.
            settings: How to run the model.
            commits: Bounds of a push.
            options: See `SwappingEngine`.
        """
        self._settings = settings or TransformersSettings()
        super().__init__(initial, commits, dtype=self._settings.dtype, **options)
        self._running_or_none: _Running | None = None
        self._stepping: asyncio.Task[None] | None = None
        self._steps = 0
        self._tickets: dict[Row, _Ticket] = {}
        self._unseeded = torch.Generator(self._settings.device).manual_seed(self._settings.seed)

    @property
    def limits(self) -> EngineLimits:
        """See `GenerationEngine`."""
        return self._running.limits

    @property
    def description(self) -> str:
        """See `GenerationEngine`."""
        return f"transformers {transformers.__version__}"

    @property
    def progress(self) -> int:
        """See `GenerationEngine`."""
        return self._steps

    async def complete(self, request: EngineRequest) -> Chunk:
        """See `GenerationEngine`."""
        async with self._ticket(request, whole=True) as ticket:
            return await self._in_time(ticket.next)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Chunk, None]:
        """See `GenerationEngine`."""
        async with self._ticket(request, whole=False) as ticket:
            while True:
                part = await self._in_time(ticket.next)
                yield part
                if part.finish_reason is not None:
                    return

    async def _launch(self, candidate: Candidate) -> WeightHost:
        torch.set_num_threads(self._settings.threads)
        model = await asyncio.to_thread(self._load_model, candidate.directory)
        tokenizer = await asyncio.to_thread(
            transformers.AutoTokenizer.from_pretrained, candidate.directory, local_files_only=True, trust_remote_code=False
        )
        config = model.config
        longest = min(self._settings.max_model_len or config.max_position_embeddings, config.max_position_embeddings)
        ends = ModelFacts.read(candidate.directory).end_token_ids
        limits = self._settings.max_batch, self._settings.max_batched_tokens
        decoder = Decoder(model, candidate.version, ends, *limits)
        staged = self._settings.staged_load
        host = TransformersHost(decoder, candidate.version, self._load_model, self._fail_all, staged=staged)
        self._running_or_none = _Running(host, tokenizer, EngineLimits(longest, config.vocab_size))
        return host

    def _swapping(self, swap: VersionSwap) -> None:
        self._stepping = asyncio.create_task(self._step(self._running.host, swap))

    async def _stop(self) -> None:
        if self._stepping is not None:
            self._stepping.cancel()
            await asyncio.wait([self._stepping])
            self._stepping = None

    @property
    def _tokenizer(self) -> Any:
        return self._running.tokenizer

    @property
    def _running(self) -> _Running:
        if self._running_or_none is None:
            raise Unavailable("the engine has not started")
        return self._running_or_none

    @asynccontextmanager
    async def _ticket(self, request: EngineRequest, *, whole: bool) -> AsyncIterator[_Ticket]:
        host, limits = self._running.host, self.limits
        check_request(request, limits)
        async with self._gate.enter(request.kind) as claim:
            seed = request.sampling.seed
            generator = self._unseeded if seed is None else torch.Generator(self._settings.device).manual_seed(seed)
            row = make_row(request, self.decode, generator)
            ticket = _Ticket(whole, asyncio.Queue(), claim)
            self._tickets[row] = ticket
            host.add(row)
            try:
                yield ticket
            finally:
                row.cancelled = True  # the decoder drops it before its next step
                del self._tickets[row]

    async def _step(self, host: TransformersHost, swap: VersionSwap) -> None:
        try:
            while True:
                rows = await host.step()
                self._steps += 1
                for row in rows:
                    ticket = self._tickets.get(row)
                    if ticket is None:
                        continue
                    if row.finish_reason is not None:
                        ticket.claim.release()
                    if row.finish_reason is not None or not ticket.whole:
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
    """Where a request's chunks arrive. `whole`: only one, at the end. None: the engine died. `claim`: of the gate."""

    whole: bool
    inbox: asyncio.Queue[Chunk | None]
    claim: Claim

    async def next(self) -> Chunk:
        chunk = await self.inbox.get()
        if chunk is None:
            raise Unavailable("the engine died or was closed")
        return chunk


class TransformersHost:
    """The decoder as the transaction of a push sees it. Whoever uses the decoder holds `_device`."""

    def __init__(
        self,
        decoder: Decoder,
        loaded: VersionId,
        load_model: Callable[[Path], Any],
        fail_all: Callable[[], None],
        *,
        staged: bool,
    ) -> None:
        """`decoder` has the model of the version `loaded`; `fail_all` ends every request."""
        self._decoder = decoder
        self._live = loaded
        self._staged = staged
        self._second: tuple[VersionId, Any] | None = None
        self._load_model = load_model
        self._fail_all = fail_all
        self._device = asyncio.Lock()
        self._work = asyncio.Event()
        self._thawed = asyncio.Event()
        self._arrivals: list[Row] = []

    def add(self, row: Row) -> None:
        """Has a row sampled."""
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
        """See `WeightHost`."""
        self._thawed.clear()
        async with self._device:
            pass  # the step that was running has ended

    async def stage(self, candidate: Candidate) -> None:
        """See `WeightHost`."""
        self._second = None
        if self._staged:
            self._second = (candidate.version, await asyncio.to_thread(self._load_model, candidate.directory))

    async def unstage(self) -> None:
        """See `WeightHost`."""
        self._second = None

    async def load(self, candidate: Candidate) -> None:
        """See `WeightHost`."""
        async with self._device:
            if candidate.version == self._live:
                model = self._decoder.model
            elif self._second is not None and candidate.version == self._second[0]:
                model = self._second[1]
            else:
                self._second = None
                model = await asyncio.to_thread(self._load_model, candidate.directory)
            if self._staged and candidate.version != self._live:
                self._second = (self._live, self._decoder.model)
            self._decoder.replace(model, candidate.version)
            self._live = candidate.version

    async def canary_logprobs(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """See `WeightHost`."""
        async with self._device:
            return await asyncio.to_thread(self._decoder.prompt_logprobs, prompts)

    async def thaw(self) -> None:
        """See `WeightHost`."""
        self._thawed.set()

    async def halt(self, reason: str) -> None:
        """See `WeightHost`."""
        self._thawed.clear()
        self._fail_all()

"""What both engines share: a gate for requests, and a `VersionSwap` over weights that each of them hosts in its own way."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from time import monotonic
from types import MappingProxyType
from typing import Any, TypedDict, Unpack, cast

from honed.artifacts.version import VersionId
from honed.generation.candidate import Candidate, read_candidate
from honed.generation.engine import CommitReport, CommitSettings, InitialVersion
from honed.generation.gate import RequestGate
from honed.generation.requests import Chunk
from honed.generation.swap import VersionSwap, WeightHost
from honed.kit.errors import (
    Aborted,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    HonedError,
    InvalidArgument,
    NotFound,
    Unavailable,
)

logger = logging.getLogger(__name__)

_REFUSALS = (Aborted, DataLoss, FailedPrecondition, InvalidArgument, NotFound)
"""Errors that are a version's own fault. Any other ends the start: another version would meet it too."""


class EngineOptions(TypedDict, total=False):
    """Options of every engine.

    Attributes:
        gate: Who may sample, and when; one for 1024 requests if there is none.
        request_timeout_s: The longest that the engine may take for a request, or for the next chunk
            of a stream. While the gate is shut this time stands still.
        clock: Counts seconds.
    """

    gate: RequestGate
    request_timeout_s: float
    clock: Callable[[], float]


class SwappingEngine(ABC):
    """The members of `GenerationEngine` that do not depend on who samples."""

    def __init__(
        self,
        initial: InitialVersion | Iterable[InitialVersion],
        commits: CommitSettings | None = None,
        *,
        dtype: str,
        **options: Unpack[EngineOptions],
    ) -> None:
        """Nothing starts yet.

        Args:
            initial: What to serve first; if it is refused, the next one, and so on. Newest first.
            commits: Bounds of a push.
            dtype: What the engine computes in.
            options: See `EngineOptions`.
        """
        self._initial = (initial,) if isinstance(initial, InitialVersion) else initial
        self._commits = commits or CommitSettings()
        self._dtype = dtype
        self._gate = options.get("gate") or RequestGate(window=1024, queue_limit=1025, application_share=0.75)
        self._request_timeout_s = options.get("request_timeout_s", 600.0)
        self._clock = options.get("clock", monotonic)
        self._swap_or_none: VersionSwap | None = None
        self._refused: dict[VersionId, str] = {}
        self._disagreeing: set[VersionId] = set()
        self._longest_token: int | None = None

    @property
    def version(self) -> VersionId:
        """See `GenerationEngine`."""
        return self._swap.version

    @property
    def refused(self) -> Mapping[VersionId, str]:
        """See `GenerationEngine`."""
        return MappingProxyType(self._refused)

    @property
    def disagreeing(self) -> Collection[VersionId]:
        """See `GenerationEngine`."""
        return frozenset(self._disagreeing)

    @property
    def in_flight(self) -> int:
        """See `GenerationEngine`."""
        return self._gate.in_flight

    async def start(self) -> None:
        """See `GenerationEngine`."""
        try:
            for initial in self._initial:
                try:
                    await self._try(initial)
                except _REFUSALS as error:
                    self._refused[initial.version] = str(error)
                    if isinstance(error, Aborted):
                        self._disagreeing.add(initial.version)
                    logger.warning(
                        "version refused at the start", extra={"version": initial.version.label, "reason": str(error)}
                    )
                else:
                    return
            raise self._none_passed()
        except BaseException:
            await self.close()
            raise

    async def prepare(self, version: VersionId, directory: Path) -> None:
        """See `GenerationEngine`."""
        await self._swap.prepare(version, directory)

    async def commit(self, version: VersionId) -> CommitReport:
        """See `GenerationEngine`."""
        return await self._swap.commit(version)

    async def abort_version(self, version: VersionId) -> None:
        """See `GenerationEngine`."""
        await self._swap.forget(version)

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
        self._gate.end("the engine is closed")
        await self._stop()
        if self._swap_or_none is not None:
            await self._swap.die("the engine is closed")

    def encode(self, text: str) -> list[int]:
        """See `GenerationEngine`."""
        return cast("list[int]", self._tokenizer.encode(text))

    def decode(self, token_ids: Sequence[int]) -> str:
        """See `GenerationEngine`."""
        return cast(str, self._tokenizer.decode(list(token_ids), skip_special_tokens=True))

    @property
    def longest_token(self) -> int:
        """See `GenerationEngine`."""
        if self._longest_token is None:
            self._longest_token = max(map(len, self._tokenizer.get_vocab()))
        return self._longest_token

    @property
    @abstractmethod
    def progress(self) -> int:
        """See `GenerationEngine`."""

    @abstractmethod
    async def _launch(self, candidate: Candidate) -> WeightHost:
        """Starts whatever samples, with the candidate's weights and architecture. Called once."""

    @abstractmethod
    async def _stop(self) -> None:
        """Ends the tasks that `_launch` and `_swapping` started. Idempotent, and harmless before `_launch`."""

    @abstractmethod
    def _swapping(self, swap: VersionSwap) -> None:
        """Told once, after `_launch`, what changes the weights from now on."""

    @property
    @abstractmethod
    def _tokenizer(self) -> Any:
        """The policy's tokenizer."""

    @property
    def _swap(self) -> VersionSwap:
        if self._swap_or_none is None:
            raise Unavailable("the engine has not started; try again")
        return self._swap_or_none

    async def _in_time(self, wait: Callable[[], Awaitable[Chunk]]) -> Chunk:
        """What `wait` returns. It may be cancelled and called again.

        Raises:
            DeadlineExceeded: The engine took too long.
        """
        left_s, shut_s = self._request_timeout_s, self._gate.shut_s
        while True:
            try:
                async with asyncio.timeout(left_s):
                    return await wait()
            except TimeoutError as error:
                left_s = self._gate.shut_s - shut_s  # nothing was sampled meanwhile
                shut_s += left_s
                if left_s <= 0:
                    limit = f"{self._request_timeout_s:g} s (generation.request_timeout_s)"
                    raise DeadlineExceeded(
                        f"the engine did not finish within {limit}: raise it, or ask for fewer tokens"
                    ) from error

    async def _try(self, initial: InitialVersion) -> None:
        directory = await asyncio.to_thread(initial.fetched)
        candidate = await asyncio.to_thread(read_candidate, initial.version, directory)
        if self._swap_or_none is None:
            host = await self._launch(candidate)
            swap = VersionSwap(host, candidate, self._gate, self._commits, self._clock, dtype=self._dtype)
            self._swap_or_none = swap
            self._swapping(swap)
        await self._swap.start(candidate)

    def _none_passed(self) -> HonedError:
        if not self._refused:
            return FailedPrecondition("there is no version to start with")
        reasons = "; ".join(f"{version}: {reason}" for version, reason in self._refused.items())
        return Aborted(f"no version can be served. {reasons}")

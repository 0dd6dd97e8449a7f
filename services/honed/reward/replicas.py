"""The other processes of the reward service, as far as promotions need them: through Redis, or none for a process alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

from honed.artifacts.promotions import PromotionState
from honed.kit.errors import FailedPrecondition, Unavailable, root_cause
from honed.queue.connection import Link
from honed.queue.keys import RunKeys
from honed.queue.lease import Claim, Leases
from honed.queue.members import REWARD, Member, Members
from honed.queue.promotions import Announced, Candidate, PromotionBoard

_LEASE: Final = "promotions"
_LEASE_MS: Final = 5_000
_LEASE_WAIT_S: Final = 30.0
_LEASE_POLL_S: Final = 0.1


class Replicas(Protocol):
    """What one replica sees of the others. Each call may raise Unavailable: Redis does not answer."""

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Keeps every other replica from promoting or publishing as long as the block runs.

        Raises:
            Unavailable: Another one does so for too long, or took over in between.
        """

    async def announced(self) -> Announced:
        """What was announced last."""

    async def announce(self, state: PromotionState) -> None:
        """Tells the others of a promotion."""

    async def offer(self, candidate: Candidate) -> None:
        """Asks the others to load a version."""

    async def others(self) -> list[Member]:
        """The other replicas that are ready."""


class NoReplicas:
    """A process alone, without Redis."""

    def __init__(self) -> None:
        """Announces to nobody."""
        self._lock = asyncio.Lock()
        self._announced = Announced()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """See `Replicas`."""
        async with self._lock:
            yield

    async def announced(self) -> Announced:
        """See `Replicas`."""
        return self._announced

    async def announce(self, state: PromotionState) -> None:
        """See `Replicas`."""
        self._announced = Announced(state.number, state.versions)

    async def offer(self, candidate: Candidate) -> None:
        """See `Replicas`."""

    async def others(self) -> list[Member]:
        """See `Replicas`."""
        return []


class RedisReplicas:
    """The replicas of a run that share its Redis."""

    def __init__(self, link: Link, keys: RunKeys, name: str) -> None:
        """`name` is this process' among the members; `link` should give up an outage soon."""
        self.members = Members(link, keys, REWARD)
        self._board = PromotionBoard(link, keys)
        self._leases = Leases(link, keys)
        self._name = name
        self._lock = asyncio.Lock()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """See `Replicas`."""
        async with self._lock:  # the lease does not tell two tasks of one process apart
            claim = await self._acquire()
            error: Exception | None = None
            try:
                async with asyncio.TaskGroup() as group:
                    keeping = group.create_task(self._leases.keep(claim, _LEASE_MS))
                    try:
                        yield
                    except Exception as raised:  # the block's own errors leave as they are, not in a group
                        error = raised
                    finally:
                        keeping.cancel()
            except ExceptionGroup as failed:
                raise Unavailable(f"another replica may have promoted meanwhile: {root_cause(failed)}") from failed
            finally:
                await self._release(claim)
            if error is not None:
                raise error

    async def announced(self) -> Announced:
        """See `Replicas`."""
        return await self._board.read()

    async def announce(self, state: PromotionState) -> None:
        """See `Replicas`."""
        await self._board.announce(state.number, state.versions)

    async def offer(self, candidate: Candidate) -> None:
        """See `Replicas`."""
        await self._board.offer(candidate)

    async def others(self) -> list[Member]:
        """See `Replicas`."""
        return [member for member in await self.members.list() if member.ready and member.name != self._name]

    async def _acquire(self) -> Claim:
        refused: FailedPrecondition | None = None
        try:
            async with asyncio.timeout(_LEASE_WAIT_S):
                while True:
                    try:
                        return await self._leases.acquire(_LEASE, self._name, _LEASE_MS)
                    except FailedPrecondition as error:
                        refused = error
                    await asyncio.sleep(_LEASE_POLL_S)
        except TimeoutError as error:
            raise Unavailable(f"another promotion does not end: {refused}") from error

    async def _release(self, claim: Claim) -> None:
        try:
            async with asyncio.timeout(_LEASE_MS / 1000):
                await self._leases.release(claim)
        except (Unavailable, FailedPrecondition, TimeoutError):
            return  # it runs out by itself

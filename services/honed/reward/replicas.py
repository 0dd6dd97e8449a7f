"""The other processes of the reward service, as far as promotions need them: through Redis, or none for a process alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Final, Protocol

from honed.artifacts.promotions import PromotionState
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, Unavailable
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.lease import LeaseHeld, LeaseLost, Leases
from honed.queue.members import REWARD, Member, Members
from honed.queue.promotions import Announced, Candidate, PromotionBoard

_LEASE: Final = "promotions"
_LEASE_MS: Final = 5_000
_LEASE_WAIT_S: Final = 30.0
_POLL_S: Final = 0.1


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

    def __init__(self, link: RedisLink, keys: RunKeys, name: str) -> None:
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
            try:
                async with self._leases.held(_LEASE, self._name, _LEASE_MS, wait_s=_LEASE_WAIT_S):
                    yield
            except LeaseHeld as error:
                raise Unavailable(f"another promotion does not end: {error}") from error
            except LeaseLost as error:
                raise Unavailable(f"another replica may have promoted meanwhile: {error}") from error

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


async def agreement(
    replicas: Replicas,
    done: Callable[[Member], bool],
    wanted: tuple[str, str],
    timeout_s: float,
    what: str,
    *,
    clock: Callable[[], float],
    sleep: Callable[[float], Awaitable[None]],
) -> list[Member]:
    """Waits until `done` holds for each other replica that is ready; returns them.

    Args:
        replicas: The others.
        done: Looks at one.
        wanted: Scorer and version that it is about.
        timeout_s: How long to wait.
        what: Begins the error; the names of those that are missing follow.
        clock: Seconds, monotonic.
        sleep: How to wait.

    Raises:
        FailedPrecondition: One of them cannot load the version; says why.
        DeadlineExceeded: One of them did not come so far in time; names it.
        Unavailable: Redis does not answer.
    """
    (name, version), end = wanted, clock() + timeout_s
    while True:
        try:
            others = await replicas.others()
        except HonedError as error:
            raise Unavailable(f"{what} the others, as far as is known here: {error}") from error
        missing = [member for member in others if not done(member)]
        if not missing:
            return others
        names = ", ".join(f"{member.name} at {member.address}" for member in missing)
        for member in missing:
            failed, _, reason = member.facts.get(f"failed:{name}", "").partition(" ")
            if failed == version:
                raise FailedPrecondition(f"{what} {names}: {reason}")
        if clock() >= end:
            raise DeadlineExceeded(f"{what} {names} after {timeout_s:g} s")
        await sleep(_POLL_S)

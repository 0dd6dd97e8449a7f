"""The learner's claims: a lock on its directory, and the run's fenced lease, whose fence rises at a roll-back too."""

from __future__ import annotations

import asyncio
import fcntl
import json
import logging
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final, NoReturn

from honed.kit.errors import FailedPrecondition
from honed.queue.lease import Claim, Leases

logger = logging.getLogger(__name__)

LEASE_MS: Final = 6_000
_RENEWALS_PER_LIFE: Final = 3
_POLL_S: Final = 0.5

Sleep = Callable[[float], Awaitable[None]]


@asynccontextmanager
async def locked(directory: Path, *, wait_s: float = 3 * LEASE_MS / 1000, sleep: Sleep = asyncio.sleep) -> AsyncIterator[None]:
    """Holds a learner's directory: two learners on one host would write into each other's files.

    The lock is the kernel's and ends with the process, however it ends. Nothing under the directory is read or written before
    it is held.

    Raises:
        FailedPrecondition: Another process still holds it after `wait_s` seconds; the message names it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        for _ in range(max(1, round(wait_s / _POLL_S))):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await sleep(_POLL_S)
        else:
            holder = path.read_text(errors="replace").strip() or "unknown"
            raise FailedPrecondition(
                f"{directory} is in use by another learner ({holder}): stop it, or give this run another directory"
            )
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        yield
    finally:
        os.close(descriptor)


class LearnerLease:
    """A held lease. All that a learner writes for others is written after `check`."""

    def __init__(self, leases: Leases, claim: Claim, *, ttl_ms: int = LEASE_MS, sleep: Sleep = asyncio.sleep) -> None:
        """`claim` has been acquired."""
        self._leases, self._claim, self._ttl_ms, self._sleep = leases, claim, ttl_ms, sleep
        self._changing = asyncio.Lock()

    @classmethod
    async def take(cls, leases: Leases, owner: str, *, above: int, sleep: Sleep = asyncio.sleep) -> LearnerLease:
        """Waits for a predecessor's lease to run out, if it died without releasing it.

        Args:
            leases: Of the run.
            owner: This process.
            above: The highest fence known from versions and checkpoints.
            sleep: Between tries.

        Raises:
            FailedPrecondition: Another learner is alive and holds it.
        """
        tries = round(3 * LEASE_MS / 1000 / _POLL_S)
        for left in reversed(range(tries)):
            try:
                return cls(leases, await leases.acquire("learner", owner, LEASE_MS, above))
            except FailedPrecondition as error:
                if not left:
                    raise
                logger.info("waiting for the lease", extra={"reason": str(error)})
                await sleep(_POLL_S)
        raise AssertionError

    @property
    def fence(self) -> int:
        """The number that goes into every version and checkpoint."""
        return self._claim.fence

    async def check(self) -> None:
        """Asserts that the lease is held.

        Raises:
            LeaseLost: Another learner has taken over.
        """
        async with self._changing:
            await self._leases.check(self._claim)

    async def advance(self) -> int:
        """Takes the next fence, so that what comes now is newer than all there was, whatever its update.

        Raises:
            FailedPrecondition: Another learner has taken over.
        """
        async with self._changing:
            await self._leases.check(self._claim)
            claim = self._claim
            self._claim = await self._leases.acquire(claim.name, claim.owner, self._ttl_ms, claim.fence)
            return self._claim.fence

    async def keep(self) -> NoReturn:
        """Renews until cancelled.

        Raises:
            LeaseLost: Another learner has taken over.
        """
        while True:
            await self._sleep(self._ttl_ms / 1000 / _RENEWALS_PER_LIFE)
            async with self._changing:
                await self._leases.renew(self._claim, self._ttl_ms)

    async def release(self) -> None:
        """Ends the lease now, so that a successor need not wait."""
        await self._leases.release(self._claim)

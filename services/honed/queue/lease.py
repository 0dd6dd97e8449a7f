"""The fenced lease: at most one learner (or conductor) of a run acts, and whoever lost its lease learns so.

The fence number rises each time the lease changes hands, and goes into every policy version. A lease alone cannot stop a
holder that slept through its expiry; the number can: whoever checks it sees that a higher one exists.

Where holders are chosen outside of Redis (a cluster's Lease), the number of that choice is the *term*. The holder of a new term
takes the lease from any other, and one whose term is over never gets it again, however late it wakes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from honed.kit.aio import background
from honed.kit.errors import FailedPrecondition, HonedError, InvalidArgument, Unavailable
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.scripts import Argument, Scripts

logger = logging.getLogger(__name__)

_RENEWALS_PER_LIFE: Final = 3
_TRY_EVERY_S: Final = 0.5
_RELEASE_TIMEOUT_S: Final = 2.0


class LeaseHeld(FailedPrecondition):
    """Another owner holds the lease."""


class LeaseLost(FailedPrecondition):
    """Another owner took the lease over.

    Attributes:
        fence: The current fence, higher than the loser's or held by another.
    """

    def __init__(self, name: str, held: int, fence: int) -> None:
        """`held` is the fence that was held, `fence` the current one."""
        super().__init__(
            f"the lease {name!r} with fence {held} was lost, the current fence is {fence}: stop, publish nothing, "
            "and start anew from the last durable checkpoint"
        )
        self.fence = fence


class TermOver(FailedPrecondition):
    """The lease was taken in a later term."""


@dataclass(frozen=True)
class Claim:
    """What a holder shows: pass it to whoever checks.

    Attributes:
        name: The lease.
        owner: The holder's token.
        fence: The number that it holds.
    """

    name: str
    owner: str
    fence: int


class Leases:
    """The leases of one run. Every call is safe to repeat."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        """Connects to nothing yet."""
        self._keys = keys
        self._scripts = Scripts(link, "run.lua")

    async def acquire(self, name: str, owner: str, ttl_ms: int, above: int = 0, term: int = 0) -> Claim:
        """Takes the lease if nobody holds it; its own holder gets it again with the same fence.

        Args:
            name: Which lease, for example `learner`.
            owner: A token unique to this process and start.
            ttl_ms: Life without renewal.
            above: The highest fence known from elsewhere (policy store, checkpoint). The new one exceeds it, even if
                Redis lost its counter.
            term: The number under which this process was chosen as the holder elsewhere; 0 if holders are chosen here.

        Raises:
            LeaseHeld: another owner holds it; the message says who and for how long.
            TermOver: it was taken in a later term.
        """
        if ttl_ms < 1 or not owner:
            raise InvalidArgument("ttl_ms" if owner else "owner", "a lease needs an owner and a life of at least 1 ms")
        fence, holder, left_ms, highest = await self._run("acquire", name, owner, 0, ttl_ms, above, term)
        if 0 < term < highest:
            raise TermOver(
                f"the lease {name!r} was taken in term {highest}, and this process was chosen in term {term}: another one "
                "has been chosen since; stop, or be chosen anew"
            )
        if holder.decode() != owner:
            raise LeaseHeld(
                f"the lease {name!r} is held by {holder.decode()} with fence {fence} for another {left_ms} ms: "
                "stop that process, or wait until its lease runs out"
            )
        return Claim(name, owner, fence)

    async def term(self, name: str) -> int:
        """The highest term in which the lease was taken; 0 if it never was in any."""
        return int(await self._run("term", name, "", 0))

    async def renew(self, claim: Claim, ttl_ms: int) -> None:
        """Lives on for `ttl_ms`. A lease that ran out during an outage is renewed too, if nobody took it over.

        Raises:
            LeaseLost: somebody did.
        """
        stands, fence = await self._run("renew", claim.name, claim.owner, claim.fence, ttl_ms)
        if not stands:
            _lost(claim, fence)

    async def release(self, claim: Claim) -> bool:
        """Ends the lease now, so that a successor need not wait. False if it was not the claimant's any more."""
        return bool(await self._run("release", claim.name, claim.owner, claim.fence))

    async def check(self, claim: Claim) -> None:
        """Asserts that the claim stands.

        Raises:
            LeaseLost: it does not.
        """
        stands, fence = await self._run("check", claim.name, claim.owner, claim.fence)
        if not stands:
            _lost(claim, fence)

    async def keep(self, claim: Claim, ttl_ms: int) -> NoReturn:
        """Renews until cancelled. Run it in the holder's TaskGroup: losing the lease then cancels the holder's work.

        Raises:
            LeaseLost: another owner took over.
            Unavailable: Redis stayed away beyond the outage deadline.
        """
        while True:
            await asyncio.sleep(ttl_ms / 1000 / _RENEWALS_PER_LIFE)
            await self.renew(claim, ttl_ms)

    @asynccontextmanager
    async def held(
        self,
        name: str,
        owner: str,
        ttl_ms: int,
        above: int = 0,
        term: int = 0,
        wait_s: float | None = None,
        on_wait: Callable[[LeaseHeld], object] = lambda _: None,
    ) -> AsyncIterator[HeldLease]:
        """Holds a lease as long as the block runs: waits for it, renews it, and releases it at the end.

        An outage of Redis does not end the block: the claim stands until somebody with a higher fence comes, and while Redis
        is away nobody can.

        Args:
            name: As for `acquire`.
            owner: As for `acquire`.
            ttl_ms: As for `acquire`; renewed at a third of it.
            above: As for `acquire`.
            term: As for `acquire`.
            wait_s: How long to wait for another owner's lease to run out; by default three lives.
            on_wait: Called with the reason at each try that finds another owner.

        Raises:
            LeaseHeld: another owner still held it after `wait_s`.
            TermOver: it was taken in a later term.
            LeaseLost: another owner took over; the block was cancelled.
            Unavailable: Redis did not answer the first request within the outage deadline.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + (3 * ttl_ms / 1000 if wait_s is None else wait_s)
        waiting = False
        while True:
            try:
                lease = HeldLease(self, await self.acquire(name, owner, ttl_ms, above, term), ttl_ms)
                break
            except LeaseHeld as error:
                if loop.time() >= end:
                    raise
                if not waiting:  # once: a wait may last for days
                    logger.info("waiting for the lease", extra={"reason": str(error)})
                waiting = True
                on_wait(error)
                await asyncio.sleep(min(_TRY_EVERY_S, ttl_ms / 1000))
        try:
            async with background(lease._renew_for_ever()):
                yield lease
        finally:
            # For the successor's sake, also after a failure; without Redis the lease runs out by itself.
            with contextlib.suppress(HonedError, TimeoutError):
                async with asyncio.timeout(_RELEASE_TIMEOUT_S):
                    await self.release(lease.claim)

    async def _run(self, operation: str, name: str, *arguments: Argument) -> Any:
        keys = [self._keys.lease(name), self._keys.fence(name), self._keys.term(name)]
        return await self._scripts.run(operation, keys, arguments)


class HeldLease:
    """A lease that `Leases.held` keeps.

    Attributes:
        claim: What to show to whoever checks; another one after `raise_fence`.
    """

    def __init__(self, leases: Leases, claim: Claim, ttl_ms: int) -> None:
        self.claim = claim
        self._leases, self._ttl_ms = leases, ttl_ms
        self._one_at_a_time = asyncio.Lock()

    async def check(self) -> None:
        """Asserts that the claim stands.

        Raises:
            LeaseLost: it does not.
        """
        await self._leases.check(self.claim)

    async def raise_fence(self, above: int = 0) -> Claim:
        """Gives the holder a new fence, above its own and above `above`: what it wrote under the old one is abandoned.

        Raises:
            LeaseLost: the claim does not stand any more.
        """
        async with self._one_at_a_time:
            await self._leases.renew(self.claim, self._ttl_ms)
            name, owner = self.claim.name, self.claim.owner
            self.claim = await self._leases.acquire(name, owner, self._ttl_ms, max(above, self.claim.fence))
            return self.claim

    async def _renew_for_ever(self) -> NoReturn:
        while True:
            await asyncio.sleep(self._ttl_ms / 1000 / _RENEWALS_PER_LIFE)
            try:
                async with self._one_at_a_time:
                    await self._leases.renew(self.claim, self._ttl_ms)
            except Unavailable as error:
                logger.warning("the lease is not renewed; Redis does not serve", extra={"reason": str(error)})


def _lost(claim: Claim, fence: int) -> NoReturn:
    raise LeaseLost(claim.name, claim.fence, fence)

"""The fenced lease: at most one learner (or conductor) of a run acts, and whoever lost its lease learns so.

The fence number rises each time the lease changes hands, and goes into every policy version. A lease alone cannot stop a
holder that slept through its expiry; the number can: whoever checks it sees that a higher one exists.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.queue.connection import Link
from honed.queue.keys import RunKeys
from honed.queue.scripts import Argument, Scripts

_RENEWALS_PER_LIFE: Final = 3


class LeaseLost(FailedPrecondition):
    """Another owner took the lease over.

    Attributes:
        fence: The current fence, higher than the loser's or held by another.
    """

    def __init__(self, name: str, mine: int, fence: int) -> None:
        """`mine` is the fence that was held, `fence` the current one."""
        super().__init__(
            f"the lease {name!r} with fence {mine} was lost, the current fence is {fence}: stop, publish nothing, "
            "and start anew from the last durable checkpoint"
        )
        self.fence = fence


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

    def __init__(self, link: Link, keys: RunKeys) -> None:
        """Connects to nothing yet."""
        self._keys = keys
        self._scripts = Scripts(link, "run.lua")

    async def acquire(self, name: str, owner: str, ttl_ms: int, above: int = 0) -> Claim:
        """Takes the lease if nobody holds it; its own holder gets it again with the same fence.

        Args:
            name: Which lease, for example `learner`.
            owner: A token unique to this process and start.
            ttl_ms: Life without renewal.
            above: The highest fence known from elsewhere (policy store, checkpoint). The new one exceeds it, even if
                Redis lost its counter.

        Raises:
            FailedPrecondition: another owner holds it; the message says who and for how long.
        """
        if ttl_ms < 1 or not owner:
            raise InvalidArgument("ttl_ms" if owner else "owner", "a lease needs an owner and a life of at least 1 ms")
        fence, holder, left_ms = await self._run("acquire", name, owner, 0, ttl_ms, above)
        if holder.decode() != owner:
            raise FailedPrecondition(
                f"the lease {name!r} is held by {holder.decode()} with fence {fence} for another {left_ms} ms: "
                "stop that process, or wait until its lease runs out"
            )
        return Claim(name, owner, fence)

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

    async def _run(self, operation: str, name: str, *arguments: Argument) -> Any:
        return await self._scripts.run(operation, [self._keys.lease(name), self._keys.fence(name)], arguments)


def _lost(claim: Claim, fence: int) -> NoReturn:
    raise LeaseLost(claim.name, claim.fence, fence)

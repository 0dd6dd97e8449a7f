"""Which processes of a service are there: each registers itself under a lease, and nothing is listed by hand.

A process that dies without a word is gone from the list when its lease runs out. A Redis that is away, or that lost the list,
ends nothing: the next heartbeat registers the process again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from typing import Final

from honed.kit.errors import HonedError
from honed.kit.rows import read_row
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.scripts import Argument, Scripts

logger = logging.getLogger(__name__)

GENERATION: Final = "generation"
REWARD: Final = "reward"
LEASE_S: Final = 6.0
_HEARTBEATS_PER_LEASE: Final = 3
_LEAVE_TIMEOUT_S: Final = 2.0


@dataclass(frozen=True)
class Member:
    """One process of a service.

    Attributes:
        name: Unique among the members of its role; another one after each start.
        address: gRPC target of its public port.
        control_address: gRPC target of its control port; empty if it has none.
        version: Label of the policy version that it serves; empty for other services.
        ready: Whether it serves. One that is not still loads, catches up or drains.
        facts: What else its peers want to know, for example the version of each scorer.
    """

    name: str
    address: str
    control_address: str = ""
    version: str = ""
    ready: bool = False
    facts: Mapping[str, str] = field(default_factory=dict)


class Members:
    """The members of one role of a run."""

    def __init__(self, link: RedisLink, keys: RunKeys, role: str) -> None:
        """`role` is `GENERATION` or `REWARD`."""
        self._keys = [keys.members(role)]
        self._scripts = Scripts(link, "registry.lua")

    async def register(self, member: Member, lease_s: float = LEASE_S) -> None:
        """Adds the member, or says anew what it is; it stays for `lease_s` seconds."""
        arguments: list[Argument] = [member.name, int(lease_s * 1000), json.dumps(asdict(member))]
        await self._scripts.run("register", self._keys, arguments)

    async def leave(self, name: str) -> bool:
        """Removes a member; False if it was not there."""
        return bool(await self._scripts.run("leave", self._keys, [name]))

    async def list(self) -> list[Member]:
        """The members whose lease stands, ordered by name."""
        found = await self._scripts.run("members", self._keys, [])
        return sorted((read_row(Member, json.loads(row)) for row in found), key=lambda member: member.name)


@asynccontextmanager
async def registered(
    members: Members, describe: Callable[[], Member], lease_s: float = LEASE_S
) -> AsyncIterator[Callable[[], None]]:
    """Keeps this process registered as long as the block runs, through any outage of Redis.

    Args:
        members: Where to register.
        describe: What this process is now; asked at each heartbeat.
        lease_s: Life of the registration without a heartbeat, seconds.

    Yields:
        A function that makes the next heartbeat come at once, for when the description has changed.
    """
    changed = asyncio.Event()

    async def beat() -> None:
        while True:
            changed.clear()
            try:
                await members.register(describe(), lease_s)
            except HonedError as error:
                logger.warning("cannot register; Redis does not answer", extra={"reason": str(error)})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(lease_s / _HEARTBEATS_PER_LEASE):
                    await changed.wait()

    beating = asyncio.create_task(beat())
    try:
        yield changed.set
    finally:
        beating.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await beating
        with contextlib.suppress(HonedError, TimeoutError):
            async with asyncio.timeout(_LEAVE_TIMEOUT_S):
                await members.leave(describe().name)

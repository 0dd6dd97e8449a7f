"""Renews the leases of long work in the background, so that nobody takes over what is still being worked on."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from typing import Final

from honed.kit.aio import background
from honed.kit.errors import Unavailable
from honed.queue.messages import Delivery
from honed.queue.stream import WorkQueue

logger = logging.getLogger(__name__)

_RENEWALS_PER_LEASE: Final = 3

OnLost = Callable[[Delivery], object]


class Holding:
    """The deliveries that are being worked on. Add what is taken, discard what has ended."""

    def __init__(self, queue: WorkQueue) -> None:
        self._queue = queue
        self._held: dict[tuple[str, int], tuple[Delivery, OnLost | None]] = {}

    def __len__(self) -> int:
        """How many are renewed."""
        return len(self._held)

    def add(self, deliveries: Iterable[Delivery], on_lost: OnLost | None = None) -> None:
        """Renews these from now on.

        Args:
            deliveries: What this process works on.
            on_lost: Called once with each delivery that somebody else took over: work on it adds nothing any more, so cancel
                it there. The delivery is renewed no longer and need not be discarded.
        """
        self._held.update({(d.entry, d.count): (d, on_lost) for d in deliveries})

    def discard(self, deliveries: Iterable[Delivery]) -> None:
        """Renews these no longer: they have ended."""
        for delivery in deliveries:
            self._held.pop((delivery.entry, delivery.count), None)

    async def renew(self) -> None:
        """Renews once, and reports what was lost."""
        asked = [delivery for delivery, _ in self._held.values()]
        kept = {(d.entry, d.count) for d in await self._queue.renew(asked)}
        for delivery in asked:
            name = (delivery.entry, delivery.count)
            if name in kept or (found := self._held.pop(name, None)) is None:  # None: discarded meanwhile
                continue
            if (on_lost := found[1]) is not None:
                on_lost(delivery)


@asynccontextmanager
async def holding(queue: WorkQueue, deliveries: Iterable[Delivery] = ()) -> AsyncIterator[Holding]:
    """Keeps deliveries leased as long as the block runs; renews at a third of the lease.

    A Redis that is away does not end the block: leases run out only by Redis' own clock, so the next renewal tells what
    was lost.

    Raises:
        FailedPrecondition: Redis refuses the renewal for good; the block was cancelled.
    """
    held = Holding(queue)
    held.add(deliveries)

    async def renew_for_ever() -> None:
        while True:
            await asyncio.sleep(queue.settings.lease_ms / 1000 / _RENEWALS_PER_LEASE)
            try:
                await held.renew()
            except Unavailable as error:
                logger.warning("leases are not renewed; Redis does not serve", extra={"reason": str(error)})

    async with background(renew_for_ever()):
        yield held

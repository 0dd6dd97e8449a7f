"""Renews the leases of long work in the background, so that nobody takes over what is still being worked on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Final

from honed.queue.messages import Delivery
from honed.queue.stream import WorkQueue

_RENEWALS_PER_LEASE: Final = 3


class Holding:
    """The deliveries that are being worked on. Add what is taken, discard what has ended."""

    def __init__(self, queue: WorkQueue) -> None:
        """Holds nothing yet."""
        self._queue = queue
        self._held: dict[tuple[str, int], Delivery] = {}
        self.lost: set[tuple[str, int]] = set()
        """(entry, count) of deliveries that others took over: work on them is in vain, and adds nothing."""

    def add(self, deliveries: Iterable[Delivery]) -> None:
        """Renews these from now on."""
        self._held.update({(d.entry, d.count): d for d in deliveries})

    def discard(self, deliveries: Iterable[Delivery]) -> None:
        """Renews these no longer: they have ended."""
        for delivery in deliveries:
            self._held.pop((delivery.entry, delivery.count), None)
            self.lost.discard((delivery.entry, delivery.count))

    async def renew(self) -> None:
        """Renews once, and notes what was lost."""
        asked = list(self._held.values())
        kept = {(d.entry, d.count) for d in await self._queue.renew(asked)}
        for delivery in asked:
            name = (delivery.entry, delivery.count)
            if name not in kept and self._held.pop(name, None) is not None:  # not discarded meanwhile
                self.lost.add(name)


@asynccontextmanager
async def holding(queue: WorkQueue, deliveries: Iterable[Delivery] = ()) -> AsyncIterator[Holding]:
    """Keeps deliveries leased as long as the block runs; renews at a third of the lease.

    Raises:
        Unavailable: Redis stayed away beyond the outage deadline; the block was cancelled.
    """
    held = Holding(queue)
    held.add(deliveries)

    async def renew_for_ever() -> None:
        while True:
            await asyncio.sleep(queue.settings.lease_ms / 1000 / _RENEWALS_PER_LEASE)
            await held.renew()

    error: Exception | None = None
    try:
        async with asyncio.TaskGroup() as group:
            renewal = group.create_task(renew_for_ever())
            try:
                yield held
            except Exception as raised:  # the block's own errors leave as they are, not in a group
                error = raised
            finally:
                renewal.cancel()
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from failed
    if error is not None:
        raise error

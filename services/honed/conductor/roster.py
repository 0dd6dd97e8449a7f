"""Which processes of replicated services have registered: kept up to date for whoever asks where the run stands."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager

from honed.conductor.fleet import Fleet
from honed.config import RunSettings
from honed.kit.errors import DeadlineExceeded, HonedError
from honed.queue.connection import RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.members import REWARD, Member, Members
from honed.runtime import redis_link
from honed.topology import REPLICATED

EVERY_S = 1.0
OUTAGE_S = 2.0


class Roster:
    """The registered members by service. Empty while Redis does not answer."""

    def __init__(self, settings: RunSettings, fleet: Fleet) -> None:
        """Knows nobody yet."""
        self._settings, self._fleet = settings, fleet
        self.members: Mapping[str, Sequence[Member]] = {}
        self._looked = asyncio.Condition()

    @property
    def alarms(self) -> list[str]:
        """What members say that needs a person: their fact `alarm`."""
        members = (member for members in self.members.values() for member in members)
        return [f"{member.name}: {member.facts['alarm']}" for member in members if "alarm" in member.facts]

    @property
    def broken(self) -> str:
        """Why nothing will be scored, however long one waits: each process of the reward service says so by its fact `broken`.

        Empty while one of them may score, or none has registered.
        """
        scoring = self.members.get(REWARD, ())
        return scoring[0].facts["broken"] if scoring and all("broken" in member.facts for member in scoring) else ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks every second as long as the block runs."""
        looking = asyncio.create_task(self._look())
        try:
            yield
        finally:
            looking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await looking

    async def note(self, members: Mapping[str, Sequence[Member]]) -> None:
        """Takes what has just been read."""
        async with self._looked:
            self.members = members
            self._looked.notify_all()

    async def shows(self, service: str, addresses: Collection[str], timeout_s: float) -> None:
        """Returns when a ready process of the service is listed at each of the addresses.

        Raises:
            DeadlineExceeded: One is still missing after `timeout_s` seconds; the message names it.
        """

        def missing() -> list[str]:
            there = {member.address for member in self.members.get(service, ()) if member.ready}
            return [address for address in addresses if address not in there]

        try:
            async with asyncio.timeout(timeout_s), self._looked:
                await self._looked.wait_for(lambda: not missing())
        except TimeoutError:
            raise DeadlineExceeded(
                f"{service} at {', '.join(missing())} is started, but has not registered as ready in Redis within "
                f"{timeout_s:g} s: `honed status` shows when it has; its log says what it waits for"
            ) from None

    async def _look(self) -> None:
        while (url := self._fleet.redis_url) is None:  # noqa: ASYNC110  # the fleet configures Redis when it starts
            await asyncio.sleep(EVERY_S)
        keys = RunKeys(self._settings.run)
        async with redis_link(self._settings, RetryPolicy(OUTAGE_S), url, max_connections=2) as link:
            while True:
                members: Mapping[str, Sequence[Member]] = {}
                with contextlib.suppress(HonedError):
                    members = {role: await Members(link, keys, role).list() for role in REPLICATED}
                await self.note(members)
                await asyncio.sleep(EVERY_S)

"""Services that run elsewhere: others start them, and they are found where the settings and Redis say that they are."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import grpc

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.fleet import check_replicated
from honed.conductor.launcher import ProcessState
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, HonedError
from honed.queue.connection import Link, Outage
from honed.queue.keys import RunKeys
from honed.queue.members import Members
from honed.runtime import internal_channel, redis_url
from honed.v1 import learner_pb2, learner_pb2_grpc, preference_pb2, preference_pb2_grpc

POLL_S = 0.5
CALL_TIMEOUT_S = 5.0


class ExternalFleet:
    """Waits for what others start; starts and ends nothing, and reads no path of another machine."""

    def __init__(self, settings: RunSettings, store: PolicyStore) -> None:
        """Connects to nothing yet.

        Raises:
            FailedPrecondition: `queue.url` is not set.
        """
        self._settings, self._store = settings, store
        self.redis_url: str | None = redis_url(settings)
        self._states: dict[str, ProcessState] = {}

    async def start_redis(self, timeout_s: float) -> None:
        """Waits for Redis; see `Fleet`."""
        async with Link(redis_url(self._settings), outage=Outage(timeout_s)) as link:
            await link.command("PING")

    async def start(self, service: str, timeout_s: float) -> None:
        """Waits for one process of the service, for as long as it takes; after `timeout_s` that is an alarm."""
        ready: dict[str, Callable[[], Awaitable[bool]]] = {"preference": self._preference, "learner": self._learner}
        state = self._states[service] = ProcessState(service)
        waiting = asyncio.ensure_future(_until(ready.get(service) or (lambda: self._registered(service))))
        try:
            done, _ = await asyncio.wait({waiting}, timeout=timeout_s)
            if not done:
                where = f"at {self.target(service)}" if service in ready else "registered in Redis"
                state.alarm = (
                    f"no {service} service is ready {where}: start one by `honed serve {service}` with this run's settings"
                )
            await waiting
        finally:
            waiting.cancel()
        state.alarm, state.ready = "", True

    async def run_job(self, job: str) -> None:
        """Waits for a base version. A reward service is ready only once it has its reward model, so that needs no wait."""
        if job == "pretrain":
            await _until(self._has_base)

    def target(self, service: str) -> str:
        """See `Fleet`."""
        target: str = getattr(self._settings, service).target
        return target

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Refuses: whoever started the processes scales them."""
        check_replicated(service)
        raise FailedPrecondition(
            f"this conductor starts no processes (conductor.launcher: none): scale {service} where it is deployed"
        )

    def states(self) -> list[ProcessState]:
        """The services as far as they were waited for."""
        return list(self._states.values())

    def address(self, process: str) -> str:
        """See `Fleet`; replicas have names of their own here."""
        return ""

    async def _has_base(self) -> bool:
        return VersionId(0, 0) in await asyncio.to_thread(self._store.versions)

    async def _registered(self, service: str) -> bool:
        async with Link(redis_url(self._settings), outage=Outage(CALL_TIMEOUT_S)) as link:
            members = await Members(link, RunKeys(self._settings.run), service).list()
            return any(member.ready for member in members)

    async def _preference(self) -> bool:
        async with internal_channel(self._settings, self.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=CALL_TIMEOUT_S)
        return True

    async def _learner(self) -> bool:
        async with internal_channel(self._settings, self.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        return bool(status.state != learner_pb2.LEARNER_STATE_STARTING)


async def _until(claim: Callable[[], Awaitable[bool]]) -> None:
    while True:
        with contextlib.suppress(HonedError, grpc.aio.AioRpcError):
            if await claim():
                return
        await asyncio.sleep(POLL_S)

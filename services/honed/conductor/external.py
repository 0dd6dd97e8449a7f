"""Services that run elsewhere: others start them, and they are found where the settings and Redis say that they are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from honed.conductor.fleet import check_replicated
from honed.conductor.jobs import JobLauncher
from honed.conductor.launcher import ProcessState
from honed.conductor.waiting import CALL_TIMEOUT_S, Probe, lacking, registered, until
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, Unavailable
from honed.kit.progress import JobProgress
from honed.queue.connection import RetryPolicy
from honed.runtime import check_addresses, internal_channel, redis_link, redis_url
from honed.topology import SERVICES
from honed.v1 import learner_pb2, learner_pb2_grpc, preference_pb2, preference_pb2_grpc

WATCH_S = 5.0


class ExternalFleet:
    """Waits for what others start; starts and ends no service, and reads no path of another machine."""

    def __init__(self, settings: RunSettings, jobs: JobLauncher) -> None:
        """Connects to nothing yet.

        Raises:
            FailedPrecondition: `queue.url` or the address of a service is not set.
        """
        self._settings, self._jobs = settings, jobs
        self.redis_url: str | None = redis_url(settings)
        self._states: dict[str, ProcessState] = {}
        check_addresses(settings)

    async def start_redis(self, timeout_s: float) -> None:
        """Waits for Redis, for as long as it takes; after `timeout_s` that is an alarm."""
        state = self._states.setdefault("redis", ProcessState("redis"))
        await until(self._redis, state, "Redis does not answer: start it, or correct queue.url", timeout_s)
        state.ready = True

    async def start(self, service: str, timeout_s: float) -> None:
        """Waits for one process of the service, for as long as it takes; after `timeout_s` that is an alarm."""
        await self._ready(self._states.setdefault(service, ProcessState(service)), timeout_s)

    async def run_job(self, job: str) -> None:
        """See `Fleet`."""
        await self._jobs.run_job(job)

    def job_progress(self, job: str) -> JobProgress | None:
        """See `Fleet`."""
        return self._jobs.progress(job)

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Looks every few seconds, as long as the block runs, whether services that were ready still are."""
        watching = [asyncio.create_task(self._watch(service)) for service in SERVICES]
        try:
            yield
        finally:
            for task in watching:
                task.cancel()
            await asyncio.gather(*watching, return_exceptions=True)

    def target(self, service: str) -> str:
        """See `Fleet`."""
        target: str = getattr(self._settings, service).target
        return target

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Refuses: whoever started the processes scales them."""
        check_replicated(service)
        launcher = self._settings.conductor.launcher
        raise FailedPrecondition(
            f"this conductor starts no services (conductor.launcher: {launcher}): scale {service} where it is deployed"
        )

    def states(self) -> list[ProcessState]:
        """The services as far as they were waited for, and jobs that are under way."""
        return [*self._states.values(), *self._jobs.states()]

    def address(self, process: str) -> str:
        """See `Fleet`; replicas have names of their own here."""
        return ""

    async def _watch(self, service: str) -> None:
        while True:
            await asyncio.sleep(WATCH_S)
            state = self._states.get(service)
            if state is not None and state.ready and await lacking(self._probe(service)):
                state.ready = False
                await self._ready(state, self._settings.conductor.start_timeout_s)

    async def _ready(self, state: ProcessState, timeout_s: float) -> None:
        service = state.name
        where = f"at {self.target(service)}" if service in ("preference", "learner") else "registered in Redis"
        lack = f"no {service} service is ready {where}: start one by `honed serve {service}` with this run's settings"
        await until(self._probe(service), state, lack, timeout_s)
        state.ready = True

    def _probe(self, service: str) -> Probe:
        probes: dict[str, Probe] = {"preference": self._preference, "learner": self._learner}
        return probes.get(service) or (lambda: registered(self._settings, service))

    async def _redis(self) -> None:
        async with redis_link(self._settings, RetryPolicy(CALL_TIMEOUT_S)) as link:
            await link.command("PING")

    async def _preference(self) -> None:
        async with internal_channel(self._settings, self.target("preference")) as channel:
            stub = preference_pb2_grpc.PreferenceServiceStub(channel)
            await stub.GetStats(preference_pb2.GetStatsRequest(), timeout=CALL_TIMEOUT_S)

    async def _learner(self) -> None:
        async with internal_channel(self._settings, self.target("learner")) as channel:
            stub = learner_pb2_grpc.LearnerServiceStub(channel)
            status = await stub.GetStatus(learner_pb2.GetStatusRequest(), timeout=CALL_TIMEOUT_S)
        if status.state == learner_pb2.LEARNER_STATE_STARTING:
            raise Unavailable("it is starting")

"""The services of a run, however many processes each has and whoever started them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

from honed.conductor.endpoints import joint_target, replica_section, write_endpoints
from honed.conductor.launcher import Launcher, ProcessState
from honed.conductor.processes import Processes, replica_name
from honed.config import ReplicatedSettings, RunSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.topology import REPLICATED, SERVICES

Write = Callable[[RunSettings], None]
JOB_TIMEOUT_S = 24 * 3600.0


class Fleet(Protocol):
    """What the phases of a run need to have running."""

    @property
    def redis_url(self) -> str | None:
        """Where Redis is, when the fleet started one."""

    async def start_redis(self, timeout_s: float) -> None:
        """Returns when Redis answers."""

    async def start(self, service: str, timeout_s: float) -> None:
        """Returns when one process of the service is ready, if it had to be started or not.

        Raises:
            DeadlineExceeded: none was in time.
            Unavailable: it dies again and again.
        """

    async def run_job(self, job: str) -> None:
        """Returns when the job's result is there.

        Raises:
            Unavailable: the job failed.
        """

    def target(self, service: str) -> str:
        """The gRPC target of a service: all its processes."""

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Starts or ends processes of a service; those that go finish what is in flight.

        Returns the addresses at which the service should now answer; empty when processes only left.

        Raises:
            DeadlineExceeded: a newcomer was not ready in time. It stays, so the same call again waits for it.
            InvalidArgument: the service runs as one process, or there is none of that name.
            FailedPrecondition: others start the processes.
        """

    def states(self) -> list[ProcessState]:
        """What is known of the processes."""

    def address(self, process: str) -> str:
        """Where a replica answers; empty for other processes."""


class LocalFleet:
    """Every service as child processes of this one."""

    def __init__(self, settings: RunSettings, launcher: Launcher, processes: Processes, write: Write) -> None:
        """Starts nothing yet.

        Args:
            settings: with every port chosen.
            launcher: what starts processes.
            processes: their specifications.
            write: keeps the settings for processes that start later.
        """
        self._settings, self._launcher, self._processes, self._write = settings, launcher, processes, write
        self._lock = asyncio.Lock()
        self._sections: dict[str, list[ReplicatedSettings]] = {}
        for name in REPLICATED:
            section: ReplicatedSettings = getattr(settings, name)
            self._sections[name] = [replica_section(section, i) for i in range(section.replicas)]

    @property
    def redis_url(self) -> str | None:
        """See `Fleet`."""
        return self._processes.redis_url

    async def start_redis(self, timeout_s: float) -> None:
        """See `Fleet`."""
        redis = await asyncio.to_thread(self._processes.redis)
        if redis is not None:
            await self._launcher.start(redis, timeout_s)

    async def start(self, service: str, timeout_s: float) -> None:
        """Starts all processes of a service, and returns when all of them are ready."""
        if service not in self._sections:
            await self._launcher.start(self._processes.service(service), timeout_s)
            return
        async with self._lock, asyncio.TaskGroup() as group:
            for section in self._sections[service]:
                group.create_task(self._launcher.start(self._processes.replica(service, section), timeout_s))

    async def run_job(self, job: str) -> None:
        """See `Fleet`."""
        await self._launcher.run_job(self._processes.job(job), JOB_TIMEOUT_S)

    def target(self, service: str) -> str:
        """See `Fleet`."""
        if service in self._sections:
            return joint_target(service, self._sections[service], self._settings.security.tls)
        target: str = getattr(self._settings, service).target
        return target

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Starts or ends processes. Newcomers are announced when they are ready, leavers before they drain."""
        check_replicated(service)
        async with self._lock:
            sections = self._sections[service]
            running = {state.name for state in self._launcher.states()}
            if replica_name(service, 0) not in running:
                raise FailedPrecondition(f"{service} has not been started yet: ask again when the run is so far")
            leaving = sections[replicas:]
            coming = [replica_section(getattr(self._settings, service), i) for i in range(len(sections), replicas)]
            # Before anything starts: what cannot be joined is refused.
            joint_target(service, [*sections[:replicas], *coming], self._settings.security.tls)
            if leaving:
                self._sections[service] = sections[:replicas]
                self.announce()
            timeout_s = self._settings.conductor.start_timeout_s
            try:
                async with asyncio.TaskGroup() as group:
                    for section in leaving:
                        group.create_task(self._launcher.end(replica_name(service, section.replica)))
                    for section in coming:
                        group.create_task(self._launcher.start(self._processes.replica(service, section), timeout_s))
            finally:
                # Also those that are late: they are kept running, and a channel passes over an address that does not answer.
                if coming:
                    self._sections[service] = [*sections, *coming]
                    self.announce()
            # Also those of an earlier call that were late.
            return [] if leaving else [section.target for section in self._sections[service]]

    def states(self) -> list[ProcessState]:
        """See `Fleet`."""
        return self._launcher.states()

    def address(self, process: str) -> str:
        """See `Fleet`."""
        every = ((name, section) for name, sections in self._sections.items() for section in sections)
        return next((section.target for name, section in every if replica_name(name, section.replica) == process), "")

    def announce(self) -> None:
        """Says where the services are, to clients and to processes that start later."""
        targets = {name: self.target(name) for name in self._sections}
        sections = {
            name: getattr(self._settings, name).model_copy(update={"address": targets[name], "replicas": len(found)})
            for name, found in self._sections.items()
        }
        self._write(self._settings.model_copy(update=sections))
        write_endpoints(self._settings, targets)


def check_replicated(service: str) -> None:
    """Raises InvalidArgument unless several processes of the service may run."""
    if service not in REPLICATED:
        known = "does not exist" if service not in SERVICES else "runs as one process"
        raise InvalidArgument("service", f"{service!r} {known}; {' and '.join(REPLICATED)} can have replicas")

"""The services of a run, however many processes each has and whoever started them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

from honed.conductor.endpoints import joint_target, replica_section, write_endpoints
from honed.conductor.jobs import ProcessJobs
from honed.conductor.launcher import Launcher, ProcessState
from honed.conductor.processes import Processes, replica_name
from honed.config import RunSettings
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, HonedError, InvalidArgument, Unavailable
from honed.kit.progress import JobProgress
from honed.settings import ReplicatedSettings
from honed.topology import REPLICATED, SERVICES
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

Write = Callable[[RunSettings], None]


class Fleet(Protocol):
    """What the phases of a run need to have running."""

    @property
    def redis_url(self) -> str | None:
        """Where Redis is, when the fleet started one."""

    async def start_redis(self, timeout_s: float) -> None:
        """Returns when Redis answers; raises as `start` does."""

    async def start(self, service: str, timeout_s: float) -> None:
        """Returns when one process of the service is ready, if it had to be started or not. It may be repeated.

        Raises:
            DeadlineExceeded: none was in time.
            Unavailable: it dies again and again.
        """

    async def run_job(self, job: str) -> None:
        """Returns when the job's result is there. It may be repeated.

        Raises:
            Unavailable: the job failed for a reason that may pass.
            HonedError: it failed by itself.
        """

    def job_progress(self, job: str) -> JobProgress | None:
        """How far the job is; None before it has said anything."""

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
        self._jobs = ProcessJobs(launcher, processes, Workspace(settings.directory).progress)
        self._lock = asyncio.Lock()
        self._starting: set[asyncio.Future[None]] = set()
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
        """Starts all processes of a service, and returns when one of them is ready: the others join it."""
        if service not in self._sections:
            await self._launcher.start(self._processes.service(service), timeout_s)
            return
        async with self._lock:
            specs = [self._processes.replica(service, section) for section in self._sections[service]]
            starting = [asyncio.ensure_future(self._launcher.start(spec, timeout_s)) for spec in specs]
            for task in starting:  # waited for to the end, so that one that is late becomes an alarm
                self._starting.add(task)
                task.add_done_callback(self._started)
            await _first_success(starting)

    async def run_job(self, job: str) -> None:
        """See `Fleet`."""
        await self._jobs.run_job(job)

    def job_progress(self, job: str) -> JobProgress | None:
        """See `Fleet`."""
        return self._jobs.progress(job)

    def target(self, service: str) -> str:
        """See `Fleet`."""
        if service in self._sections:
            return joint_target(service, self._sections[service], self._settings.security.tls)
        target: str = getattr(self._settings, service).target
        return target

    async def scale(self, service: str, replicas: int) -> list[str]:
        """Starts or ends processes. Newcomers are announced when they are ready, leavers before they drain.

        Newcomers start one after another and stand back as far as the learner until they are ready: loading a model takes
        whole cores, which those that serve and train need.

        Raises:
            DeadlineExceeded: a newcomer was late; it is kept running, and those after it have been started.
            Unavailable: one dies again and again; the same.
        """
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
            async with asyncio.TaskGroup() as group:
                for section in leaving:
                    group.create_task(self._launcher.end(replica_name(service, section.replica)))
            late: list[HonedError] = []
            for section in coming:
                spec = self._processes.replica(service, section)
                spec = replace(spec, starting_nice=max(spec.nice, SERVICES["learner"].nice))
                try:
                    await self._launcher.start(spec, self._settings.conductor.start_timeout_s)
                except (DeadlineExceeded, Unavailable) as error:
                    late.append(error)
                finally:
                    # Also one that is late: it is kept running, and a channel passes over an address that does not answer.
                    self._sections[service] = [*self._sections[service], section]
                    self.announce()
            if late:
                raise late[0]
            # Also those of an earlier call that were late.
            return [] if leaving else [section.target for section in self._sections[service]]

    def _started(self, task: asyncio.Future[None]) -> None:
        self._starting.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.warning("a process of several is late", extra={"reason": str(error)})

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


async def _first_success(tasks: Sequence[asyncio.Future[None]]) -> None:
    """Returns when one has succeeded; raises what the first one raised when none has."""
    for done in asyncio.as_completed(tasks):
        with contextlib.suppress(DeadlineExceeded, Unavailable):
            await done
            return
    await tasks[0]


def check_replicated(service: str) -> None:
    """Raises InvalidArgument unless several processes of the service may run."""
    if service not in REPLICATED:
        known = "does not exist" if service not in SERVICES else "runs as one process"
        raise InvalidArgument("service", f"{service!r} {known}; {' and '.join(REPLICATED)} can have replicas")

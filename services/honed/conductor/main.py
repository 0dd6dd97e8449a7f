"""The conductor process by itself: drives a run whose services run elsewhere.

With `conductor.launcher: kubernetes` it also starts the run's jobs, and of several conductors the holder of the cluster's Lease
drives the run. The others stand by, alive and not ready, though they may share its directory. Who loses the Lease ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final

from honed.artifacts.store import PolicyStore
from honed.conductor.endpoints import write_endpoints
from honed.conductor.external import ExternalFleet
from honed.conductor.jobs import AwaitedJobs, JobLauncher
from honed.conductor.leadership import Leadership, Say, Unopposed
from honed.conductor.local import DirectoryInUse, alone
from honed.conductor.record import recorded
from honed.conductor.results import Results
from honed.conductor.run import Run
from honed.conductor.service import conductor_server
from honed.conductor.summary import write_summary
from honed.conductor.tracked import tracked
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, root_cause
from honed.kit.server import Server, serve_until_signalled
from honed.tracking.start import check_tracking
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM. A failed run is an alarm in `GetRun`; the service goes on answering.

    Raises:
        FailedPrecondition: the settings ask for processes, or name no Redis or not every service; or another process runs in
            the directory; or a tracker's package is not installed; or there is no way to the cluster; or another conductor has
            been chosen.
    """
    if not settings.conductor.services_elsewhere:
        raise FailedPrecondition(
            "conductor.launcher is process, and this command starts none: run `honed up`, or set it to none or kubernetes, to "
            "drive services that run elsewhere"
        )
    check_tracking(settings)
    store = PolicyStore(settings.policy_url, settings.run)
    async with _launching(settings, Results(settings, store)) as (jobs, leadership):
        fleet = ExternalFleet(settings, jobs)
        driven = Run(settings, fleet, store, leadership)
        server = conductor_server(driven)

        async def work(stopping: asyncio.Event) -> None:
            await _lead(driven, leadership, server, stopping)

        # Where a Lease chooses, its holder takes the directory; elsewhere whoever comes second is refused before it listens.
        with contextlib.nullcontext() if _chosen_by_lease(settings) else alone(driven.workspace):
            async with driven.roster.running(), fleet.watched():
                await serve_until_signalled(server, work)


def _chosen_by_lease(settings: RunSettings) -> bool:
    return settings.conductor.launcher == "kubernetes"


@asynccontextmanager
async def _launching(settings: RunSettings, results: Results) -> AsyncIterator[tuple[JobLauncher, Leadership]]:
    """What runs the jobs, and who chooses the conductor."""
    if settings.conductor.launcher == "none":
        yield AwaitedJobs(settings, results), Unopposed()
        return
    # Here, because whoever has no cluster has no client of one.
    from honed.conductor.cluster.api import connected
    from honed.conductor.cluster.jobs import KubernetesJobs
    from honed.conductor.cluster.lease import ClusterLease

    section = settings.conductor.kubernetes
    async with connected(section) as api:
        yield KubernetesJobs(api, settings, results), ClusterLease(api, section)


async def _lead(driven: Run, leadership: Leadership, server: Server, stopping: asyncio.Event) -> None:
    """Drives the run once this process is chosen, and as long as it is; ends at once if it is to stop before."""
    doing, chosen = driven.state.doing, asyncio.Event()

    def wait(reason: str) -> None:
        driven.state.doing = f"standing by: {reason}"

    async def lead() -> None:
        async with leadership.held(wait, partial(driven.state.alarm, "lease")), _directory_held(driven, wait):
            chosen.set()
            driven.state.doing = doing
            await server.ready()
            async with recorded(driven), tracked(driven):
                await _drive(driven, stopping)

    leading, stop = asyncio.ensure_future(lead()), asyncio.ensure_future(stopping.wait())
    try:
        await asyncio.wait({leading, stop}, return_when=asyncio.FIRST_COMPLETED)
        if chosen.is_set() or leading.done():
            await leading
    finally:
        for task in (leading, stop):
            task.cancel()
        await asyncio.gather(leading, stop, return_exceptions=True)


@asynccontextmanager
async def _directory_held(driven: Run, on_wait: Say) -> AsyncIterator[None]:
    """Holds the run's directory for the holder of the Lease; a predecessor that still ends on the same volume is waited for.

    Raises:
        FailedPrecondition: the directory cannot be used.
    """
    with contextlib.ExitStack() as stack:
        while _chosen_by_lease(driven.settings):
            try:
                stack.enter_context(alone(driven.workspace))
                break
            except DirectoryInUse as error:
                on_wait(str(error))
                await asyncio.sleep(_LOOK_EVERY_S)
        yield


async def _drive(driven: Run, stopping: asyncio.Event) -> None:
    """Returns when the run has been stopped, here or by a call."""
    executing = asyncio.ensure_future(_execute(driven))
    asked = [asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(driven.stopping.wait())]
    try:
        with _announced(driven.settings):
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            driven.stopping.set()
            await executing
    finally:
        for task in (*asked, executing):
            task.cancel()
        await asyncio.gather(*asked, executing, return_exceptions=True)


@contextmanager
def _announced(settings: RunSettings) -> Iterator[None]:
    """Says where the services are, for commands such as `honed status` beside this conductor."""
    write_endpoints(settings, {})
    try:
        yield
    finally:
        Workspace(settings.directory).endpoints.unlink(missing_ok=True)


async def _execute(driven: Run) -> None:
    try:
        await driven.execute()
    except Exception as error:  # whatever it is, the service goes on answering
        logger.exception("the run has failed", extra={"reason": str(root_cause(error))})
    if driven.state.loop_started_at is not None:
        await write_summary(driven)
        await driven.stand_by()

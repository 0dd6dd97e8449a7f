"""The conductor process by itself: drives a run whose services run elsewhere, and launches nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from honed.artifacts.store import PolicyStore
from honed.conductor.endpoints import write_endpoints
from honed.conductor.external import ExternalFleet
from honed.conductor.local import alone
from honed.conductor.roster import Roster
from honed.conductor.run import Run
from honed.conductor.service import conductor_server
from honed.conductor.summary import write_summary
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, root_cause
from honed.kit.server import serve_until_signalled
from honed.workspace import Workspace

logger = logging.getLogger(__name__)


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM. A failed run is an alarm in `GetRun`; the service goes on answering.

    Raises:
        FailedPrecondition: the settings ask for processes, or name no Redis or not every service; or another process runs in
            the directory.
    """
    if settings.conductor.launcher != "none":
        raise FailedPrecondition(
            "conductor.launcher is process, and this command starts none: run `honed up`, or set it to none to drive services "
            "that run elsewhere"
        )
    store = PolicyStore(settings.policy_url, settings.run)
    fleet = ExternalFleet(settings, store)
    driven = Run(settings, fleet, store)
    roster = Roster(settings, fleet)
    server = conductor_server(driven, roster)

    async def work(stopping: asyncio.Event) -> None:
        await server.ready()
        executing = asyncio.ensure_future(_execute(driven))
        asked = [asyncio.ensure_future(stopping.wait()), asyncio.ensure_future(driven.stopping.wait())]
        try:
            with _announced(settings):
                await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
                driven.stopping.set()
                await executing
        finally:
            for task in asked:
                task.cancel()

    with alone(driven.workspace):
        async with roster.running(), fleet.watched():
            await serve_until_signalled(server, work)


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

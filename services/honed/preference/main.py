"""The preference process: the store on its database, and PreferenceService."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid

from honed.config import RunSettings
from honed.kit.errors import HonedError
from honed.kit.server import Listener, Server, Servicer, serve_until_signalled
from honed.kit.wiring import server_options
from honed.preference.service import PreferenceService
from honed.preference.store import PreferenceStore
from honed.v1 import preference_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = "honed.v1.PreferenceService"
CHECK_EVERY_S = 5.0


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        Unavailable: the database cannot be reached.
    """
    mine = settings.preference
    store = PreferenceStore(settings.database_url, clock=lambda: time.time_ns() // 1000, new_id=lambda: uuid.uuid4().hex)
    async with store:
        service = PreferenceService(store)
        servicer = Servicer(SERVICE, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, service)
        server = Server([Listener(mine.host, mine.port, [servicer])], server_options(settings, mine))

        async def work(stopping: asyncio.Event) -> None:
            logger.info("serving", extra={"database": store.name})
            while not stopping.is_set():
                try:
                    await service.health()
                    await server.ready()
                except HonedError as error:
                    logger.warning("database does not answer", extra={"reason": str(error)})
                    await server.ready(serving=False)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(stopping.wait(), CHECK_EVERY_S)

        await serve_until_signalled(server, work)

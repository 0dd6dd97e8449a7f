"""The preference process: the store on its database, and PreferenceService."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from honed.config import RunSettings
from honed.kit.errors import HonedError
from honed.kit.from_files import FromFiles
from honed.kit.server import Lifecycle, Listener, Server, Servicer, serve_until_signalled
from honed.preference.database import Database, DatabaseOptions
from honed.preference.migrate import migrate
from honed.preference.service import ImportBatch, PreferenceService
from honed.preference.settings import PreferenceSettings
from honed.preference.store import PreferenceStore, StoreOptions
from honed.runtime import server_options
from honed.v1 import preference_pb2_grpc

logger = logging.getLogger(__name__)

SERVICE = "honed.v1.PreferenceService"
CHECK_EVERY_S = 5.0


def database_options(section: PreferenceSettings) -> DatabaseOptions:
    """The limits and the password of the database.

    Raises:
        ValueError: the password file cannot be read.
    """
    file = section.database_password_file
    return DatabaseOptions(
        migration_deadline_s=section.migration_deadline_s, password=None if file is None else password_source(file)
    )


def password_source(file: Path) -> Callable[[], str]:
    """What returns the password that a file holds now.

    Raises:
        ValueError: the file cannot be read.
    """

    def read() -> str:
        try:
            return file.read_text().strip()
        except OSError as error:
            raise ValueError(f"preference.database_password_file {file} cannot be read: {error.strerror}") from error

    return FromFiles([file], read).get


async def migrate_database(settings: RunSettings) -> str:
    """Brings the database to this build's schema, and says where it is.

    Raises:
        FailedPrecondition: the schema is newer than this build.
        Unavailable: the database cannot be reached.
    """
    database = Database(settings.database_url, database_options(settings.preference))
    try:
        return f"database {database.name} has schema revision {await migrate(database)}"
    finally:
        await database.close()


async def run(settings: RunSettings) -> None:
    """Serves until SIGTERM.

    Raises:
        FailedPrecondition: the database's schema is newer than this build.
        Unavailable: the database cannot be reached.
    """
    section = settings.preference
    options = server_options(settings, section)  # a token table that is missing is told before the database is touched
    store = PreferenceStore(
        settings.database_url,
        clock=lambda: time.time_ns() // 1000,
        new_id=lambda: uuid.uuid4().hex,
        options=StoreOptions(
            database=database_options(section), erase_page=section.erase_page, migrate=section.migrate == "start"
        ),
    )
    async with store:
        service = PreferenceService(store, ImportBatch(section.import_batch))
        servicer = Servicer(SERVICE, preference_pb2_grpc.add_PreferenceServiceServicer_to_server, service)
        server = Server([Listener(section.host, section.port, [servicer])], options)

        async def work(stopping: Lifecycle) -> None:
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

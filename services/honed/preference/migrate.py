"""Brings the database to this build's schema, once, however many services start together.

All revisions run in one transaction behind a lock that other starters wait for: on SQLite the write lock of the file, on
PostgreSQL an advisory lock. Who comes second finds nothing to do. A failed revision leaves the schema as it was. A revision may
rewrite every row, so the transaction has a deadline of its own (`DatabaseOptions.migration_deadline_s`).
"""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from honed.kit.errors import FailedPrecondition
from honed.preference.database import Database

_RETRY_S = 0.05


async def migrate(database: Database) -> str:
    """Creates or upgrades the schema.

    Returns:
        The revision that the database has now.

    Raises:
        FailedPrecondition: the schema is newer than this build.
        Unavailable: the database cannot be reached, or its lock was not free in time.
    """
    if database.is_sqlite:
        await _write_ahead(database)
    async with database.migrating() as connection:
        return await connection.run_sync(_upgrade, database.name)


def alembic_config(connection: sa.Connection | None = None) -> Config:
    """Alembic's settings for the packaged revisions; `connection` is the one that they run on."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _upgrade(connection: sa.Connection, name: str) -> str:
    config = alembic_config(connection)
    scripts = ScriptDirectory.from_config(config)
    current = MigrationContext.configure(connection).get_current_revision()
    try:
        if current is not None:
            scripts.get_revision(current)
    except CommandError as error:
        raise FailedPrecondition(
            f"database {name} has schema revision {current!r}, which this build does not know: it was written by a newer "
            "build; run that build, or restore a backup"
        ) from error
    command.upgrade(config, "head")
    head = scripts.get_current_head()
    assert head is not None
    return head


async def _write_ahead(database: Database) -> None:
    """Switches the file to its write-ahead log. Lasting; SQLite does not wait for locks in this one statement, so we do."""
    async with database.guarded():
        while True:
            try:
                (mode,) = await asyncio.to_thread(database.pragma, "journal_mode=WAL")
                break
            except sqlite3.OperationalError as error:
                if "locked" not in str(error):
                    raise
                await asyncio.sleep(_RETRY_S)
    if mode != "wal":
        raise FailedPrecondition(
            f"database {database.name}: no write-ahead log there (journal mode {mode}); put the file on a local disk"
        )

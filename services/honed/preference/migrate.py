"""Brings the database to this build's schema, once, however many services start together.

All revisions run in one transaction behind a lock that other starters wait for: on SQLite the write lock of the file, on
PostgreSQL an advisory lock. Who comes second finds nothing to do. A failed revision leaves the schema as it was. A revision may
rewrite every row, so the transaction has a deadline of its own (`DatabaseOptions.migration_deadline_s`).

Where a job migrates before a rollout, the release before meets a schema that is newer than its own, and it must go on: a
revision that leaves that release working says so in its id, `0003_works_with_0002`. Code that has at least revision 0002 then
uses the schema as it is; other code refuses it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util.exc import CommandError

from honed.kit.errors import FailedPrecondition, Unavailable
from honed.preference.database import Database

logger = logging.getLogger(__name__)

_RETRY_S = 0.05
_WORKS_WITH: Final = re.compile(r"\d{4}_works_with_(\d{4})")


@dataclass(frozen=True)
class Schema:
    """How far a database is.

    Attributes:
        revision: that it has; None if it has no schema at all.
        ours: the newest that this build knows.
        newer: whether its revision is one of a newer build, with which this one works.
    """

    revision: str | None
    ours: str
    newer: bool = False

    @property
    def behind(self) -> bool:
        """Whether it has to be migrated before this build can use it."""
        return not self.newer and self.revision != self.ours


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


async def check_schema(database: Database) -> Schema:
    """Reads how far the schema is, and changes nothing.

    Raises:
        FailedPrecondition: it is newer than this build can use.
        Unavailable: it is older than this build needs, or the database cannot be reached.
    """
    if _is_missing(database):
        schema = Schema(None, _head())
    else:
        async with database.reading() as connection:
            schema = await connection.run_sync(_schema, database.name)
    if schema.behind:
        has = f"schema revision {schema.revision!r}" if schema.revision else "no schema"
        raise Unavailable(
            f"database {database.name} has {has}, which is behind this build's {schema.ours!r}: run its `honed job migrate`"
        )
    return schema


async def wait_for_schema(database: Database, deadline_s: float, *, every_s: float = 2.0, say_s: float = 30.0) -> Schema:
    """Waits until a migration job has brought the database to this build's schema; the log says what it waits for.

    Raises:
        FailedPrecondition: the schema is newer than this build can use.
        Unavailable: nobody has within `deadline_s` seconds; says what is missing.
    """
    clock = asyncio.get_running_loop().time
    end, said = clock() + deadline_s, -say_s
    while True:
        try:
            return await check_schema(database)
        except Unavailable as error:
            if clock() + every_s > end:
                raise
            if clock() - said >= say_s:
                logger.warning("waiting for the database", extra={"reason": str(error)})
                said = clock()
        await asyncio.sleep(every_s)


def alembic_config(connection: sa.Connection | None = None) -> Config:
    """Alembic's settings for the packaged revisions; `connection` is the one that they run on."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    if connection is not None:
        config.attributes["connection"] = connection
    return config


def _upgrade(connection: sa.Connection, name: str) -> str:
    schema = _schema(connection, name)
    if schema.newer:
        assert schema.revision is not None
        logger.info("the schema is a newer build's, with which this one works", extra={"revision": schema.revision})
        return schema.revision
    command.upgrade(alembic_config(connection), "head")
    return schema.ours


def _schema(connection: sa.Connection, name: str) -> Schema:
    scripts, ours = ScriptDirectory.from_config(alembic_config(connection)), _head()
    current = MigrationContext.configure(connection).get_current_revision()
    try:
        if current is not None:
            scripts.get_revision(current)
    except CommandError as error:
        works_with = _WORKS_WITH.fullmatch(current or "")
        if works_with and works_with[1] <= ours[:4]:
            return Schema(current, ours, newer=True)
        raise FailedPrecondition(
            f"database {name} has schema revision {current!r}, which is ahead of this build's {ours!r}: it was written by a "
            "newer build; run that build, or restore a backup"
        ) from error
    return Schema(current, ours)


def _is_missing(database: Database) -> bool:
    """Whether there is no file yet: reading would make one."""
    return database.is_sqlite and not Path(database.url.database or "").exists()


def _head() -> str:
    """The newest revision of this build."""
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
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

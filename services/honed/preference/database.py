"""One database behind one small object: transactions with deadlines, durable commits, errors that say what to do.

SQLite: write-ahead log; synchronous=FULL, so that a commit is on the disk before it is acknowledged; a write transaction begins
IMMEDIATE, so that it never has to upgrade a read lock, which would fail at once instead of waiting. Erased text is overwritten.
PostgreSQL: READ COMMITTED and synchronous_commit=on, whatever the server's defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from honed.kit.errors import DataLoss, FailedPrecondition, HonedError, Unavailable

MIGRATION_LOCK = 0x686F6E6564  # "honed"; any number that no other user of the database takes
_DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg", "postgres": "postgresql+asyncpg"}


@dataclass(frozen=True)
class DatabaseOptions:
    """How long things may take and how much may be open.

    Attributes:
        deadline_s: the longest that one transaction may take.
        lock_wait_s: the longest wait for another process's lock; below `deadline_s`, so that the database says what it
            waited for.
        connections: open connections at most.
        migration_deadline_s: the longest that a change of the schema may take, which may rewrite every row.
        cleaning_deadline_s: the longest that clearing away after an erasure may take.
        password: returns the password for a server's URL as it is now; asked at each new connection. None: the URL's own.
    """

    deadline_s: float = 30.0
    lock_wait_s: float = 10.0
    connections: int = 5
    migration_deadline_s: float = 3600.0
    cleaning_deadline_s: float = 300.0
    password: Callable[[], str] | None = None


class Database:
    """A pool of connections to the one database of a service."""

    def __init__(self, url: str, options: DatabaseOptions | None = None) -> None:
        """Prepares the pool; connects to nothing yet.

        Args:
            url: `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user:password@host/name`.
            options: limits.

        Raises:
            FailedPrecondition: the URL is none of these.
        """
        self.options = options or DatabaseOptions()
        self.url = _with_driver(url)
        self.name = self.url.render_as_string(hide_password=True)
        self.is_sqlite = self.url.get_backend_name() == "sqlite"
        # SQLite's own wait for its write lock knows no order: who writes without a pause would keep another out for ever.
        self._turn: AbstractAsyncContextManager[object] = asyncio.Lock() if self.is_sqlite else contextlib.nullcontext()
        self.engine = _sqlite(self.url, self.options) if self.is_sqlite else _postgresql(self.url, self.options)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that only reads.

        Raises:
            Unavailable: the database is locked, full, gone or too slow.
        """
        async with self.guarded(), self.engine.connect() as connection, connection.begin():
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that is durable when the block has ended without an error.

        Raises:
            Unavailable: the database is locked, full, gone or too slow. Whether the commit happened may be unknown then: a
                repetition under the same idempotency key is safe.
        """
        async with self.guarded(), self._turn, self.engine.connect() as connection:
            await connection.execution_options(honed_writes=True)
            async with connection.begin():
                yield connection

    @asynccontextmanager
    async def migrating(self) -> AsyncIterator[AsyncConnection]:
        """A transaction that may take as long as a migration may. On PostgreSQL it first waits for other starters.

        Raises:
            Unavailable: the database is locked, full, gone or too slow.
        """
        deadline_s = self.options.migration_deadline_s
        async with self.guarded(deadline_s), self.engine.connect() as connection:
            await connection.execution_options(honed_writes=True)
            async with connection.begin():
                if not self.is_sqlite:
                    for limit in ("statement_timeout", "idle_in_transaction_session_timeout", "lock_timeout"):
                        await connection.execute(sa.text(f"SET LOCAL {limit} = {int(deadline_s * 1000)}"))
                    await connection.execute(sa.select(sa.func.pg_advisory_xact_lock(MIGRATION_LOCK)))
                    # Another starter was waited for. A table's lock is not: who queues for it holds everybody else up.
                    await connection.execute(sa.text(f"SET LOCAL lock_timeout = {int(self.options.lock_wait_s * 1000)}"))
                yield connection

    async def clean(self, tables: Sequence[str]) -> bool:
        """Clears away what rows were before they changed: by VACUUM, and on SQLite the write-ahead log as well.

        (`secure_delete` alone is not enough: where SQLite moves rows between pages, the space they leave keeps their bytes.)

        Returns:
            Whether nothing kept the database from doing so. On PostgreSQL a transaction that is older than the change keeps
            its rows, and this does not see it.

        Raises:
            Unavailable: the database is not there.
        """
        deadline_s = self.options.cleaning_deadline_s
        if self.is_sqlite:
            async with self.guarded(deadline_s), self._turn:
                busy, _, _ = await asyncio.to_thread(self._rewrite)
                return not busy
        async with self.guarded(deadline_s), self.engine.connect() as raw:
            connection = await raw.execution_options(isolation_level="AUTOCOMMIT")  # VACUUM stands outside of transactions
            await connection.execute(sa.text(f"SET statement_timeout = {int(deadline_s * 1000)}"))
            try:
                for table in tables:
                    await connection.execute(sa.text(f"VACUUM {table}"))
            finally:
                await connection.execute(sa.text("RESET statement_timeout"))
            return True

    def pragma(self, statement: str) -> tuple[Any, ...]:
        """Runs a PRAGMA of SQLite that must stand outside of transactions, on a connection of its own. Makes the file. Blocks.

        Raises:
            sqlite3.Error: it failed.
        """
        with self._connected() as connection:
            row: tuple[Any, ...] = connection.execute(f"PRAGMA {statement}").fetchone()
            return row

    def _rewrite(self) -> tuple[Any, ...]:
        with self._connected() as connection:
            connection.execute("VACUUM")
            row: tuple[Any, ...] = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            return row

    def _connected(self) -> contextlib.closing[sqlite3.Connection]:
        path = Path(self.url.database or "")
        path.parent.mkdir(parents=True, exist_ok=True)
        return contextlib.closing(sqlite3.connect(path, timeout=self.options.lock_wait_s, isolation_level=None))

    async def close(self) -> None:
        """Closes every connection."""
        await self.engine.dispose()

    @asynccontextmanager
    async def guarded(self, deadline_s: float | None = None) -> AsyncIterator[None]:
        """The deadline of one transaction, and the database's errors as ours.

        Args:
            deadline_s: the longest that the block may take; None for that of ordinary transactions.

        Raises:
            Unavailable: the database is locked, full, gone or too slow.
            DataLoss: the file is damaged, or no database.
        """
        deadline_s = self.options.deadline_s if deadline_s is None else deadline_s
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except exc.DBAPIError as error:
            translated = _translated(self.name, error.orig, error.connection_invalidated)
            if translated is None:
                raise
            raise translated from error
        except sqlite3.Error as error:  # from `pragma`
            translated = _translated(self.name, error)
            if translated is None:
                raise
            raise translated from error
        except exc.TimeoutError as error:
            raise Unavailable(
                f"database {self.name}: all {self.options.connections} connections are busy; try again, or allow more"
            ) from error
        except TimeoutError as error:
            raise Unavailable(f"database {self.name} did not answer within {deadline_s:g} s; a repetition is safe") from error
        except OSError as error:
            raise Unavailable(f"database {self.name} cannot be reached ({error}); check that it runs") from error


def _with_driver(text: str) -> URL:
    try:
        url = make_url(text)
    except exc.ArgumentError as error:
        # The text may hold a password: it is not repeated.
        raise FailedPrecondition("the database URL cannot be read; write sqlite:///file or postgresql://...") from error
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise FailedPrecondition(f"no support for database {backend!r}; write sqlite:///file or postgresql://...")
    if backend == "sqlite" and url.database in (None, "", ":memory:"):
        raise FailedPrecondition("the record needs a file: an SQLite database in memory would lose every judgement")
    return url.set(drivername=_DRIVERS[backend])


def _sqlite(url: URL, options: DatabaseOptions) -> AsyncEngine:
    engine = create_async_engine(
        url,
        pool_size=options.connections,
        max_overflow=0,
        pool_timeout=options.lock_wait_s,
        connect_args={"timeout": options.lock_wait_s},
    )

    @sa.event.listens_for(engine.sync_engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # transactions are begun below, not by the driver
        try:
            cursor = connection.cursor()
            for pragma in ("synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
                cursor.execute(f"PRAGMA {pragma}")
            cursor.close()
        except BaseException:
            connection.close()  # the pool does not know it yet, and it has a thread
            raise

    @sa.event.listens_for(engine.sync_engine, "begin")
    def begin(connection: sa.Connection) -> None:
        writes = connection.get_execution_options().get("honed_writes", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: URL, options: DatabaseOptions) -> AsyncEngine:
    milliseconds = str(int(options.deadline_s * 1000))
    return create_async_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=options.connections,
        max_overflow=0,
        pool_timeout=options.lock_wait_s,
        pool_pre_ping=True,
        connect_args={
            "timeout": options.lock_wait_s,
            **({} if options.password is None else {"password": options.password}),
            "server_settings": {
                "application_name": "honed-preference",
                "synchronous_commit": "on",
                "lock_timeout": str(int(options.lock_wait_s * 1000)),
                "statement_timeout": milliseconds,
                "idle_in_transaction_session_timeout": milliseconds,
            },
        },
    )


def _translated(name: str, error: BaseException | None, invalidated: bool = False) -> HonedError | None:
    """A driver's error as ours; None for a fault of the statement, which is a fault of this program."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, sqlite3.OperationalError):
        advice = next((advice for word, advice in _SQLITE_ADVICE.items() if word in text), "check the file and its volume")
        return Unavailable(f"database {name}: {text}: {advice}; a repetition is safe")
    if type(error) is sqlite3.DatabaseError:  # the class itself stands for damage
        return DataLoss(f"database {name}: {text}; name another file, or restore a backup")
    state = str(getattr(error, "sqlstate", None) or "")
    # Classes of connections, resources, operator intervention and system errors; then locks, conflicts, refused log-ins.
    if invalidated or state[:2] in {"08", "53", "57", "58"} or state in {"55P03", "40001", "40P01", "28000", "28P01", "3D000"}:
        return Unavailable(f"database {name}: {text}: check that it runs and accepts this client; a repetition is safe")
    return None


_SQLITE_ADVICE = {
    "locked": "another process writes to the file; end it or try again",
    "full": "free space on its volume, then try again",
    "unable to open": "check that its directory exists and may be written",
    "readonly": "let this process write to it",
}

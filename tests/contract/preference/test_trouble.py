"""What happens when the process, the file or the server is in trouble: nothing acknowledged is lost, errors say what to do."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import asyncpg
import pytest
import sqlalchemy as sa
from tests.support.judgements import entries
from tests.support.postgres import running_postgres
from tests.support.preference_reading import everything

from honed.kit.errors import DataLoss, Unavailable
from honed.preference.database import Database, DatabaseOptions
from honed.preference.store import StoreOptions
from honed.preference.writing import Recorded

# Short for locks alone: making the tables may take a slow disk some seconds.
IMPATIENT = StoreOptions(database=DatabaseOptions(deadline_s=60, lock_wait_s=0.2))

WRITER = """
import asyncio, itertools, sys
from honed.preference.store import PreferenceStore
from tests.support.judgements import entries

async def main():
    async with PreferenceStore(sys.argv[1], clock=lambda: 1, new_id=str) as store:
        for number in itertools.count():
            (outcome,) = await store.record(entries(1, start=number))
            print(outcome.id, flush=True)

asyncio.run(main())
"""


async def test_what_was_acknowledged_survives_kill_9(url: str, make_store) -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert writer.stdout is not None
    try:
        for _ in range(20):
            await asyncio.to_thread(writer.stdout.readline)
    finally:
        writer.send_signal(signal.SIGKILL)
        rest, _ = writer.communicate()
    acknowledged = 20 + rest.count("\n")
    async with make_store(url) as store:
        ids = [judgement.id for judgement in await everything(store)]
    assert ids[:acknowledged] == list(range(1, acknowledged + 1))
    assert len(ids) <= acknowledged + 1  # the last may have been committed and not acknowledged


async def test_commits_are_flushed_to_the_disk(sqlite_url: str, make_store) -> None:
    database = Database(sqlite_url)
    async with make_store(sqlite_url), database.reading() as connection:
        assert (await connection.execute(sa.text("PRAGMA synchronous"))).scalar_one() == 2  # FULL
        assert (await connection.execute(sa.text("PRAGMA journal_mode"))).scalar_one() == "wal"
        assert (await connection.execute(sa.text("PRAGMA foreign_keys"))).scalar_one() == 1
    await database.close()


async def test_a_locked_file_is_unavailable_and_then_available(sqlite_url: str, make_store) -> None:
    async with make_store(sqlite_url, IMPATIENT) as store:
        other = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"), isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(Unavailable, match="locked: another process writes"):
            await store.record(entries(1))
        assert await everything(store) == []  # readers go on
        other.execute("ROLLBACK")
        other.close()
        assert await store.record(entries(1)) == [Recorded(1, duplicate=False)]


async def test_a_full_disk_is_said_and_ridden_out(sqlite_url: str, make_store) -> None:
    async with make_store(sqlite_url) as store:
        limit = "PRAGMA max_page_count=60"

        def restrict(connection: sqlite3.Connection, _record: object, _proxy: object) -> None:
            connection.cursor().execute(limit)

        engine = store._database.engine.sync_engine
        sa.event.listen(engine, "checkout", restrict)
        with pytest.raises(Unavailable, match="full: free space"):
            await store.record(entries(3000))
        limit = "PRAGMA max_page_count=1000000"
        assert len(await store.record(entries(3000))) == 3000


async def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path, make_store) -> None:
    (tmp_path / "honed.db").mkdir()
    with pytest.raises(Unavailable, match=r"honed\.db.*unable to open"):
        async with make_store(f"sqlite:///{tmp_path}/honed.db"):
            pass


async def test_a_file_that_is_no_database_is_named(tmp_path: Path, make_store) -> None:
    (tmp_path / "honed.db").write_text("These are not the tables you are looking for. " * 100)
    with pytest.raises(DataLoss, match=r"honed\.db.*not a database"):
        async with make_store(f"sqlite:///{tmp_path}/honed.db"):
            pass


@pytest.mark.postgres
async def test_a_lock_that_is_not_released_is_unavailable(postgres_url: str, make_store) -> None:
    async with make_store(postgres_url, IMPATIENT) as store:
        other = await asyncpg.connect(postgres_url)
        try:
            async with other.transaction():
                await other.execute("SELECT * FROM record_state FOR UPDATE")
                with pytest.raises(Unavailable, match="lock timeout"):
                    await store.record(entries(1))
        finally:
            await other.close()
        assert await store.record(entries(1)) == [Recorded(1, duplicate=False)]


@pytest.mark.postgres
async def test_a_server_that_went_away_is_unavailable_until_it_is_back(make_store) -> None:
    with running_postgres() as server:
        async with make_store(server.empty_database()) as store:
            await store.record(entries(2))
            await asyncio.to_thread(server.stop)
            for _ in range(2):
                with pytest.raises(Unavailable):
                    await store.record(entries(1, start=2))
            with pytest.raises(Unavailable):
                await store.check()
            await asyncio.to_thread(server.start)
            await store.record(entries(1, start=2))
            assert len(await everything(store)) == 3


@pytest.mark.postgres
async def test_connections_that_were_cut_are_replaced(postgres_url: str, make_store) -> None:
    async with make_store(postgres_url) as store:
        await store.record(entries(2))
        other = await asyncpg.connect(postgres_url)
        try:
            await other.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
        finally:
            await other.close()
        await store.record(entries(1, start=2))
        assert len(await everything(store)) == 3


async def test_a_server_that_is_not_there_is_named_without_its_password(tmp_path: Path, make_store) -> None:
    with pytest.raises(Unavailable, match="cannot be reached") as caught:
        async with make_store(f"postgresql://me:secret@/db?host={tmp_path}"):
            pass
    assert "secret" not in str(caught.value)


async def test_a_transaction_that_takes_too_long_is_given_up(url: str, make_store) -> None:
    async with make_store(url):
        pass  # makes the tables, however long that takes
    async with make_store(url, StoreOptions(database=DatabaseOptions(deadline_s=1.0, lock_wait_s=5))) as store:
        holder = Database(url)
        async with holder.writing() as connection:
            await connection.execute(sa.text("UPDATE record_state SET last_id = last_id"))
            with pytest.raises(Unavailable, match=r"did not answer within|statement timeout"):
                await store.record(entries(1))
        await holder.close()
        for _ in range(50):  # the given-up statement may hold its connection a little longer
            try:
                outcomes = await store.record(entries(1))
                break
            except Unavailable:
                await asyncio.sleep(0.05)
        assert [outcome.id for outcome in outcomes if isinstance(outcome, Recorded)] == [1]

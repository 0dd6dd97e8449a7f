"""The schema: made once, equal to the models, never touched by an older build."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from tests.support.judgements import entries
from tests.support.preference_reading import everything

from honed.kit.errors import FailedPrecondition, Unavailable
from honed.preference import migrate as migrate_module
from honed.preference.database import Database, DatabaseOptions
from honed.preference.migrate import alembic_config, check_schema, migrate, wait_for_schema
from honed.preference.store import StoreOptions
from honed.preference.tables import metadata

STARTER = """
import asyncio, sys
from honed.preference import migrate as migrate_module
from honed.preference.database import Database, DatabaseOptions
from honed.preference.migrate import migrate

async def main():
    database = Database(sys.argv[1])
    print("ready", flush=True)
    sys.stdin.readline()
    print(await migrate(database))
    await database.close()

asyncio.run(main())
"""


async def test_migrations_make_what_the_models_say(url: str) -> None:
    database = Database(url)
    await migrate(database)
    async with database.reading() as connection:

        def compare(sync: sa.Connection) -> list[object]:
            return list(compare_metadata(MigrationContext.configure(sync), metadata))

        assert await connection.run_sync(compare) == []
    await database.close()


async def test_migrating_again_changes_nothing(url: str, make_store) -> None:
    async with make_store(url) as store:
        await store.record(entries(3))
    async with make_store(url) as store:
        assert len(await everything(store)) == 3


async def test_processes_that_start_together_migrate_once(url: str) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STARTER, url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    try:
        for starter in starters:
            assert starter.stdout is not None
            assert await asyncio.to_thread(starter.stdout.readline) == "ready\n"
        for starter in starters:
            assert starter.stdin is not None
            starter.stdin.write("go\n")
            starter.stdin.flush()
        for starter in starters:
            out, err = await asyncio.to_thread(starter.communicate, timeout=60)
            assert (out, starter.returncode) == ("0002\n", 0), err
    finally:
        for starter in starters:
            starter.kill()
            starter.communicate()
    database = Database(url)
    async with database.reading() as connection:
        assert (await connection.execute(sa.text("SELECT count(*) FROM record_state"))).scalar_one() == 1
    await database.close()


async def test_a_newer_schema_is_refused_by_name(url: str, make_store) -> None:
    database = Database(url)
    await migrate(database)
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    await database.close()
    with pytest.raises(FailedPrecondition, match=r"'9999'.*newer build"):
        async with make_store(url):
            pass


async def test_a_newer_schema_that_works_with_this_build_is_used_as_it_is(url: str, make_store) -> None:
    """A job has migrated for the next release, and this one's process starts again before the rollout reaches it."""
    async with make_store(url) as store:
        await store.record(entries(3))
    await _say_revision(url, "0003_works_with_0002")
    for migrates in (True, False):
        async with make_store(url, StoreOptions(migrate=migrates)) as store:
            assert len(await everything(store)) == 3
    await _say_revision(url, "0004_works_with_0003")
    for migrates in (True, False):
        with pytest.raises(FailedPrecondition, match="which is ahead of this build's '0002'"):
            async with make_store(url, StoreOptions(migrate=migrates)):
                pass


async def test_a_service_that_does_not_migrate_waits_for_the_job(url: str) -> None:
    await _at_revision(url, "0001")
    database, other = Database(url), Database(url)
    waiting = asyncio.ensure_future(wait_for_schema(database, 30.0, every_s=0.05))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    with pytest.raises(
        Unavailable, match="has schema revision '0001', which is behind this build's '0002': run its `honed job"
    ):
        await check_schema(other)
    assert await migrate(other) == "0002"
    async with asyncio.timeout(20):
        assert (await waiting).revision == "0002"
    for each in (database, other):
        await each.close()


async def test_a_service_whose_job_never_comes_says_what_it_waited_for(url: str, make_store) -> None:
    with pytest.raises(Unavailable, match="has no schema, which is behind"):
        async with make_store(url, StoreOptions(DatabaseOptions(migration_deadline_s=0.1), migrate=False)):
            pass
    database = Database(url)
    if not database.is_sqlite:
        async with database.reading() as connection:
            assert await connection.run_sync(lambda sync: sa.inspect(sync).get_table_names()) == [], "and it changed nothing"
    else:
        assert not Path(database.url.database or "").exists()
    await database.close()


def test_the_job_migrates_and_ends(url: str, tmp_path: Path) -> None:
    environment = {"HONED_PREFERENCE__DATABASE_URL": url, "HONED_DIRECTORY": str(tmp_path)}
    for _ in range(2):
        done = _job(environment)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("has schema revision 0002\n")
    asyncio.run(_say_revision(url, "9999"))
    ahead = _job(environment)
    assert ahead.returncode == 1
    assert "'9999', which is ahead of this build's '0002'" in ahead.stderr.splitlines()[-1]


def test_the_job_ends_with_75_when_the_database_is_away(tmp_path: Path) -> None:
    away = _job({"HONED_PREFERENCE__DATABASE_URL": "postgresql://u:pa55@127.0.0.1:1/x", "HONED_DIRECTORY": str(tmp_path)})
    assert away.returncode == os.EX_TEMPFAIL
    assert away.stderr.splitlines()[-1].startswith("honed: database postgresql+asyncpg://u:***@127.0.0.1:1/x cannot be reached")
    assert "pa55" not in away.stderr + away.stdout


def _job(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "honed.cli.main", "job", "migrate"]
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, check=False, env={**os.environ, **environment, "PYTHONPATH": path}
    )


async def _say_revision(url: str, revision: str) -> None:
    database = Database(url)
    async with database.writing() as connection:
        await connection.execute(sa.text("UPDATE alembic_version SET version_num = :revision"), {"revision": revision})
    await database.close()


async def test_a_revision_may_take_longer_than_an_ordinary_transaction(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    upgrade = migrate_module._upgrade

    def slow(connection: sa.Connection, name: str) -> str:
        _take_a_second(connection)
        return upgrade(connection, name)

    monkeypatch.setattr(migrate_module, "_upgrade", slow)
    database = Database(url, DatabaseOptions(deadline_s=0.4))
    assert await migrate(database) == "0002"
    await database.close()


async def test_a_revision_has_a_deadline_of_its_own(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    database = Database(url, DatabaseOptions(migration_deadline_s=0.001))
    with pytest.raises(Unavailable, match=r"0\.001 s|timeout"):
        await migrate(database)
    await database.close()


async def test_a_long_revision_goes_through_while_others_write_and_they_are_held_to_their_own_deadline(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """M22: writers that meet the locks of a revision give up in their own time, and the revision goes on."""
    await _at_revision(url, "0001")
    upgrade, locked = migrate_module._upgrade, asyncio.Event()

    def slow(connection: sa.Connection, name: str) -> str:
        connection.execute(sa.text("UPDATE record_state SET last_id = last_id"))  # the row that every writer locks first
        locked.set()
        _take_a_second(connection)
        return upgrade(connection, name)

    monkeypatch.setattr(migrate_module, "_upgrade", slow)
    options = DatabaseOptions(deadline_s=0.5, lock_wait_s=0.3)
    migrating, serving = Database(url, options), Database(url, options)
    revision = asyncio.ensure_future(migrate(migrating))
    async with asyncio.timeout(20):
        await locked.wait()
    outcomes: list[bool] = []
    while not revision.done():
        outcomes.append(await _writes(serving))
        await asyncio.sleep(0.05)
    assert await revision == "0002"
    assert outcomes[0] is False, "refused while the revision held the lock"
    assert await _writes(serving), "and it writes again afterwards"
    for database in (migrating, serving):
        await database.close()


def _take_a_second(connection: sa.Connection) -> None:
    wait = "SELECT pg_sleep(1.2)"
    if connection.dialect.name == "sqlite":
        wait = "WITH RECURSIVE n(g) AS (SELECT 1 UNION ALL SELECT g + 1 FROM n WHERE g < 6000000) SELECT sum(g) FROM n"
    connection.execute(sa.text(wait))


async def _at_revision(url: str, revision: str) -> None:
    database = Database(url)
    await migrate(database)
    async with database.writing() as connection:
        await connection.run_sync(lambda sync: command.downgrade(alembic_config(sync), revision))
    await database.close()


async def _writes(database: Database) -> bool:
    try:
        async with database.writing() as connection:
            await connection.execute(sa.text("UPDATE record_state SET last_id = last_id"))
    except Unavailable:
        return False
    return True

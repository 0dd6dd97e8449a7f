"""Dump and restore of the preference database, with the pod's own scripts and a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.deploy.manifests import DEPLOY
from tests.support.judgements import entries, full
from tests.support.postgres import PostgresServer, programs, running_postgres
from tests.support.preference_reading import everything

from honed.preference.content import KINDS, Entry
from honed.preference.store import PreferenceStore

pytestmark = pytest.mark.postgres

SCRIPTS = DEPLOY / "components" / "backup"


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_postgres() as server:
        yield server


class Backups:
    """The backup pod, as far as its scripts go."""

    def __init__(self, server: PostgresServer, folder: Path) -> None:
        self.folder = folder / "backups"
        password = folder / "password"
        password.write_text("of no use to a server that trusts its socket\n")
        self._environment = {
            "PATH": f"{programs()}:{os.environ['PATH']}",
            "PGHOST": str(server.folder),
            "PGUSER": "postgres",
            "PGDATABASE": "postgres",
            "PASSWORD_FILE": str(password),
            "BACKUPS": str(self.folder),
            "KEEP": "3",
        }

    def run(self, script: str, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["/bin/sh", str(SCRIPTS / script)]
        env = self._environment | environment
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def dump(self) -> None:
        done = self.run("dump.sh")
        assert done.returncode == 0, done.stderr

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def backups(server: PostgresServer, tmp_path: Path) -> Backups:
    return Backups(server, tmp_path)


def opened(url: str) -> PreferenceStore:
    return PreferenceStore(url, clock=lambda: 1_800_000_000_000_000, new_id=lambda: "snapshot")


async def test_every_judgement_comes_back_as_it_was(server: PostgresServer, backups: Backups) -> None:
    url = server.empty_database()
    async with opened(url) as store:
        await store.record([*(Entry(kind, full(kind)) for kind in KINDS), *entries(500)])
        before = await everything(store)
    backups.dump()

    async with opened(server.empty_database()) as store:  # the database is lost, and people go on
        await store.record(entries(3, prefix="later"))
    done = backups.run("restore.sh")
    assert done.returncode == 0, done.stderr
    async with opened(url) as store:
        assert await everything(store) == before
        again = await store.record([Entry(kind, full(kind)) for kind in KINDS])
        assert all(outcome.duplicate for outcome in again)  # type: ignore[union-attr]  # keys are remembered
        assert len(await everything(store)) == len(before)


async def test_a_named_dump_is_restored_and_a_missing_one_is_said(server: PostgresServer, backups: Backups) -> None:
    url = server.empty_database()
    async with opened(url) as store:
        await store.record(entries(2))
    backups.dump()
    [first] = backups.files
    (backups.folder / first).rename(backups.folder / "honed-before.dump")
    async with opened(url) as store:
        await store.record(entries(2, prefix="more"))
    backups.dump()
    assert backups.run("restore.sh", FILE="honed-before.dump").returncode == 0
    async with opened(url) as store:
        assert len(await everything(store)) == 2
    done = backups.run("restore.sh", FILE="honed-never.dump")
    assert (done.returncode, "there is no dump" in done.stderr) == (1, True)


async def test_a_damaged_dump_changes_nothing(server: PostgresServer, backups: Backups) -> None:
    url = server.empty_database()
    async with opened(url) as store:
        await store.record(entries(200))
    backups.dump()
    [name] = backups.files
    file = backups.folder / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    async with opened(url) as store:
        await store.record(entries(1, prefix="later"))
    assert backups.run("restore.sh").returncode != 0
    async with opened(url) as store:
        assert len(await everything(store)) == 201


def test_the_newest_dumps_stay_and_half_a_dump_does_not(server: PostgresServer, backups: Backups) -> None:
    server.empty_database()
    backups.folder.mkdir()
    for day in range(1, 6):
        (backups.folder / f"honed-2026010{day}T021700Z.dump").touch()
    (backups.folder / "honed-20260106T021700Z.dump.partial").touch()
    backups.dump()
    new = backups.files[-1]
    assert backups.files == ["honed-20260104T021700Z.dump", "honed-20260105T021700Z.dump", new]


def test_a_server_that_does_not_answer_leaves_the_dumps_alone(backups: Backups, tmp_path: Path) -> None:
    backups.folder.mkdir()
    for day in range(1, 6):
        (backups.folder / f"honed-2026010{day}T021700Z.dump").touch()
    done = backups.run("dump.sh", PGHOST=str(tmp_path / "nowhere"))
    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert len([name for name in backups.files if name.endswith(".dump")]) == 5

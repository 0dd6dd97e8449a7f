"""Each test runs on a fresh SQLite file and on a fresh PostgreSQL database."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
from tests.support.postgres import PostgresServer, postgres_server

from honed.preference.store import PreferenceStore, StoreOptions

__all__ = ["postgres_server"]

BOTH = [pytest.param("sqlite"), pytest.param("postgres", marks=pytest.mark.postgres)]
NOW = 1_800_000_000_000_000


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/record/honed.db"


@pytest.fixture(params=BOTH)
def url(request: pytest.FixtureRequest) -> str:
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:  # the fixture itself
    return postgres_server.empty_database()


@pytest.fixture
def make_store() -> Callable[..., PreferenceStore]:
    numbers = itertools.count(1)

    def make(url: str, options: StoreOptions | None = None) -> PreferenceStore:
        clock: Iterator[int] = itertools.count(NOW)
        return PreferenceStore(url, clock=lambda: next(clock), new_id=lambda: f"snapshot-{next(numbers)}", options=options)

    return make


@pytest.fixture
async def store(url: str, make_store: Callable[..., PreferenceStore]) -> AsyncIterator[PreferenceStore]:
    async with make_store(url) as opened:
        yield opened

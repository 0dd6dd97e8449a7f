"""Which databases the record accepts, and what it says to the others."""

from __future__ import annotations

import pytest

from honed.kit.errors import FailedPrecondition
from honed.preference.database import Database


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("sqlite:///a.db", "sqlite+aiosqlite:///a.db"),
        ("postgresql://me:secret@host/db", "postgresql+asyncpg://me:***@host/db"),
        ("postgres://me:secret@host/db", "postgresql+asyncpg://me:***@host/db"),
        ("postgresql+psycopg://host/db", "postgresql+asyncpg://host/db"),
    ],
)
def test_a_database_is_named_without_its_password(url: str, name: str) -> None:
    assert Database(url).name == name


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_a_record_in_memory_is_refused(url: str) -> None:
    with pytest.raises(FailedPrecondition, match="would lose every judgement"):
        Database(url)


@pytest.mark.parametrize("url", ["mysql://host/db", "nothing", ""])
def test_another_database_is_refused(url: str) -> None:
    with pytest.raises(FailedPrecondition, match="sqlite:///file or postgresql://"):
        Database(url)

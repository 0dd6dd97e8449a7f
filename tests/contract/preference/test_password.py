"""The database's password comes from a file, and is read again when it was replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from tests.support.postgres import running_postgres

from honed.kit.errors import Unavailable
from honed.preference.database import Database
from honed.preference.main import database_options, password_source
from honed.preference.settings import PreferenceSettings

pytestmark = pytest.mark.postgres


async def asked(database: Database) -> object:
    async with database.reading() as connection:
        return (await connection.execute(sa.text("SELECT current_user"))).scalar()


async def test_a_new_connection_has_the_password_of_now(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text("first\n")
    with running_postgres() as server:
        rules = server.folder / "data" / "pg_hba.conf"
        rules.write_text("local all app scram-sha-256\n" + rules.read_text())
        server.execute("CREATE ROLE app LOGIN PASSWORD 'first'")
        server.execute("SELECT pg_reload_conf()")
        options = database_options(PreferenceSettings(database_password_file=file))
        database = Database(f"postgresql://app@/postgres?host={server.folder}", options)
        assert await asked(database) == "app"

        server.execute("ALTER ROLE app PASSWORD 'second'")
        assert await asked(database) == "app"  # what is open stays open
        await database.engine.dispose()
        with pytest.raises(Unavailable, match="password authentication failed"):
            await asked(database)
        file.write_text("second and longer\n")  # another size: a file system's clock may be coarse
        server.execute("ALTER ROLE app PASSWORD 'second and longer'")
        assert await asked(database) == "app"
        await database.engine.dispose()


def test_a_password_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"preference\.database_password_file .*none cannot be read: No such file"):
        password_source(tmp_path / "none")

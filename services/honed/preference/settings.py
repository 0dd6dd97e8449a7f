"""The run file's section on the preference service."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from honed.settings import Positive, Seconds, ServerSettings


class PreferenceSettings(ServerSettings):
    """The preference service."""

    database_url: SecretStr | None = Field(None, description="SQLAlchemy URL. Unset: SQLite in <directory>.")
    database_password_file: Path | None = Field(None, description="Password for the URL; read again for each new connection.")
    import_batch: Positive = 500
    migrate: Literal["start", "job"] = Field(
        "start",
        description="start: the service changes the schema when it starts. job: it waits for `honed job migrate` of its build.",
    )
    migration_deadline_s: Seconds = Field(3600.0, description="The longest that a change of the schema may take.")
    erase_page: Positive = Field(5000, description="Judgements that one transaction of an erasure changes.")

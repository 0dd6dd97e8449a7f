"""The run file's section on the store of versions."""

from __future__ import annotations

from typing import Final

from pydantic import Field

from honed.settings import Positive, Section

TRAINED: Final = "trained"
"""The name of the reward model that a run trains, and a scorer's source that reads its newest version."""


class PolicyStoreSettings(Section):
    """Where policy versions are kept."""

    url: str | None = Field(None, description="Directory or fsspec URL. Unset: <directory>/policy.")
    keep: Positive = Field(6, description="How many of the newest versions to keep.")

"""A directory for the length of a benchmark."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty directory that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="honed-loadtest-") as name:
        yield Path(name)

"""Each claim holds on a local directory and on an object store by URL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest


@pytest.fixture(params=["local", "memory"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
    else:
        url = f"memory://honed-{tmp_path.name}"
        yield url
        fsspec.filesystem("memory").store.clear()

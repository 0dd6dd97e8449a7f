"""A stand-in of a cluster's API, and a connection to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.cluster import Cluster
from tests.support.cluster_run import api_of, make_quick

from honed.conductor.cluster.api import Api


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    make_quick(monkeypatch)


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster(second_s=0.2)
    async with cluster.serving():
        yield cluster


@pytest.fixture
async def api(tmp_path: Path, cluster: Cluster) -> AsyncIterator[Api]:
    async with api_of(tmp_path, cluster) as api:
        yield api

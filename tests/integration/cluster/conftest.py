"""A stand-in of a cluster's API, and a connection to it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tests.support.cluster import Cluster
from tests.support.cluster_run import REQUEST_S, SOON_S, api_of, make_quick

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
async def api(tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest) -> AsyncIterator[Api]:
    """Gives a call up soon only where the stand-in never answers one: a slow machine fails no other test."""
    call = getattr(request.node, "callspec", None)  # of a parametrized test
    unanswered = call is not None and call.params.get("kind") in ("silent", "half-open")
    async with api_of(tmp_path, cluster, request_timeout_s=SOON_S if unanswered else REQUEST_S) as api:
        yield api

"""A real redis-server for the session, a run of its own for each test."""

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.integration.queue.servers import Server

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys

_RUNS = itertools.count(1)


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def keys() -> RunKeys:
    return RunKeys(f"learner-{next(_RUNS)}")


@pytest.fixture
async def link(redis_server: Server) -> AsyncIterator[RedisLink]:
    async with RedisLink(redis_server.url, retry=RetryPolicy(deadline_s=30)) as link:
        yield link

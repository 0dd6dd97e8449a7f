"""A real redis-server for the session, a run of its own for each test."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest
from tests.integration.queue.servers import LossyWire, Server

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.messages import Delivery
from honed.queue.stream import DeliverySettings, WorkQueue

_RUNS = itertools.count(1)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with Server(tmp_path_factory.mktemp("redis")) as server:
        yield server.url


@pytest.fixture
def keys() -> RunKeys:
    return RunKeys(f"run-{next(_RUNS)}")


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[RedisLink]:
    async with RedisLink(redis_url, retry=RetryPolicy(deadline_s=10)) as link:
        yield link


@pytest.fixture
def queue(link: RedisLink, keys: RunKeys) -> Callable[..., WorkQueue]:
    """Makes a consumer of a stage. Its lease is long: only `expire` makes it run out."""

    def make(
        consumer: str = "a",
        stage: str = "rollouts",
        via: RedisLink = link,
        clock: Callable[[], float] = time.monotonic,
        **settings: int,
    ) -> WorkQueue:
        return WorkQueue(via, keys, stage, consumer, DeliverySettings(**{"sweep_ms": 1, **settings}), clock)

    return make


@pytest.fixture
def expire(link: RedisLink, keys: RunKeys) -> Callable[..., Awaitable[None]]:
    """Lets leases run out now, without waiting: sets the entries' idle time, and nothing else."""

    async def expire(*deliveries: Delivery, idle_ms: int = 3_600_000) -> None:
        for d in deliveries:
            stream = keys.stream(d.stage)
            await link.redis.xclaim(stream, "workers", d.consumer, 0, [d.entry], idle=idle_ms, justid=True)

    return expire


@pytest.fixture
def wire(redis_url: str) -> LossyWire:
    return LossyWire(redis_url)

"""A real redis-server for the module, a run of its own for each test."""

from __future__ import annotations

import asyncio
import itertools
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from honed.queue.connection import Link, Outage
from honed.queue.embedded import embedded_redis_command, embedded_redis_url, free_port, wait_ready
from honed.queue.keys import RunKeys
from honed.queue.stream import QueueSettings, WorkQueue

_RUNS = itertools.count(1)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory: Path = tmp_path_factory.mktemp("redis")
    process = subprocess.Popen(embedded_redis_command(directory, free_port()), stdout=subprocess.DEVNULL)
    try:
        url = embedded_redis_url(directory)
        asyncio.run(wait_ready(url, 20))
        yield url
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture
def keys() -> RunKeys:
    return RunKeys(f"run-{next(_RUNS)}")


@pytest.fixture
async def link(redis_url: str) -> AsyncIterator[Link]:
    async with Link(redis_url, outage=Outage(deadline_s=10)) as link:
        yield link


@pytest.fixture
def queue(link: Link, keys: RunKeys) -> Callable[..., WorkQueue]:
    """Makes a consumer of a stage; its lease is long, so only `expire` makes it run out."""

    def make(consumer: str = "a", stage: str = "rollouts", **settings: int) -> WorkQueue:
        return WorkQueue(link, keys, stage, consumer, QueueSettings(**{"sweep_ms": 1, **settings}))

    return make


@pytest.fixture
def expire(link: Link, keys: RunKeys) -> Callable[..., object]:
    """Lets a delivery's lease run out now, without waiting: sets its idle time, and nothing else."""

    async def expire(*deliveries: object, idle_ms: int = 3_600_000) -> None:
        for d in deliveries:
            await link.command("XCLAIM", keys.stream(d.stage), "workers", d.consumer, 0, d.entry, "IDLE", idle_ms, "JUSTID")

    return expire

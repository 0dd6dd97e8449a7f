"""A real redis-server for the session, a run of its own for each test, and a way to lose a reply on the wire."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from urllib.parse import urlsplit

import pytest

from honed.queue.connection import Link, Outage
from honed.queue.embedded import embedded_redis_command, embedded_redis_url, free_port, wait_ready
from honed.queue.keys import RunKeys
from honed.queue.messages import Delivery
from honed.queue.stream import QueueSettings, WorkQueue

_RUNS = itertools.count(1)


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("redis")
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
    """Makes a consumer of a stage. Its lease is long: only `expire` makes it run out."""

    def make(consumer: str = "a", stage: str = "rollouts", via: Link = link, **settings: int) -> WorkQueue:
        return WorkQueue(via, keys, stage, consumer, QueueSettings(**{"sweep_ms": 1, **settings}))

    return make


@pytest.fixture
def expire(link: Link, keys: RunKeys) -> Callable[..., Awaitable[None]]:
    """Lets leases run out now, without waiting: sets the entries' idle time, and nothing else."""

    async def expire(*deliveries: Delivery, idle_ms: int = 3_600_000) -> None:
        for d in deliveries:
            stream = keys.stream(d.stage)
            await link.redis.xclaim(stream, "workers", d.consumer, 0, [d.entry], idle=idle_ms, justid=True)

    return expire


class LossyWire:
    """A TCP proxy before Redis that can swallow a reply and drop the connection: Redis did the work, nobody heard."""

    def __init__(self, url: str) -> None:
        self._to = urlsplit(url)
        self._lose_reply_to: bytes | None = None
        self.lost = 0

    def lose_reply_to(self, word: bytes) -> None:
        """Loses the reply to the next request that contains `word`."""
        self._lose_reply_to = word

    async def __aenter__(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        return f"redis://:{self._to.password}@127.0.0.1:{port}/0"

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection(self._to.hostname, self._to.port)
        with contextlib.suppress(ConnectionError):
            while request := await reader.read(1 << 20):
                lose = self._lose_reply_to is not None and self._lose_reply_to in request
                onward_writer.write(request)
                reply = await onward_reader.read(1 << 20)
                if lose and not reply.startswith(b"-NOSCRIPT"):
                    self._lose_reply_to = None
                    self.lost += 1
                    break
                writer.write(reply)
        for side in (writer, onward_writer):
            side.close()


@pytest.fixture
def wire(redis_url: str) -> LossyWire:
    return LossyWire(redis_url)

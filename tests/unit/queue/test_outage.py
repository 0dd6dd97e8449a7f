"""How the link treats errors, with a clock and a sleep of the test's own."""

import asyncio
import contextlib
import math
import random

import pytest
import redis.exceptions as rex
from redis._parsers.base import BaseParser

from honed.kit.errors import FailedPrecondition, Unauthenticated, Unavailable
from honed.queue.connection import RedisLink, RetryPolicy


class Time:
    def __init__(self) -> None:
        self.now = 0.0
        self.pauses: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds


def make(time: Time, **retry: float) -> RedisLink:
    return RedisLink(
        "redis://:secret@nowhere:6379/0", retry=RetryPolicy(**retry), rng=random.Random(1), clock=time, sleep=time.sleep
    )


def failing(time: Time, error: Exception, until: float):
    async def operation() -> str:
        if time.now < until:
            raise error
        return "answer"

    return operation


def answer(line: bytes) -> Exception:
    """The error that the client makes of a server's answer: it cuts off the code of those that have a class."""
    return BaseParser.parse_error(line[1:-2].decode())


@pytest.mark.parametrize(
    "error",
    [
        rex.ConnectionError("refused"),
        rex.TimeoutError("slow"),
        ConnectionResetError("reset"),
        rex.BusyLoadingError("Redis is loading the dataset in memory"),
        answer(b"-READONLY You can't write against a read only replica.\r\n"),
        answer(b"-OOM command not allowed when used memory > 'maxmemory'.\r\n"),
        answer(b"-LOADING Redis is loading the dataset in memory\r\n"),
        answer(b"-MASTERDOWN Link with MASTER is down\r\n"),
        answer(b"-ERR Error running script: @user_script: 12: -READONLY You can't write against a read only replica.\r\n"),
        rex.ResponseError("MISCONF Errors writing to the AOF file: No space left on device"),
    ],
)
async def test_an_outage_of_twenty_seconds_is_ridden_out(error):
    time = Time()
    assert await make(time).call(failing(time, error, until=20)) == "answer"
    assert time.now >= 20


async def test_pauses_grow_to_the_cap_and_carry_jitter():
    time = Time()
    await make(time, first_s=0.1, cap_s=2).call(failing(time, rex.ConnectionError(), until=60))
    assert all(0 <= p <= 2 for p in time.pauses)
    assert time.pauses[0] <= 0.1
    assert len({round(p, 6) for p in time.pauses}) == len(time.pauses)


async def test_beyond_the_deadline_the_error_names_the_url_without_the_password_and_what_to_do():
    time = Time()
    with pytest.raises(Unavailable, match=r"redis://nowhere:6379/0 has not served for 30 s .*check") as caught:
        await make(time, deadline_s=30).call(failing(time, rex.ConnectionError("refused"), until=1e9))
    assert "secret" not in str(caught.value)
    assert time.now == pytest.approx(30)


async def test_each_outage_has_its_own_deadline():
    time = Time()
    link = make(time, deadline_s=30)
    for _ in range(3):
        await link.call(failing(time, rex.ConnectionError(), until=time.now + 20))


async def test_a_wrong_password_is_not_retried():
    time = Time()
    with pytest.raises(Unauthenticated, match="credentials"):
        await make(time).call(failing(time, rex.AuthenticationError("WRONGPASS"), until=1e9))
    assert time.pauses == []


async def test_a_refused_operation_is_not_retried():
    time = Time()
    with pytest.raises(FailedPrecondition, match="WRONGTYPE"):
        await make(time).call(failing(time, rex.ResponseError("WRONGTYPE Operation against a key"), until=1e9))
    assert time.pauses == []


async def test_without_a_deadline_it_tries_for_ever_and_says_so_now_and_then(caplog):
    time = Time()
    assert await make(time, deadline_s=math.inf).call(failing(time, rex.ConnectionError("refused"), until=86_400)) == "answer"
    said = [record for record in caplog.records if "does not serve" in record.message]
    assert 1200 <= len(said) <= 1440


async def test_the_same_connections_serve_a_call_that_somebody_waits_for():
    time = Time()
    patient = make(time, deadline_s=math.inf)
    with pytest.raises(Unavailable, match="has not served for 5 s"):
        await patient.within(5).call(failing(time, rex.ConnectionError(), until=1e9))
    assert patient.within(5).redis is patient.redis
    assert await patient.call(failing(time, rex.ConnectionError(), until=time.now + 100)) == "answer"


@contextlib.asynccontextmanager
async def server(reply: bytes):
    """Answers every command alike, and counts connections."""
    connections = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connections.append(writer)
        with contextlib.suppress(ConnectionError):
            while await reader.read(1 << 16):
                writer.write(reply)
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield listening.sockets[0].getsockname()[1], connections
    finally:
        listening.close()


async def test_a_demoted_master_is_asked_over_a_new_connection_so_that_its_name_is_looked_up_again():
    retry = RetryPolicy(deadline_s=0.2, first_s=0.01, cap_s=0.01)
    async with (
        server(b"-READONLY You can't write against a read only replica.\r\n") as (port, connections),
        RedisLink(f"redis://127.0.0.1:{port}/0", retry=retry) as link,
    ):
        with pytest.raises(Unavailable, match="read only replica"):
            await link.command("SET", "a", "b")
    assert len(connections) > 3

"""What goes wrong during a soak: each fault is one function that does it to a live run and returns when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from redis.asyncio import Redis

from honed.artifacts.store import PolicyStore
from honed.queue.embedded import embedded_redis_url
from honed.queue.keys import SCORED, RunKeys
from honed.v1 import common_pb2, conductor_pb2
from loadtest.live_run import LiveRun
from loadtest.timetable import KILL

REDIS_PAUSE_S = 20.0
FULL_DISK_S = 30.0
LOST_S = 1.0
POISON_SCORE = 1e308
FILL_DISK = "fill_disk"
POISONED = f"a rollout with a reward of {POISON_SCORE:g} came in"

Fault = Callable[[LiveRun, random.Random], Awaitable[str]]
"""Says what it did; raises NotNow if it could not."""


class NotNow(RuntimeError):
    """The run was not in a state to be hurt in this way; try again later."""


async def kill_one(run: LiveRun, rng: random.Random) -> str:
    """Kill -9 of a random process of the run, the generators' engine processes and Redis among them."""
    from loadtest.resources import descendants

    processes = [process for process in (await run.get_run()).processes if process.pid]
    if not processes:
        raise NotNow("no process runs")
    victim = rng.choice(processes)
    pid = rng.choice(descendants(victim.pid))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    return f"killed {victim.name} ({'itself' if pid == victim.pid else 'a child'})"


async def pause_redis(run: LiveRun, rng: random.Random) -> str:
    """Redis answers nobody for a while; connections to it hang."""
    pid = await _redis_pid(run)
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(REDIS_PAUSE_S)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    return f"Redis stood still for {REDIS_PAUSE_S:g} s"


async def empty_redis(run: LiveRun, rng: random.Random) -> str:
    """Everything in Redis is gone."""
    async with _redis(run) as client:
        await client.flushall()
    return "Redis was emptied"


async def cut_redis(run: LiveRun, rng: random.Random) -> str:
    """Redis crashes and has lost its last second, as after a power cut."""
    path = run.directory / "redis" / "appendonly.aof"
    before = path.stat().st_size
    await asyncio.sleep(LOST_S)
    pid = await _redis_pid(run)
    os.kill(pid, signal.SIGSTOP)  # so that the launcher starts it only after the cut
    lost = path.stat().st_size - before
    with path.open("r+b") as file:
        file.truncate(before)
    os.kill(pid, signal.SIGKILL)
    return f"Redis crashed and lost {lost} bytes, {LOST_S:g} s of its log"


async def damage_newest_version(run: LiveRun, rng: random.Random) -> str:
    """Bytes of the newest version in the store flip, and a generator that starts meets it."""
    store = PolicyStore(run.directory / "policy", "loadtest")
    newest = store.servable()[0]
    path = run.directory / "policy" / "loadtest" / newest.label / "model.safetensors"
    try:
        with path.open("r+b") as file:
            file.seek(-64, os.SEEK_END)
            file.write(bytes(64))
    except OSError:
        raise NotNow("the newest version was replaced before it could be damaged") from None
    generators = [p for p in (await run.get_run()).processes if p.pid and p.name.startswith("generation")]
    with contextlib.suppress(ProcessLookupError):
        os.kill(rng.choice(generators).pid, signal.SIGKILL)
    return f"version {newest} was damaged and a generator killed"


async def poison_batch(run: LiveRun, rng: random.Random) -> str:
    """A scored rollout comes in whose reward is finite and whose update is not."""
    stream = RunKeys("loadtest").stream(SCORED)
    async with _redis(run) as client:
        end = time.monotonic() + 60
        while not (found := await client.xrevrange(stream, count=1)):
            if time.monotonic() > end:
                raise NotNow("no rollout passed by within 60 s to be poisoned")
            await asyncio.sleep(0.01)
        fields: Any = found[0][1]
        scored = common_pb2.ScoredRollout.FromString(fields[b"body"])
        scored.reward = POISON_SCORE
        scored.rollout.rollout_id = f"poison-{rng.randrange(1 << 30)}/0"
        entry = {"id": scored.rollout.rollout_id, "body": scored.SerializeToString(), "traceparent": ""}
        await client.xadd(stream, entry)  # type: ignore[arg-type]  # redis-py's key type is invariant
        await client.hincrby(RunKeys("loadtest").tally(SCORED), "came_in", 1)
    return POISONED


async def fill_disk(run: LiveRun, rng: random.Random) -> str:
    """The disk of the run is full for a while."""
    filler = run.directory.parent / "filler"
    written = await asyncio.to_thread(_fill, filler)
    try:
        end = time.monotonic() + FULL_DISK_S
        while time.monotonic() < end:
            await asyncio.sleep(1.0)
            await asyncio.to_thread(_fill, filler)  # what others removed meanwhile is full again at once
    finally:
        filler.unlink(missing_ok=True)
    return f"the disk was full for {FULL_DISK_S:g} s ({written >> 20} MiB)"


FAULTS: Mapping[str, Fault] = {
    KILL: kill_one,
    "pause_redis": pause_redis,
    "empty_redis": empty_redis,
    "cut_redis": cut_redis,
    "damage_version": damage_newest_version,
    "poison_batch": poison_batch,
    FILL_DISK: fill_disk,
}


async def _redis_pid(run: LiveRun) -> int:
    processes: list[conductor_pb2.ProcessStatus] = list((await run.get_run()).processes)
    pid = next((process.pid for process in processes if process.name == "redis"), 0)
    if not pid:  # 0 would be this process's own group
        raise NotNow("Redis is just being started")
    return pid


def _redis(run: LiveRun) -> Redis:
    return Redis.from_url(embedded_redis_url(run.directory / "redis"), socket_timeout=10.0)


def _fill(path: Path) -> int:
    """Writes until there is no room left; returns the size of the file."""
    block = bytes(1 << 20)
    with contextlib.suppress(OSError), path.open("ab", buffering=0) as file:
        while True:
            if file.write(block) < len(block):
                break
    return path.stat().st_size

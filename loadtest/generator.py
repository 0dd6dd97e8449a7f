"""The benchmark's side of `loadtest.serving`: starts the server process, talks to it, and ends it."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from honed.kit.channel import connect
from honed.kit.tokens import read_token
from loadtest.resources import descendants, usage

if TYPE_CHECKING:
    from loadtest.serving import Setup

START_TIMEOUT_S = 240.0
COMMAND_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 40.0
_REPLY_BYTES = 1 << 24


@dataclass(frozen=True)
class Version:
    """A published version and the sha256 of its manifest."""

    fence: int
    step: int
    digest: str


class Generator:
    """A running server process."""

    def __init__(self, process: asyncio.subprocess.Process, ready: dict[str, Any]) -> None:
        """`ready` is what the process said when it served."""
        self._process = process
        self._ready = ready
        self._token = read_token(Path(ready["token_file"]))
        self.vocabulary: int = ready["vocabulary"]
        self.model = Path(ready["model"])
        self.versions = [Version(*row) for row in ready["versions"]]

    def channel(self, *, control: bool = False) -> grpc.aio.Channel:
        """A channel to its public or its control port."""
        return connect(self._ready["control" if control else "target"], self._token)

    def memory(self) -> int:
        """Bytes that the process and its engine hold for themselves."""
        return usage(descendants(self._process.pid)).memory

    async def command(self, do: str, **fields: Any) -> dict[str, Any]:
        """Has the process do something of `serving.Bench`."""
        return await ask(self._process, {"do": do, **fields}, COMMAND_TIMEOUT_S)


@asynccontextmanager
async def started(setup: Setup) -> AsyncIterator[Generator]:
    """Starts the process, which takes half a minute, and ends it with the block.

    Raises:
        RuntimeError: it ended early; its own output says why.
        TimeoutError: it did not serve in time.
    """
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
    environment = {**quiet, **os.environ, "OMP_NUM_THREADS": str(setup.threads)}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "loadtest.serving",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=_REPLY_BYTES,
        env=environment,
    )
    try:
        yield Generator(process, await ask(process, asdict(setup), START_TIMEOUT_S))
    finally:
        await _end(process)


async def ask(process: asyncio.subprocess.Process, message: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    """Sends one line and returns the reply.

    Raises:
        RuntimeError: the process ended.
        TimeoutError: no reply came in time.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(timeout_s):
        process.stdin.write(json.dumps(message).encode() + b"\n")
        await process.stdin.drain()
        line = await process.stdout.readline()
    if not line:
        raise RuntimeError("the server process ended; what it printed above says why")
    reply: dict[str, Any] = json.loads(line)
    return reply


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(STOP_TIMEOUT_S):
            await process.wait()
    except TimeoutError:
        process.kill()  # the engine's own process follows it
        await process.wait()

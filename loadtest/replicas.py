"""Generation processes over one store and one Redis, and their replacement one by one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import yaml

from honed.queue.embedded import free_port
from honed.queue.members import Member, Members

T = TypeVar("T")

START_TIMEOUT_S: Final = 180.0
END_TIMEOUT_S: Final = 90.0
FOUND_AGAIN_S: Final = 3.0
"""A little more than `grpc.max_reconnect_backoff_ms`: clients have connected by then."""
_LOG_TAIL: Final = 3000


@dataclass
class Replica:
    """One generation process and where it listens."""

    number: int
    port: int
    control_port: int
    health_port: int
    log: Path
    process: subprocess.Popen[bytes]
    log_file: IO[bytes]

    @property
    def address(self) -> str:
        """Its public port."""
        return f"127.0.0.1:{self.port}"

    async def ended(self, timeout_s: float = END_TIMEOUT_S) -> int:
        """Waits for the end of the process; its exit code.

        Raises:
            TimeoutError: It did not end in time.
        """
        await _until(self._has_ended, timeout_s, f"replica {self.number} did not end")
        return int(self.process.returncode)

    def tail(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace")[-_LOG_TAIL:]

    async def _has_ended(self) -> bool:
        return self.process.poll() is not None


@dataclass
class Replicas:
    """The processes of a run's generation service.

    Attributes:
        root: Holds the run file and the logs.
        tree: The run file.
        redis_url: Redis.
        members: Where the processes register.
        environment: Of the processes, beside what they inherit.
    """

    root: Path
    tree: Mapping[str, Any]
    redis_url: str
    members: Members
    environment: Mapping[str, str] = field(default_factory=dict)
    started: list[Replica] = field(default_factory=list)

    def start(self, number: int, like: Replica | None = None) -> Replica:
        """Starts a process; `like` one before it, on the same ports."""
        run_file = self.root / "run.yaml"
        run_file.write_text(yaml.safe_dump(dict(self.tree)))
        ports = (like.port, like.control_port, like.health_port) if like else (free_port(), free_port(), free_port())
        names = ("PORT", "CONTROL_PORT", "HEALTH_PORT")
        variables = {f"HONED_GENERATION__{name}": str(port) for name, port in zip(names, ports, strict=True)}
        variables |= {"HONED_GENERATION__REPLICA": str(number), "HONED_QUEUE__URL": self.redis_url}
        log = self.root / f"generation-{number}-{time.monotonic_ns()}.log"
        log_file = log.open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "honed.cli.main", "serve", "generation", "--run-file", str(run_file)],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **self.environment, **variables},
            stdin=subprocess.DEVNULL,
            stdout=log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(Replica(number, *ports, log, process, log_file))
        return self.started[-1]

    async def member(
        self, replica: Replica, claim: Callable[[Member], bool], what: str, timeout_s: float = START_TIMEOUT_S
    ) -> Member:
        """Waits until the process is registered with what `claim` asks for.

        Raises:
            TimeoutError: It is not in time.
            RuntimeError: The process ended.
        """

        async def look() -> Member | None:
            if replica.process.poll() is not None:
                raise RuntimeError(f"replica {replica.number} ended with {replica.process.returncode}: {replica.tail()}")
            found = [member for member in await self.members.list() if member.address == replica.address]
            return next((member for member in found if claim(member)), None)

        return await _until(look, timeout_s, what)

    async def ready(self, replica: Replica) -> Member:
        """Waits until the process is ready; raises as `member` does."""
        return await self.member(replica, lambda member: member.ready, f"replica {replica.number} was not ready")

    async def replace_each(self, replicas: Sequence[Replica], on_step: Callable[[str], None] = lambda _: None) -> list[Replica]:
        """Ends each process by SIGTERM and starts a successor on its ports, one after the other.

        Raises:
            RuntimeError: A process did not end well.
            TimeoutError: One did not end, or its successor was not ready, in time.
        """
        successors = []
        for replica in replicas:
            on_step(f"SIGTERM to replica {replica.number}")
            replica.process.send_signal(signal.SIGTERM)
            if code := await replica.ended():
                raise RuntimeError(f"replica {replica.number} ended with {code}: {replica.tail()}")
            on_step(f"starting replica {replica.number} again")
            successor = self.start(replica.number, replica)
            await self.ready(successor)
            successors.append(successor)
            await asyncio.sleep(FOUND_AGAIN_S)
        return successors

    def stop(self) -> None:
        """Kills what still runs."""
        for replica in self.started:
            if replica.process.poll() is None:
                os.killpg(replica.process.pid, signal.SIGKILL)
                replica.process.wait()
            replica.log_file.close()


async def _until(claim: Callable[[], Awaitable[T | None]], timeout_s: float, what: str) -> T:
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                if found := await claim():
                    return found
                await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise TimeoutError(f"{what} within {timeout_s:g} s") from error

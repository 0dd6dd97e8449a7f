"""Real generation processes over one store and one Redis."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import yaml
from tests.support.run import environment, until

from honed.queue.embedded import free_port
from honed.queue.members import Member, Members

FOUND_AGAIN_S = 3.0
"""A little more than `grpc.max_reconnect_backoff_ms`: clients have connected to a replica that is ready for so long."""


@dataclass
class Process:
    """One generation process and where it listens."""

    replica: int
    port: int
    control_port: int
    health_port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None
    log_file: IO[bytes] | None = None

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None
        return self.process

    async def ended(self, timeout_s: float = 60.0) -> int:
        await until(lambda: self.running.poll() is not None, timeout_s, f"replica {self.replica} ends")
        return int(self.running.returncode)


@dataclass
class Generators:
    """The replicas of a run's generation service.

    Attributes:
        root: A directory of the test's; holds the run file, the run and the logs.
        tree: The run file.
        redis_url: Redis.
        members: Their list.
    """

    root: Path
    tree: dict[str, Any]
    redis_url: str
    members: Members
    started: list[Process] = field(default_factory=list)

    def start(self, replica: int, *, like: Process | None = None) -> Process:
        """Starts a process; `like` one before it, on the same ports."""
        run_file = self.root / "run.yaml"
        if not run_file.exists():
            run_file.write_text(yaml.safe_dump(self.tree))
        ports = (like.port, like.control_port, like.health_port) if like else tuple(free_port() for _ in range(3))
        process = Process(replica, *ports, log=self.root / f"generation-{replica}-{time.monotonic_ns()}.log")
        variables = {
            "HONED_GENERATION__REPLICA": str(replica),
            "HONED_GENERATION__PORT": str(process.port),
            "HONED_GENERATION__CONTROL_PORT": str(process.control_port),
            "HONED_GENERATION__HEALTH_PORT": str(process.health_port),
            "HONED_QUEUE__URL": self.redis_url,
        }
        process.log_file = process.log.open("wb")
        process.process = subprocess.Popen(
            [sys.executable, "-m", "honed.cli.main", "serve", "generation", "--run-file", str(run_file)],
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            stdout=process.log_file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    async def member(self, process: Process, claim: Callable[[Member], bool], what: str, timeout_s: float = 90.0) -> Member:
        """Waits until the member that listens where the process does fulfils a claim."""

        async def look() -> Member | None:
            if process.running.poll() is not None:
                raise AssertionError(f"replica {process.replica} ended: {process.log.read_text()[-3000:]}")
            found = [member for member in await self.members.list() if member.address == process.address]
            return next((member for member in found if claim(member)), None)

        found: Member = await until(look, timeout_s, what, every_s=0.05)
        return found

    async def ready(self, process: Process) -> Member:
        return await self.member(process, lambda member: member.ready, f"replica {process.replica} is ready")

    def stop(self) -> None:
        for process in self.started:
            if process.running.poll() is None:
                os.killpg(process.running.pid, signal.SIGKILL)
                process.running.wait(20)
            if process.log_file is not None:
                process.log_file.close()


async def rolling_restart(generators: Generators, processes: list[Process], on_step: Callable[[str], None]) -> list[Process]:
    """Replaces each process by a successor on its ports, one after the other; returns the successors."""
    successors = []
    for process in processes:
        on_step(f"SIGTERM to replica {process.replica}")
        process.running.send_signal(signal.SIGTERM)
        code = await process.ended()
        assert code == 0, f"exit code {code}: {process.log.read_text()[-3000:]}"
        on_step(f"starting replica {process.replica} again")
        successor = generators.start(process.replica, like=process)
        await generators.ready(successor)
        successors.append(successor)
        await asyncio.sleep(FOUND_AGAIN_S)
    return successors

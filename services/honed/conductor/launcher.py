"""The launcher's port, and the launcher of one machine: child processes that are watched and started again when they die.

What a launcher promises: a service that dies is started again, with growing pauses, up to a limit in its settings; nothing that
it started outlives it; each process's output is in a file of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from honed.kit.errors import Unavailable

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
LONGEST_PAUSE_S = 5.0
STABLE_AFTER_S = 60.0
STOP_S = 20.0


@dataclass(frozen=True)
class ProcessSpec:
    """What to run.

    Attributes:
        name: the service's name; its output goes to `<name>.log`.
        command: what to execute.
        environment: variables over the launcher's own.
        nice: how far the process stands back when cores are short, 0 to 19.
        ready: returns once the process serves; raises nothing, may be cancelled. None: it is ready when it runs.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    ready: Callable[[], Awaitable[None]] | None = None


@dataclass
class ProcessState:
    """What is known of a process."""

    name: str
    pid: int | None = None
    ready: bool = False
    restarts: int = 0
    last_exit: str = ""


class Launcher(Protocol):
    """Starts what a run consists of, and keeps it running. A Kubernetes launcher stands behind the same port."""

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Starts a service and returns when it is ready. It is started again whenever it dies.

        Raises:
            Unavailable: it was not ready in time, or died too often; the message has the end of its log.
        """

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Runs a job to its end.

        Raises:
            Unavailable: it failed or took too long; the message has the end of its log.
        """

    def states(self) -> list[ProcessState]:
        """What is known of each service, and of each job that has not ended well, in the order of their start."""

    async def failed(self) -> str:
        """Returns the reason when a service has died too often for another start."""

    async def stop(self) -> None:
        """Ends everything, the last started first."""


class ProcessLauncher:
    """Runs everything as child processes of this one."""

    def __init__(self, logs: Path, restart_limit: int) -> None:
        """Writes output under `logs`; a service may be started again `restart_limit` times."""
        self._logs = logs
        self._restart_limit = restart_limit
        self._states: dict[str, ProcessState] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._failure: asyncio.Future[str] | None = None

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Starts a service; see the port."""
        ready = asyncio.Event()
        self._watchers[spec.name] = watcher = asyncio.create_task(self._watch(spec, ready))
        watcher.add_done_callback(lambda done: self._watcher_ended(spec.name, done))
        failure = asyncio.ensure_future(self.failed())
        waiting = asyncio.ensure_future(ready.wait())
        try:
            await asyncio.wait({failure, waiting}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if failure.done():
                raise Unavailable(failure.result())
            if not ready.is_set():
                raise Unavailable(f"{spec.name} was not ready within {timeout_s:g} s; {self._log_tail(spec.name)}")
        finally:
            failure.cancel()
            waiting.cancel()

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Runs a job; see the port."""
        state = self._states.setdefault(spec.name, ProcessState(spec.name))
        process = await self._spawn(spec, state)
        try:
            async with asyncio.timeout(timeout_s):
                code = await process.wait()
        except TimeoutError:
            raise Unavailable(f"{spec.name} did not end within {timeout_s:g} s; {self._log_tail(spec.name)}") from None
        finally:
            await _end(process)
            state.pid, state.ready = None, False
        if code:
            state.last_exit = _exit_text(code)
            raise Unavailable(f"{spec.name} failed ({state.last_exit}); {self._log_tail(spec.name)}")
        del self._states[spec.name]

    def states(self) -> list[ProcessState]:
        """See the port."""
        return list(self._states.values())

    async def failed(self) -> str:
        """Waits for a service to be beyond help."""
        return await asyncio.shield(self._failure_future())

    async def stop(self) -> None:
        """Ends everything, the last started first."""
        for name in reversed(list(self._watchers)):
            watcher = self._watchers.pop(name)
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)

    async def _watch(self, spec: ProcessSpec, ready: asyncio.Event) -> None:
        state = self._states.setdefault(spec.name, ProcessState(spec.name))
        pause = FIRST_PAUSE_S
        while True:
            started = time.monotonic()
            process = await self._spawn(spec, state)
            waiting = asyncio.ensure_future(self._mark_ready(spec, state, ready))
            try:
                code = await process.wait()
            finally:
                waiting.cancel()
                await _end(process)
                state.pid, state.ready = None, False
            state.last_exit = _exit_text(code)
            if time.monotonic() - started > STABLE_AFTER_S:
                pause = FIRST_PAUSE_S
            if state.restarts >= self._restart_limit:
                reason = f"{spec.name} died {state.restarts + 1} times, last: {state.last_exit}; {self._log_tail(spec.name)}"
                self._fail(reason)
                return
            state.restarts += 1
            logger.warning("service died; starting it again", extra={"child": spec.name, "exit": state.last_exit})
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _mark_ready(self, spec: ProcessSpec, state: ProcessState, ready: asyncio.Event) -> None:
        if spec.ready is not None:
            await spec.ready()
        state.ready = True
        ready.set()

    async def _spawn(self, spec: ProcessSpec, state: ProcessState) -> asyncio.subprocess.Process:
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{spec.name}.log").open("ab") as log:
            # A group of its own, so that grandchildren (vLLM's engine process) end with it.
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "honed.conductor.child", str(spec.nice)),
                *spec.command,
                env={**os.environ, **spec.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        state.pid = process.pid
        return process

    def _watcher_ended(self, name: str, watcher: asyncio.Task[None]) -> None:
        """Nobody awaits a watcher: one that fails must not leave its service unwatched in silence."""
        if not watcher.cancelled() and (error := watcher.exception()) is not None:
            self._fail(f"{name} cannot be kept running: {type(error).__name__}: {error}")

    def _fail(self, reason: str) -> None:
        if not self._failure_future().done():
            self._failure_future().set_result(reason)

    def _failure_future(self) -> asyncio.Future[str]:
        if self._failure is None:
            self._failure = asyncio.get_running_loop().create_future()
        return self._failure

    def _log_tail(self, name: str) -> str:
        path = self._logs / f"{name}.log"
        lines = path.read_text(errors="replace").strip().splitlines() if path.exists() else []
        return f"the end of {path}:\n" + "\n".join(lines[-8:])


async def _end(process: asyncio.subprocess.Process) -> None:
    """Ends a process and its group: politely, then not."""
    if process.returncode is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_S)
    # Also after a normal end: children that it left behind would go on computing.
    _signal_group(process.pid, signal.SIGKILL)
    if process.returncode is None:
        await process.wait()


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

"""The launcher of one machine: child processes that are watched, started again, and whose logs are bounded.

Three things are watched: that a process runs, that it answers its liveness probe, and how large its log is.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from honed.conductor.child import tied
from honed.conductor.launcher import ProcessSpec, ProcessState
from honed.conductor.logs import rotate, tail
from honed.conductor.priority import set_back
from honed.conductor.rates import Recent
from honed.kit.errors import DeadlineExceeded, FailedPrecondition, Unavailable

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.2
QUICK_PAUSE_S = 5.0
LONGEST_PAUSE_S = 60.0
STABLE_AFTER_S = 60.0
PROBE_EVERY_S = 5.0
PROBE_DEADLINE_S = 5.0
PROBES_MISSED = 3
ROTATE_EVERY_S = 10.0


@dataclass(frozen=True)
class Limits:
    """When the launcher of one machine raises an alarm, and how much it writes.

    Attributes:
        restarts: restarts of one service within `window_s` before an alarm.
        window_s: seconds.
        log_bytes: size of a log before it is rotated; one older one is kept.
    """

    restarts: int
    window_s: float = 600.0
    log_bytes: int = 64 << 20


class ProcessLauncher:
    """Runs everything as child processes of this one."""

    def __init__(
        self, logs: Path, limits: Limits, clock: Callable[[], float] = time.monotonic, shared_cores: Sequence[int] = ()
    ) -> None:
        """Writes output under `logs`; `clock` gives seconds; what does not train is bound to `shared_cores`, if any."""
        self._logs, self._limits, self._clock, self._shared_cores = logs, limits, clock, shared_cores
        self._states: dict[str, ProcessState] = {}
        self._watchers: dict[str, asyncio.Task[None]] = {}
        self._ready: dict[str, asyncio.Event] = {}
        self._late: set[str] = set()
        self._alarmed = asyncio.Condition()
        self._keeper: asyncio.Task[None] | None = None
        self.hurry = asyncio.Event()

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Starts a service; see the port."""
        if self._keeper is None:
            self._keeper = asyncio.create_task(self._keep_house())
        if spec.name not in self._watchers:
            self._states[spec.name], self._ready[spec.name] = ProcessState(spec.name), asyncio.Event()
            self._watchers[spec.name] = asyncio.create_task(self._watch(spec))
        state, ready = self._states[spec.name], self._ready[spec.name]
        waiting = [asyncio.ensure_future(ready.wait()), asyncio.ensure_future(self._alarm_of(spec.name))]
        try:
            await asyncio.wait(waiting, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if ready.is_set():
                return
            if state.alarm:
                raise Unavailable(f"{state.alarm}; {self._log_tail(spec.name)}")
            state.alarm = f"{spec.name} was not ready within {timeout_s:g} s"
            self._late.add(spec.name)
            raise DeadlineExceeded(f"{state.alarm}; {self._log_tail(spec.name)}")
        finally:
            for task in waiting:
                task.cancel()

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Runs a job; see the port."""
        state = self._states[spec.name] = ProcessState(spec.name)
        process = await self._spawn(spec, state)
        try:
            async with asyncio.timeout(timeout_s):
                code = await process.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"{spec.name} did not end within {timeout_s:g} s; {self._log_tail(spec.name)}") from None
        finally:
            await self._end_process(process, spec.stop_s)
            state.pid, state.ready = None, False
        if code:
            state.last_exit = _exit_text(code)
            passing = code < 0 or code == os.EX_TEMPFAIL  # killed, by a kernel that is short of memory perhaps
            kind = Unavailable if passing else FailedPrecondition
            raise kind(f"{spec.name} failed ({state.last_exit}); {self._log_tail(spec.name)}")
        del self._states[spec.name]

    async def end(self, name: str) -> None:
        """Ends one service; see the port."""
        watcher = self._watchers.pop(name, None)
        if watcher is not None:
            watcher.cancel()
            await asyncio.gather(watcher, return_exceptions=True)
        self._states.pop(name, None)
        self._ready.pop(name, None)
        self._late.discard(name)

    def states(self) -> list[ProcessState]:
        """See the port."""
        return list(self._states.values())

    async def stop(self) -> None:
        """Ends everything, the last started first."""
        for name in reversed(list(self._watchers)):
            await self.end(name)
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)

    async def _watch(self, spec: ProcessSpec) -> None:
        """Keeps a service running until cancelled."""
        state, ready = self._states[spec.name], self._ready[spec.name]
        recent = Recent(self._limits.window_s)
        pause = FIRST_PAUSE_S
        while True:
            started = self._clock()
            try:
                state.last_exit = await self._live(spec, state, ready)
            except Exception as error:  # no memory, no file handles: these pass; and nobody else watches this service
                state.last_exit = f"cannot be started: {type(error).__name__}: {error}"
            if self._clock() - started > STABLE_AFTER_S:
                pause = FIRST_PAUSE_S
            often = recent.add(self._clock()) > self._limits.restarts
            if often:
                state.alarm = (
                    f"{spec.name} died {recent.count(self._clock())} times in {self._limits.window_s:g} s, "
                    f"last: {state.last_exit}"
                )
                async with self._alarmed:
                    self._alarmed.notify_all()
            state.restarts += 1
            logger.warning("service died; starting it again", extra={"child": spec.name, "exit": state.last_exit})
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S if often else QUICK_PAUSE_S)
            if recent.count(self._clock()) <= self._limits.restarts // 2:
                state.alarm = ""

    async def _live(self, spec: ProcessSpec, state: ProcessState, ready: asyncio.Event) -> str:
        """Runs the process until it ends; returns how it ended."""
        process = await self._spawn(spec, state)
        waiting = asyncio.ensure_future(self._mark_ready(spec, state, ready, process.pid))
        probing = asyncio.ensure_future(self._hangs(spec, process.pid))
        try:
            code = await process.wait()
            return "hung; killed" if probing.done() else _exit_text(code)
        finally:
            waiting.cancel()
            probing.cancel()
            await self._end_process(process, spec.stop_s)
            state.pid, state.ready = None, False

    async def _hangs(self, spec: ProcessSpec, pid: int) -> None:
        """Kills the process and returns when it has answered once and then misses several probes in a row."""
        if spec.alive is None:
            await asyncio.Event().wait()
            return
        answered, missed = False, 0
        while missed < PROBES_MISSED:
            await asyncio.sleep(PROBE_EVERY_S)
            try:
                async with asyncio.timeout(PROBE_DEADLINE_S):
                    await spec.alive()
            except Exception as error:  # whatever it is: the process does not answer
                missed += answered
                logger.info("no answer to a liveness probe", extra={"child": spec.name, "reason": str(error)})
            else:
                answered, missed = True, 0
        logger.warning("service hangs; killing it", extra={"child": spec.name})
        _signal_group(pid, signal.SIGKILL)

    async def _mark_ready(self, spec: ProcessSpec, state: ProcessState, ready: asyncio.Event, pid: int) -> None:
        if spec.ready is not None:
            await spec.ready()
        if spec.starting_nice is not None:
            await asyncio.to_thread(set_back, pid, spec.nice)
        if spec.name in self._late:
            self._late.discard(spec.name)
            state.alarm = ""
        state.ready = True
        ready.set()

    async def _spawn(self, spec: ProcessSpec, state: ProcessState) -> asyncio.subprocess.Process:
        self._logs.mkdir(parents=True, exist_ok=True)
        nice = spec.nice if spec.starting_nice is None else spec.starting_nice
        with (self._logs / f"{spec.name}.log").open("ab") as log:
            # A group of its own, so that grandchildren (vLLM's engine process) end with it.
            process = await asyncio.create_subprocess_exec(
                *tied(spec.command, nice, () if spec.trains else self._shared_cores),
                env={**os.environ, **spec.environment},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        state.pid = process.pid
        return process

    async def _end_process(self, process: asyncio.subprocess.Process, stop_s: float) -> None:
        """Ends a process and its group: politely, then not."""
        if process.returncode is None:
            _signal_group(process.pid, signal.SIGTERM)
            hurry = asyncio.ensure_future(self.hurry.wait())
            ended = asyncio.ensure_future(process.wait())
            await asyncio.wait({hurry, ended}, timeout=stop_s, return_when=asyncio.FIRST_COMPLETED)
            hurry.cancel()
        # Also after a normal end: children that it left behind would go on computing.
        _signal_group(process.pid, signal.SIGKILL)
        if process.returncode is None:
            await process.wait()

    async def _alarm_of(self, name: str) -> None:
        async with self._alarmed:
            await self._alarmed.wait_for(lambda: name in self._states and bool(self._states[name].alarm))

    async def _keep_house(self) -> None:
        """Rotates logs and, as the first process of a container, collects orphans that have ended."""
        while True:
            await asyncio.sleep(ROTATE_EVERY_S)
            for path in self._logs.glob("*.log"):
                with contextlib.suppress(OSError):  # a full disk must not end the run's housekeeping
                    await asyncio.to_thread(rotate, path, self._limits.log_bytes)
            if os.getpid() == 1:
                _collect_orphans({state.pid for state in self._states.values()})

    def _log_tail(self, name: str) -> str:
        return tail(self._logs / f"{name}.log")


def _collect_orphans(own: set[int | None]) -> None:
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) and found.si_pid not in own:
            os.waitpid(found.si_pid, 0)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, number)


def _exit_text(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"

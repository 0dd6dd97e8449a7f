"""The launcher's port: what starts a run's processes and keeps them running.

What a launcher promises: a service that dies or hangs is started again, with growing pauses, for ever; one that does so too
often raises an alarm; nothing that it started outlives it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

STOP_S = 40.0


@dataclass(frozen=True)
class ProcessSpec:
    """What to run.

    Attributes:
        name: the process's name; its output goes to `<name>.log`.
        command: what to execute.
        environment: variables over the launcher's own.
        nice: how far the process stands back when cores are short, 0 to 19.
        starting_nice: the same until it is ready; None for no other.
        trains: it may use the cores that the launcher keeps for training.
        ready: returns once the process serves; raises nothing, may be cancelled. None: it is ready when it runs.
        alive: answers soon as long as the process is not hung, and raises anything otherwise. None: never asked.
        stop_s: how long the process may take to end after SIGTERM.
    """

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    nice: int = 0
    ready: Callable[[], Awaitable[None]] | None = None
    alive: Callable[[], Awaitable[None]] | None = None
    stop_s: float = STOP_S
    starting_nice: int | None = None
    trains: bool = False


@dataclass
class ProcessState:
    """What is known of a process.

    Attributes:
        name: as in its specification.
        pid: None while it does not run.
        ready: whether it serves.
        restarts: how often it was started again.
        last_exit: why it ended last; empty if it never did.
        alarm: why it needs a person; empty when all is well.
        log_tail: the last lines of a log that is elsewhere, in a pod's.
    """

    name: str
    pid: int | None = None
    ready: bool = False
    restarts: int = 0
    last_exit: str = ""
    alarm: str = ""
    log_tail: Sequence[str] = ()


class Launcher(Protocol):
    """Starts what a run consists of, and keeps it running. A Kubernetes launcher stands behind the same port."""

    async def start(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Starts a service and returns when it is ready. It is started again whenever it dies, also after an error here.

        A repetition starts nothing: it waits for what the first call has started.

        Raises:
            DeadlineExceeded: it was not ready in time; the message has the end of its log.
            Unavailable: it dies again and again; the same.
        """

    async def run_job(self, spec: ProcessSpec, timeout_s: float) -> None:
        """Runs a job to its end.

        Raises:
            Unavailable: it was killed, or could not go on for lack of a service or of room; another try may succeed.
            FailedPrecondition: it failed by itself: by its data or its settings.
            DeadlineExceeded: it took too long.
        """

    async def end(self, name: str) -> None:
        """Ends one service: SIGTERM, and SIGKILL when it has not ended in its `stop_s`. Nothing happens if it is unknown."""

    def states(self) -> list[ProcessState]:
        """What is known of each service, and of each job that has not ended well, in the order of their start."""

    async def stop(self) -> None:
        """Ends everything, the last started first."""

"""The training jobs of a run: the port behind which they run, and the two launchers of it that need no cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from honed.conductor.launcher import Launcher, ProcessState
from honed.conductor.processes import Processes
from honed.conductor.results import REWARD_MODEL, Results
from honed.conductor.waiting import registered, until
from honed.config import RunSettings
from honed.kit.errors import HonedError, Unavailable
from honed.kit.progress import JobProgress, read_progress

JOB_TIMEOUT_S = 24 * 3600.0


class JobLauncher(Protocol):
    """Runs the jobs of a run, each to its end."""

    async def run_job(self, job: str) -> None:
        """Returns when the job's result is there. It may be repeated.

        Raises:
            Unavailable: It was killed, or could not go on for lack of a service or of room; another try may succeed.
            FailedPrecondition: It failed by itself: by its data or its settings.
            DeadlineExceeded: It took too long.
        """

    def progress(self, job: str) -> JobProgress | None:
        """How far the job is; None before it has said anything."""

    def states(self) -> list[ProcessState]:
        """What is known of each job that has not ended well."""


class ProcessJobs:
    """Jobs as child processes of this one."""

    def __init__(self, launcher: Launcher, processes: Processes, progress: Path) -> None:
        """`progress` is the directory where jobs say how far they are. The launcher has the states."""
        self._launcher, self._processes, self._progress = launcher, processes, progress

    async def run_job(self, job: str) -> None:
        """See the port."""
        await self._launcher.run_job(self._processes.job(job), JOB_TIMEOUT_S)

    def progress(self, job: str) -> JobProgress | None:
        """See the port."""
        return read_progress(self._progress / f"{job}.json")

    def states(self) -> list[ProcessState]:
        """See the port."""
        return []


class AwaitedJobs:
    """Jobs that somebody else runs, wherever the files are that they need. Their results are waited for."""

    def __init__(self, settings: RunSettings, results: Results) -> None:
        """Looks at nothing yet."""
        self._settings, self._results = settings, results
        self._states: dict[str, ProcessState] = {}

    async def run_job(self, job: str) -> None:
        """Waits for the job's result, for as long as it takes; after `conductor.start_timeout_s` that is an alarm."""
        state = self._states.setdefault(job, ProcessState(job))

        async def probe() -> None:
            if lack := await self._results.lacking(job):
                if job != REWARD_MODEL:
                    raise Unavailable(lack)
                # A reward service is ready only once it has its reward model, wherever that came from.
                try:
                    await registered(self._settings, "reward")
                except HonedError as error:
                    raise Unavailable(f"{lack}; {error}") from error

        how = f"run `honed job {job}` once with this run's settings, where the files are that it names"
        await until(probe, state, how, self._settings.conductor.start_timeout_s)
        del self._states[job]

    def progress(self, job: str) -> JobProgress | None:
        """See the port."""
        return None

    def states(self) -> list[ProcessState]:
        """See the port."""
        return list(self._states.values())

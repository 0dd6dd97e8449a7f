"""What a run leaves behind for those who look at it later: when it began, where it stands, and the curves of its phases.

The learner's journal has the updates. The phases before the online loop have none: what their jobs tell of a step is noted here
as it passes, one step a second at most.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from honed.conductor.run import Run
from honed.conductor.state import PHASE_NAMES
from honed.kit.progress import JobProgress
from honed.kit.rows import read_row
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0


@dataclass(frozen=True)
class RunRecord:
    """A run as it was when its conductor looked last.

    Attributes:
        run: Its name.
        algorithm: Of the learner.
        started_at: Of the first start, seconds since 1970, as all times here.
        state: The phase, or how training ended.
        ended_at: When; None while it goes on.
        error: Why it failed.
    """

    run: str
    algorithm: str
    started_at: float
    state: str = "starting"
    ended_at: float | None = None
    error: str = ""


@dataclass(frozen=True)
class PhaseStep:
    """One step of a phase before the online loop: when it was noted, and its figures by name."""

    phase: str
    step: int
    at: float
    figures: dict[str, float]


def read_record(workspace: Workspace) -> RunRecord | None:
    """The record of a run's directory; None without one that can be read."""
    try:
        return read_row(RunRecord, json.loads(workspace.run_record.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def read_phases(path: Path) -> Iterator[PhaseStep]:
    """The steps of a file, in order. A line that a crash has cut short is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        try:
            yield read_row(PhaseStep, json.loads(line))
        except (ValueError, TypeError):
            continue


@asynccontextmanager
async def recorded(run: Run) -> AsyncIterator[None]:
    """Keeps the record of a run as long as the block runs. A disk that is full costs the record and nothing else."""
    recorder = Recorder(run)
    recorder.look()
    watching = asyncio.create_task(_watch(recorder))
    try:
        yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        recorder.look()


async def _watch(recorder: Recorder) -> None:
    while True:
        await asyncio.sleep(_LOOK_EVERY_S)
        recorder.look()


class Recorder:
    """Writes what has changed since it looked last."""

    def __init__(self, run: Run) -> None:
        """Reads what an earlier start of the run has left."""
        self._run, self._workspace = run, run.workspace
        before = read_record(self._workspace)
        self._started_at = before.started_at if before is not None else run.state.started_at
        self._written: RunRecord | None = None
        self._steps = {row.phase: row.step for row in read_phases(self._workspace.phase_curves)}
        self._warned = False

    def look(self) -> None:
        """Writes what is new."""
        try:
            self._workspace.conductor.mkdir(parents=True, exist_ok=True)
            self._note_state()
            progress = self._run.job_progress()
            if progress is not None and progress.step > self._steps.get(progress.phase, 0) and progress.phase:
                self._note_step(progress)
        except OSError as error:
            if not self._warned:
                logger.warning("the run's record cannot be written", extra={"reason": str(error)})
            self._warned = True

    def _note_state(self) -> None:
        state, settings = self._run.state, self._run.settings
        record = RunRecord(
            settings.run, settings.learner.algorithm, self._started_at, PHASE_NAMES[state.phase], state.ended_at, state.error
        )
        if record == self._written:
            return
        path = self._workspace.run_record
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(record)))
        partial.replace(path)
        self._written = record

    def _note_step(self, progress: JobProgress) -> None:
        row = PhaseStep(progress.phase, progress.step, time.time(), progress.figures)
        with self._workspace.phase_curves.open("a") as file:
            file.write(json.dumps(asdict(row)) + "\n")
        self._steps[progress.phase] = progress.step

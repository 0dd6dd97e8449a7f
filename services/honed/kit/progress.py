"""How far a job is: in a small file that whoever shows it can read at any moment, and in the job's log.

The log is for those who cannot read the job's files, because it runs on another machine.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from honed.kit.rows import read_row

logger = logging.getLogger(__name__)

SHORTEST_INTERVAL_S = 0.25
LOG_EVERY_S = 5.0
_KEY: Final = "job_progress"


@dataclass(frozen=True)
class JobProgress:
    """A job's progress.

    Attributes:
        done: Share from 0 to 1.
        doing: In words.
        figures: By name.
        phase: The phase of the run whose step this was; empty when no step was made.
        step: Its optimizer step, from 1.
    """

    done: float
    doing: str
    figures: dict[str, float] = field(default_factory=dict)
    phase: str = ""
    step: int = 0


class ProgressFile:
    """Written by the job, whole at each moment; a line of the log every few seconds."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        self._due = self._log_due = clock()

    def report(self, progress: JobProgress, *, final: bool = False) -> None:
        """Writes the progress, at most a few times a second."""
        now = self._clock()
        if not final and now < self._due:
            return
        self._due = now + SHORTEST_INTERVAL_S
        if final or now >= self._log_due:
            self._log_due = now + LOG_EVERY_S
            logger.info(progress.doing, extra={_KEY: asdict(progress)})
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(progress)))
        partial.rename(self._path)


def read_progress(path: Path) -> JobProgress | None:
    """The progress of a job; None before it has said anything."""
    try:
        return read_row(JobProgress, json.loads(path.read_text()))
    except FileNotFoundError:
        return None


def logged_progress(line: str) -> JobProgress | None:
    """The progress that a line of a job's log tells; None for every other line."""
    if f'"{_KEY}"' not in line:
        return None
    try:
        found = json.loads(line)[_KEY]
        figures = {str(name): float(value) for name, value in found["figures"].items()}
        phase, step = str(found.get("phase", "")), int(found.get("step", 0))
        return JobProgress(float(found["done"]), str(found["doing"]), figures, phase, step)
    except (ValueError, TypeError, KeyError, AttributeError):  # a line that was cut, or of another program
        return None

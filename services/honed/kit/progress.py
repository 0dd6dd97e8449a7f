"""How far a job is, in a small file that whoever shows it can read at any moment."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

SHORTEST_INTERVAL_S = 0.25


@dataclass(frozen=True)
class JobProgress:
    """A job's progress: share done from 0 to 1, what it is doing, and its figures by name."""

    done: float
    doing: str
    figures: dict[str, float] = field(default_factory=dict)


class ProgressFile:
    """Written by the job, whole at each moment."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """`clock` gives seconds."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._clock = path, clock
        self._due = clock()

    def report(self, progress: JobProgress, *, final: bool = False) -> None:
        """Writes the progress, at most a few times a second."""
        if not final and self._clock() < self._due:
            return
        self._due = self._clock() + SHORTEST_INTERVAL_S
        partial = self._path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(progress)))
        partial.rename(self._path)


def read_progress(path: Path) -> JobProgress | None:
    """The progress of a job; None before it has said anything."""
    try:
        return JobProgress(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None

"""The port behind which a tracker stands, and the values that cross it.

Every method may take as long as it takes: a tracker has a thread of its own, and nothing of the run waits for it. What it
raises is tried again. A point that was sent twice must count once, as far as the tracker's own format allows that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, NamedTuple, Protocol

UPDATES: Final = ""
"""The series of the learner's updates; those of the phases before it have the phase's name."""

SERIES: Final = (UPDATES, "pretrain", "sft", "reward_model")


class Mark(NamedTuple):
    """The newest point of a series that a tracker has, with all before it: when it ended, and its step."""

    at_ms: int
    step: int


Sent = Mapping[str, Mark]
"""By series; one that is not there has nothing."""


@dataclass(frozen=True)
class Point:
    """What was measured at one step of a series.

    Attributes:
        series: `UPDATES`, or a phase.
        step: The update, or the phase's optimizer step, from 1.
        at_ms: When it ended, in milliseconds since 1970.
        values: By name. They need not be finite.
    """

    series: str
    step: int
    at_ms: int
    values: Mapping[str, float]

    @property
    def named(self) -> dict[str, float]:
        """The values by name; those of a phase below the phase's name, as in `pretrain/loss`."""
        return {f"{self.series}/{name}" if self.series else name: value for name, value in self.values.items()}


@dataclass(frozen=True)
class TrackedRun:
    """A run as trackers know it.

    Attributes:
        name: The run's.
        started_at: Of the first start, seconds since 1970.
        parameters: The settings by dotted key, without secrets.
        tags: What people look for: algorithm, directory, release.
    """

    name: str
    started_at: float
    parameters: Mapping[str, str]
    tags: Mapping[str, str]


@dataclass(frozen=True)
class Opened:
    """Where a tracker keeps the run, and how much of it is there; None for as much as was noted on this side."""

    id: str
    sent: Sent | None = None


@dataclass(frozen=True)
class Outcome:
    """How training ended, with its figures by name and the files to keep with the run.

    Attributes:
        state: How.
        at_ms: When, in milliseconds since 1970.
        update: The last one.
        figures: Of the reports.
        files: Reports, and the settings.
    """

    state: Literal["finished", "stopped", "failed"]
    at_ms: int
    update: int
    figures: Mapping[str, float] = field(default_factory=dict)
    files: Sequence[Path] = ()


class Tracker(Protocol):
    """Keeps one run."""

    @property
    def name(self) -> str:
        """Of the kind: `mlflow`."""
        ...

    @property
    def store(self) -> str:
        """Where it keeps runs, without secrets. What was kept in another store is sent anew."""
        ...

    def open(self, run: TrackedRun, known: str | None, sent: Sent) -> Opened:
        """Goes on with the run that it keeps under the id `known`; begins one where that is None, or gone.

        Args:
            run: the run.
            known: what an earlier `open` returned.
            sent: how much was sent by then.
        """
        ...

    def log(self, points: Sequence[Point]) -> None:
        """Adds points. After a roll-back the updates that are made again come again, under the same steps and later."""
        ...

    def finish(self, outcome: Outcome) -> None:
        """Adds what the run has come to. Points may follow: a run that went back trains on."""
        ...

    def close(self) -> None:
        """Lets go of files and connections."""
        ...

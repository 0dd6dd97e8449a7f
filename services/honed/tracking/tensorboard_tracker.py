"""Keeps a run in TensorBoard's event files, by tensorboardX, which needs neither torch nor TensorBoard.

Each series has a directory of its own, which TensorBoard shows as a run by itself. Where a series goes on, after a start or a
roll-back, a new file begins with the standard's mark that whatever stands at this step or later does not count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary
from tensorboardX.summary import text

from honed.tracking.port import SERIES, UPDATES, Opened, Outcome, Point, Sent, TrackedRun


class TensorboardTracker:
    """One run in one directory."""

    name = "tensorboard"

    def __init__(self, directory: Path) -> None:
        """Writes nothing yet."""
        self._directory = directory
        self.store = str(directory)
        self._writers: dict[str, EventsWriter] = {}
        self._last: dict[str, int] = {}

    def open(self, run: TrackedRun, known: str | None, sent: Sent) -> Opened:
        """See `Tracker`. Event files that are not known to be this run's go: TensorBoard would show both as one."""
        self.close()
        self._last = {}
        there = {series: mark for series, mark in sent.items() if known is not None and self._of(series).is_dir()}
        if not there:
            for file in (file for series in SERIES for file in self._of(series).glob("events.out.tfevents.*")):
                file.unlink()
            rows = [f"|{name}|`{value}`|" for name, value in run.parameters.items()]
            self._add(UPDATES, 0, time.time(), text("settings", "\n".join(["|setting|value|", "|---|---|", *rows])))
            self._flush()
        return Opened(run.name, there)

    def log(self, points: Sequence[Point]) -> None:
        """See `Tracker`."""
        for point in points:
            if point.step <= self._last.get(point.series, point.step):  # the first since the opening, or one made again
                self._begin(point)
            values = [Summary.Value(tag=name, simple_value=value) for name, value in point.values.items()]
            self._add(point.series, point.step, point.at_ms / 1000, Summary(value=values))
            self._last[point.series] = point.step
        self._flush()

    def finish(self, outcome: Outcome) -> None:
        """See `Tracker`. Files cannot be kept there."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in outcome.figures.items()]
        self._add(UPDATES, outcome.update, outcome.at_ms / 1000, Summary(value=values))
        self._flush()

    def close(self) -> None:
        """See `Tracker`."""
        for writer in self._writers.values():
            writer.close()
        self._writers = {}

    def _of(self, series: str) -> Path:
        return self._directory / (series or "online")

    def _begin(self, point: Point) -> None:
        """Says that nothing counts which the series has at this step or later."""
        event = Event(step=point.step, wall_time=point.at_ms / 1000, session_log=SessionLog(status=SessionLog.START))
        self._writer(point.series).write_event(event)

    def _add(self, series: str, step: int, at: float, summary: Summary) -> None:
        self._writer(series).write_event(Event(step=step, wall_time=at, summary=summary))

    def _writer(self, series: str) -> EventsWriter:
        writer = self._writers.get(series)
        if writer is None:
            self._of(series).mkdir(parents=True, exist_ok=True)
            # The name has but whole seconds, and a file of that name would be written over.
            writer = EventsWriter(str(self._of(series) / "events"), f".{time.time_ns()}")
            self._writers[series] = writer
        return writer

    def _flush(self) -> None:
        for writer in self._writers.values():
            writer.flush()

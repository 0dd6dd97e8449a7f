"""Tracks a run as its run file asks: what learner and phases measure goes out in the background, the reports at the end."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Final, Literal

import grpc

from honed import __version__
from honed.conductor.record import read_phases, read_record
from honed.conductor.run import Run
from honed.runtime import internal_channel
from honed.tracking.parameters import figures_of, files_of, parameters_of
from honed.tracking.port import UPDATES, Mark, Outcome, Point, Sent, TrackedRun
from honed.tracking.position import PositionFile
from honed.tracking.sender import Sender
from honed.tracking.source import unsent, updates
from honed.tracking.start import check_tracking, makers
from honed.v1 import conductor_pb2

logger = logging.getLogger(__name__)

_LOOK_EVERY_S: Final = 1.0
_OUTCOMES: Final[Mapping[conductor_pb2.RunPhase.ValueType, Literal["finished", "failed"]]] = {
    conductor_pb2.RUN_PHASE_FINISHED: "finished",
    conductor_pb2.RUN_PHASE_FAILED: "failed",
}


@asynccontextmanager
async def tracked(run: Run) -> AsyncIterator[None]:
    """Tracks the run as long as the block runs; what is left then is sent for `tracking.stop_s` at most.

    Raises:
        FailedPrecondition: a tracker's package is not installed; names the extra.
        ValueError: the environment names a store that is none.
    """
    check_tracking(run.settings)
    tracking = _Tracking(run)
    works = [*(sender.run() for sender in tracking.senders.values()), tracking.watch()]
    working = [asyncio.create_task(work) for work in works]
    try:
        try:
            yield
        finally:
            await tracking.end()
    finally:
        for task in working:
            task.cancel()
        await asyncio.gather(*working, return_exceptions=True)


class _Tracking:
    """The trackers of one run, and what they are sent."""

    def __init__(self, run: Run) -> None:
        self._run, settings = run, run.settings
        record = read_record(run.workspace)
        tags = {"run": settings.run, "algorithm": settings.learner.algorithm, "version": __version__}
        facts = TrackedRun(
            settings.run,
            run.state.started_at if record is None else record.started_at,
            parameters_of(settings),
            {**tags, "directory": str(settings.directory)},
        )
        self.senders = {
            name: Sender(
                name,
                make,
                facts,
                self._points,
                PositionFile(run.workspace.tracking / f"{name}.json"),
                partial(run.state.alarm, f"tracking {name}"),
            )
            for name, make in makers(settings).items()
        }
        self._told: tuple[object, ...] = ()

    async def watch(self) -> None:
        """Tells the outcome when training has ended and its report is written."""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            ended_at = self._run.state.ended_at
            if ended_at is not None and _written_at(self._run.workspace.report_json) >= ended_at:
                await self._tell()

    async def end(self) -> None:
        """Tells the outcome as it is now, and waits for what is not sent yet."""
        if not self.senders:
            return
        await self._tell()
        waits = {name: asyncio.create_task(sender.settled()) for name, sender in self.senders.items()}
        _, left = await asyncio.wait(waits.values(), timeout=self._run.settings.tracking.stop_s)
        for name, wait in waits.items():
            if wait in left:
                wait.cancel()
                logger.warning("not all of the run is sent; the next start sends it", extra={"tracker": name})

    async def _tell(self) -> None:
        state, workspace = self._run.state, self._run.workspace
        phase = state.phase if state.ended_at is not None else conductor_pb2.RUN_PHASE_STOPPED
        # The page is written after the figures, where it can be drawn: both times, or it would be left behind.
        now = (phase, state.ended_at, _written_at(workspace.report_json), _written_at(workspace.report_html))
        if now == self._told:
            return
        self._told = now
        outcome = Outcome(
            _OUTCOMES.get(phase, "stopped"),
            int((state.ended_at or time.time()) * 1000),
            state.learner.version.step if state.learner is not None else 0,
            await asyncio.to_thread(figures_of, workspace),
            await asyncio.to_thread(files_of, workspace),
        )
        for sender in self.senders.values():
            sender.finish(outcome)

    async def _points(self, sent: Sent) -> AsyncIterator[Point]:
        """What the phases before the loop have measured, as it comes, and the updates once there are some."""
        workspace, marks = self._run.workspace, dict(sent)
        while self._run.state.loop_started_at is None:
            for point in unsent(await asyncio.to_thread(_phases, workspace.phase_curves), marks):
                marks[point.series] = Mark(point.at_ms, point.step)
                yield point
            await asyncio.sleep(_LOOK_EVERY_S)
        for point in unsent(await asyncio.to_thread(_phases, workspace.phase_curves), marks):
            yield point
        async for point in updates(self._learner, marks.get(UPDATES)):
            yield point

    def _learner(self) -> grpc.aio.Channel:
        return internal_channel(self._run.settings, self._run.fleet.target("learner"))


def _phases(path: Path) -> list[Point]:
    return [Point(row.phase, row.step, int(row.at * 1000), row.figures) for row in read_phases(path)]


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0

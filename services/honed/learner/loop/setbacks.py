"""What follows when a batch cannot be applied or generators refuse a version: skip it, go back, in the end stop training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

from honed.artifacts.version import VersionId
from honed.learner.loop.guard import Guard
from honed.learner.loop.push import PushReport
from honed.learner.loop.retry import Retry
from honed.learner.loop.rollback import History
from honed.learner.loop.run_state import RunState
from honed.learner.sources.source import InHand

logger = logging.getLogger(__name__)

OnRefused = Literal["rollback", "continue"]


class Setbacks:
    """Counts what goes wrong in a row, and does what follows from it. Its caller holds the state of the run."""

    def __init__(
        self, run: RunState, history: History, retry: Retry, *, limit: int, on_refused: OnRefused, max_staleness: int
    ) -> None:
        """Nothing has gone wrong yet.

        Args:
            run: The state of the run.
            history: Where it can go back to.
            retry: Repeats what a full disk holds up.
            limit: Batches that cannot be applied, or versions that are refused, in a row before a roll-back; and after that,
                before training stops.
            on_refused: What follows when generators refuse a version.
            max_staleness: Versions.
        """
        self._run, self._history, self._retry = run, history, retry
        self._limit, self._on_refused, self._max_staleness = limit, on_refused, max_staleness
        self.stopped = False
        """Whether training has stopped for good, unless a person has it go on."""
        self._bad_batches, self._refusals = Guard(limit), Guard(limit)

    def resume(self) -> None:
        """Lets training go on that had stopped."""
        self.stopped = False
        self._run.status.alarms.pop("training", None)

    def forget(self) -> None:
        """Begins to count anew, after a person has rolled back."""
        self._bad_batches, self._refusals = Guard(self._limit), Guard(self._limit)
        self.resume()

    def applied(self) -> None:
        """A batch was applied."""
        self._bad_batches.succeeded()

    def served(self) -> None:
        """A version was brought in."""
        self._refusals.succeeded()
        self._run.status.alarms.pop("version", None)

    async def skip(self, held: Sequence[InHand], error: Exception, *, beyond: int | None = None) -> None:
        """Leaves a batch that cannot be applied; the weights are as they were before it.

        Args:
            held: The batch.
            error: Why.
            beyond: The update whose weights are themselves at fault, so that a roll-back must go further than to them.
        """
        logger.error("batch skipped", extra={"step": self._run.training.step, "reason": str(error)})
        await self._retry.run("journal", lambda: self._run.skip(held, str(error)))
        await self._run.intake.drop(held, "bad_batch")
        verdict = self._bad_batches.failed()
        if verdict == "rollback":
            await self._retry.run("roll-back", lambda: self._back_to_last_good(str(error), before=beyond))
        elif verdict == "fail":
            self._stop(f"batch after batch cannot be applied, after a roll-back too; the last: {error}")

    async def answer_refusal(self, report: PushReport) -> None:
        """Leaves a version that generators refused."""
        reason = f"generators refused version {report.version}: {'; '.join(report.failures)}"
        logger.error("version refused", extra={"version": report.version.label, "reason": reason})
        self._run.status.alarms["version"] = reason
        await self._retry.run("quarantine", lambda: self._run.release.quarantine(report))
        self._run.release.answered(report)
        if report.version == self._run.averaged:
            return  # the weights that it is of are served, and nothing trains on it: no reason to go back
        verdict = self._refusals.failed()
        if self._on_refused == "rollback" or verdict == "rollback":
            await self._retry.run("roll-back", lambda: self._back_to_last_good(reason, publish=verdict != "fail"))
        elif verdict != "fail" and self._is_starved_by(report.version):
            await self._run.rename()
            await self._retry.run("publish", lambda: self._run.publish([]))
        if verdict == "fail":
            self._stop(f"version after version is refused, after a roll-back too; the last: {reason}")

    def _is_starved_by(self, refused: VersionId) -> bool:
        """Whether no rollout fresh enough can come any more unless the same weights are brought in under another name."""
        status = self._run.status
        served = status.served.step if status.served else 0
        return refused == status.version and self._run.training.step - served > self._max_staleness

    async def _back_to_last_good(self, reason: str, *, publish: bool = True, before: int | None = None) -> None:
        destination = await self._run.status.pulse.in_thread(lambda: self._history.last_good(before))
        logger.warning("rolling back", extra={"to": destination.label, "reason": reason})
        await self._run.go_back(destination, publish=publish)

    def _stop(self, reason: str) -> None:
        self.stopped = True
        self._run.status.alarms["training"] = f"training has stopped: {reason}"
        logger.critical("training has stopped", extra={"reason": reason})

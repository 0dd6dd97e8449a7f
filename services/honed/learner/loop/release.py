"""From weights to a served version: export, publish to the store, push to the generators in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import shutil
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Canary, Lineage, Manifest
from honed.artifacts.marks import Mark
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit import tracing
from honed.kit.errors import HonedError
from honed.learner import metrics
from honed.learner.loop.exporter import Exporter
from honed.learner.loop.journal import Journal
from honed.learner.loop.push import Pusher, PushReport
from honed.learner.loop.records import PushRecord
from honed.learner.loop.rollback import good_versions
from honed.learner.sources.source import InHand
from honed.learner.status import LearnerStatus
from honed.learner.train.average import WeightAverage
from honed.queue.lease import HeldLease

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0
BASE: Final = VersionId(0, 0)


class Release:
    """Publishes versions of one run, and brings the newest one into the generators."""

    def __init__(
        self,
        store: PolicyStore,
        exporter: Exporter,
        pusher: Pusher,
        journal: Journal,
        lease: HeldLease,
        status: LearnerStatus,
        *,
        keep: int,
        config_hash: str = "",
        preference_snapshot: Callable[[], str] = str,
        clock: Callable[[], float],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """Publishes nothing yet.

        Args:
            store: Where versions go first.
            exporter: Makes a directory of the weights.
            pusher: Brings a version into the generators.
            journal: Gets each push.
            lease: Checked before each write that others see.
            status: Shows what is served, and what is in trouble.
            keep: How many of the newest versions stay; the base, promoted ones and the last one committed always do.
            config_hash: Digest of the settings, for the lineage.
            preference_snapshot: Content hash of the judgements behind the reward model, or that pairs are of, for the lineage;
                empty if unknown.
            clock: Seconds since 1970.
            sleep: Between tries.
        """
        self.store, self._exporter, self._pusher, self._journal = store, exporter, pusher, journal
        self._lease, self._status, self._keep = lease, status, keep
        self._config_hash, self._snapshot = config_hash, preference_snapshot
        self._clock, self._sleep = clock, sleep
        self._pushing: asyncio.Task[None] | None = None
        self._attempt = asyncio.Lock()
        self._attempted = asyncio.Event()
        self.changed: Callable[[], None] = lambda: None
        """Called when generators have refused a version, or the push has failed for good."""
        self.committed: Callable[[], None] = lambda: None
        """Called when a generator has committed a version."""
        self._refused: list[PushReport] = []

    @property
    def refused(self) -> PushReport | None:
        """The first push that generators refused and that nobody has dealt with yet."""
        return self._refused[0] if self._refused else None

    def answered(self, report: PushReport) -> None:
        """Somebody has dealt with a refused push; others that came meanwhile stand."""
        self._refused.remove(report)

    def forget_refusals(self) -> None:
        """What was refused is left behind."""
        self._refused.clear()

    async def publish(self, version: VersionId, held: Sequence[InHand], *, average: WeightAverage | None = None) -> Manifest:
        """Puts the weights as they are now, or their average, into the store. Not while the weights change.

        Args:
            version: What to call them.
            held: The batch that made them; empty if none did.
            average: What to publish in place of the weights.

        Raises:
            LeaseLost: Another learner has taken over; nothing was published.
            StoreFull: There is no room; the generators go on with the version they have.
        """
        await self._lease.check()
        pulse = self._status.pulse

        def export() -> tuple[Path, tuple[Canary, ...]]:
            with contextlib.nullcontext() if average is None else average.in_place():
                return self._exporter.export(version)

        directory, canaries = await pulse.in_thread(export)
        try:
            figures = {} if average is None else average.figures()
            draft = VersionDraft(version, canaries, replace(self._lineage(held), figures=figures))
            return await pulse.in_thread(lambda: self.store.publish(directory, draft))
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def push(self, manifest: Manifest) -> None:
        """Begins to bring a published version in, in place of one that nobody has taken yet.

        It goes on until a generator commits the version or refuses it: a generator that is away ends nothing.
        """
        await self.stop()
        self._attempted.clear()
        self._pushing = asyncio.create_task(self._push(manifest))

    async def settle(self) -> None:
        """Waits until the push under way has been tried once: versions are committed in order, one at a time.

        Raises:
            LeaseLost: Another learner has taken over.
        """
        if self._pushing is None:
            return
        attempted = asyncio.ensure_future(self._attempted.wait())
        try:
            await asyncio.wait({attempted, self._pushing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            attempted.cancel()
        self.check()

    def check(self) -> None:
        """Raises what ended the push, if it has failed.

        Raises:
            LeaseLost: Another learner has taken over.
        """
        if self._pushing is not None and self._pushing.done():
            pushing, self._pushing = self._pushing, None
            pushing.result()

    async def stop(self, patience_s: float | None = None) -> None:
        """Ends the tries for a version that nobody takes.

        Args:
            patience_s: How long a try that is under way may go on; None lets it come to its end.
        """
        if self._pushing is None:
            return
        pushing, self._pushing = self._pushing, None
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._attempt.acquire()
                self._attempt.release()
        pushing.cancel()
        await asyncio.wait([pushing])

    async def quarantine(self, report: PushReport) -> None:
        """Marks a refused version, so that no generator ever tries it again. It stands, for whoever looks for the cause."""
        mark = Mark("; ".join(report.failures)[:2000], self._now())
        await self._status.pulse.in_thread(lambda: self.store.marks.add(report.version, "quarantined", mark))
        await self._retain(report.version, refused=True)  # refused ones before it must not fill the disk

    def promoted(self) -> frozenset[str]:
        """Labels of promoted versions. Blocks."""
        return frozenset(version.label for version in self.store.marks.all("promoted"))

    async def _push(self, manifest: Manifest) -> None:
        pause_s, told = _FIRST_PAUSE_S, None
        try:
            while True:
                async with self._attempt:
                    await self._lease.check()
                    with tracing.span("push", head=True, attributes={"honed.version": manifest.version.label}) as span:
                        report = await self._pusher.push(manifest)
                        span.set({"honed.committed": report.committed, "honed.failures": len(report.failures)})
                        if not report.committed:
                            span.fail("refused" if report.refused else "unreached")
                    if report.committed or report.refused or report.failures != told:
                        self._record(report)
                        told = report.failures
                self._attempted.set()
                if report.refused:
                    self._refused.append(report)
                if report.committed or report.refused:
                    break
                self._status.alarms["push"] = (
                    f"version {report.version} has reached no generator: {'; '.join(report.failures)}; trying again"
                )
                await self._sleep(pause_s)
                pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            self._status.alarms.pop("push", None)
            if report.committed:
                await self._retain(report.version)
            await self._journal.announce()
        except Exception:
            self.changed()
            raise
        finally:
            self._attempted.set()
            if self._refused:
                self.changed()

    def _record(self, report: PushReport) -> None:
        for failure in report.failures:
            logger.warning("push failed", extra={"version": report.version.label, "reason": failure})
        record = PushRecord(
            version=report.version.label,
            ended_at=self._clock(),
            committed=report.committed,
            failures=report.failures,
            pauses_s=report.pauses_s,
            canary_max_error=report.canary_max_error,
            carried=report.carried,
            refused=report.refused,
        )
        metrics.pushed(record)
        if report.committed:
            self._status.served = report.version
            self.committed()
        if not (report.committed and self._journal.committed(record.version)):
            try:
                self._journal.add_push(record)
            except OSError as error:  # a full disk loses a line of the journal, not the push
                logger.warning("the push is not in the journal", extra={"version": record.version, "reason": str(error)})

    async def _retain(self, pushed: VersionId, *, refused: bool = False) -> None:
        def remove() -> None:
            if not refused:
                # A generator that started meanwhile may have marked it: a version that one generator takes is a good one.
                self.store.marks.remove(pushed, "quarantined")
            good = good_versions(self.store, self._journal)
            last_good = [version for version in self.store.versions() if good(version.label)][-1:]
            self.store.retain(self._keep, {BASE, pushed, *last_good})

        try:
            await asyncio.to_thread(remove)
        except (HonedError, OSError) as error:
            logger.warning("old versions could not be removed", extra={"reason": str(error)})

    def _lineage(self, held: Sequence[InHand]) -> Lineage:
        return Lineage(
            parent="" if self._status.served is None else self._status.served.label,
            config_hash=self._config_hash,
            preference_snapshot=self._snapshot(),
            reward_model_version=scorer_versions(each.scorers for each in held),
            first_entry=_entry(held[:1]),
            last_entry=_entry(held[-1:]),
            created_at=self._now(),
        )

    def _now(self) -> str:
        return datetime.fromtimestamp(self._clock(), tz=UTC).isoformat()


def _entry(held: Sequence[InHand]) -> str:
    return "".join(each.delivery.entry for each in held if each.delivery is not None)


def scorer_versions(scorers: Iterable[Mapping[str, str]]) -> str:
    """Every scorer version of a batch, once, in order: `name@version,...`."""
    seen = {item for each in scorers for item in each.items()}
    return ",".join(f"{name}@{version}" for name, version in sorted(seen))

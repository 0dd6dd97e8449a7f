"""GenerationControlService: the transactional change of weights, and the brakes."""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from google.protobuf.duration_pb2 import Duration

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.generation.engine import CommitReport
from honed.generation.frontend import SamplingFrontend
from honed.generation.quarantine import fetch_or_mark
from honed.kit import tracing
from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument, Unavailable
from honed.kit.idempotency import Once
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)


class GenerationControlService(generation_pb2_grpc.GenerationControlServiceServicer):
    """Fetches versions into a local directory while the old one serves, and swaps them in.

    One change at a time. The directories of the serving version and the one before stay, for a
    roll-back; at a commit the others go.
    """

    def __init__(
        self,
        frontend: SamplingFrontend,
        store: PolicyStore,
        directory: Path,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        """Before the engine serves, every change is answered with Unavailable.

        Args:
            frontend: In front of the engine.
            store: Where versions are fetched from.
            directory: Where fetched versions go.
            on_change: Called when another version serves, or what is taken changes.
        """
        self._frontend = frontend
        self._engine = frontend.engine
        self._store = store
        self._directory = directory
        self._on_change = on_change
        self._changing = asyncio.Lock()
        self._prepare: Once[generation_pb2.PrepareVersionResponse] = Once()
        self._commit: Once[CommitReport | None] = Once()

    async def PrepareVersion(
        self, request: generation_pb2.PrepareVersionRequest, context: Any
    ) -> generation_pb2.PrepareVersionResponse:
        """Fetches and verifies a version."""
        version = self._version(request.version)
        return await self._prepare(request.idempotency_key, lambda: self._do_prepare(version, request.manifest_sha256))

    async def CommitVersion(
        self, request: generation_pb2.CommitVersionRequest, context: Any
    ) -> generation_pb2.CommitVersionResponse:
        """Serves a prepared version."""
        version = self._version(request.version)
        report = await self._commit(request.idempotency_key, lambda: self._do_commit(version))
        if report is None:
            return generation_pb2.CommitVersionResponse(version=request.version)
        return generation_pb2.CommitVersionResponse(
            version=request.version,
            pause=_duration(report.pause_s),
            canary_max_error=report.canary_max_error,
            requests_carried=report.requests_carried,
        )

    async def AbortVersion(
        self, request: generation_pb2.AbortVersionRequest, context: Any
    ) -> generation_pb2.AbortVersionResponse:
        """Forgets a prepared version."""
        version = self._version(request.version)
        async with self._changing:
            await self._engine.abort_version(version)
            if version > self._engine.version:
                await asyncio.to_thread(shutil.rmtree, self._target(version), ignore_errors=True)
        return generation_pb2.AbortVersionResponse()

    async def Pause(self, request: generation_pb2.PauseRequest, context: Any) -> generation_pb2.PauseResponse:
        """Freezes what is in flight."""
        await self._engine.pause()
        return generation_pb2.PauseResponse()

    async def Resume(self, request: generation_pb2.ResumeRequest, context: Any) -> generation_pb2.ResumeResponse:
        """Lets it go on, and ends a drain."""
        self._frontend.draining = False
        self._on_change()
        await self._engine.resume()
        return generation_pb2.ResumeResponse()

    async def Drain(self, request: generation_pb2.DrainRequest, context: Any) -> generation_pb2.DrainResponse:
        """Takes no new calls, and waits until nothing is in flight or the time is up."""
        self._frontend.draining = True
        self._on_change()
        end = time.monotonic() + (request.timeout.ToTimedelta().total_seconds() if request.HasField("timeout") else 30.0)
        while self._engine.in_flight and time.monotonic() < end:  # noqa: ASYNC110  # the engine has no event for it
            await asyncio.sleep(0.02)
        return generation_pb2.DrainResponse(remaining=self._engine.in_flight)

    @property
    def version(self) -> VersionId:
        """The version that serves. Raises Unavailable before the first."""
        return self._engine.version

    @property
    def changing(self) -> bool:
        """Whether a version is being prepared or committed."""
        return self._changing.locked()

    async def change(self, version: VersionId, manifest_sha256: str) -> CommitReport | None:
        """Prepares and commits a version, as the two calls do.

        Raises:
            DataLoss: the version is damaged.
            FailedPrecondition: the version is quarantined, or this build cannot read it.
            Aborted: it did not take, and the old version serves.
        """
        mark = await asyncio.to_thread(self._store.marks.get, version, "quarantined")
        if mark is not None:
            raise FailedPrecondition(f"version {version} is quarantined since {mark.at}: {mark.reason}")
        await self._do_prepare(version, manifest_sha256)
        return await self._do_commit(version)

    async def _do_prepare(self, version: VersionId, manifest_sha256: str) -> generation_pb2.PrepareVersionResponse:
        started = time.monotonic()
        target = self._target(version)
        async with self._changing:
            if version == self._engine.version:
                return generation_pb2.PrepareVersionResponse(elapsed=_duration(0.0))
            here = target.exists()
            with tracing.span("fetch"):  # every byte is verified by its digest
                await asyncio.to_thread(fetch_or_mark, self._store, version, self._directory, manifest_sha256 or None)
            try:
                await self._engine.prepare(version, target)
            except DataLoss as error:  # the store's bytes have just passed: the version is whole, this host's copy is not
                await asyncio.to_thread(shutil.rmtree, target, ignore_errors=True)
                raise Unavailable(f"the copy of version {version} on this host was damaged and is removed: {error}") from error
        fetched = 0 if here else sum(path.stat().st_size for path in target.iterdir())
        return generation_pb2.PrepareVersionResponse(bytes_fetched=fetched, elapsed=_duration(time.monotonic() - started))

    async def _do_commit(self, version: VersionId) -> CommitReport | None:
        """Commits a version; None if it serves already, as after a restart."""
        async with self._changing:
            if version == self._engine.version:
                return None
            if version < self._engine.version:
                raise FailedPrecondition(
                    f"version {version} is older than {self._engine.version}, which serves: a newer learner has taken over"
                )
            before = self._engine.version
            report = await self._engine.commit(version)
            self._frontend.pauses.append(report.pause_s)
            self._on_change()
            await asyncio.to_thread(self._clear, before, version)
        logger.info(
            "version committed",
            extra={
                "version": version.label,
                "pause_ms": round(report.pause_s * 1e3, 1),
                "carried": report.requests_carried,
                "canary_max_error": report.canary_max_error,
            },
        )
        return report

    def _clear(self, before: VersionId, now: VersionId) -> None:
        """Removes every fetched version older than `now` but `before`, refused ones too."""
        for path in self._directory.glob("[0-9]*"):  # a fetch under way has a hidden name
            if path != self._target(before) and VersionId.parse(path.name) < now:
                shutil.rmtree(path, ignore_errors=True)

    def _target(self, version: VersionId) -> Path:
        return self._directory / version.label

    def _version(self, version: common_pb2.PolicyVersion) -> VersionId:
        if version.run != self._frontend.run:
            raise InvalidArgument("version.run", f"this generator serves run {self._frontend.run!r}, not {version.run!r}")
        return VersionId(version.fence, version.step)


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromNanoseconds(int(seconds * 1e9))
    return duration

"""Gets a new policy version into the store and into every running generator.

Prepared everywhere first, then committed everywhere: a version that cannot be fetched or verified somewhere pauses nobody. A
generator that is down is left behind: when it comes back it takes the newest version from the store by itself.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from honed.artifacts.manifest import Manifest
from honed.artifacts.store import PolicyStore, VersionDraft
from honed.artifacts.version import VersionId
from honed.v1 import common_pb2, generation_pb2, generation_pb2_grpc

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class PushReport:
    """How a push went.

    Attributes:
        version: what was pushed.
        committed: generators that serve it now.
        failures: why the others do not, one text each.
        pauses_s: how long in-flight requests stood still, one for each generator that changed its weights now.
        canary_max_error: nats, the largest over all generators.
        carried: requests that were in flight at a pause and went on.
    """

    version: VersionId
    committed: int
    failures: tuple[str, ...]
    pauses_s: tuple[float, ...] = ()
    canary_max_error: float = 0.0
    carried: int = 0


class Publisher:
    """Publishes versions of one run under one fence."""

    def __init__(
        self,
        store: PolicyStore,
        generators: Sequence[generation_pb2_grpc.GenerationControlServiceAsyncStub],
        *,
        keep: int,
        timeout_s: float,
        check_lease: Callable[[], Awaitable[None]],
    ) -> None:
        """Pushes to `generators`.

        Args:
            store: where versions go first.
            generators: a control stub for each replica.
            keep: how many of the newest versions stay; the base version 0.0 always does.
            timeout_s: deadline of each call.
            check_lease: raises FailedPrecondition once another learner has taken over.
        """
        self._store = store
        self._generators = generators
        self._keep = keep
        self._timeout_s = timeout_s
        self._check_lease = check_lease

    async def publish(self, directory: Path, draft: VersionDraft) -> Manifest:
        """Puts the model directory, which is used up, into the store.

        Raises:
            LeaseLost: another learner has taken over; nothing was published.
            StoreFull: there is no room; the generators go on with the version they have.
        """
        await self._check_lease()
        try:
            return await asyncio.to_thread(self._store.publish, directory, draft)
        finally:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)

    async def published(self, version: VersionId) -> Manifest:
        """The manifest of a version that is in the store.

        Raises:
            DataLoss: it is damaged.
        """
        return await asyncio.to_thread(self._store.manifest, version)

    async def bring_in(self, manifest: Manifest) -> PushReport:
        """Brings a published version into every generator, once; failures are in the report.

        Raises:
            LeaseLost: another learner has taken over.
        """
        await self._check_lease()
        report = await self._bring_in(manifest)
        await asyncio.to_thread(self._store.retain, self._keep, {VersionId(0, 0)})
        return report

    async def _bring_in(self, manifest: Manifest) -> PushReport:
        version = common_pb2.PolicyVersion(run=manifest.run, fence=manifest.version.fence, step=manifest.version.step)
        key = f"{manifest.run}/{manifest.version}"
        # Without a key: after a failed commit it has to be done again.
        prepare = generation_pb2.PrepareVersionRequest(version=version, manifest_sha256=manifest.digest)
        prepared = await asyncio.gather(
            *(self._attempt("prepare", g.PrepareVersion(prepare, timeout=self._timeout_s)) for g in self._generators)
        )
        commit = generation_pb2.CommitVersionRequest(version=version, idempotency_key=key)
        ready = [g for g, answer in zip(self._generators, prepared, strict=True) if not isinstance(answer, str)]
        answers = await asyncio.gather(
            *(self._attempt("commit", g.CommitVersion(commit, timeout=self._timeout_s)) for g in ready)
        )
        done = [answer for answer in answers if not isinstance(answer, str)]
        failures = tuple(answer for answer in (*prepared, *answers) if isinstance(answer, str))
        for failure in failures:
            logger.warning("push failed", extra={"version": manifest.version.label, "reason": failure})
        return PushReport(
            version=manifest.version,
            committed=len(done),
            failures=failures,
            pauses_s=tuple(answer.pause.ToNanoseconds() / 1e9 for answer in done if answer.HasField("pause")),
            canary_max_error=max((answer.canary_max_error for answer in done), default=0.0),
            carried=sum(answer.requests_carried for answer in done),
        )

    async def _attempt(self, what: str, call: Awaitable[Answer]) -> Answer | str:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            return f"{what}: {error.code().name}: {error.details()}"

"""LearnerService: where the learner stands, its metrics and pushes live, and its brakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition
from honed.kit.idempotency import Once
from honed.learner.loop.journal import Journal
from honed.learner.loop.loop import TrainingLoop
from honed.learner.loop.pause import PauseFile
from honed.learner.loop.records import PushRecord, Totals
from honed.learner.loop.rollback import Destination, History, check_target
from honed.learner.status import LearnerStatus
from honed.v1 import common_pb2, learner_pb2, learner_pb2_grpc


@dataclass(frozen=True)
class LoadedLearner:
    """A learner that has loaded its weights."""

    loop: TrainingLoop
    journal: Journal
    history: History
    pause: PauseFile


class LearnerService(learner_pb2_grpc.LearnerServiceServicer):
    """Answers from memory; nothing here waits for Redis, and no answer grows with the run."""

    def __init__(
        self, run: str, target_updates: int | None, status: LearnerStatus, learner: asyncio.Future[LoadedLearner]
    ) -> None:
        """Answers from the first moment on.

        Args:
            run: Its name.
            target_updates: Of the run; None if it has no end.
            status: Where the learner stands.
            learner: Set once the weights are loaded.
        """
        self._run, self._target, self._status, self._learner = run, target_updates or 0, status, learner
        self._pause: Once[learner_pb2.LearnerServicePauseResponse] = Once()
        self._resume: Once[learner_pb2.LearnerServiceResumeResponse] = Once()
        self._checkpoint: Once[learner_pb2.CheckpointResponse] = Once()
        self._roll_back: Once[learner_pb2.RollbackResponse] = Once()

    async def GetStatus(self, request: learner_pb2.GetStatusRequest, context: Any) -> learner_pb2.GetStatusResponse:
        """Tells where the learner stands."""
        status = self._status
        totals = self._learner.result().journal.totals if self._is_loaded() else Totals()
        return learner_pb2.GetStatusResponse(
            state=status.state,
            version=self._version(status.version),
            served_version=self._version(status.served) if status.served else None,
            target_steps=self._target,
            rollouts_trained=totals.trained,
            rollouts_dropped=status.dropped,
            versions_pushed=totals.pushed,
            pushes_failed=totals.failed,
            busy_seconds=status.busy.seconds,
            checkpoint_step=status.checkpoint_update,
            alarm=status.alarm,
            rollouts_undone=totals.undone,
            batches_skipped=totals.skipped,
            wait_seconds=status.waiting.seconds,
            versions_refused=totals.refused,
        )

    async def WatchMetrics(
        self, request: learner_pb2.WatchMetricsRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchMetricsResponse]:
        """Streams the metrics of each update."""
        journal = (await asyncio.shield(self._learner)).journal
        updates = journal.follow(request.from_step, live=not request.no_follow, with_rollouts=request.with_rollouts)
        async for record in updates:
            metrics = learner_pb2.StepMetrics(
                step=record.step,
                ended_at=_timestamp(record.ended_at),
                values=record.values,
                rollout_ids=record.rollout_ids if request.with_rollouts else (),
            )
            yield learner_pb2.WatchMetricsResponse(metrics=metrics)

    async def WatchPushes(
        self, request: learner_pb2.WatchPushesRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchPushesResponse]:
        """Streams the pushes."""
        journal = (await asyncio.shield(self._learner)).journal
        async for record in journal.follow_pushes(request.from_step, live=not request.no_follow):
            yield learner_pb2.WatchPushesResponse(push=self._push(record))

    async def Pause(
        self, request: learner_pb2.LearnerServicePauseRequest, context: Any
    ) -> learner_pb2.LearnerServicePauseResponse:
        """Stops after the update in hand, and stays so over a restart."""
        learner = self._loaded()

        async def work() -> learner_pb2.LearnerServicePauseResponse:
            await asyncio.to_thread(learner.pause.set, True)
            learner.loop.pause()
            return learner_pb2.LearnerServicePauseResponse()

        return await self._pause(request.idempotency_key, work)

    async def Resume(
        self, request: learner_pb2.LearnerServiceResumeRequest, context: Any
    ) -> learner_pb2.LearnerServiceResumeResponse:
        """Goes on."""
        learner = self._loaded()

        async def work() -> learner_pb2.LearnerServiceResumeResponse:
            await asyncio.to_thread(learner.pause.set, False)
            learner.loop.resume()
            return learner_pb2.LearnerServiceResumeResponse()

        return await self._resume(request.idempotency_key, work)

    async def Checkpoint(self, request: learner_pb2.CheckpointRequest, context: Any) -> learner_pb2.CheckpointResponse:
        """Saves after the update in hand."""
        learner = self._loaded()

        async def work() -> learner_pb2.CheckpointResponse:
            return learner_pb2.CheckpointResponse(step=await learner.loop.checkpoint())

        # Shielded: a caller that gives up must not cancel the acknowledgement that follows the checkpoint.
        return await asyncio.shield(asyncio.ensure_future(self._checkpoint(request.idempotency_key, work)))

    async def Rollback(self, request: learner_pb2.RollbackRequest, context: Any) -> learner_pb2.RollbackResponse:
        """Goes back to an update or a version."""
        learner = self._loaded()
        version = VersionId(request.version.fence, request.version.step) if request.HasField("version") else None
        step = request.step if version is None else version.step
        check_target(self._run, "" if version is None else request.version.run, step, self._status.update)

        def find() -> Destination:
            return learner.history.of_step(step) if version is None else learner.history.of_version(version)

        async def work() -> learner_pb2.RollbackResponse:
            new, exact = await learner.loop.roll_back(find)
            return learner_pb2.RollbackResponse(version=self._version(new), exact=exact)

        return await asyncio.shield(asyncio.ensure_future(self._roll_back(request.idempotency_key, work)))

    def _is_loaded(self) -> bool:
        return self._learner.done() and not self._learner.cancelled()

    def _loaded(self) -> LoadedLearner:
        if not self._is_loaded():
            raise FailedPrecondition("the learner still loads its weights: ask again when its health check passes")
        return self._learner.result()

    def _version(self, version: VersionId) -> common_pb2.PolicyVersion:
        return common_pb2.PolicyVersion(run=self._run, fence=version.fence, step=version.step)

    def _push(self, record: PushRecord) -> learner_pb2.Push:
        return learner_pb2.Push(
            version=self._version(VersionId.parse(record.version)),
            ended_at=_timestamp(record.ended_at),
            committed=record.committed,
            failures=record.failures,
            pauses_seconds=record.pauses_s,
            canary_max_error=record.canary_max_error,
            carried=record.carried,
            refused=record.refused,
        )


def _timestamp(seconds: float) -> Timestamp:
    timestamp = Timestamp()
    timestamp.FromNanoseconds(int(seconds * 1e9))
    return timestamp

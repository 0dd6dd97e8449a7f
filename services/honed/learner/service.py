"""LearnerService: where the learner stands, its metrics live, and its brakes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, Unimplemented
from honed.learner.ledger import Ledger
from honed.learner.loop import Status, TrainingLoop
from honed.v1 import common_pb2, learner_pb2, learner_pb2_grpc


class LearnerService(learner_pb2_grpc.LearnerServiceServicer):
    """Answers from the loop; until there is one (weights load), only the status is known."""

    def __init__(
        self, run: str, steps: int, status: Status, ledger: Ledger, dropped: Callable[[], Awaitable[Mapping[str, int]]]
    ) -> None:
        """`dropped` counts the rollouts that did not train, by reason."""
        self._run, self._steps, self._dropped = run, steps, dropped
        self.status, self.ledger = status, ledger
        self.loop: TrainingLoop | None = None

    async def GetStatus(self, request: learner_pb2.GetStatusRequest, context: Any) -> learner_pb2.GetStatusResponse:
        """Tells where the learner stands."""
        status, ledger = self.status, self.ledger
        step = self.loop.trainer.step if self.loop else status.checkpoint_step
        succeeded = sum(push.succeeded for push in ledger.pushes)
        return learner_pb2.GetStatusResponse(
            state=status.state,
            version=self._version(VersionId(status.fence, step)),
            served_version=self._version(status.served) if status.served else None,
            target_steps=self._steps,
            rollouts_trained=sum(len(record.rollout_ids) for record in ledger.steps),
            rollouts_dropped=await self._dropped(),
            versions_pushed=succeeded,
            pushes_failed=len(ledger.pushes) - succeeded,
            busy_seconds=status.busy.seconds,
            checkpoint_step=status.checkpoint_step,
        )

    async def WatchMetrics(
        self, request: learner_pb2.WatchMetricsRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchMetricsResponse]:
        """Streams the metrics of each step."""
        async for record in self.ledger.follow(request.from_step, live=not request.no_follow):
            ended_at = Timestamp()
            ended_at.FromNanoseconds(int(record.ended_at * 1e9))
            ids = record.rollout_ids if request.with_rollouts else ()
            metrics = learner_pb2.StepMetrics(step=record.step, ended_at=ended_at, values=record.values, rollout_ids=ids)
            yield learner_pb2.WatchMetricsResponse(metrics=metrics)

    async def WatchPushes(
        self, request: learner_pb2.WatchPushesRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchPushesResponse]:
        """Streams the pushes."""
        if not request.no_follow:
            raise Unimplemented("WatchPushes is served with no_follow only")
        for push in list(self.ledger.pushes):
            version = VersionId.parse(push.version)
            if version.step < request.from_step:
                continue
            ended_at = Timestamp()
            ended_at.FromNanoseconds(int(push.ended_at * 1e9))
            yield learner_pb2.WatchPushesResponse(
                push=learner_pb2.Push(
                    version=self._version(version),
                    ended_at=ended_at,
                    committed=push.committed,
                    failures=push.failures,
                    pauses_seconds=push.pauses_s,
                    canary_max_error=push.canary_max_error,
                    carried=push.carried,
                )
            )

    async def Pause(
        self, request: learner_pb2.LearnerServicePauseRequest, context: Any
    ) -> learner_pb2.LearnerServicePauseResponse:
        """Stops after the step in hand."""
        self._running().unpaused.clear()
        return learner_pb2.LearnerServicePauseResponse()

    async def Resume(
        self, request: learner_pb2.LearnerServiceResumeRequest, context: Any
    ) -> learner_pb2.LearnerServiceResumeResponse:
        """Goes on."""
        self._running().unpaused.set()
        return learner_pb2.LearnerServiceResumeResponse()

    async def Checkpoint(self, request: learner_pb2.CheckpointRequest, context: Any) -> learner_pb2.CheckpointResponse:
        """Saves after the update in hand."""
        step = await asyncio.shield(self._running().save_now())
        return learner_pb2.CheckpointResponse(step=step)

    async def Rollback(self, request: learner_pb2.RollbackRequest, context: Any) -> learner_pb2.RollbackResponse:
        """Comes with the promotion and roll-back of versions."""
        raise Unimplemented("Rollback is not served yet; stop the run and start it from an older checkpoint's directory")

    def _running(self) -> TrainingLoop:
        if self.loop is None:
            raise FailedPrecondition("the learner still loads its weights: ask again when its health check passes")
        return self.loop

    def _version(self, version: VersionId) -> common_pb2.PolicyVersion:
        return common_pb2.PolicyVersion(run=self._run, fence=version.fence, step=version.step)

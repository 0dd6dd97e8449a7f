"""Services with figures for `honed top`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from tests.integration.client import served

from honed.v1 import common_pb2, conductor_pb2, generation_pb2, learner_pb2, reward_pb2


class Generation(served.Generation):
    """Samples a hundred tokens between two looks."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = 0

    async def GetPolicy(self, request: generation_pb2.GetPolicyRequest, context: Any) -> generation_pb2.GetPolicyResponse:
        self.tokens += 100
        return generation_pb2.GetPolicyResponse(
            version=common_pb2.PolicyVersion(run="demo", fence=1, step=5),
            engine="recorded 1",
            in_flight=9,
            training_in_flight=6,
            waiting=2,
            tokens_sampled=self.tokens,
            pause_p95_seconds=0.023,
        )


class Reward(served.RewardByLength):
    async def ListScorers(self, request: reward_pb2.ListScorersRequest, context: Any) -> reward_pb2.ListScorersResponse:
        response = reward_pb2.ListScorersResponse()
        response.scorers.add(name="people", version="0123abcdef", state=reward_pb2.SCORER_STATE_SERVING)
        response.scorers.add(name="people", version="4567abcdef", state=reward_pb2.SCORER_STATE_LOADED)
        return response


class Learner(served.Learner):
    """Five updates, ten seconds from one to the next, the last one a moment ago."""

    async def WatchMetrics(
        self, request: learner_pb2.WatchMetricsRequest, context: Any
    ) -> AsyncIterator[learner_pb2.WatchMetricsResponse]:
        now = time.time()
        for step in range(request.from_step, 6):
            metrics = learner_pb2.StepMetrics(step=step, values={"staleness_max": 2.0, "staleness_mean": 1.25, "kl": 3.5})
            metrics.ended_at.FromNanoseconds(int((now - 10 * (5 - step)) * 1e9))
            yield learner_pb2.WatchMetricsResponse(metrics=metrics)


class Conductor(served.Conductor):
    """A run whose replicas have registered."""

    def __init__(self, processes: Sequence[conductor_pb2.ProcessStatus]) -> None:
        self.processes = processes

    async def GetRun(self, request: conductor_pb2.GetRunRequest, context: Any) -> conductor_pb2.GetRunResponse:
        answer = await super().GetRun(request, context)
        answer.run.processes.extend(self.processes)
        answer.run.alarms.append("generation-1: it samples for too long")
        return answer

"""Asks the reward service for scores of many responses, in calls of a bounded size."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc

from honed.v1 import reward_pb2, reward_pb2_grpc

BATCH = 512
CALL_TIMEOUT_S = 300.0
TRIES = 60
FULL_PAUSE_S = 1.0


async def scores(
    stub: reward_pb2_grpc.RewardServiceAsyncStub, items: Sequence[reward_pb2.ScoreItem]
) -> list[reward_pb2.ScoreResult]:
    """The result of each item, in order. A service that is full is asked again.

    Raises:
        AioRpcError: a call failed.
    """
    results: list[reward_pb2.ScoreResult] = []
    for start in range(0, len(items), BATCH):
        request = reward_pb2.ScoreRequest(items=items[start : start + BATCH])
        for left in reversed(range(TRIES)):
            try:
                results += (await stub.Score(request, timeout=CALL_TIMEOUT_S)).results
                break
            except grpc.aio.AioRpcError as error:
                if error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED or not left:
                    raise
                await asyncio.sleep(FULL_PAUSE_S)
    return results

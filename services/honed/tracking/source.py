"""Where points come from: the learner's journal by RPC, and the curves of the phases before the online loop.

The journal is the record: whoever was away asks again from what it has. Updates that were undone by a roll-back are made again
under the same steps; they are told from those that were sent by when they ended.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from typing import Final

import grpc

from honed.tracking.port import UPDATES, Mark, Point, Sent
from honed.v1 import learner_pb2, learner_pb2_grpc

logger = logging.getLogger(__name__)

_WATCH_S: Final = 600.0
"""A stream is opened anew after so long: one whose other end is gone without a word is not waited for."""
_ASK_AGAIN_S: Final = 1.0
_CALL_S: Final = 60.0

Learner = Callable[[], AbstractAsyncContextManager[grpc.aio.Channel]]


async def updates(learner: Learner, sent: Mark | None) -> AsyncIterator[Point]:
    """Yields the updates after those that were sent, then live, through restarts of the learner. Ends never.

    Args:
        learner: Opens a channel to it.
        sent: The newest one that was.
    """
    while True:
        try:
            async with learner() as channel:
                stub = learner_pb2_grpc.LearnerServiceStub(channel)
                undone = sent is not None and not await _stands(stub, sent)
                first = 0 if sent is None or undone else sent.step + 1
                request = learner_pb2.WatchMetricsRequest(from_step=first)
                async for answer in stub.WatchMetrics(request, timeout=_WATCH_S):
                    point = _point(answer.metrics)
                    if undone and sent is not None and point.at_ms <= sent.at_ms:
                        continue  # an older one, which was sent
                    undone, sent = False, Mark(point.at_ms, point.step)
                    yield point
        except (
            grpc.aio.AioRpcError,
            ValueError,
        ) as error:  # it starts, for the first time or again; its token too may be missing
            logger.debug("the learner does not tell its updates", extra={"reason": str(error)})
        await asyncio.sleep(_ASK_AGAIN_S)


async def _stands(stub: learner_pb2_grpc.LearnerServiceAsyncStub, sent: Mark) -> bool:
    """Whether the learner still has the update that was sent last, or has forgotten it with its oldest ones."""
    request = learner_pb2.WatchMetricsRequest(from_step=sent.step, no_follow=True)
    async for answer in stub.WatchMetrics(request, timeout=_CALL_S):
        point = _point(answer.metrics)
        return point.step > sent.step or point.at_ms == sent.at_ms
    return False


def _point(metrics: learner_pb2.StepMetrics) -> Point:
    return Point(UPDATES, metrics.step, metrics.ended_at.ToMilliseconds(), dict(metrics.values))


def unsent(points: Iterable[Point], sent: Sent) -> list[Point]:
    """Those of the phases that were not sent."""
    return [point for point in points if point.series not in sent or point.at_ms > sent[point.series].at_ms]

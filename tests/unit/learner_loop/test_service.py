"""Claims about LearnerService: it answers from memory, from the first moment on, and its brakes hold."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.learner_world import Learner, World, batches

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument, NotFound
from honed.learner.loop.pause import PauseFile
from honed.learner.service import LearnerService, LoadedLearner
from honed.v1 import common_pb2, learner_pb2

pb: Any = learner_pb2
NONE: Any = None  # no handler asks its context


def service_of(world: World, learner: Learner) -> LearnerService:
    loaded: asyncio.Future[LoadedLearner] = asyncio.get_running_loop().create_future()
    loaded.set_result(LoadedLearner(learner.loop, learner.journal, learner.history, PauseFile(world.home)))
    return LearnerService("r", world.steps, learner.status, loaded)


async def updates(service: LearnerService, **request: Any) -> list[Any]:
    return [answer.metrics async for answer in service.WatchMetrics(pb.WatchMetricsRequest(no_follow=True, **request), NONE)]


async def test_the_status_says_all_and_reads_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.generator.refuses, world.settings = {2}, {"on_refused": "continue", "overlap_push": False}
    learner = await world.start()
    await world.to_the_end(learner)
    learner.status.dropped = {"stale": 7}
    service = service_of(world, learner)
    for name in ("read", "_from_disk"):
        monkeypatch.setattr(learner.journal, name, None)
    status = await service.GetStatus(pb.GetStatusRequest(), NONE)
    assert (status.state, status.version.fence, status.version.step) == (pb.LEARNER_STATE_FINISHED, 1, 3)
    assert (status.rollouts_trained, dict(status.rollouts_dropped), status.target_steps) == (12, {"stale": 7}, 3)
    assert (status.versions_pushed, status.pushes_failed, status.versions_refused) == (2, 1, 1)
    assert "refused version 1.2" in status.alarm
    assert (status.checkpoint_step, status.served_version.step) == (3, 3)
    assert status.wait_seconds > 0


async def test_before_the_weights_are_loaded_it_says_that_it_starts(world: World) -> None:
    learner = world.learner()
    service = LearnerService("r", None, learner.status, asyncio.get_running_loop().create_future())
    status = await service.GetStatus(pb.GetStatusRequest(), NONE)
    assert (status.state, status.target_steps) == (pb.LEARNER_STATE_STARTING, 0)
    with pytest.raises(FailedPrecondition, match="still loads"):
        await service.Pause(pb.LearnerServicePauseRequest(), NONE)


async def test_metrics_come_with_the_rollouts_when_asked_for_and_pushes_from_an_update_on(world: World) -> None:
    learner = await world.start()
    await world.to_the_end(learner)
    service = service_of(world, learner)
    assert [len(metrics.rollout_ids) for metrics in await updates(service)] == [0, 0, 0]
    assert [list(metrics.rollout_ids) for metrics in await updates(service, from_step=3, with_rollouts=True)] == [
        [f"r-{turn}/0" for turn in range(8, 12)]
    ]
    request = pb.WatchPushesRequest(from_step=2, no_follow=True)
    pushes = [answer.push async for answer in service.WatchPushes(request, NONE)]
    assert [(push.version.step, push.committed, push.carried, list(push.pauses_seconds)) for push in pushes] == [
        (2, 1, 3, [0.002]), (3, 1, 3, [0.002])
    ]  # fmt: skip


async def test_a_pause_survives_a_restart(world: World) -> None:
    """L5."""
    first = await world.start()
    await service_of(world, first).Pause(pb.LearnerServicePauseRequest(), NONE)
    second = await world.start(fence=2, paused=bool(PauseFile(world.home)))
    service = service_of(world, second)
    running = asyncio.ensure_future(world.to_the_end(second))
    async with asyncio.timeout(20):
        while second.status.state != pb.LEARNER_STATE_PAUSED:
            await asyncio.sleep(0.001)
        await service.Resume(pb.LearnerServiceResumeRequest(), NONE)
        await running
    assert not PauseFile(world.home)
    assert second.status.update == 3


async def test_the_same_key_again_does_nothing_again(world: World) -> None:
    """L5: a pause that is repeated after a resume does not pause anew; a roll-back is done once."""
    world.steps, world.intake.batches = 9, batches(3)
    learner = await world.start()
    service = service_of(world, learner)
    running = asyncio.ensure_future(learner.loop.run())
    async with asyncio.timeout(30):
        await world.intake.starved.wait()
        pause = pb.LearnerServicePauseRequest(idempotency_key="a")
        await service.Pause(pause, NONE)
        await service.Resume(pb.LearnerServiceResumeRequest(idempotency_key="b"), NONE)
        await service.Pause(pause, NONE)
        assert not PauseFile(world.home)
        back = pb.RollbackRequest(step=2, idempotency_key="c")
        answers = [await service.Rollback(back, NONE) for _ in range(2)]
        assert [(a.version.fence, a.version.step, a.exact) for a in answers] == [(2, 2, True)] * 2
        learner.stopping.set()
        await running
    assert learner.status.fence == 2


async def test_a_roll_back_to_what_is_not_there_says_so_and_changes_nothing(world: World) -> None:
    learner = await world.start()
    await world.to_the_end(learner)
    service = service_of(world, learner)
    wrong = common_pb2.PolicyVersion(run="other", fence=1, step=1)
    for request, error, text in (
        (pb.RollbackRequest(step=9), InvalidArgument, "step: 9 is after update 3"),
        (pb.RollbackRequest(version=wrong), InvalidArgument, "version.run: this learner trains run 'r', not 'other'"),
        (pb.RollbackRequest(version=common_pb2.PolicyVersion(run="r", fence=7, step=1)), NotFound, "7.1"),
    ):
        with pytest.raises(error, match=text):
            await service.Rollback(request, NONE)
    assert (learner.status.update, learner.status.fence, learner.status.version) == (3, 1, VersionId(1, 3))

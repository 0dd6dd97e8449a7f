"""Claims about a conductor whose services are started by others."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.run import run_tree, settings_of, until

from honed.artifacts.store import PolicyStore
from honed.conductor import main
from honed.conductor.external import ExternalFleet
from honed.conductor.jobs import AwaitedJobs
from honed.conductor.results import Results
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.v1 import learner_pb2, learner_pb2_grpc


def settings(root: Path, learner: int = 1, **queue: str) -> RunSettings:
    tree = run_tree(root, conductor={"launcher": "none", "start_timeout_s": 0.05}, learner={"port": learner})
    for name in ("generation", "reward", "preference", "conductor"):
        tree[name] = {**tree.get(name, {}), "port": 2}
    return settings_of({**tree, "queue": queue, "security": {"authentication": False}})


def awaited(found: RunSettings) -> AwaitedJobs:
    return AwaitedJobs(found, Results(found, PolicyStore(found.policy_url, found.run)))


def make_fleet(root: Path, learner: int = 1) -> ExternalFleet:
    found = settings(root, learner, url="redis://127.0.0.1:1/0")
    return ExternalFleet(found, awaited(found))


class FakeLearner(learner_pb2_grpc.LearnerServiceServicer):
    """Trains, or refuses callers."""

    def __init__(self) -> None:
        self.refusing = False

    async def GetStatus(self, request: Any, context: Any) -> learner_pb2.GetStatusResponse:
        if self.refusing:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, "this bearer token is unknown")
        return learner_pb2.GetStatusResponse(state=learner_pb2.LEARNER_STATE_TRAINING)


@pytest.fixture
async def learner() -> AsyncIterator[tuple[FakeLearner, int]]:
    server, service = grpc.aio.server(), FakeLearner()
    learner_pb2_grpc.add_LearnerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, port
    await server.stop(None)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.conductor.waiting.POLL_S", 0.01)
    monkeypatch.setattr("honed.conductor.external.WATCH_S", 0.01)


async def test_it_starts_and_ends_nothing(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    with pytest.raises(FailedPrecondition, match="scale generation where it is deployed"):
        await fleet.scale("generation", 2)
    with pytest.raises(InvalidArgument, match="runs as one process"):
        await fleet.scale("learner", 2)


async def test_a_service_that_does_not_come_is_waited_for_under_an_alarm(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    waiting = asyncio.ensure_future(fleet.start("learner", 0.05))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 60, "the alarm")
    assert "no learner service is ready at 127.0.0.1:1: start one by `honed serve learner`" in fleet.states()[0].alarm
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_a_redis_that_does_not_answer_is_waited_for_under_an_alarm(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path, 1)
    waiting = asyncio.ensure_future(fleet.start_redis(0.05))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 60, "the alarm")
    assert fleet.states()[0].alarm.startswith("Redis does not answer")
    await asyncio.sleep(0.2)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)


async def test_an_alarm_says_why_a_service_does_not_count_as_ready(tmp_path: Path, learner: tuple[FakeLearner, int]) -> None:
    service, port = learner
    service.refusing = True
    fleet = make_fleet(tmp_path, port)
    waiting = asyncio.ensure_future(fleet.start("learner", 0.05))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 60, "the alarm")
    assert "(this bearer token is unknown; every service needs the same tokens" in fleet.states()[0].alarm
    service.refusing = False
    async with asyncio.timeout(10):
        await waiting
    assert (fleet.states()[0].ready, fleet.states()[0].alarm) == (True, "")


async def test_a_service_that_is_lost_later_is_not_ready_until_it_is_back(
    tmp_path: Path, learner: tuple[FakeLearner, int]
) -> None:
    service, port = learner
    fleet = make_fleet(tmp_path, port)
    await fleet.start("learner", 10)
    [state] = fleet.states()
    async with fleet.watched():
        service.refusing = True
        await until(lambda: state.alarm and not state.ready, 60, "it is missed")
        service.refusing = False
        await until(lambda: state.ready and not state.alarm, 60, "it is back")


async def test_without_the_address_of_a_service_it_says_which_one_to_set(tmp_path: Path) -> None:
    found = settings(tmp_path, 0, url="redis://127.0.0.1:1/0")
    with pytest.raises(FailedPrecondition, match=r"learner\.address is not set, and 127\.0\.0\.1:0 leads nowhere"):
        ExternalFleet(found, awaited(found))


async def test_pretraining_elsewhere_is_done_when_the_base_version_is_in_the_store(tmp_path: Path) -> None:
    fleet = make_fleet(tmp_path)
    waiting = asyncio.ensure_future(fleet.run_job("pretrain"))
    await until(lambda: fleet.states() and fleet.states()[0].alarm, 60, "the alarm")
    assert "run `honed job pretrain` once with this run's settings" in fleet.states()[0].alarm
    assert not waiting.done()
    version = tmp_path / "run" / "policy" / "small" / "0.0"
    version.mkdir(parents=True)
    (version / "manifest.json").write_text("{}")
    async with asyncio.timeout(10):
        await waiting
    assert fleet.states() == []


async def test_without_a_redis_of_its_own_or_with_processes_it_says_what_to_set(tmp_path: Path) -> None:
    found = settings(tmp_path)
    with pytest.raises(FailedPrecondition, match=r"queue\.url is not set"):
        ExternalFleet(found, awaited(found))
    with pytest.raises(FailedPrecondition, match=r"conductor\.launcher is process"):
        await main.run(settings_of(run_tree(tmp_path)))

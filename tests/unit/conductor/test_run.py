"""Claims about a run over services that are made up: what it waits for, and what a failure leaves standing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.run import run_tree, settings_of, until

from honed.artifacts.store import PolicyStore
from honed.conductor.launcher import ProcessState
from honed.conductor.run import Run
from honed.kit.errors import HonedError, Unavailable
from honed.v1 import conductor_pb2, preference_pb2, preference_pb2_grpc


class FakeFleet:
    """Everything starts at once; jobs are counted, and may fail."""

    redis_url = None

    def __init__(self, preference: str) -> None:
        self.preference = preference
        self.jobs: list[str] = []
        self.failing: set[str] = set()
        self.given_up: ProcessState | None = None
        self.ended: list[str] = []

    async def start_redis(self, timeout_s: float) -> None: ...

    async def start(self, service: str, timeout_s: float) -> None:
        if service == "learner":
            await asyncio.Event().wait()

    async def run_job(self, job: str) -> None:
        self.jobs.append(job)
        if job in self.failing:
            raise Unavailable(f"{job} failed (exit code 1)")

    def target(self, service: str) -> str:
        return self.preference

    async def scale(self, service: str, replicas: int) -> list[str]:
        self.ended.append(service)
        return []

    def states(self) -> list[ProcessState]:
        return [self.given_up] if self.given_up else []

    def address(self, process: str) -> str:
        return ""


class FakePreference(preference_pb2_grpc.PreferenceServiceServicer):
    """Counts what it is told to."""

    def __init__(self) -> None:
        self.by_kind: dict[str, int] = {}

    async def GetStats(self, request: Any, context: Any) -> preference_pb2.GetStatsResponse:
        return preference_pb2.GetStatsResponse(by_kind=self.by_kind)


@pytest.fixture
async def preference() -> AsyncIterator[tuple[FakePreference, str]]:
    server, service = grpc.aio.server(), FakePreference()
    preference_pb2_grpc.add_PreferenceServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


def make_run(root: Path, target: str) -> tuple[Run, FakeFleet]:
    tree = run_tree(root, reward={"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]})
    settings = settings_of({**tree, "security": {"authentication": False}})
    fleet = FakeFleet(target)
    return Run(settings, fleet, PolicyStore(settings.policy_url, settings.run)), fleet


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.conductor.run.POLL_S", 0.01)


async def test_training_waits_for_judgements_and_says_how_to_bring_some(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    run, fleet = make_run(tmp_path, target)
    service.by_kind = {"thumbs": 3}  # nothing that orders two texts
    executing = asyncio.ensure_future(run.execute())
    await until(lambda: "honed judge import" in run.state.doing, 10, "it waits")
    assert fleet.jobs == ["pretrain"]
    service.by_kind = {"thumbs": 3, "pairwise": 1}
    await until(lambda: fleet.jobs == ["pretrain", "reward-model"], 10, "the job runs")
    assert "waiting" not in run.state.doing
    run.stopping.set()
    await executing
    assert run.state.phase == conductor_pb2.RUN_PHASE_STOPPED


async def test_a_failed_job_is_an_error_and_an_alarm_and_ends_no_service(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, fleet = make_run(tmp_path, target)
    fleet.failing = {"reward-model"}
    with pytest.raises((HonedError, BaseExceptionGroup)):
        await run.execute()
    assert run.state.phase == conductor_pb2.RUN_PHASE_FAILED
    assert run.alarms() == ["training failed, serving goes on: reward-model failed (exit code 1)"]
    assert fleet.ended == []


async def test_a_learner_that_is_given_up_fails_training(tmp_path: Path, preference: tuple[FakePreference, str]) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, fleet = make_run(tmp_path, target)
    executing = asyncio.ensure_future(run.execute())
    await until(lambda: run.state.phase == conductor_pb2.RUN_PHASE_PPO, 10, "the learner starts")
    fleet.given_up = ProcessState("learner", alarm="learner died 11 times in 600 s", given_up=True)
    with pytest.raises(Unavailable, match="learner died 11 times"):
        await executing
    assert "learner died 11 times in 600 s" in run.alarms()

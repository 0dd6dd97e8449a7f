"""Claims about a run over services that are made up: what it waits for, and what a failure leaves standing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.support.run import run_tree, settings_of, until

from honed.artifacts.store import PolicyStore
from honed.cli.run import _up
from honed.conductor.launcher import ProcessState
from honed.conductor.run import Run
from honed.kit.errors import FailedPrecondition, HonedError, Unavailable
from honed.kit.progress import JobProgress
from honed.queue.members import Member
from honed.v1 import (
    common_pb2,
    conductor_pb2,
    learner_pb2,
    learner_pb2_grpc,
    preference_pb2,
    preference_pb2_grpc,
)


class FakeFleet:
    """Everything starts at once; jobs are counted, and may fail."""

    redis_url = None

    def __init__(self, preference: str) -> None:
        self.preference = preference
        self.jobs: list[str] = []
        self.failing: dict[str, list[Exception]] = {}
        self.learner = ProcessState("learner")
        self.started: list[str] = []
        self.ended: list[str] = []

    async def start_redis(self, timeout_s: float) -> None: ...

    async def start(self, service: str, timeout_s: float) -> None:
        self.started.append(service)
        if service == "learner":
            await asyncio.Event().wait()

    async def run_job(self, job: str) -> None:
        self.jobs.append(job)
        if self.failing.get(job):
            raise self.failing[job].pop(0)

    def job_progress(self, job: str) -> JobProgress | None:
        return None

    def target(self, service: str) -> str:
        return self.preference

    async def scale(self, service: str, replicas: int) -> list[str]:
        self.ended.append(service)
        return []

    def states(self) -> list[ProcessState]:
        return [self.learner]

    def address(self, process: str) -> str:
        return ""


class FakePreference(preference_pb2_grpc.PreferenceServiceServicer):
    """Counts what it is told to."""

    def __init__(self) -> None:
        self.by_kind: dict[str, int] = {}
        self.failing: list[grpc.StatusCode] = []
        self.keys: set[str] = set()

    async def ImportJudgements(self, requests: Any, context: Any) -> preference_pb2.ImportJudgementsResponse:
        async for request in requests:
            self.keys.add(request.idempotency_key)
            if self.failing:
                await context.abort(self.failing.pop(0), "killed in the middle")
        return preference_pb2.ImportJudgementsResponse()

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


class FakeLearner(learner_pb2_grpc.LearnerServiceServicer):
    """Stands where a test says."""

    def __init__(self) -> None:
        self.status = learner_pb2.GetStatusResponse(
            state=learner_pb2.LEARNER_STATE_FINISHED, version=common_pb2.PolicyVersion(fence=1, step=4), target_steps=4
        )

    def go_back(self, step: int, fence: int) -> None:
        self.status.version.step, self.status.version.fence = step, fence
        self.status.state = learner_pb2.LEARNER_STATE_WAITING

    async def GetStatus(self, request: Any, context: Any) -> learner_pb2.GetStatusResponse:
        return self.status


@pytest.fixture
async def learner() -> AsyncIterator[tuple[FakeLearner, str]]:
    server, service = grpc.aio.server(), FakeLearner()
    learner_pb2_grpc.add_LearnerServiceServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"127.0.0.1:{port}"
    await server.stop(None)


def make_run(root: Path, target: str, phases: list[str] | None = None, **sections: Mapping[str, Any]) -> tuple[Run, FakeFleet]:
    tree = run_tree(root, **sections, reward={"scorers": [{"name": "people", "kind": "reward_model", "source": "trained"}]})
    settings = settings_of({**tree, "phases": phases, "security": {"authentication": False}})
    fleet = FakeFleet(target)
    return Run(settings, fleet, PolicyStore(settings.policy_url, settings.run)), fleet


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.conductor.run.POLL_S", 0.01)
    monkeypatch.setattr("honed.conductor.online.POLL_S", 0.01)
    monkeypatch.setattr("honed.conductor.run.FIRST_PAUSE_S", 0.05)
    monkeypatch.setattr("honed.conductor.run.LONGEST_PAUSE_S", 0.1)


async def test_training_waits_for_judgements_and_says_how_to_bring_some(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    run, fleet = make_run(tmp_path, target)
    service.by_kind = {"thumbs": 3}  # nothing that orders two texts
    executing = asyncio.ensure_future(run.execute())
    await until(lambda: "honed judge import" in run.state.doing, 60, "it waits")
    assert fleet.jobs == ["pretrain"]
    service.by_kind = {"thumbs": 3, "pairwise": 1}
    await until(lambda: fleet.jobs == ["pretrain", "reward-model"], 60, "the job runs")
    assert "waiting" not in run.state.doing
    run.stopping.set()
    await executing
    assert run.state.phase == conductor_pb2.RUN_PHASE_STOPPED


@pytest.mark.parametrize("best_of", [None, 4])
async def test_a_run_without_the_online_phase_serves_its_reward_and_is_measured(
    tmp_path: Path, preference: tuple[FakePreference, str], monkeypatch: pytest.MonkeyPatch, best_of: int | None
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    data = {} if best_of is None else {"data": {"evaluation": {"best_of": best_of}}}
    run, fleet = make_run(tmp_path, target, ["reward_model"], **data)
    measured: list[str] = []

    def measure(name: str) -> Any:
        async def measure() -> None:
            measured.append(f"{name} with {', '.join(sorted(fleet.started))}")

        return measure

    for name in ("before", "after"):
        monkeypatch.setattr(run.evaluation, name, measure(name))
    await run.execute()
    assert run.state.phase == conductor_pb2.RUN_PHASE_FINISHED
    up = "with generation, preference, reward"
    assert measured == ([f"before {up}"] if best_of is None else [f"before {up}", f"after {up}"])


async def test_a_failed_job_is_an_error_and_an_alarm_and_ends_no_service(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, fleet = make_run(tmp_path, target)
    fleet.failing = {"reward-model": [FailedPrecondition("reward-model failed (exit code 1)")]}
    with pytest.raises((HonedError, BaseExceptionGroup)):
        await run.execute()
    assert run.state.phase == conductor_pb2.RUN_PHASE_FAILED
    assert run.alarms() == ["training failed, serving goes on: reward-model failed (exit code 1)"]
    assert fleet.ended == []


async def test_a_job_that_may_succeed_later_is_tried_again_under_an_alarm(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, fleet = make_run(tmp_path, target)
    fleet.failing = {"pretrain": [Unavailable("pretrain failed (killed by SIGKILL)")] * 3}
    executing = asyncio.ensure_future(run.execute())
    await until(run.alarms, 60, "an alarm")
    assert run.alarms() == ["pretraining: pretrain failed (killed by SIGKILL); it is tried again"]
    await until(lambda: fleet.jobs == ["pretrain"] * 4 + ["reward-model"], 60, "the run goes on")
    assert run.alarms() == []
    run.stopping.set()
    await executing


async def test_a_preference_service_that_is_killed_during_the_import_ends_no_run(
    tmp_path: Path, preference: tuple[FakePreference, str]
) -> None:
    service, target = preference
    service.failing = [grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNAVAILABLE]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(f'{{"prompt": "", "chosen": "good {i}", "rejected": "bad"}}\n' for i in range(3)))
    run, _ = make_run(tmp_path, target, data={"judgements": [{"file": str(pairs), "format": "trl"}]})
    executing = asyncio.ensure_future(run.execute())
    await until(lambda: "import of judgements" in run.state.alarms, 60, "an alarm")
    await until(lambda: run.state.imported == 3, 60, "the import ends")
    assert len(service.keys) == 3
    assert run.alarms() == []
    run.stopping.set()
    await executing


async def test_judgements_that_are_wrong_end_training(tmp_path: Path, preference: tuple[FakePreference, str]) -> None:
    service, target = preference
    service.failing = [grpc.StatusCode.INVALID_ARGUMENT]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "", "chosen": "good", "rejected": "bad"}\n')
    run, _ = make_run(tmp_path, target, data={"judgements": [{"file": str(pairs), "format": "trl"}]})
    with pytest.raises(BaseExceptionGroup):
        await run.execute()
    assert run.state.error == "killed in the middle"


@pytest.mark.parametrize("end_on_failure", [False, True])
async def test_a_learner_that_dies_again_and_again_ends_only_a_run_that_is_to_end_with_it(
    tmp_path: Path, preference: tuple[FakePreference, str], end_on_failure: bool
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, fleet = make_run(tmp_path, target)
    executing = asyncio.ensure_future(run.execute(end_on_failure=end_on_failure))
    await until(lambda: run.state.phase == conductor_pb2.RUN_PHASE_PPO, 60, "the learner starts")
    fleet.learner.alarm = "learner died 11 times in 600 s"
    if end_on_failure:
        with pytest.raises(Unavailable, match="learner died 11 times"):
            await executing
    else:
        await asyncio.sleep(0.1)
        assert not executing.done()
        run.stopping.set()
        await executing
    assert "learner died 11 times in 600 s" in run.alarms()


@pytest.mark.parametrize("end_on_failure", [False, True])
async def test_a_scorer_that_never_gives_a_score_ends_only_a_run_that_is_to_end_with_it(
    tmp_path: Path, preference: tuple[FakePreference, str], end_on_failure: bool
) -> None:
    service, target = preference
    service.by_kind = {"pairwise": 1}
    run, _ = make_run(tmp_path, target)
    executing = asyncio.ensure_future(run.execute(end_on_failure=end_on_failure))
    await until(lambda: run.state.phase == conductor_pb2.RUN_PHASE_PPO, 60, "the learner starts")
    facts = {"alarm": "scorer 'f' returned nan: mend it", "broken": "scorer 'f' returned nan"}
    await run.roster.note({"reward": [Member("reward-0", "b:1", facts=facts)]})
    assert "reward-0: scorer 'f' returned nan: mend it" in run.alarms()
    if end_on_failure:
        with pytest.raises(Unavailable, match="scorer 'f' returned nan"):
            await executing
        assert run.state.error == "scorer 'f' returned nan"
    else:
        await asyncio.sleep(0.1)
        assert not executing.done()
        run.stopping.set()
        await executing


async def test_a_finished_run_trains_on_when_its_learner_goes_back_whoever_asked_for_it(
    tmp_path: Path, learner: tuple[FakeLearner, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, target = learner
    run, _ = make_run(tmp_path, target)
    trained: list[int] = []

    async def train() -> None:
        trained.append(service.status.version.step)
        service.status.state, service.status.version.step = learner_pb2.LEARNER_STATE_FINISHED, 4

    monkeypatch.setattr(run, "_loop", train)
    run.state.enter(conductor_pb2.RUN_PHASE_FINISHED, "done")
    standing_by = asyncio.ensure_future(run.stand_by())
    await until(lambda: run.state.learner is not None, 60, "it looks")
    assert trained == []
    service.go_back(2, fence=2)
    await until(lambda: trained == [2] and run.state.phase == conductor_pb2.RUN_PHASE_FINISHED, 60, "it trains on")
    run.stopping.set()
    await standing_by


async def test_training_that_fails_after_a_roll_back_leaves_serving_alone_and_goes_on_after_the_next_one(
    tmp_path: Path, learner: tuple[FakeLearner, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    service, target = learner
    run, _ = make_run(tmp_path, target)
    failures = [Exception("the tokenizer is damaged"), FailedPrecondition("the streams were not empty")]
    tries: list[int] = []

    async def train() -> None:
        tries.append(service.status.version.step)
        if failures:
            raise failures.pop(0)
        service.status.state, service.status.version.step = learner_pb2.LEARNER_STATE_FINISHED, 4

    monkeypatch.setattr(run, "_loop", train)
    service.go_back(2, fence=2)
    standing_by = asyncio.ensure_future(run.stand_by())
    await until(lambda: run.state.error == "the tokenizer is damaged", 60, "the first failure")
    service.go_back(1, fence=3)
    await until(lambda: run.state.error == "the streams were not empty", 60, "the second failure")
    assert run.alarms() == ["training failed, serving goes on: the streams were not empty"]
    assert (tries, standing_by.done()) == ([2, 1], False)
    service.go_back(0, fence=4)
    await until(lambda: run.state.phase == conductor_pb2.RUN_PHASE_FINISHED, 60, "the third try succeeds")
    assert run.alarms() == []
    run.stopping.set()
    await standing_by


async def test_honed_up_goes_on_serving_after_any_failure_of_training(
    tmp_path: Path, learner: tuple[FakeLearner, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = make_run(tmp_path, learner[1])

    async def fail(*_: object) -> None:
        raise Exception("what a library raises")  # as the tokenizer library does

    monkeypatch.setattr(run, "_phases", fail)

    @asynccontextmanager
    async def ours(_: object) -> AsyncIterator[Run]:
        yield run

    monkeypatch.setattr("honed.conductor.local.local_run", ours)
    for name in ("configure_logging", "log_to"):
        monkeypatch.setattr(f"honed.kit.log.{name}", lambda *_: None)
    run.workspace.root.mkdir(parents=True)
    up = asyncio.ensure_future(_up(run.settings, exit_on_failure=False))
    await until(lambda: run.state.error == "what a library raises", 60, "the failure")
    await asyncio.sleep(0.2)
    assert not up.done()
    run.stopping.set()
    with pytest.raises(Exception, match="what a library raises"):
        await up

"""Claims about the learner and the preference service beside peers of the last release; see `tests.support.released`."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from tests.support.judgements import full, pair
from tests.support.listening import serving
from tests.support.released import Released
from tests.support.run import run_tree, settings_of

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.conductor.judgements import import_judgements
from honed.conductor.online import OnlineLoop
from honed.conductor.run import Run
from honed.conductor.settings import JudgementsFile
from honed.conductor.state import RunState
from honed.conductor.summary import write_summary
from honed.kit.server import Servicer
from honed.learner.data.judgement import Ranking
from honed.learner.jobs.reward_model import _freeze, _Training
from honed.learner.loop.journal import Journal
from honed.learner.loop.records import UpdateRecord
from honed.learner.service import LearnerService, LoadedLearner
from honed.learner.status import LearnerStatus
from honed.models.tokenizer import load_tokenizer
from honed.preference.service import ImportBatch, PreferenceService
from honed.preference.store import PreferenceStore
from honed.v1 import learner_pb2, learner_pb2_grpc, preference_pb2, preference_pb2_grpc

NONE: Any = None  # parts that no call here asks
RELEASED = Released()


@pytest.fixture
async def learner_address(tmp_path: Path) -> AsyncIterator[str]:
    """A learner of the last release, two updates in, that has dropped rollouts and is in trouble."""
    status = LearnerStatus(learner_pb2.LEARNER_STATE_TRAINING, version=VersionId(1, 2), served=VersionId(1, 1))
    status.dropped, status.alarms = {"stale": 7}, {"disk": "the disk is full"}
    journal = Journal(tmp_path)
    for step in (1, 2):
        journal.add_update(UpdateRecord(step, 1e9, {"loss": 0.5 * step}, [f"r-{step}/0"]))
    loaded: asyncio.Future[LoadedLearner] = asyncio.get_running_loop().create_future()
    loaded.set_result(LoadedLearner(NONE, journal, NONE, NONE))
    service = LearnerService("run", 9, status, loaded)
    servicer = Servicer("honed.v1.LearnerService", learner_pb2_grpc.add_LearnerServiceServicer_to_server, service)
    async with (
        serving([servicer]) as server,
        RELEASED.before(f"127.0.0.1:{server.ports[0]}") as address,
    ):
        yield address


@pytest.fixture
async def learner(learner_address: str) -> AsyncIterator[learner_pb2_grpc.LearnerServiceStub]:
    async with grpc.aio.insecure_channel(learner_address) as channel:
        yield learner_pb2_grpc.LearnerServiceStub(channel)


async def test_a_conductor_reads_where_an_old_learner_stands(
    learner: learner_pb2_grpc.LearnerServiceAsyncStub, tmp_path: Path
) -> None:
    state = RunState()
    status = await OnlineLoop(settings_of(run_tree(tmp_path)), NONE, state)._status(learner)
    assert status is not None
    assert (status.state, status.version.step, status.served_version.step) == (learner_pb2.LEARNER_STATE_TRAINING, 2, 1)
    assert (status.target_steps, status.rollouts_trained, dict(status.rollouts_dropped)) == (9, 2, {"stale": 7})
    assert state.learner == status
    assert state.alarms == {}, "the release did not know them; what it says nothing of is no alarm"


async def test_a_watcher_gets_the_metrics_of_an_old_learner_without_what_is_new(
    learner: learner_pb2_grpc.LearnerServiceAsyncStub,
) -> None:
    request = learner_pb2.WatchMetricsRequest(no_follow=True, with_rollouts=True)
    metrics = [answer.metrics async for answer in learner.WatchMetrics(request, timeout=10)]
    assert [(each.step, dict(each.values), list(each.rollout_ids)) for each in metrics] == [
        (1, {"loss": 0.5}, []), (2, {"loss": 1.0}, [])
    ]  # fmt: skip
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in learner.WatchPushes(learner_pb2.WatchPushesRequest(no_follow=True), timeout=10):
            pass
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED


async def test_a_report_has_what_an_old_learner_knows(learner_address: str, tmp_path: Path) -> None:
    """Its updates, though it cannot tell of its pushes."""
    settings = settings_of(run_tree(tmp_path, security={"authentication": False}))
    fleet: Any = SimpleNamespace(target=lambda service: learner_address, states=list)
    run = Run(settings, fleet, PolicyStore(settings.policy_url, settings.run))
    run.workspace.root.mkdir()
    await write_summary(run)
    report = json.loads(run.workspace.report_json.read_text())
    assert (report["updates"], report["versions_pushed"]) == (2, 0)


@pytest.fixture
async def preference(tmp_path: Path) -> AsyncIterator[preference_pb2_grpc.PreferenceServiceStub]:
    """The preference service behind a peer of the last release: to a client an old service, to the service an old client."""
    ticks, names = itertools.count(1_800_000_000_000_000), itertools.count(1)
    url = f"sqlite:///{tmp_path}/honed.db"
    async with PreferenceStore(url, clock=lambda: next(ticks), new_id=lambda: f"snapshot-{next(names)}") as store:
        service = PreferenceService(store, ImportBatch(judgements=10))
        add = preference_pb2_grpc.add_PreferenceServiceServicer_to_server
        async with (
            serving([Servicer("honed.v1.PreferenceService", add, service)]) as server,
            RELEASED.before(f"127.0.0.1:{server.ports[0]}") as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            yield preference_pb2_grpc.PreferenceServiceStub(channel)


async def test_a_job_trains_on_the_export_of_an_old_preference_service(
    preference: preference_pb2_grpc.PreferenceServiceAsyncStub, tmp_path: Path
) -> None:
    file = tmp_path / "judgements.jsonl"
    rows = [{"prompt": "", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(3)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert await import_judgements(preference, JudgementsFile(file=file, format="trl")) == 3
    settings = settings_of(run_tree(tmp_path))
    tokenizer = load_tokenizer(tmp_path / "model")
    snapshot = await _freeze(preference, "run", tmp_path)
    judgements, left_out = await _Training(settings, NONE, NONE, tmp_path)._exported(preference, snapshot, tokenizer)
    assert (len(snapshot.sha256), left_out) == (64, 0)
    assert [[tokenizer.decode(ids) for ids in row.responses] for row in judgements if isinstance(row, Ranking)] == [
        [f"good {n}", f"bad {n}"] for n in range(3)
    ]


async def test_an_old_client_and_this_preference_service_understand_each_other(
    preference: preference_pb2_grpc.PreferenceServiceAsyncStub,
) -> None:
    request = preference_pb2.RecordJudgementRequest(judgement=full(), idempotency_key="key")
    assert not (await preference.RecordJudgement(request, timeout=10)).duplicate
    assert (await preference.RecordJudgement(request, timeout=10)).duplicate
    (exported,) = [
        answer.judgement async for answer in preference.ExportJudgements(preference_pb2.ExportJudgementsRequest(), timeout=10)
    ]
    exported.ClearField("id")
    assert exported == full()
    assert (await preference.GetStats(preference_pb2.GetStatsRequest(), timeout=10)).judgements == 1


async def test_a_refusal_reaches_an_old_client_with_its_code(
    preference: preference_pb2_grpc.PreferenceServiceAsyncStub,
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await preference.RecordJudgement(preference_pb2.RecordJudgementRequest(judgement=pair(1, annotator="")), timeout=10)
    assert unary.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        async for _ in preference.ExportJudgements(preference_pb2.ExportJudgementsRequest(snapshot_id="none"), timeout=10):
            pass
    assert streamed.value.code() == grpc.StatusCode.NOT_FOUND

"""Claims about a run that is tracked: its phases, its updates, what it came to, and a conductor that was killed in between."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient
from tests.support.run import until
from tests.support.tracking import JournalLearner, tracker_environment
from tests.unit.conductor.test_run import FakeFleet, make_run

from honed.conductor import record, tracked
from honed.conductor.run import Run
from honed.kit.errors import FailedPrecondition
from honed.kit.progress import JobProgress
from honed.v1 import conductor_pb2

__all__ = ["tracker_environment"]


class Fleet(FakeFleet):
    """Services that are made up, with a job that tells its steps."""

    progress: JobProgress | None = None

    def job_progress(self, job: str) -> JobProgress | None:
        return self.progress


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_LOOK_EVERY_S", 0.02)
    monkeypatch.setattr(tracked, "_LOOK_EVERY_S", 0.02)


@pytest.fixture
async def learner(tmp_path: Path) -> AsyncIterator[JournalLearner]:
    made = JournalLearner(tmp_path / "learner")
    async with made.serving():
        yield made
        await made.journal.close()


@asynccontextmanager
async def started(root: Path, learner: JournalLearner, stop_s: float = 20) -> AsyncIterator[tuple[Run, Fleet]]:
    """One start of the conductor."""
    run, _ = make_run(root, learner.target, tracking={"mlflow": {"uri": str(root / "mlruns")}, "stop_s": stop_s})
    fleet = Fleet(learner.target)
    run.fleet = fleet
    async with record.recorded(run), tracked.tracked(run):
        yield run, fleet


def history(client: MlflowClient, name: str) -> list[tuple[int, float]]:
    (kept,) = client.search_runs([client.get_experiment_by_name("honed").experiment_id])
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(kept.info.run_id, name))


async def test_one_run_of_mlflow_has_the_phases_the_updates_and_the_report_over_two_starts(
    tmp_path: Path, learner: JournalLearner
) -> None:
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    async with started(tmp_path, learner) as (run, fleet):
        run.state.enter(conductor_pb2.RUN_PHASE_PRETRAIN, "training the language model")
        for step in (1, 2):
            fleet.progress = JobProgress(0.1 * step, f"step {step}", {"loss": 1.0 / step}, "pretrain", step)
            await until(lambda step=step: len(list(record.read_phases(run.workspace.phase_curves))) == step, 60, "it is noted")
        run.state.enter(conductor_pb2.RUN_PHASE_PPO, "online loop")
        run.state.loop_started_at = time.time()
        for step in (1, 2):
            await learner.train(step)
        noted = run.workspace.tracking / "mlflow.json"
        await until(lambda: noted.exists() and len(json.loads(noted.read_text())["sent"]) == 2, 60, "both series are sent")
    assert history(client, "pretrain/loss") == [(1, 1.0), (2, 0.5)]
    assert history(client, "kl") == [(1, 0.1), (2, 0.2)]
    first = record.read_record(run.workspace)
    assert first is not None
    assert first.state == "online"

    await learner.train(3)
    async with started(tmp_path, learner) as (run, _):
        run.state.loop_started_at = time.time()
        run.state.learner = learner.status(3)
        run.state.enter(conductor_pb2.RUN_PHASE_FINISHED, "done")
        run.state.ended_at = time.time()
        run.workspace.report_json.write_text(json.dumps({"outcome": "finished", "reward_after": 1.5}))
        experiment = client.get_experiment_by_name("honed").experiment_id
        await until(lambda: client.search_runs([experiment])[0].info.status == "FINISHED", 60, "the outcome is sent")
        run.workspace.report_html.write_text("<html></html>")  # it is drawn after the figures are written
    assert history(client, "pretrain/loss") == [(1, 1.0), (2, 0.5)]
    assert history(client, "kl") == [(1, 0.1), (2, 0.2), (3, 0.3)]
    assert history(client, "report/reward_after") == [(3, 1.5)]
    (kept,) = client.search_runs([experiment])
    assert kept.data.params["learner.batch"] == str(run.settings.learner.batch)
    assert {file.path for file in client.list_artifacts(kept.info.run_id)} == {"report.json", "report.html"}
    last = record.read_record(run.workspace)
    assert last is not None
    assert (last.state, last.started_at) == ("finished", first.started_at)


async def test_a_run_that_fails_is_failed_in_its_tracker_too(tmp_path: Path, learner: JournalLearner) -> None:
    async def fail() -> None:
        async with started(tmp_path, learner) as (run, _):
            run.state.enter(conductor_pb2.RUN_PHASE_FAILED, "training failed")
            run.state.ended_at = time.time()
            raise FailedPrecondition("no prompts")

    with pytest.raises(FailedPrecondition):
        await fail()
    client = MlflowClient((tmp_path / "mlruns").as_uri())
    (kept,) = client.search_runs([client.get_experiment_by_name("honed").experiment_id])
    assert kept.info.status == "FAILED"


async def test_a_store_that_cannot_be_written_holds_no_run_up(tmp_path: Path, learner: JournalLearner) -> None:
    (tmp_path / "mlruns").write_text("a file where a directory should be")
    async with started(tmp_path, learner, stop_s=0.2) as (run, _):
        run.state.loop_started_at = time.time()
        await learner.train(1)
    assert not (run.workspace.tracking / "mlflow.json").exists()
    async with started(tmp_path, learner) as (run, _):  # somebody has put it right
        (tmp_path / "mlruns").unlink()
        run.state.loop_started_at = time.time()
        run.state.learner = learner.status(1)
    assert history(MlflowClient((tmp_path / "mlruns").as_uri()), "kl") == [(1, 0.1)]

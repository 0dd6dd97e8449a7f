"""Claims about runs in MLflow, read back by its own client from files and from SQLite."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient
from tests.support.tracking import RUN, update

from honed.tracking.mlflow_tracker import MlflowTracker
from honed.tracking.port import UPDATES, Mark, Outcome, Point


class Store:
    """One store, and what it has of a run."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = MlflowClient(uri)

    def tracker(self, experiment: str = "tests") -> MlflowTracker:
        return MlflowTracker(self.uri, experiment)

    def run(self, run_id: str) -> Any:
        return self.client.get_run(run_id)

    def history(self, run_id: str, name: str) -> list[tuple[int, float]]:
        history = self.client.get_metric_history(run_id, name)
        return [(metric.step, metric.value) for metric in sorted(history, key=lambda metric: (metric.step, metric.timestamp))]


@pytest.fixture
def files(tmp_path: Path) -> Store:
    return Store((tmp_path / "mlruns").as_uri())


def test_a_run_has_its_parameters_every_update_and_what_it_came_to(files: Store, tmp_path: Path) -> None:
    tracker = files.tracker()
    opened = tracker.open(RUN, None, {})
    tracker.log([Point("pretrain", 40, 1_789_999_000_000, {"loss": 2.5}), update(1, score_mean=0.5), update(2)])
    report = tmp_path / "report.html"
    report.write_text("<p>")
    tracker.finish(Outcome("finished", 1_790_000_009_000, 2, {"report/agreement": 0.75}, [report]))
    run = files.run(opened.id)
    assert (run.info.run_name, run.info.status, run.info.start_time) == ("shop", "FINISHED", 1_790_000_000_000)
    assert run.data.params == {"learner.steps": "16", "seed": "7"}
    assert run.data.tags["honed.algorithm"] == "grpo"
    assert files.history(opened.id, "kl") == [(1, 0.1), (2, 0.2)]
    assert files.history(opened.id, "score_mean") == [(1, 0.5)]
    assert files.history(opened.id, "pretrain/loss") == [(40, 2.5)]
    assert run.data.metrics["report/agreement"] == 0.75
    assert [file.path for file in files.client.list_artifacts(opened.id)] == ["report.html"]
    assert files.client.get_experiment_by_name("tests").experiment_id == run.info.experiment_id


def test_a_conductor_that_was_killed_finds_how_much_is_there_and_doubles_no_half_batch(files: Store) -> None:
    before = files.tracker()
    run_id = before.open(RUN, None, {}).id
    before.log([update(1), update(2)])
    files.client.log_batch(run_id, metrics=[Metric("kl", 0.3, update(3).at_ms, 3)])  # and then it was killed
    after = files.tracker()
    opened = after.open(RUN, run_id, {})
    assert opened.id == run_id
    assert opened.sent == {UPDATES: Mark(update(2).at_ms, 2)}
    after.log([update(3, entropy=1.0), update(4)])
    assert files.history(run_id, "kl") == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    assert files.history(run_id, "entropy") == [(3, 1.0)]
    assert files.history(run_id, "update") == [(step, step) for step in (1, 2, 3, 4)]


def test_updates_that_are_made_again_come_under_the_same_step_and_the_later_one_counts(files: Store) -> None:
    tracker = files.tracker()
    run_id = tracker.open(RUN, None, {}).id
    tracker.log([update(1), update(2), update(2, again=60, kl=0.9)])
    assert files.history(run_id, "kl") == [(1, 0.1), (2, 0.2), (2, 0.9)]
    assert files.run(run_id).data.metrics["kl"] == 0.9
    assert tracker.open(RUN, run_id, {}).sent == {UPDATES: Mark(update(2, again=60).at_ms, 2)}


def test_a_run_that_has_ended_goes_on_when_it_trains_on_and_not_before(files: Store) -> None:
    tracker = files.tracker()
    run_id = tracker.open(RUN, None, {}).id
    tracker.finish(Outcome("failed", 1_790_000_001_000, 0))
    again = files.tracker()
    again.open(RUN, run_id, {})
    assert files.run(run_id).info.status == "FAILED"
    again.log([update(1)])
    assert files.run(run_id).info.status == "RUNNING"


def test_a_run_that_somebody_has_deleted_is_begun_anew(files: Store) -> None:
    tracker = files.tracker()
    first = tracker.open(RUN, None, {}).id
    tracker.log([update(1)])
    files.client.delete_run(first)
    opened = files.tracker().open(RUN, first, {UPDATES: Mark(update(1).at_ms, 1)})
    assert opened.id != first
    assert opened.sent == {}


def test_what_is_no_number_and_names_that_mlflow_refuses_are_taken(files: Store) -> None:
    tracker = files.tracker()
    run_id = tracker.open(RUN, None, {}).id
    tracker.log([update(1, **{"agreement#<people>": 1.0, "loss": math.nan, "ratio_max": math.inf})])
    metrics = files.run(run_id).data.metrics
    assert metrics["agreement__people_"] == 1.0
    assert math.isnan(metrics["loss"])
    assert metrics["ratio_max"] == math.inf


def test_long_parameters_are_cut_and_changed_ones_become_tags(files: Store) -> None:
    long = replace(RUN, parameters={**RUN.parameters, **{f"key{number}": "v" for number in range(250)}, "data": "x" * 9000})
    tracker = files.tracker()
    run_id = tracker.open(long, None, {}).id
    kept = files.run(run_id).data.params
    assert len(kept) == 253
    assert kept["data"] == "x" * 5999 + "…"
    tracker.open(replace(long, parameters={**long.parameters, "learner.steps": "32"}), run_id, {})
    run = files.run(run_id)
    assert run.data.params["learner.steps"] == "16"
    assert {name: value for name, value in run.data.tags.items() if "changed" in name} == {"honed.changed.learner.steps": "32"}


def test_more_points_than_one_call_takes_all_arrive(files: Store) -> None:
    tracker = files.tracker()
    run_id = tracker.open(RUN, None, {}).id
    tracker.log([update(step, **{f"m{number}": 1.0 for number in range(30)}) for step in range(1, 101)])
    assert [step for step, _ in files.history(run_id, "m29")] == list(range(1, 101))


def test_sqlite_keeps_a_run_with_its_files_beside_it(tmp_path: Path) -> None:
    store = Store(f"sqlite:///{tmp_path}/runs.db")
    tracker = store.tracker()
    run_id = tracker.open(RUN, None, {}).id
    tracker.log([update(1)])
    tracker.log([update(1)])  # the answer to the first was lost
    report = tmp_path / "report.json"
    report.write_text("{}")
    tracker.finish(Outcome("stopped", 1_790_000_002_000, 1, {}, [report]))
    assert store.history(run_id, "kl") == [(1, 0.1)]
    assert store.run(run_id).info.status == "KILLED"
    assert list((tmp_path / "mlartifacts").rglob("report.json"))

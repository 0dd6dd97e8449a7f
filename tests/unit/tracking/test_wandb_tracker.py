"""Claims about runs in Weights & Biases without its service: the files that `wandb sync` takes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.tracking import RUN, finished_records, history, update

from honed.tracking.port import Outcome, Point
from honed.tracking.settings import WandbSettings
from honed.tracking.wandb_tracker import WandbTracker, has_key


def test_a_run_that_went_on_lies_in_one_directory_as_a_whole(tmp_path: Path) -> None:
    first = WandbTracker(WandbSettings(), tmp_path)
    opened = first.open(RUN, None, {})
    assert opened.sent == {}
    first.log([update(1), update(2)])
    first.close()
    second = WandbTracker(WandbSettings(project="shop"), tmp_path)
    again = second.open(RUN, opened.id, {})
    assert (again.id, again.sent) == (opened.id, {})  # everything is to be sent once more
    second.log([Point("sft", 5, 1_789_999_000_000, {"loss": 2.5}), update(1), update(2), update(2, again=9, kl=0.9)])
    report = tmp_path / "report.html"
    report.write_text("<p>")
    second.finish(Outcome("finished", 1_790_000_009_000, 2, {"report/agreement": 0.75}, [report]))
    records = finished_records(tmp_path)
    rows = [history(record) for record in records if record.HasField("history")]
    assert [(row["update"], row["kl"]) for row in rows if "update" in row] == [(1, 0.1), (2, 0.2), (2, 0.9)]
    assert [(row["sft/step"], row["sft/loss"]) for row in rows if "update" not in row] == [(5, 2.5)]
    (run,) = [record.run for record in records if record.HasField("run")][-1:]
    assert (run.run_id, run.display_name, run.project) == (opened.id, "shop", "shop")
    assert "learner.steps" in str(run.config)
    assert any("report/agreement" in str(record.summary) for record in records if record.HasField("summary"))
    assert list(tmp_path.glob("wandb/offline-run-*/files/report.html"))


def test_auto_is_online_where_there_is_a_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert not has_key()
    login = tmp_path / "login"
    login.write_text("machine api.wandb.ai\n  login user\n  password secret\n")
    monkeypatch.setenv("NETRC", str(login))
    assert has_key()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert not has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert has_key()

"""Claims about `honed runs`: what directories say of their runs, with nothing running and nothing tracked."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from honed.cli.main import app
from honed.conductor.local import alone
from honed.config import RunSettings
from honed.kit.errors import NotFound
from honed.learner.loop.journal import Journal
from honed.learner.loop.records import UpdateRecord
from honed.runs.comparison import compare
from honed.runs.found import choose, find_runs, read_details, read_run
from honed.runs.page import COLOURS, write_page
from honed.settings_file import write_settings
from honed.workspace import Workspace

runner = CliRunner()


def make_run(
    root: Path, name: str, updates: int = 3, state: str = "finished", started_at: float = 1_790_000_000.0, **learner: Any
) -> Workspace:
    """What a run leaves, as its own parts write it."""
    workspace = Workspace(root / name)
    with alone(workspace):
        tree: Mapping[str, Any] = {"run": f"run-{name}", "directory": str(workspace.root), "learner": {"batch": 4, **learner}}
        write_settings(RunSettings.model_validate(tree), workspace.effective_settings)
        workspace.conductor.mkdir()
        record = {"run": f"run-{name}", "algorithm": learner.get("algorithm", "ppo"), "started_at": started_at, "state": state}
        workspace.run_record.write_text(json.dumps(record))
        journal = Journal(workspace.learner)
        for step in range(1, updates + 1):
            values = {"score_mean": step / 2, "kl": step / 10, "episodes": 4.0, "grad_norm": 1.0}
            journal.add_update(UpdateRecord(step, started_at + step, values, [f"r-{step}/0"]))
        if state == "finished":
            workspace.report_json.write_text(json.dumps({"outcome": "finished", "reward_after": 1.5}))
    return workspace


def printed(*arguments: str) -> str:
    result = runner.invoke(app, ["runs", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_list_has_each_run_with_what_it_came_to_the_newest_first(tmp_path: Path) -> None:
    make_run(tmp_path, "old", algorithm="ppo")
    make_run(tmp_path / "group", "new", updates=5, started_at=1_790_009_000.0, algorithm="reinforce")
    make_run(tmp_path, "none", updates=0, state="pretrain", started_at=1_780_000_000.0)
    (tmp_path / "mlruns").mkdir()
    rows = json.loads(printed("list", "--root", str(tmp_path), "--json"))
    assert [(row["name"], row["algorithm"], row["updates"], row["score"], row["kl"], row["state"]) for row in rows] == [
        ("run-new", "reinforce", 5, 2.5, 0.5, "finished"),
        ("run-old", "ppo", 3, 1.5, 0.3, "finished"),
        ("run-none", "ppo", 0, None, None, "interrupted"),
    ]
    shown = printed("list", "--root", str(tmp_path))
    assert "run-new" in shown
    assert str(tmp_path / "group" / "new") in shown


def test_a_run_that_is_up_shows_its_phase_and_one_that_was_killed_is_interrupted(tmp_path: Path) -> None:
    workspace = make_run(tmp_path, "live", state="online")
    workspace.endpoints.write_text("{}")
    with alone(workspace):
        assert read_run(workspace.root).state == "online"
    assert read_run(workspace.root).state == "interrupted"


def test_a_run_of_a_release_without_records_is_read_from_its_settings_and_report(tmp_path: Path) -> None:
    workspace = make_run(tmp_path, "old", algorithm="reinforce")
    workspace.run_record.unlink()
    os.utime(workspace.effective_settings, (1_700_000_000, 1_700_000_000))
    run = read_run(workspace.root)
    assert (run.name, run.algorithm, run.state, run.started_at) == ("run-old", "reinforce", "finished", 1_700_000_000)


def test_a_damaged_journal_is_told_and_hides_no_other_run(tmp_path: Path) -> None:
    broken = make_run(tmp_path, "broken")
    make_run(tmp_path, "whole")
    (journal,) = broken.learner.glob("journal/updates/*.jsonl")
    journal.write_text("no JSON\n" + journal.read_text())
    runs = {run.name: run for run in find_runs(tmp_path)}
    assert "is not JSON" in runs["run-broken"].problem
    assert runs["run-whole"].updates == 3
    comparison = compare([read_details(run) for run in runs.values()])
    assert any("is not JSON" in text for each in comparison.runs for text in each.missing)


def test_runs_are_named_by_name_or_directory_and_what_is_none_is_refused(tmp_path: Path) -> None:
    first, second = make_run(tmp_path, "a"), make_run(tmp_path / "deep", "b")
    chosen = choose(["run-a", str(second.root)], tmp_path)
    assert [run.directory for run in chosen] == [first.root, second.root]
    assert choose(["b"], tmp_path)[0].name == "run-b"
    with pytest.raises(NotFound, match=r"no run 'run-c' .* did you mean run-"):
        choose(["run-c"], tmp_path)
    with pytest.raises(NotFound, match="is no directory"):
        choose(["run-a"], tmp_path / "absent")
    with pytest.raises(ValueError, match="named twice"):
        choose(["run-a", str(first.root)], tmp_path)
    make_run(tmp_path / "other", "a")
    with pytest.raises(ValueError, match="2 runs have the name run-a: name one by its directory"):
        choose(["run-a"], tmp_path)
    failed = runner.invoke(app, ["runs", "compare", "a", "--root", str(tmp_path)])
    assert failed.exit_code == 2
    assert "two runs or more" in failed.output


def test_side_by_side_are_the_settings_that_differ_and_the_figures_and_what_is_missing_is_said(tmp_path: Path) -> None:
    make_run(tmp_path, "a", learning_rate=1e-4)
    make_run(tmp_path, "b", learning_rate=2e-4, updates=5, state="failed")
    result = runner.invoke(app, ["runs", "compare", "a", "b", "--root", str(tmp_path), "--json"])
    found = json.loads(result.stdout)
    assert found["parameters"] == {"learner.learning_rate": ["0.0001", "0.0002"], "run": ["run-a", "run-b"]}
    assert found["figures"]["updates"] == [3.0, 5.0]
    assert found["figures"]["episodes"] == [12.0, 20.0]
    assert found["figures"]["score_mean, last 10"] == [1.0, 1.5]
    assert found["figures"]["report/reward_after"] == [1.5, None]
    assert found["runs"][0]["missing"] == []
    assert "no report" in found["runs"][1]["missing"][0]
    shown = runner.invoke(app, ["runs", "compare", "a", "b", "--root", str(tmp_path)])
    assert "learner.learning_rate" in shown.stdout
    assert "run-b: no report" in shown.stderr


@pytest.fixture
def page(tmp_path: Path) -> str:
    make_run(tmp_path, "a")
    other = make_run(tmp_path, "b", updates=900)
    rows = [{"phase": "pretrain", "step": step, "at": 1.0 * step, "figures": {"loss": 5.0 / step}} for step in (1, 2)]
    other.phase_curves.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"phase": "pretr')
    target = tmp_path / "compare.html"
    printed("compare", "a", "b", "--root", str(tmp_path), "--html", str(target), "--metric", "grad_norm")
    return target.read_text()


def test_the_page_is_whole_and_draws_each_run_in_its_colour_over_updates_and_episodes(page: str) -> None:
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"|<script|@import', page), "it needs nothing beside it"
    titles = ["Score", "KL to the base policy", "grad_norm"]
    assert [page.count(f"<figcaption>{title}</figcaption>") for title in titles] == [2, 2, 2]
    assert "<figcaption>Loss of pretrain</figcaption>" in page
    pictures = page.split("<svg")[1:]
    assert len(pictures) == 7
    assert all(COLOURS[0] in picture and COLOURS[1] in picture for picture in pictures[:6])
    assert len(page) < 400_000, "a long run is thinned out"


def test_a_metric_that_no_run_has_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    runs = [read_details(read_run(make_run(tmp_path, name).root)) for name in ("a", "b")]
    with pytest.raises(ValueError, match="no run has the metric gradnorm; there are episodes, grad_norm, kl, score_mean"):
        write_page(tmp_path / "page.html", compare(runs), ["gradnorm"])

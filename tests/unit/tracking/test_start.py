"""Claims about the run file's section `tracking`: what can be asked for, what is refused, and what is told of a run."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from honed.check.findings import Report
from honed.check.surroundings import check_surroundings
from honed.conductor.local import local_run
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition
from honed.settings_file import SettingsError, load_settings
from honed.tracking.parameters import figures_of, files_of, parameters_of
from honed.tracking.start import asked_for, check_tracking, makers, mlflow_uri
from honed.workspace import Workspace


def settings_of(tmp_path: Path, **sections: Any) -> RunSettings:
    return RunSettings.model_validate({"directory": str(tmp_path / "out" / "shop"), **sections})


def without(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == package else found(name, *rest))


def test_nothing_is_tracked_and_no_library_is_loaded_unless_the_run_file_asks(tmp_path: Path) -> None:
    settings = settings_of(tmp_path)
    assert asked_for(settings.tracking) == []
    assert makers(settings) == {}
    code = (
        "import sys, honed.conductor.local; from honed.config import RunSettings; from honed.tracking.start import makers; "
        "makers(RunSettings.model_validate({'tracking': {'mlflow': {}, 'wandb': {}, 'tensorboard': {}}})); "
        "print([name for name in ('mlflow', 'wandb', 'tensorboardX') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "package"), [("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "tensorboardX")])
async def test_what_is_asked_for_and_not_installed_is_refused_at_the_start_and_by_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str
) -> None:
    without(monkeypatch, package)
    check_tracking(settings_of(tmp_path))
    settings = settings_of(tmp_path, tracking={name: {}}, generation={"engine": "transformers"})
    report = Report()
    check_surroundings(settings, report)
    assert [finding.text for finding in report.errors if finding.where == "tracking"] == [
        f"tracking.{name} is set, and the package {package} is not installed: install honed[{name}], or remove tracking.{name}"
    ]
    with pytest.raises(FailedPrecondition, match=rf"honed\[{name}\]"):
        async with local_run(settings):
            pass
    assert not settings.directory.exists(), "nothing was begun"


def test_sqlite_needs_its_packages_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "alembic")
    check_tracking(settings_of(tmp_path, tracking={"mlflow": {"uri": "http://mlflow:5000"}}))
    with pytest.raises(FailedPrecondition, match="alembic"):
        check_tracking(settings_of(tmp_path, tracking={"mlflow": {"uri": "sqlite:////tmp/m.db"}}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tracking: {mlflow: {uri: 'mysql://host/db'}}", "tracking.mlflow.uri: .*kind mysql: take http"),
        ("tracking: {mlflow: {uri: 'http://'}}", "names no host"),
        ("tracking: {mlflow: {uri: 'sqlite:///'}}", "names no file of this machine"),
        ("tracking: {mlflow: {uri: 'file://host/x'}}", "names no file of this machine"),
        ("tracking: {mlflow: {uri: 'databricks:'}}", "is no MLflow store"),
        ("tracking: {mlflow: {url: x}}", r"tracking.mlflow.url: unknown key; did you mean tracking.mlflow.uri\?"),
        ("tracking: {wandb: {mode: on}}", "tracking.wandb.mode"),
        ("tracking: {stop_s: 0}", "tracking.stop_s"),
    ],
)
def test_a_wrong_section_is_refused_by_its_key(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=message):
        load_settings(path)


def test_mlflow_keeps_runs_where_the_run_file_or_the_environment_says_or_beside_the_run(tmp_path: Path) -> None:
    def uri(mlflow: dict[str, str], environment: dict[str, str], **sections: Any) -> str:
        return mlflow_uri(settings_of(tmp_path, tracking={"mlflow": mlflow}, **sections), environment)

    elsewhere = {"MLFLOW_TRACKING_URI": "http://elsewhere:5000"}
    assert uri({"uri": "http://mlflow:5000"}, elsewhere) == "http://mlflow:5000"
    assert uri({}, elsewhere) == "http://elsewhere:5000"
    assert uri({}, {}) == f"file://{tmp_path}/out/mlruns"
    assert uri({"uri": "/my runs"}, {}) == uri({"uri": "file:///my%20runs"}, {}) == "file:///my%20runs"
    assert uri({}, {}, conductor={"launcher": "none"}) == f"file://{tmp_path}/out/shop/mlruns"
    asking = settings_of(tmp_path, tracking={"mlflow": {}})
    with pytest.raises(ValueError, match="MLFLOW_TRACKING_URI names a store of the kind databricks"):
        check_tracking(asking, {"MLFLOW_TRACKING_URI": "databricks://profile"})


def test_parameters_have_every_setting_and_no_secret_and_no_port(tmp_path: Path) -> None:
    settings = settings_of(
        tmp_path,
        queue={"url": "redis://:hunter2@redis:6379/0", "password": "hunter2"},
        preference={"database_url": "postgresql://honed:hunter2@db/h"},
        tracking={"mlflow": {"uri": "https://me:hunter2@mlflow/"}},
        reward={"scorers": [{"name": "own", "kind": "reward_model", "source": "s3://me:hunter2@bucket/model"}]},
    )
    found = parameters_of(settings)
    assert "hunter2" not in str(found)
    assert found["learner.batch"] == str(settings.learner.batch)
    assert found["learner.kl.controller"] == settings.learner.kl.controller
    assert '"source": "s3://me@bucket/model"' in found["reward.scorers"]
    assert found["tracking.mlflow.uri"] == "https://me@mlflow/"
    assert not [key for key in found if key.endswith(("port", "address"))]


def test_figures_are_the_numbers_of_the_reports(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert figures_of(workspace) == {}
    workspace.report_json.write_text(
        '{"outcome": "finished", "kl": 1.5, "agreement": null, "accounts": {"trained": 4}, "samples": [{"reward_after": 1}]}'
    )
    workspace.recipe_json.write_text('{"before": 0.5}')
    assert figures_of(workspace) == {"report/kl": 1.5, "report/accounts/trained": 4.0, "recipe/before": 0.5}
    assert files_of(workspace) == [workspace.report_json, workspace.recipe_json]

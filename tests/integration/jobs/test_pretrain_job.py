"""The pretraining job is killed and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.integration.jobs.test_reward_model_job import Killed, kill_at

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.learner.jobs import pretrain
from honed.workspace import Workspace

TEXTS = [f"{a} {b} film about {c}." for a in ("A lovely", "The dull") for b in ("quiet", "long") for c in ("love", "war", "it")]


def settings_of(root: Path, **section: Any) -> RunSettings:
    root.mkdir(exist_ok=True)
    (root / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sizes = {"vocabulary": 300, "hidden_size": 32, "layers": 1, "block_tokens": 16, "block_rows": 2, "tokens": 1000}
    tree = {
        "run": "small",
        "directory": str(root / "run"),
        "generation": {"max_model_tokens": 64, "max_prompt_tokens": 32, "max_tokens": 16},
        "conductor": {"response_tokens": 8},
        "pretrain": {**sizes, "threads": 1, **section},
        "data": {"texts": [str(root / "texts.jsonl")]},
    }
    return RunSettings.model_validate(tree)


def published(settings: RunSettings) -> dict[str, str]:
    manifest = PolicyStore(settings.policy_url, settings.run).manifest(VersionId(0, 0))
    return {entry.path: entry.sha256 for entry in manifest.files}


def test_a_killed_job_goes_on_and_publishes_what_one_that_was_not_killed_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = settings_of(tmp_path / "whole")
    pretrain.run(whole)
    killed = settings_of(tmp_path / "killed")
    with monkeypatch.context() as patch:
        kill_at(12, patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(killed)
    home = Workspace(killed.directory).unfinished("pretrain")
    assert [path.name for path in (home / "checkpoints").iterdir()] == ["000000-00000011-step-11"]
    with monkeypatch.context() as patch:
        kill_at(5, patch, pretrain)  # it does not come by there again
        pretrain.run(killed)
    assert published(killed) == published(whole)
    assert [path.name for path in home.iterdir()] == ["lock"]


def test_other_settings_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(12, patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(settings_of(tmp_path))
    other = settings_of(tmp_path, learning_rate=2e-3)
    with monkeypatch.context() as patch:
        kill_at(1, patch, pretrain)
        with pytest.raises(Killed):
            pretrain.run(other)


def test_too_few_texts_for_a_batch_are_refused_with_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="use a smaller batch"):
        pretrain.run(settings_of(tmp_path, block_rows=64))

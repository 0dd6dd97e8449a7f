"""Claims about a run's directory: one run at a time, and nothing else's."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from honed.conductor.local import LOCK, local_run
from honed.config import RunSettings
from honed.kit.errors import FailedPrecondition


def settings(directory: Path) -> RunSettings:
    return RunSettings(directory=directory)


async def test_a_second_run_in_the_same_directory_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        with pytest.raises(FailedPrecondition, match=f"in use by the run of process {os.getpid()}"):
            async with local_run(settings(directory)):
                pass
        assert json.loads((directory / "endpoints.json").read_text()), "the first one's files are as they were"


async def test_the_lock_ends_with_the_run(tmp_path: Path) -> None:
    for _ in range(2):
        async with local_run(settings(tmp_path / "run")):
            pass
    with (tmp_path / "run" / LOCK).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_a_directory_with_something_else_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(FailedPrecondition, match="holds no run of honed"):
        async with local_run(settings(tmp_path), fresh=True):
            pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


async def test_a_fresh_run_clears_what_an_earlier_one_left(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)):
        (directory / "models").mkdir()
        (directory / "models" / "old").write_text("weights")
    async with local_run(settings(directory), fresh=True):
        assert not (directory / "models").exists()


async def test_endpoints_are_announced_while_it_runs_and_tokens_are_private(tmp_path: Path) -> None:
    directory = tmp_path / "run"
    async with local_run(settings(directory)) as run:
        endpoints = json.loads((directory / "endpoints.json").read_text())
        assert endpoints["conductor"] == run.settings.conductor.target
        assert not endpoints["conductor"].endswith(":0")
        for token in (directory / "tokens").glob("*.token"):
            assert token.stat().st_mode & 0o077 == 0
    assert not (directory / "endpoints.json").exists()

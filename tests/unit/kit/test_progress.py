"""Claims about how far a job is, as others read it from its file and from its log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from honed.conductor.logs import last_lines
from honed.kit.log import configure_logging
from honed.kit.progress import JobProgress, ProgressFile, logged_progress, read_progress


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    root, always = logging.getLogger(), [logging.getLogger(name) for name in ("honed.audit", "honed.kit.progress")]
    handlers, level, levels = root.handlers[:], root.level, [logger.level for logger in always]
    configure_logging("pretrain", "ERROR")
    stream = io.StringIO()
    handler = root.handlers[0]
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    yield stream
    root.handlers[:] = handlers
    root.setLevel(level)
    for logger, before in zip(always, levels, strict=True):
        logger.setLevel(before)


def test_the_log_tells_the_progress_every_few_seconds_at_any_level(tmp_path: Path, log: io.StringIO) -> None:
    now = 100.0
    file = ProgressFile(tmp_path / "p.json", lambda: now)
    for second in range(11):
        now = 100.0 + second
        file.report(JobProgress(second / 10, f"step {second}", {"loss": 2.5}))
    lines = log.getvalue().splitlines()
    assert [logged_progress(line) for line in lines] == [
        JobProgress(step / 10, f"step {step}", {"loss": 2.5}) for step in (0, 5, 10)
    ]
    now += 0.1
    file.report(JobProgress(1.0, "done"), final=True)
    assert logged_progress(log.getvalue().splitlines()[-1]) == read_progress(tmp_path / "p.json") == JobProgress(1.0, "done")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "Traceback (most recent call last):",
        '{"message": "job_progress"}',
        '{"job_progress": {"done": 0.5, "doi',
        '{"job_progress": {"done": "much", "doing": "", "figures": {}}}',
        '{"job_progress": 3}',
        '["job_progress"]',
        '{"job_progress": {"done": 1, "doing": "x"}}',
    ],
)
def test_another_line_tells_none(line: str) -> None:
    assert logged_progress(line) is None


def test_the_end_of_a_log_leaves_progress_out(tmp_path: Path, log: io.StringIO) -> None:
    file = ProgressFile(tmp_path / "p.json")
    logging.getLogger("x").error("the disk is full")
    for _ in range(20):
        file.report(JobProgress(0.5, "step"), final=True)
    [line] = last_lines(log.getvalue())
    assert "the disk is full" in line

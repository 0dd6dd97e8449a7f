"""A file of JSON lines that is added to: nothing is lost, and nothing is half there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from honed.kit.appended import SYNC_EVERY_S, AppendedLines
from honed.kit.errors import FailedPrecondition


def test_lines_are_there_when_the_file_is_opened_again(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lines.jsonl"
    for number in range(3):
        with AppendedLines(path) as lines:
            assert [row["n"] for _, row in lines.rows()] == list(range(number))
            lines.append({"n": number, "text": "é"})
    assert path.read_text(encoding="utf-8").splitlines()[0] == '{"n": 0, "text": "é"}'


@pytest.mark.parametrize(
    ("left", "kept"),
    [
        (b"", []),
        (b'{"n": 1}\n{"n": 2', [1]),
        (b'{"n": 1}\n{"n": 2}', [1, 2]),
        (b'{"n": 1', []),
        ('{"n": 1}\n{"t": "é"}'.encode()[:-3], [1]),
    ],
)
def test_a_last_line_that_was_cut_is_mended(tmp_path: Path, left: bytes, kept: list[int]) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(left)
    with AppendedLines(path) as lines:
        assert [row["n"] for _, row in lines.rows()] == kept
        lines.append({"n": 9})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [*kept, 9]


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    with AppendedLines(path), pytest.raises(FailedPrecondition, match=r"lines\.jsonl is being written"):
        AppendedLines(path).__enter__()
    with AppendedLines(path) as lines:
        lines.append({})


def test_lines_go_to_the_disk_now_and_then_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", lambda number: synced.append(number))
    now = 0.0
    with AppendedLines(tmp_path / "lines.jsonl", clock=lambda: now) as lines:
        lines.append({})
        assert len(synced) == 0
        now = SYNC_EVERY_S
        lines.append({})
        lines.append({})
        assert len(synced) == 1
    assert len(synced) == 2

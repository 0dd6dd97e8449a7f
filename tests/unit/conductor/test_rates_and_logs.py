"""Claims about rates, rotation of logs and the child's tie to its parent."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from honed.conductor import child
from honed.conductor.logs import plain, rotate, tail
from honed.conductor.rates import Growth, Recent


def test_events_leave_the_count_when_the_window_has_passed() -> None:
    recent = Recent(window_s=10)
    assert [recent.add(now) for now in (0.0, 1.0, 2.0)] == [1, 2, 3]
    assert recent.count(10.5) == 2, "the first is 10.5 s old"
    assert recent.count(100.0) == 0


def test_growth_counts_rises_within_the_window_and_no_fall() -> None:
    growth = Growth(window_s=10)
    assert growth.read(500, 0.0) == 0, "what was there before is no growth"
    assert growth.read(530, 1.0) == 30
    assert growth.read(20, 2.0) == 30, "letters were deleted"
    assert growth.read(25, 3.0) == 35
    assert growth.read(25, 11.5) == 5
    assert growth.read(25, 14.0) == 0


def test_a_log_that_is_too_long_is_moved_aside_while_its_writer_has_it_open(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    with path.open("ab", buffering=0) as writer:
        writer.write(b"a" * 100)
        assert not rotate(path, 100)
        writer.write(b"b")
        assert rotate(path, 100)
        writer.write(b"after\n")
    assert path.read_bytes() == b"after\n", "the writer goes on at the beginning, and leaves no hole"
    assert (tmp_path / "one.log.1").read_bytes() == b"a" * 100 + b"b"
    assert not rotate(tmp_path / "none.log", 1)


def test_the_tail_names_the_log_and_reads_its_end_only(tmp_path: Path) -> None:
    path = tmp_path / "one.log"
    path.write_text("x" * 100_000 + "\n" + "\n".join(f"line {i}" for i in range(20)))
    assert tail(path, 2) == f"the end of {path}:\nline 18\nline 19"
    assert tail(tmp_path / "none.log") == f"the end of {tmp_path / 'none.log'}:\n"


@pytest.mark.skipif(sys.platform != "linux", reason="parents are watched on Linux")
@pytest.mark.parametrize(("parent", "starts"), [(1, True), (4242, False)])
def test_a_child_of_the_first_process_of_a_container_starts(monkeypatch: pytest.MonkeyPatch, parent: int, starts: bool) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr(os, "getppid", lambda: 1)
    monkeypatch.setattr(os, "nice", lambda _: 0)
    monkeypatch.setattr(os, "execvp", lambda _, command: started.append(command))
    monkeypatch.setattr(child.ctypes, "CDLL", lambda *_, **__: type("Libc", (), {"prctl": staticmethod(lambda *_: 0)}))
    monkeypatch.setattr(sys, "argv", ["child", str(parent), "0", "", "honed", "serve"])
    if starts:
        child.main()
        assert started == [["honed", "serve"]]
    else:
        with pytest.raises(SystemExit):
            child.main()
        assert not started


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('{"level": "warning", "message": "the loss is NaN", "service": "pretrain"}', "warning: the loss is NaN"),
        (
            '{"level": "error", "message": "it failed", "error": "Traceback\\n  ...\\nValueError: x"}',
            "error: it failed (ValueError: x)",
        ),
        ("Loading weights", "Loading weights"),
        ('["no", "record"]', '["no", "record"]'),
        ("x" * 4000, "x" * 299 + "…"),
    ],
)
def test_a_line_of_a_log_is_shown_to_people_in_short(line: str, shown: str) -> None:
    assert plain(line) == shown

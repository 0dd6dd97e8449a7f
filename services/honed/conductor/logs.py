"""Log files of child processes: bounded in size, and their last lines for error messages."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from honed.kit.progress import logged_progress

LINES = 8
_TAIL_BYTES = 16 << 10
_LONGEST = 300


def rotate(path: Path, limit_bytes: int) -> bool:
    """Moves what a log holds to `<name>.1` when it is longer than `limit_bytes`; returns whether it did.

    The file is copied and cut, not renamed: its writer has it open for appending and knows nothing of this. A line written
    between copy and cut is lost.
    """
    try:
        if path.stat().st_size <= limit_bytes:
            return False
    except FileNotFoundError:
        return False
    partial = path.with_name(path.name + ".partial")
    shutil.copyfile(path, partial)
    os.truncate(path, 0)
    partial.replace(path.with_name(path.name + ".1"))
    return True


def tail(path: Path, lines: int = LINES) -> str:
    """The last lines of a log, under a heading that names it."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - _TAIL_BYTES))
            text = file.read().decode(errors="replace")
    except OSError:
        text = ""
    return f"the end of {path}:\n" + "\n".join(last_lines(text, lines))


def last_lines(text: str, lines: int = LINES) -> Sequence[str]:
    """The last lines of a log that say more than how far a job is."""
    return [line for line in text.strip().splitlines() if logged_progress(line) is None][-lines:]


def plain(line: str) -> str:
    """A line of a log for people: level and message of one that is JSON, and no more than fits a screen."""
    with contextlib.suppress(ValueError):
        record = json.loads(line)
        if isinstance(record, dict) and "message" in record:
            error = str(record.get("error") or record.get("reason") or "").strip().rpartition("\n")[2]
            line = f"{record.get('level', 'info')}: {record['message']}" + (f" ({error})" if error else "")
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"

"""A file of JSON lines that a long job adds to, and goes on with after it was killed.

A line is there as a whole or not at all: a last line that was cut is mended when the file is opened. What has been added
reaches the disk now and then, and at the end.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, Self

from honed.kit.errors import FailedPrecondition
from honed.kit.jsonl import read_lines

SYNC_EVERY_S: Final = 2.0


class AppendedLines:
    """The file, held by this process alone. Use it as a context manager."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Opens nothing; `clock` gives seconds and says when lines go to the disk."""
        self.path = path
        self._clock = clock
        self._synced_at = clock()
        self._opened: BinaryIO | None = None

    def __enter__(self) -> Self:
        """Opens the file, made if it is not there, and mends its end.

        Raises:
            FailedPrecondition: Another process adds to it.
            OSError: It cannot be written.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise FailedPrecondition(f"{self.path} is being written by another process: wait for it, or name another") from None
        _mend(file)
        self._opened = file
        return self

    def __exit__(self, *_: object) -> None:
        self.sync()
        self._file.close()
        self._opened = None

    def rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields (line number from 1, object) of what is in the file.

        Raises:
            ValueError: A line is no JSON object; names file and line.
        """
        self._file.flush()
        return read_lines(self.path)

    def append(self, row: dict[str, Any]) -> None:
        """Adds a line.

        Raises:
            OSError: It cannot be written; an incomplete line is mended when the file is opened again.
            ValueError: A number of the row is none, or has no end.
        """
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()
        if self._clock() - self._synced_at >= SYNC_EVERY_S:
            self.sync()

    def sync(self) -> None:
        """Returns when all lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._synced_at = self._clock()

    @property
    def _file(self) -> BinaryIO:
        assert self._opened is not None, "use it as a context manager"
        return self._opened


def _mend(file: BinaryIO) -> None:
    """Ends the last line if it is whole, and takes it out if it is not."""
    file.seek(0)
    size, last = 0, b""
    for last in file:
        size += len(last)
    if not last or last.endswith(b"\n"):
        return
    try:
        json.loads(last)
    except ValueError:
        file.truncate(size - len(last))
    else:
        file.write(b"\n")

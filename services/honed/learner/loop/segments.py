"""An append-only log of numbered JSON rows, in files of bounded size.

A file is named after the number of its first row, and begins with a header that carries the log's totals before it. So
opening reads the newest file alone, however long the log; old files can go without changing any total; and a row is found
by its number. A row is durable when `append` returns. What a crash cut short is not a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from honed.kit.errors import DataLoss
from honed.kit.files import sync

FORMAT: Final = 1
ROWS: Final = 1000
BYTES: Final = 16 << 20
_INTENT: Final = "cut.json"

Row = dict[str, Any]
Totals = dict[str, float]


class Segments:
    """One log. One writer; any number of readers, of other processes too."""

    def __init__(self, directory: Path, *, rows: int = ROWS, most_bytes: int = BYTES) -> None:
        """Opens nothing.

        Args:
            directory: Of the files.
            rows: Rows of a file at most.
            most_bytes: Bytes after which the next row begins another file.
        """
        self.directory, self._rows, self._most_bytes = directory, rows, most_bytes
        self._path: Path | None = None
        self._count = self._size = 0
        self._last = -1

    def open(self) -> tuple[Totals, list[Row]]:
        """Opens the log for writing; returns the totals before the newest file, and its rows.

        Raises:
            DataLoss: a row before the last is damaged.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        self._finish_cut()
        paths = self.paths()
        if not paths:
            return {}, []
        path = paths[-1]
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole == 0:  # killed before its header was written: nothing of it ever counted
            path.unlink()
            return self.open()
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
        totals, rows = _parse(path, content[:whole])
        self._at(path, rows, whole)
        return totals, rows

    def append(self, number: int, row: Row, totals: Mapping[str, float]) -> bool:
        """Adds a row; `totals` are those before it. Returns whether it began another file.

        Numbers never fall; rows of one number stay together.
        """
        line = json.dumps({"n": number, **row}, separators=(",", ":")).encode() + b"\n"
        full = self._count >= self._rows or self._size >= self._most_bytes
        begun = self._path is None or (full and number > self._last)  # rows of one number share a file
        if begun:
            self._at(self.directory / f"{number:012d}.jsonl", [], 0)
            line = json.dumps({"format": FORMAT, "totals": dict(totals)}).encode() + b"\n" + line
        assert self._path is not None
        try:
            with self._path.open("ab") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            self._unwrite(begun)
            raise
        if begun:
            sync(self.directory)
        self._count, self._size, self._last = self._count + 1, self._size + len(line), number
        return begun

    def rows(self, number: int = 0) -> Iterator[list[Row]]:
        """The rows from a number on, file by file.

        Raises:
            DataLoss: a row before the last is damaged.
        """
        paths = self.paths()
        first = max((at for at, path in enumerate(paths) if _first(path) <= number), default=0)
        for path in paths[first:]:
            try:
                content = path.read_bytes()
            except FileNotFoundError:
                continue  # its time has run out, or it was cut off
            whole = content.rfind(b"\n") + 1
            if whole == 0:
                continue  # its header is being written
            _, found = _parse(path, content[:whole])
            if found := [row for row in found if row["n"] >= number]:
                yield found

    def cut(self, number: int, header: Callable[[list[Row]], Mapping[str, float]]) -> list[Row]:
        """Removes the rows after a number; returns the rows of the newest file that is left.

        Killed in between, it is finished when the log is opened.

        Args:
            number: Of the last row that stays.
            header: From the rows that stay in the newest file to the totals before them.
        """
        rows = self._kept(number)
        intent = {"number": number, "totals": dict(header(rows)), "rows": rows}
        _write(self.directory / _INTENT, json.dumps(intent).encode())
        self._finish_cut()
        return rows

    def paths(self) -> list[Path]:
        """The files, oldest first."""
        return sorted(self.directory.glob("[0-9]*.jsonl")) if self.directory.is_dir() else []

    def _kept(self, number: int) -> list[Row]:
        """The rows up to a number of the file that holds it."""
        before = [path for path in self.paths() if _first(path) <= number]
        if not before:
            return []
        content = before[-1].read_bytes()
        _, rows = _parse(before[-1], content[: content.rfind(b"\n") + 1])
        return [row for row in rows if row["n"] <= number]

    def _finish_cut(self) -> None:
        """Does what an intent says: removes the newer files, and writes the last one anew with its rows and the totals."""
        intent = self.directory / _INTENT
        if not intent.exists():
            return
        wanted = json.loads(intent.read_bytes())
        number, rows = int(wanted["number"]), wanted["rows"]
        for path in reversed(self.paths()):
            if _first(path) > number:
                path.unlink()
        paths = self.paths()
        path = paths[-1] if paths else self.directory / f"{number + 1:012d}.jsonl"
        content = encoded(wanted["totals"], rows)
        _write(path, content)
        intent.unlink()
        sync(self.directory)
        self._at(path, rows, len(content))

    def _at(self, path: Path, rows: list[Row], size: int) -> None:
        """Goes on behind these rows of a file."""
        self._path, self._count, self._size = path, len(rows), size
        self._last = rows[-1]["n"] if rows else -1

    def _unwrite(self, begun: bool) -> None:
        """Takes a row that did not fit on the disk off again, so that the next one is not glued to it."""
        assert self._path is not None
        if begun:
            self._path.unlink(missing_ok=True)
            self._path = None
        elif self._path.exists():
            with self._path.open("r+b") as file:
                file.truncate(self._size)


def encoded(totals: Mapping[str, float], rows: Iterable[Row]) -> bytes:
    """A file of these rows; `totals` are those before it."""
    head: Row = {"format": FORMAT, "totals": dict(totals)}
    return b"".join(json.dumps(each, separators=(",", ":")).encode() + b"\n" for each in (head, *rows))


def _parse(path: Path, content: bytes) -> tuple[Totals, list[Row]]:
    rows: list[Row] = []
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataLoss(f"{path}, line {number} is not JSON ({error}): it was edited, or the disk is bad") from error
        rows.append(row)
    if not rows or rows[0].get("format") != FORMAT:
        raise DataLoss(f"{path} does not begin with a header of format {FORMAT}: it was edited, or another build wrote it")
    return rows[0]["totals"], rows[1:]


def _first(path: Path) -> int:
    return int(path.stem)


def _write(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)

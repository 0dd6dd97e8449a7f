"""JSON lines with errors that name the file and the line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object).

    Raises:
        ValueError: the file is missing, or a line is no JSON object; names both.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:  # some editors begin a file with a mark of its encoding
            yield from parse_lines(file, str(path), hint="; is the file truncated?")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def parse_lines(lines: Iterable[str], source: str, *, hint: str = "") -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of lines that come from `source`; `hint` follows the error of a broken one.

    Raises:
        ValueError: a line is no JSON object; names the source and the line.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{source}, line {number}: not JSON ({error.msg}){hint}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{source}, line {number}: must be a JSON object, is a {type(row).__name__}")
        yield number, row


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.rename(path)

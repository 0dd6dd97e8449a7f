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
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{path}, line {number}: not JSON ({error.msg}); is the file truncated?") from error
                if not isinstance(row, dict):
                    raise ValueError(f"{path}, line {number}: must be a JSON object, is a {type(row).__name__}")
                yield number, row
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Writes the file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.rename(path)

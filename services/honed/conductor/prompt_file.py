"""A file of prompts, checked whole at the start and read line by line later: it may have millions of lines.

Memory holds 8 bytes a line. The order of each pass is a permutation that is computed, not stored.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol, Self

from honed.kit.errors import InvalidArgument
from honed.models.prompt_rows import at_line, check_row, row_reference

OnProgress = Callable[[float], object]
"""Told the share of the file that has been checked."""

_CHECK_ROWS: Final = 1024
_CACHED: Final = 1024
_ROUNDS: Final = 4


@dataclass(frozen=True, slots=True)
class FilePrompt:
    """One prompt of a file.

    Attributes:
        token_ids: The prompt.
        reference: What scorers compare responses with; empty if there is nothing.
    """

    token_ids: list[int]
    reference: str = ""


class Encoder(Protocol):
    """Makes token ids of prompts."""

    def __call__(self, row: dict[str, Any]) -> list[int]:
        """Token ids of `text`, `token_ids` or `messages`.

        Raises:
            InvalidArgument: the prompt cannot be used; names the field.
        """
        ...


def check_prompts(path: Path, on_progress: OnProgress | None = None) -> int:
    """Reads a file of prompts as far as that goes without a tokenizer, to find a bad one before any work is done.

    Returns:
        How many prompts it holds.

    Raises:
        ValueError: the file is missing, damaged, empty, or a line has no prompt; names file and line.
    """
    return len(_index(path, check_row, on_progress)) - 1


class PromptFile:
    """The prompts of a JSON-lines file, by their number."""

    def __init__(self, path: Path, encode: Encoder, on_progress: OnProgress | None = None) -> None:
        """Checks every line.

        Raises:
            ValueError: the file is missing, damaged, empty, or a line has no prompt that can be used; names file and line.
        """
        self._path, self._encode = path, encode
        self._offsets = _index(path, encode, on_progress)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # stays the same file if another takes its name
        self._cached = lru_cache(_CACHED)(self._read)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, number: int) -> FilePrompt:
        """A prompt, by its place in the file without empty lines.

        Raises:
            ValueError: the file has been changed since it was checked.
        """
        return self._cached(number)

    def at(self, position: int, seed: int) -> FilePrompt:
        """The prompt at a position of the endless sequence: all prompts once, then all again in another order, and so on.

        A pure function of the file, the position and the seed.
        """
        epoch, place = divmod(position, len(self))
        return self[permuted(place, len(self), f"{seed}/epoch/{epoch}")]

    def _read(self, number: int) -> FilePrompt:
        start, end = self._offsets[number : number + 2]
        line = os.pread(self._file, end - start, start)
        try:
            row = json.loads(line)
            return FilePrompt(self._encode(row), row_reference(row))
        except (ValueError, InvalidArgument) as error:
            raise ValueError(f"{self._path} has been changed since the run began (prompt {number + 1}: {error})") from error


def permuted(place: int, size: int, key: str) -> int:
    """Where a permutation of 0 .. size - 1 sends `place`.

    A Feistel network permutes the next power of 4; what falls outside is sent on until it is inside.
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for round_ in range(_ROUNDS):
            digest = hashlib.blake2b(f"{key}/{round_}/{right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "big") & mask)
        place = left << half | right
        if place < size:
            return place


def _index(path: Path, check: Callable[[dict[str, Any]], object], on_progress: OnProgress | None) -> array[int]:
    """Where each line with a prompt begins, and where the file ends."""
    offsets = array("Q")
    try:
        total = path.stat().st_size
        for number, offset, line in _lines(path):
            try:
                row = json.loads(line)
            except ValueError as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
                raise ValueError(f"{path}, line {number}: not JSON ({reason}); is the file truncated?") from error
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: must be a JSON object, is a {type(row).__name__}")
            try:
                check(row)
            except InvalidArgument as error:
                raise at_line(path, number, error) from error
            offsets.append(offset)
            if on_progress is not None and len(offsets) % _CHECK_ROWS == 0:
                on_progress(offset / total)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    if not offsets:
        raise ValueError(f"{path} holds no prompts")
    if on_progress is not None:
        on_progress(1.0)
    offsets.append(total)
    return offsets


def _lines(path: Path) -> Iterator[tuple[int, int, bytes]]:
    offset = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, offset, line
            offset += len(line)

"""Reads the human ratings out of the fetched archive: short texts, each with every single rating that people gave it."""

from __future__ import annotations

import ast
import io
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from honed.kit.errors import DataLoss

MOVIES = "movieReviewSnippets"
SETS = (MOVIES, "nytEditorialSnippets", "tweets", "amazonReviewSnippets")
LOWEST, HIGHEST = -4, 4

_INNER = "hutto_ICWSM_2014.tar.gz"
_MEMBER_LIMIT = 16 << 20  # bytes; the largest of the real files has 1.4 MB


@dataclass(frozen=True)
class RatedText:
    """A text and what each rater said of it, from -4 (extremely negative) to +4 (extremely positive)."""

    set: str
    id: str
    text: str
    ratings: tuple[int, ...]

    @property
    def mean_rating(self) -> float:
        """The mean over raters, in rating points."""
        return sum(self.ratings) / len(self.ratings)


def read_ratings(archive: Path) -> dict[str, tuple[RatedText, ...]]:
    """Returns the four sets of `SETS`, each in the order of its file. Nothing is written outside this process.

    Bytes that are not UTF-8 become U+FFFD. The ratings file of one set starts with a byte order mark; it is dropped.

    Raises:
        DataLoss: when the archive, a file in it, or a line of such a file is not as described; the message names which.
    """
    try:
        with tarfile.open(archive, "r:gz") as outer:
            member = next((m for m in outer if m.isfile() and Path(m.name).name == _INNER), None)
            if member is None:
                raise DataLoss(f"{archive} has no {_INNER} inside; fetch it again")
            inner_bytes = _read(outer.extractfile(member), f"{archive}:{_INNER}")
        with tarfile.open(fileobj=io.BytesIO(inner_bytes), mode="r:gz") as inner:
            wanted = {f"{name}_{kind}.txt" for name in SETS for kind in ("GroundTruth", "anonDataRatings")}
            files = {
                Path(m.name).name: _read(inner.extractfile(m), f"{_INNER}:{m.name}")
                for m in inner
                if m.isfile() and Path(m.name).name in wanted
            }
    except (tarfile.TarError, EOFError, OSError) as error:
        raise DataLoss(f"{archive} cannot be read as a tar.gz ({error}); delete it and fetch it again") from error
    missing = sorted(wanted - files.keys())
    if missing:
        raise DataLoss(f"{archive}:{_INNER} lacks {', '.join(missing)}; fetch it again")
    return {
        name: parse_set(name, _decode(files[f"{name}_GroundTruth.txt"]), _decode(files[f"{name}_anonDataRatings.txt"]))
        for name in SETS
    }


def parse_set(name: str, texts: str, ratings: str) -> tuple[RatedText, ...]:
    """Joins a set's texts (id, mean, text) with its ratings (id, mean, deviation, list) by id; both tab-separated.

    Raises:
        DataLoss: a line has the wrong columns, a rating is not an integer from -4 to 4, or an id is in one file only.
    """
    by_id: dict[str, tuple[int, ...]] = {}
    for where, (identity, _, _, listed) in _rows(f"{name}_anonDataRatings.txt", ratings, 4):
        by_id[identity] = _rating_list(where, listed)
    rated = []
    for where, (identity, _, text) in _rows(f"{name}_GroundTruth.txt", texts, 3):
        if identity not in by_id:
            raise DataLoss(f"{where}: no ratings for id {identity!r}")
        rated.append(RatedText(name, identity, text.strip(), by_id.pop(identity)))
    if by_id:
        raise DataLoss(f"{name}_GroundTruth.txt: no text for the rated ids {sorted(by_id)[:5]}")
    return tuple(rated)


def _rows(file: str, content: str, columns: int) -> Iterator[tuple[str, list[str]]]:
    # Only "\n" ends a line: str.splitlines would also break texts at characters such as U+0085.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) != columns:
            raise DataLoss(f"{file} line {number}: {len(cells)} columns instead of {columns}")
        yield f"{file} line {number}", cells


def _rating_list(where: str, listed: str) -> tuple[int, ...]:
    try:
        values = ast.literal_eval(listed.strip())
    except (ValueError, SyntaxError) as error:
        raise DataLoss(f"{where}: the ratings are not a list of integers: {listed[:60]!r}") from error
    if not isinstance(values, list) or not values:
        raise DataLoss(f"{where}: the ratings are not a list of integers: {listed[:60]!r}")
    for value in values:
        if type(value) is not int or not LOWEST <= value <= HIGHEST:
            raise DataLoss(f"{where}: rating {value!r} is not an integer from {LOWEST} to {HIGHEST}")
    return tuple(values)


def _read(file: IO[bytes] | None, where: str) -> bytes:
    if file is None:
        raise DataLoss(f"{where} is not a plain file")
    with file:
        content = file.read(_MEMBER_LIMIT + 1)
    if len(content) > _MEMBER_LIMIT:
        raise DataLoss(f"{where} is larger than {_MEMBER_LIMIT} bytes")
    return content


def _decode(content: bytes) -> str:
    return content.decode("utf-8-sig", errors="replace")

"""A made-up archive in the form of the real one."""

from __future__ import annotations

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from honed.demo.data.fetch import SourceDistribution
from honed.demo.data.ratings import MOVIES, SETS, RatedText

INNER = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"


def packed(files: Mapping[str, bytes]) -> bytes:
    """A tar.gz of the files."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def inner_files() -> dict[str, bytes]:
    """Two texts a set."""
    files = {}
    for name in SETS:
        files[f"hutto_ICWSM_2014/{name}_GroundTruth.txt"] = b"1\t1.0\tGood fun .\n2\t-1.5\tA dull caf\xe9\n"
        files[f"hutto_ICWSM_2014/{name}_anonDataRatings.txt"] = b"1\t1.0\t0.8\t[1, 2, 0]\n2\t-1.5\t0.5\t[-1, -2]\n"
    return files


@pytest.fixture
def make_archive(tmp_path: Path) -> Callable[..., Path]:
    def make(files: Mapping[str, bytes] | None = None) -> Path:
        path = tmp_path / "made-1.0.tar.gz"
        path.write_bytes(packed({INNER: packed(inner_files() if files is None else files)}))
        return path

    return make


def source_of(path: Path) -> SourceDistribution:
    return SourceDistribution("made==1.0", "made-1.0.tar.gz", hashlib.sha256(path.read_bytes()).hexdigest())


def movies(count: int) -> tuple[RatedText, ...]:
    return tuple(RatedText(MOVIES, str(i), f"text number {i} here", (i % 9 - 4, (i + 1) % 9 - 4)) for i in range(count))

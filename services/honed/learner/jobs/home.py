"""Where a job works: a directory that is its own while it runs, and that keeps what an interrupted try has left.

Beside that, what decided a result: the lineage of version 0.0 has a digest of it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from honed.artifacts.files import hash_file
from honed.kit.errors import FailedPrecondition

_LOCK: Final = "lock"
_MADE_OF: Final = "made_of.json"


@contextmanager
def job_home(directory: Path, made_of: Mapping[str, Any]) -> Iterator[Path]:
    """A job's directory. It is empty, or holds what a try that was interrupted has left, if that was made of the same.

    What is in it goes when the block ends well, and stays when it ends by an error.

    Args:
        directory: Of the job.
        made_of: What decides the result: settings, and digests of data; JSON.

    Raises:
        FailedPrecondition: The same job is at work there.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / _LOCK).open("w") as lock:  # the kernel's, which ends with the process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FailedPrecondition(f"{directory} is in use: the same job of this run is at work already") from error
        wanted = _written(made_of)
        if _read(directory / _MADE_OF) != wanted:
            _empty(directory)
            _write(directory / _MADE_OF, wanted)
        yield directory
        _empty(directory)


def record_made_of(path: Path, made_of: Mapping[str, Any]) -> None:
    """Keeps what decides a result that is about to be made; JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, _written(made_of))


def made_of_digest(path: Path, otherwise: Callable[[], Mapping[str, Any]]) -> str:
    """Digest of what `record_made_of` has kept, or of `otherwise` where nothing was kept, as before there was a record."""
    return hashlib.sha256((_read(path) or _written(otherwise())).encode()).hexdigest()


def weights_of(model: Path) -> list[str]:
    """Digests of the files with a model's weights, in the order of their names."""
    return [hash_file(path)[1] for path in sorted(model.glob("*.safetensors"))]


@contextmanager
def appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill under another name, where nothing is yet; it takes its own when the block ends well."""
    partial = directory.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.parent.mkdir(parents=True, exist_ok=True)
    yield partial
    os.replace(partial, directory)


def _written(made_of: Mapping[str, Any]) -> str:
    return json.dumps(made_of, sort_keys=True)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _empty(directory: Path) -> None:
    # The list of what it was made of goes first: a removal that is cut short leaves nothing that could be taken for whole.
    (directory / _MADE_OF).unlink(missing_ok=True)
    for path in directory.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)

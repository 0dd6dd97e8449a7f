"""Trained models that later runs take, by all that they are made of: the directory of the setting `reuse`.

An entry is a directory `KIND-DIGEST`: the model's files, and `made_of.json` with what the digest is of (settings, digests of
the data and of the model that training began with, this package's version), the digests of the files, the run that trained it
and how long that took. It appears whole or not at all. An entry whose files are not those is not taken. A run that takes one
says so in `reused.json`.

Where training ends by time, an entry is what one machine made of it; another run would have made something else of the same.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from honed import __version__
from honed.artifacts.files import hash_file
from honed.config import RunSettings
from honed.learner.jobs.home import appearing
from honed.workspace import Workspace

logger = logging.getLogger(__name__)

_RECORD: Final = "made_of.json"


@dataclass(frozen=True)
class Reused:
    """A model that has been taken.

    Attributes:
        run: That trained it.
        seconds: Which that took.
        figures: Its own, as they were given to `keep`.
    """

    run: str
    seconds: float
    figures: Mapping[str, float]


class Shelf:
    """The entries of one kind that a run may take, and give."""

    def __init__(self, settings: RunSettings, kind: str, made_of: Mapping[str, Any]) -> None:
        """Reads nothing yet.

        Args:
            settings: The run's; where `reuse` is not set, nothing is there and nothing is kept.
            kind: Of model, a part of the entry's name.
            made_of: All that decides the result, as JSON.
        """
        self._run, self._kind, self._place = settings.run, kind, Workspace(settings.directory)
        self._made_of = {"honed": __version__, **made_of}
        written = json.dumps(self._made_of, sort_keys=True).encode()
        digest = hashlib.sha256(written).hexdigest()[:24]
        self._entry = None if settings.reuse is None else settings.reuse / f"{kind}-{digest}"
        self._started = time.monotonic()

    def take(self, target: Path) -> Reused | None:
        """Makes `target`, where nothing is yet, of the entry; None if there is no entry, or one that is damaged."""
        if self._entry is None or not (self._entry / _RECORD).exists():
            return None
        try:
            record = json.loads((self._entry / _RECORD).read_text(encoding="utf-8"))
            reused = Reused(record["run"], float(record["seconds"]), record["figures"])
            with appearing(target) as partial:
                shutil.copytree(self._entry, partial, ignore=shutil.ignore_patterns(_RECORD))
                if record["made_of"] != self._made_of or _digests(partial) != record["files"]:
                    raise ValueError("its files are not those that were kept")
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("not reused: the entry is damaged", extra={"entry": str(self._entry), "reason": str(error)})
            return None
        self._tell(reused)
        logger.info("reused", extra={"entry": str(self._entry), "trained_by": reused.run})
        return reused

    def keep(self, source: Path, figures: Mapping[str, float] | None = None) -> None:
        """Makes an entry of a model's directory. A shelf that cannot be written is a warning: the run has its model."""
        if self._entry is None:
            return
        partial = self._entry.with_name(f".{self._entry.name}-{uuid.uuid4().hex}")
        record = {
            "made_of": self._made_of,
            "files": _digests(source),
            "run": self._run,
            "seconds": time.monotonic() - self._started,
            "figures": dict(figures or {}),
        }
        try:
            partial.parent.mkdir(parents=True, exist_ok=True)
            shutil.copytree(source, partial)
            (partial / _RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
            shutil.rmtree(self._entry, ignore_errors=True)  # a damaged one
            partial.rename(self._entry)
        except OSError as error:
            logger.warning("not kept for reuse", extra={"entry": str(self._entry), "reason": str(error)})
            shutil.rmtree(partial, ignore_errors=True)

    def _tell(self, reused: Reused) -> None:
        known = reused_models(self._place)
        path = self._place.reused
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({**known, self._kind: reused.seconds}) + "\n", encoding="utf-8")
        partial.replace(path)


def reused_models(place: Workspace) -> dict[str, float]:
    """What a run has taken and not trained, by kind: the seconds that its training once took."""
    if not place.reused.exists():
        return {}
    found: dict[str, float] = json.loads(place.reused.read_text(encoding="utf-8"))
    return found


def _digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != _RECORD)
    return {path.relative_to(directory).as_posix(): hash_file(path)[1] for path in files}

"""Where reward models come from: artifacts of the run's store, copied to this process' own directory, or local directories.

A directory that an operator names in a call is published as an artifact first: what other replicas load, or this one after a
restart, never depends on a path of one host.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from honed.artifacts.manifest import Lineage
from honed.artifacts.reward_models import ArtifactRef, RewardModelStore
from honed.kit.errors import InvalidArgument, PermissionDenied

_COPIES_KEPT: Final = 3


class ModelSources:
    """The sources of one process. Calls block."""

    def __init__(self, location: str, run: str, into: Path, roots: Sequence[Path], keep: int = 6) -> None:
        """Reads nothing yet.

        Args:
            location: Of the run's store.
            run: Its name.
            into: Where artifacts are copied to; this process' own.
            roots: Directories that `directory` allows.
            keep: How many versions of a published directory the store keeps.
        """
        self._location, self._run, self._into = location, run, into
        self._roots = tuple(root.resolve() for root in roots)
        self._keep = keep

    def local(self, source: str) -> Path:
        """The model directory of a source.

        Raises:
            NotFound: The store has no such artifact.
            DataLoss: The artifact is damaged.
        """
        ref = ArtifactRef.parse(source)
        if ref is None:
            return Path(source)
        into = self._into / ref.name
        directory = self._store(ref.name).fetch(ref.version, into)
        _prune(into, directory)
        return directory

    def newest(self, name: str) -> ArtifactRef | None:
        """The newest version of a reward model; None if there is none yet."""
        store = self._store(name)
        version = store.latest()
        return None if version is None else store.reference(version)

    def publish(self, scorer: str, directory: Path, version: str, promoted: Sequence[str]) -> ArtifactRef:
        """Publishes a directory as the next version of the reward model that has the scorer's name.

        Args:
            scorer: The scorer's name.
            directory: A model directory.
            version: The scorer's version, a digest of the files.
            promoted: Sources that must be kept.
        """
        store = self._store(scorer)
        lineage = Lineage(reward_model_version=version, created_at=datetime.now(tz=UTC).isoformat())
        ref = store.reference(store.publish_next(directory, lineage).version)
        store.retire(self._keep, [*promoted, str(ref)])
        return ref

    def directory(self, source: str) -> Path:
        """The directory that a caller names by path or `file://` URL.

        Raises:
            InvalidArgument: It is a URL of another kind.
            PermissionDenied: It is outside the allowed roots.
        """
        parts = urlsplit(source)
        if parts.scheme not in ("", "file"):
            raise InvalidArgument(
                "source",
                f"{parts.scheme}:// cannot be read here; give artifact:NAME/VERSION, or a directory, or mount it as one",
            )
        path = Path(parts.path if parts.scheme else source)
        directory = path.resolve()  # follows links and `..`, so that neither leads out of the roots
        if not any(directory.is_relative_to(root) for root in self._roots):
            raise PermissionDenied(f"{source} is outside the directories that reward.allowed_roots allows")
        return directory

    def _store(self, name: str) -> RewardModelStore:
        return RewardModelStore(self._location, self._run, name)


def _prune(into: Path, newest: Path) -> None:
    """Removes all but a few copies: each is in memory once it is loaded, and can be fetched again."""
    others = sorted((path for path in into.iterdir() if path != newest), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_COPIES_KEPT - 1 :]:
        shutil.rmtree(path, ignore_errors=True)

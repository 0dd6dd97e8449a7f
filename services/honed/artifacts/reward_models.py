"""Reward models as artifacts: versions 0.1, 0.2, ... under a name, named `artifact:NAME/VERSION` in run files and calls."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from honed.artifacts.draft import VersionDraft
from honed.artifacts.files import hash_file, open_backend
from honed.artifacts.manifest import Kind, Lineage, Manifest
from honed.artifacts.names import MANIFEST_NAME, SUFFIXES, check_name, check_run, is_name
from honed.artifacts.settings import TRAINED as TRAINED
from honed.artifacts.store import ArtifactStore
from honed.artifacts.version import VersionId
from honed.kit.errors import InvalidArgument

_DIRECTORY: Final = "reward-models"
_IO_TIMEOUT_S: Final = 60.0
_REFERENCE: Final = re.compile(r"artifact:([^/]+)/([^/]+)")


@dataclass(frozen=True)
class ArtifactRef:
    """`artifact:NAME/VERSION`."""

    name: str
    version: VersionId

    def __str__(self) -> str:
        return f"artifact:{self.name}/{self.version.label}"

    @classmethod
    def parse(cls, source: str) -> Self | None:
        """Reads a reference; None if `source` is of another kind.

        Raises:
            InvalidArgument: It begins as a reference and is none.
        """
        if not source.startswith("artifact:"):
            return None
        match = _REFERENCE.fullmatch(source)
        if match is None:
            raise InvalidArgument(
                "source", f"{source!r} is not of the form artifact:NAME/VERSION, for example artifact:trained/0.1"
            )
        return cls(check_name(match[1]), VersionId.parse(match[2]))


class RewardModelStore(ArtifactStore):
    """The versions of one reward model of a run."""

    kind: Kind = "reward-model"

    def __init__(self, location: str | Path, run: str, name: str, *, io_timeout_s: float = _IO_TIMEOUT_S) -> None:
        """`name` is the reward model's; see `ArtifactStore` for the others."""
        super().__init__(location, run, _DIRECTORY, check_name(name), io_timeout_s=io_timeout_s)
        self.name = name

    @property
    def _what(self) -> str:
        return f"reward model {self.name} of run {self.run}"

    @staticmethod
    def names(location: str | Path, run: str) -> list[str]:
        """The reward models of a run."""
        backend = open_backend(str(location), _IO_TIMEOUT_S)
        return sorted(name for name in backend.list_names(backend.join(check_run(run), _DIRECTORY)) if is_name(name))

    def reference(self, version: VersionId) -> ArtifactRef:
        """How run files and calls name a version."""
        return ArtifactRef(self.name, version)

    def publish_next(self, source: Path, lineage: Lineage) -> Manifest:
        """Publishes a model directory as the next version; if the newest has the same files, it is the answer.

        Files of a kind that a version may not hold, such as pickled training arguments, are left out.

        Raises:
            InvalidArgument: It is no model directory.
            StoreFull: There is no room.
        """
        files = _model_files(source)
        newest = self.latest()
        if newest is not None:
            manifest = self.manifest(newest)
            here = {path: hash_file(source / path) for path in files}
            if here == {entry.path: (entry.bytes, entry.sha256) for entry in manifest.files}:
                return manifest
        version = VersionId(0, 1 if newest is None else newest.step + 1)
        return self.publish(source, VersionDraft(version, (), lineage), files)

    def retire(self, keep_last: int, promoted: Collection[str]) -> list[VersionId]:
        """Removes all but the newest `keep_last` versions; never one that `promoted` names as its source.

        Returns:
            What was removed.
        """
        references = (ArtifactRef.parse(source) for source in promoted if source.startswith("artifact:"))
        return self.retain(keep_last, {ref.version for ref in references if ref is not None and ref.name == self.name})


def _model_files(source: Path) -> Sequence[str]:
    found = sorted(path.relative_to(source) for path in source.rglob("*") if path.is_file())
    return [
        path.as_posix()
        for path in found
        if path.suffix in SUFFIXES and path.name != MANIFEST_NAME and not any(part.startswith(".") for part in path.parts)
    ]


def find_reward_model(location: str | Path, run: str, scorer_version: str) -> Manifest | None:
    """The artifact whose scores bear `scorer_version`; None if the run's store holds none. Blocks.

    With it the lineage of a policy version names the judgements behind each reward model of its batch
    (`manifest.lineage.preference_snapshot`).
    """
    for name in RewardModelStore.names(location, run):
        store = RewardModelStore(location, run, name)
        for version in reversed(store.versions()):
            manifest = store.manifest(version)
            if manifest.lineage.reward_model_version == scorer_version:
                return manifest
    return None

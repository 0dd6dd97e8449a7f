"""What became of a version after it was published: quarantined, or promoted.

A version's own directory never changes, so each mark is a small file beside the versions: `marks/<label>.<mark>.json`.
It goes when retention removes its version.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Final, Literal

from honed.artifacts.files import Backend
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, InvalidArgument
from honed.kit.rows import read_row

MarkKind = Literal["quarantined", "promoted"]
_DIRECTORY: Final = "marks"
_MAX_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class Mark:
    """Why a version was marked, and when (ISO 8601, UTC)."""

    reason: str
    at: str


class Marks:
    """The marks of one run's versions. Calls block."""

    def __init__(self, backend: Backend, root: str) -> None:
        """`root` is the directory of the run in `backend`."""
        self._backend = backend
        self._directory = backend.join(root, _DIRECTORY)

    def add(self, version: VersionId, kind: MarkKind, mark: Mark) -> None:
        """Marks a version; a second mark of one kind replaces the first."""
        self._backend.write(self._path(version, kind), json.dumps(asdict(mark)).encode())

    def remove(self, version: VersionId, kind: MarkKind) -> None:
        """Takes a mark away; nothing happens if there is none."""
        self._backend.remove(self._path(version, kind))

    def get(self, version: VersionId, kind: MarkKind) -> Mark | None:
        """A version's mark of one kind; None if it has none.

        Raises:
            DataLoss: it cannot be read.
        """
        return self._read(f"{version.label}.{kind}.json")

    def prune(self, before: VersionId, standing: Collection[VersionId]) -> None:
        """Removes the marks of versions older than `before` that are not `standing` any more."""
        for name in self._backend.list_names(self._directory):
            try:
                version = VersionId.parse(name.removesuffix(".json").rpartition(".")[0])
            except InvalidArgument:
                continue  # not ours
            if version < before and version not in standing:
                self._backend.remove(self._backend.join(self._directory, name))

    def all(self, kind: MarkKind) -> Mapping[VersionId, Mark]:
        """The marks of one kind, by version.

        Raises:
            DataLoss: a mark cannot be read.
        """
        found: dict[VersionId, Mark] = {}
        for name in self._backend.list_names(self._directory):
            if not name.endswith(f".{kind}.json"):
                continue
            try:
                version = VersionId.parse(name.removesuffix(f".{kind}.json"))
            except InvalidArgument:
                continue  # not ours
            mark = self._read(name)
            if mark is not None:  # else it was removed meanwhile
                found[version] = mark
        return found

    def _read(self, name: str) -> Mark | None:
        data = self._backend.read(self._backend.join(self._directory, name), _MAX_BYTES)
        if data is None:
            return None
        try:
            return read_row(Mark, json.loads(data))
        except (ValueError, TypeError) as error:
            raise DataLoss(f"mark {name} cannot be read ({error}): remove it, or write it anew") from error

    def _path(self, version: VersionId, kind: MarkKind) -> str:
        return self._backend.join(self._directory, f"{version.label}.{kind}.json")

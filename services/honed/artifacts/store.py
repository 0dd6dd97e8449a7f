"""Where versions of models live: publish, list, fetch, retain.

A version is a complete Hugging Face model directory plus `manifest.json`, which is written last and
removed first: a version without it does not exist. Versions are immutable. The store is a local
directory or any fsspec URL:

    <location>/<run>/<fence>.<step>/                  versions of the policy
    <location>/<run>/marks/                           what became of them (`marks`)
    <location>/<run>/reward-models/<name>/0.<k>/      versions of a reward model, with their own marks
    <location>/<run>/reward/promoted.json             which of those serve (`promotions`)
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from honed.artifacts.draft import VersionDraft, model_files, same_or_conflict
from honed.artifacts.files import CHUNK_BYTES, Backend, StoreFull, hash_file, open_backend
from honed.artifacts.manifest import MANIFEST_MAX_BYTES, FileEntry, Kind, Manifest, TensorEntry
from honed.artifacts.marks import Marks
from honed.artifacts.names import MANIFEST_NAME, check_run
from honed.artifacts.tensors import read_tensor_entries
from honed.artifacts.verify import check_tensors, compare, verify_directory
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, FailedPrecondition, InvalidArgument, NotFound
from honed.models.facts import chat_template_source


class ArtifactStore:
    """The versions of one model. Calls block; async callers use `asyncio.to_thread`. Not for one version from two writers."""

    kind: Kind = "policy"
    name = ""

    def __init__(self, location: str | Path, run: str, *parts: str, io_timeout_s: float = 60.0) -> None:
        """`location` is a directory or an fsspec URL.

        Args:
            location: Parent of the run's directory; created when first written to.
            run: The run's name.
            parts: Where the versions stand in the run's directory.
            io_timeout_s: Deadline of each single operation on a store that is not a local directory.

        Raises:
            InvalidArgument: If the run's name or the URL is not usable.
        """
        self.run = check_run(run)
        self._backend: Backend = open_backend(str(location), io_timeout_s)
        self._root = self._backend.join(run, *parts)
        self.marks = Marks(self._backend, self._root)

    def publish(self, source: Path, draft: VersionDraft, files: Sequence[str] | None = None) -> Manifest:
        """Copies the model directory `source` into the store, digesting it in the same read.

        Publishing the same content again returns the manifest that stands.

        Args:
            source: The directory.
            draft: What its files do not say.
            files: Which of its files; None takes all.

        Raises:
            InvalidArgument: If a needed file is missing, or one is of a kind that a version may not hold.
            Conflict: If the version exists with other content.
            StoreFull: If there is no room; the partial version is removed, the others stay.
            Unavailable: If the store does not answer in time.
        """
        paths = model_files(source, files)
        tensors = tuple(
            entry for path in paths if path.endswith(".safetensors") for entry in read_tensor_entries(source / path, path)
        )
        existing = self._find(draft.version)
        if existing is not None:
            entries = tuple(FileEntry(path, *hash_file(source / path)) for path in paths)
            return same_or_conflict(existing, self._manifest(source, draft, entries, tensors))
        needed = sum((source / path).stat().st_size for path in paths)
        directory = self._directory(draft.version)
        try:
            self._backend.remove_tree(directory)  # what a publisher that died had left
            entries = tuple(
                FileEntry(path, *self._backend.upload(source / path, self._backend.join(directory, path))) for path in paths
            )
            manifest = self._manifest(source, draft, entries, tensors)
            self._backend.write(self._backend.join(directory, MANIFEST_NAME), manifest.to_bytes())
        except OSError as error:
            self._discard(draft.version)
            if StoreFull.matches(error):
                raise StoreFull(directory, needed) from error
            raise
        except BaseException:
            self._discard(draft.version)
            raise
        return manifest

    def versions(self) -> list[VersionId]:
        """The complete versions, oldest first."""
        return [version for version in self._directories() if self._is_complete(version)]

    def latest(self) -> VersionId | None:
        """The newest complete version."""
        return next((version for version in reversed(self._directories()) if self._is_complete(version)), None)

    def manifest(self, version: VersionId) -> Manifest:
        """The manifest of a complete version.

        Raises:
            NotFound: If the version does not stand complete in the store.
            DataLoss: If its manifest is damaged or belongs elsewhere.
            FailedPrecondition: If this build cannot read it: a newer one wrote it.
        """
        manifest = self._find(version)
        if manifest is None:
            raise NotFound(f"version {version} of {self._what} is not in the store at {self._root}, or not complete")
        return manifest

    def fetch(self, version: VersionId, into: Path, manifest_sha256: str | None = None) -> Path:
        """Copies a version to a fresh local directory `into/<label>` and verifies every byte of it.

        A directory that is already there is verified, and replaced if it is damaged. Nothing partial stays behind.

        Args:
            version: Which version.
            into: The local parent directory, on one file system with the result.
            manifest_sha256: What the caller was told that the manifest's digest is.

        Raises:
            NotFound: If the version is not in the store.
            DataLoss: If bytes are missing or differ from their digest; the message names the file.
            FailedPrecondition: If this build cannot read its manifest: a newer one wrote it.
            StoreFull: If `into` has no room.
        """
        manifest = self.manifest(version)
        if manifest_sha256 is not None and manifest.digest != manifest_sha256:
            raise DataLoss(
                f"version {version}: the manifest's sha256 is {manifest.digest}, the caller expects {manifest_sha256}"
            )
        target = into / version.label
        if target.exists():
            if _holds(target, manifest):
                return target
            shutil.rmtree(target)
        partial = into / f".{version.label}.{uuid.uuid4().hex}"
        try:
            partial.mkdir(parents=True)
            for entry in manifest.files:
                self._fetch_file(version, entry, partial / entry.path)
            (partial / MANIFEST_NAME).write_bytes(manifest.to_bytes())
            check_tensors(partial, manifest)
            partial.rename(target)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            if StoreFull.matches(error):
                raise StoreFull(str(target), manifest.total_bytes) from error
            # A fetch whose caller gave up goes on in its thread, and may have come first.
            if error.errno in {errno.ENOTEMPTY, errno.EEXIST} and _holds(target, manifest):
                return target
            raise
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return target

    def check(self, version: VersionId) -> Manifest:
        """Reads every byte of a version where it stands, and keeps nothing.

        Raises:
            NotFound: If the version is not in the store.
            DataLoss: If bytes are missing or differ from their digest; the message names the file.
        """
        manifest = self.manifest(version)
        for entry in manifest.files:
            self._read_file(version, entry, lambda _: None)
        return manifest

    def fetch_files(self, version: VersionId, wanted: Callable[[str], bool], into: Path) -> list[str]:
        """Copies some files of a version into the local directory `into`, each verified; the weights can stay behind.

        Args:
            version: Which version.
            wanted: Takes the path of a file in the version.
            into: Created if it is missing. A file that stands there complete is left.

        Returns:
            The paths of the files that `wanted` took.

        Raises:
            NotFound: If the version is not in the store.
            DataLoss: If a file is missing or differs from its digest.
        """
        entries = [entry for entry in self.manifest(version).files if wanted(entry.path)]
        for entry in entries:
            target = into / entry.path
            if target.is_file() and hash_file(target) == (entry.bytes, entry.sha256):
                continue
            partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                self._fetch_file(version, entry, partial)
                partial.rename(target)
            finally:
                partial.unlink(missing_ok=True)
        return [entry.path for entry in entries]

    def retain(self, keep_last: int, keep: set[VersionId] | None = None) -> list[VersionId]:
        """Removes all but the newest `keep_last` versions, those in `keep` and promoted ones; also what dead publishers left.

        A quarantined version is none of the newest: however many are refused in a row, they push no good one out.

        Returns:
            The complete versions that were removed.
        """
        if keep_last < 1:
            raise InvalidArgument("keep_last", f"must be at least 1, got {keep_last}")
        complete = self.versions()
        quarantined = self.marks.all("quarantined")
        good = [version for version in complete if version not in quarantined]
        kept = set(good[-keep_last:]) | (keep or set()) | set(self.marks.all("promoted"))
        removed = [version for version in complete if version not in kept]
        for version in removed:
            self._discard(version)
        if complete:
            # Newer than the newest may be a version that is being written now.
            for version in self._directories():
                if version < complete[-1] and version not in kept:
                    self._discard(version)
            # Marks say what became of the versions of now, those that were refused and are gone among them.
            self.marks.prune((good[-keep_last:] or complete)[0], kept.intersection(complete))
        return removed

    @property
    def _what(self) -> str:
        return f"run {self.run}"

    def _directory(self, version: VersionId) -> str:
        return self._backend.join(self._root, version.label)

    def _directories(self) -> list[VersionId]:
        versions = []
        for name in self._backend.list_names(self._root):
            try:
                versions.append(VersionId.parse(name))
            except InvalidArgument:
                continue  # not ours
        return sorted(versions)

    def _is_complete(self, version: VersionId) -> bool:
        return self._backend.exists(self._backend.join(self._directory(version), MANIFEST_NAME))

    def _find(self, version: VersionId) -> Manifest | None:
        path = self._backend.join(self._directory(version), MANIFEST_NAME)
        data = self._backend.read(path, MANIFEST_MAX_BYTES)
        if data is None:
            return None
        manifest = Manifest.from_bytes(data)
        found = (manifest.run, manifest.kind, manifest.name, manifest.version)
        if found != (self.run, self.kind, self.name, version):
            described = " ".join(str(part) for part in found if part)
            raise DataLoss(f"{path} describes {described}, but stands where {self._what} {version} belongs")
        if not manifest.is_canonical:
            raise DataLoss(f"{path} is not in the form that honed writes; it was edited")
        return manifest

    def _manifest(
        self, source: Path, draft: VersionDraft, files: tuple[FileEntry, ...], tensors: tuple[TensorEntry, ...]
    ) -> Manifest:
        return Manifest(
            run=self.run,
            version=draft.version,
            files=files,
            tensors=tensors,
            canaries=draft.canaries,
            tokenizer_sha256=next(entry.sha256 for entry in files if entry.path == "tokenizer.json"),
            chat_template=chat_template_source(source) or "",
            lineage=draft.lineage,
            kind=self.kind,
            name=self.name,
        )

    def _discard(self, version: VersionId) -> None:
        directory = self._directory(version)
        self._backend.remove(self._backend.join(directory, MANIFEST_NAME))
        self._backend.remove_tree(directory)

    def _fetch_file(self, version: VersionId, entry: FileEntry, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("wb") as output:
            self._read_file(version, entry, output.write)

    def _read_file(self, version: VersionId, entry: FileEntry, keep: Callable[[bytes], object]) -> None:
        digest, size = hashlib.sha256(), 0
        for chunk in self._backend.chunks(self._backend.join(self._directory(version), entry.path), CHUNK_BYTES):
            digest.update(chunk)
            size += len(chunk)
            if size > entry.bytes:
                break  # the message below says it; no need to fill the disk first
            keep(chunk)
        compare(f"version {version}: {entry.path}", entry, size, digest.hexdigest())


class PolicyStore(ArtifactStore):
    """The versions of a run's policy."""

    def __init__(self, location: str | Path, run: str, *, io_timeout_s: float = 60.0) -> None:
        """See `ArtifactStore`."""
        super().__init__(location, run, io_timeout_s=io_timeout_s)

    def servable(self) -> list[VersionId]:
        """The complete versions that are not quarantined, newest first: what a generator may try to serve."""
        quarantined = self.marks.all("quarantined")
        return [version for version in reversed(self.versions()) if version not in quarantined]


def _holds(directory: Path, manifest: Manifest) -> bool:
    """Whether a local directory is the complete and undamaged version of a manifest."""
    try:
        return verify_directory(directory).digest == manifest.digest
    except (DataLoss, FailedPrecondition):  # of another schema: not the manifest that was just read, so damaged
        return False

"""A version that an engine may load: its verified directory, and whether it fits what is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from honed.artifacts.manifest import Manifest
from honed.artifacts.verify import verify_directory
from honed.artifacts.version import VersionId
from honed.kit.errors import DataLoss, FailedPrecondition


@dataclass(frozen=True, slots=True)
class Candidate:
    """A verified version on the local disk."""

    directory: Path
    manifest: Manifest

    @property
    def version(self) -> VersionId:
        """Its name."""
        return self.manifest.version

    @property
    def weight_bytes(self) -> int:
        """Size of the safetensors files."""
        return sum(entry.bytes for entry in self.manifest.files if entry.path.endswith(".safetensors"))

    @property
    def weight_files(self) -> tuple[str, ...]:
        """The safetensors files, relative to the directory."""
        return tuple(entry.path for entry in self.manifest.files if entry.path.endswith(".safetensors"))


def read_candidate(version: VersionId, directory: Path) -> Candidate:
    """Verifies each byte at `directory` against its manifest. Blocks.

    Raises:
        DataLoss: If it is not the complete and undamaged `version`.
        FailedPrecondition: If the version has no canaries: nobody could tell whether it was loaded
            right.
    """
    manifest = verify_directory(directory)
    if manifest.version != version:
        raise DataLoss(f"{directory} holds version {manifest.version}, not {version}")
    if not manifest.canaries:
        raise FailedPrecondition(f"version {version} has no canaries; publish it with at least one")
    return Candidate(directory.absolute(), manifest)


def check_fits(candidate: Candidate, serving: Candidate) -> None:
    """Raises FailedPrecondition if `candidate` cannot replace `serving` in a running engine."""
    if candidate.manifest.tokenizer_sha256 != serving.manifest.tokenizer_sha256:
        raise FailedPrecondition(
            f"version {candidate.version} has another tokenizer than {serving.version}, which serves; restart the engine on it"
        )
    new, old = ({t.name: (t.dtype, t.shape) for t in c.manifest.tensors} for c in (candidate, serving))
    if new != old:
        name = min(name for name in new.keys() | old.keys() if new.get(name) != old.get(name))
        raise FailedPrecondition(
            f"version {candidate.version} has another architecture than {serving.version}, which serves: tensor {name} is "
            f"{new.get(name, 'absent')} instead of {old.get(name, 'absent')}; restart the engine on it"
        )

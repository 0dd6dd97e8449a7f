"""What is to become a version: which files of a model directory, and what the publisher says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from honed.artifacts.manifest import Canary, Lineage, Manifest
from honed.artifacts.names import MANIFEST_NAME, check_path
from honed.artifacts.version import VersionId
from honed.kit.errors import Conflict, InvalidArgument


@dataclass(frozen=True, slots=True)
class VersionDraft:
    """What the publisher knows and the files do not say."""

    version: VersionId
    canaries: tuple[Canary, ...]
    lineage: Lineage = field(default_factory=Lineage)


def model_files(source: Path, chosen: Sequence[str] | None) -> list[str]:
    """The files of a model directory that make a version, or those that are chosen of them, in order.

    Raises:
        InvalidArgument: If a needed file is missing, or one is of a kind that a version may not hold.
    """
    found = (path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file())
    paths = sorted(found if chosen is None else chosen)
    paths = [check_path(path, "source") for path in paths if path != MANIFEST_NAME]
    for needed in ("config.json", "tokenizer.json"):
        if needed not in paths:
            raise InvalidArgument("source", f"{source} holds no {needed}; a version is a complete model directory")
    if not any(path.endswith(".safetensors") for path in paths):
        raise InvalidArgument("source", f"{source} holds no safetensors file")
    return paths


def same_or_conflict(existing: Manifest, offered: Manifest) -> Manifest:
    """The manifest that stands, if a publication repeats it: a retry differs from the first try only in its clock.

    Raises:
        Conflict: If the version exists with other content.
    """
    clock = replace(offered.lineage, created_at=existing.lineage.created_at)
    # The template follows from the files, and an earlier build found it in fewer of them.
    if replace(offered, lineage=clock, chat_template=existing.chat_template) != existing:
        raise Conflict(f"version {existing.version} of run {existing.run} exists with other content; versions never change")
    return existing

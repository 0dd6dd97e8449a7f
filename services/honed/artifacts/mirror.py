"""Copies a run's store; a backup is such a copy, a restore its reverse.

    python3 -m honed.artifacts.mirror FROM TO --run NAME [--remove | --restore]

Every byte is verified against its manifest on the way, and a version's manifest is written last: a copy that was broken off
holds whole versions only, and the next one goes on where it ended. What is retired while it is copied is left out.

Two stores that are not of one run are never mixed: a store that was lost begins anew with a version 0.0 of its own, and a
backup of it over the backup of the lost one would leave neither. So a version is never replaced by another of its label.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from honed.artifacts.files import open_backend
from honed.artifacts.names import MANIFEST_NAME
from honed.artifacts.reward_models import RewardModelStore
from honed.artifacts.store import ArtifactStore, PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import Conflict, DataLoss, HonedError, InvalidArgument, NotFound
from honed.kit.log import configure_logging

logger = logging.getLogger(__name__)

_IO_TIMEOUT_S: Final = 60.0
_SMALL: Final = 16 << 20
_MARKS: Final = "marks"
_REWARD_MODELS: Final = "reward-models"
_PROMOTED: Final = ("reward", "promoted.json")


@dataclass
class Mirrored:
    """What a copy did, in versions.

    Attributes:
        copied: those that the copy lacked.
        there: those that it had.
        removed: those that the original does not have any more.
    """

    copied: int = 0
    there: int = 0
    removed: int = 0


def mirror(source: str, target: str, run: str, *, remove: bool = False, restore: bool = False) -> Mirrored:
    """Brings a copy of a run's store up to date. Blocks.

    Args:
        source: directory or fsspec URL of the original.
        target: the same of the copy.
        run: whose.
        remove: whether versions that the original has retired leave the copy as well. An original without any version removes
            none: that is a volume that is not mounted, or a store that was lost.
        restore: whether the copy is a live store that gets back what it lacks: its own marks and promotions stay as they are.

    Raises:
        InvalidArgument: a restore removes nothing.
        NotFound: the original holds no version of the run.
        Conflict: the two places hold versions of different runs; nothing was changed.
        DataLoss: bytes of the original are damaged; names the file. What was copied before stays.
        Unavailable: one of the stores does not answer.
    """
    if remove and restore:
        raise InvalidArgument("remove", "a restore removes nothing: choose one of the two")
    done = Mirrored()
    if not PolicyStore(source, run).versions():
        raise NotFound(f"{source} holds no version of run {run!r}: nothing is copied, and nothing removed")
    for original, copy, parts in _stores(source, target, run):
        _check_same_run(original, copy, (source, target), parts)
    for original, copy, parts in _stores(source, target, run):
        _copy_versions(original, copy, (target, *parts), done, remove=remove)
        _copy_marks(source, target, parts, remove=remove, replace=not restore)
    _copy_file(source, target, (run, *_PROMOTED), replace=not restore)
    return done


def _stores(source: str, target: str, run: str) -> Iterator[tuple[ArtifactStore, ArtifactStore, tuple[str, ...]]]:
    yield PolicyStore(source, run), PolicyStore(target, run), (run,)
    for name in RewardModelStore.names(source, run):
        yield RewardModelStore(source, run, name), RewardModelStore(target, run, name), (run, _REWARD_MODELS, name)


def _check_same_run(original: ArtifactStore, copy: ArtifactStore, places: tuple[str, str], parts: tuple[str, ...]) -> None:
    """Raises Conflict unless what the copy holds was once copied from the original.

    The policy's 0.0 says when it was made, so that no other run has the same one, and it is never retired. Reward models
    are: of one that was trained anew the copy may hold only versions that are gone.
    """
    there, wanted = set(copy.versions()), set(original.versions())
    for version in sorted(there & wanted):
        with _unless_retired(original, version):
            digests = original.manifest(version).digest, copy.manifest(version).digest
            if digests[0] != digests[1]:
                raise _conflict(
                    places, parts, f"hold different versions {version} (sha256 {digests[0][:12]} and {digests[1][:12]})"
                )
    if copy.kind == "policy" and there and not there & wanted:
        raise _conflict(places, parts, "hold no version in common")


def _conflict(places: tuple[str, str], parts: tuple[str, ...], what: str) -> Conflict:
    source, target = places
    return Conflict(
        f"{source} and {target} {what} below {'/'.join(parts)}: they are not of one run, and nothing was copied or removed. "
        f"If {source} holds the right one, move {target}/{parts[0]} away or name another place, and copy again. If it was made "
        f"anew after a loss, move {source}/{parts[0]} away and restore it from {target}"
    )


@contextmanager
def _unless_retired(original: ArtifactStore, version: VersionId) -> Iterator[None]:
    """Ends quietly what failed because the version was retired meanwhile."""
    try:
        yield
    except (NotFound, DataLoss):
        if version in original.versions():
            raise
        logger.info("retired while it was copied", extra={"version": version.label})


def _copy_versions(
    original: ArtifactStore, copy: ArtifactStore, where: tuple[str, ...], done: Mirrored, *, remove: bool
) -> None:
    target, *parts = where
    backend = open_backend(target, _IO_TIMEOUT_S)
    there, wanted = set(copy.versions()), original.versions()
    for version in wanted:
        if version in there:  # with the same digest: `_check_same_run`
            done.there += 1
            continue
        directory = backend.join(*parts, version.label)
        with _unless_retired(original, version), tempfile.TemporaryDirectory(prefix="honed-mirror-") as scratch:
            manifest = original.manifest(version)
            fetched = original.fetch(version, Path(scratch), manifest.digest)
            backend.remove(backend.join(directory, MANIFEST_NAME))
            for entry in manifest.files:
                backend.upload(fetched / entry.path, backend.join(directory, entry.path))
            backend.write(backend.join(directory, MANIFEST_NAME), manifest.to_bytes())
            done.copied += 1
    for version in sorted(there - set(wanted)) if remove and wanted else ():
        backend.remove(backend.join(*parts, version.label, MANIFEST_NAME))
        backend.remove_tree(backend.join(*parts, version.label))
        done.removed += 1


def _copy_marks(source: str, target: str, parts: tuple[str, ...], *, remove: bool, replace: bool) -> None:
    original, copy = open_backend(source, _IO_TIMEOUT_S), open_backend(target, _IO_TIMEOUT_S)
    names = {name for name in original.list_names(original.join(*parts, _MARKS)) if not name.startswith(".")}
    for name in sorted(names):
        _copy_file(source, target, (*parts, _MARKS, name), replace=replace)
    for name in sorted(set(copy.list_names(copy.join(*parts, _MARKS))) - names) if remove else ():
        copy.remove(copy.join(*parts, _MARKS, name))


def _copy_file(source: str, target: str, parts: tuple[str, ...], *, replace: bool) -> None:
    original, copy = open_backend(source, _IO_TIMEOUT_S), open_backend(target, _IO_TIMEOUT_S)
    data = original.read(original.join(*parts), _SMALL)
    there = copy.read(copy.join(*parts), _SMALL)
    if data is not None and (there is None or (replace and data != there)):
        copy.write(copy.join(*parts), data)


def main() -> int:
    """Runs the command; prints what it did."""
    parser = argparse.ArgumentParser(prog="python3 -m honed.artifacts.mirror", description="Copy a run's store.")
    parser.add_argument("source", help="Directory or URL of the original.")
    parser.add_argument("target", help="Directory or URL of the copy.")
    parser.add_argument("--run", required=True, help="The run's name.")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--remove", action="store_true", help="Remove from the copy what the original has retired.")
    how.add_argument("--restore", action="store_true", help="Only add what is missing; marks and promotions stay.")
    options = parser.parse_args()
    configure_logging("mirror", "INFO")
    try:
        done = mirror(options.source, options.target, options.run, remove=options.remove, restore=options.restore)
    except (HonedError, OSError) as error:
        sys.stderr.write(f"honed: {error}\n")
        return 1
    sys.stdout.write(f"{done.copied} versions copied, {done.there} were there, {done.removed} removed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

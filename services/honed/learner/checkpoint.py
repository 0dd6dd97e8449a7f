"""Checkpoints: one immutable directory each, complete or not there; safetensors, JSON and one bitmap.

`<fence>-<sequence>-step-<update>/` holds `model.safetensors`, `optimizer.safetensors`, `generator.safetensors`,
`progress.json`, `trained.bin` (see `trained`), and `manifest.json` with the size and sha256 of each. It is written under a
hidden name, every file and the directory are synced, and it appears by one rename. Invariants: what carries the final name
was complete when it appeared; (fence, sequence) rises with every save, so the newest is well defined even when an update is
made again after a roll-back; nothing here is ever rewritten; and a learner that lost its lease, and does not know it yet,
neither writes behind its successor nor removes what is the successor's.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from honed.kit.errors import DataLoss, FailedPrecondition, HonedError, InvalidArgument, NotFound, Overloaded
from honed.learner.trained import TrainedIds
from honed.learner.trainer_state import TrainerState

logger = logging.getLogger(__name__)

FORMAT = 2
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_TRAINED = "trained.bin"
_PARTIAL = ".partial-"
_NAME = re.compile(r"(\d{6,})-(\d{8})-step-(\d+)")
_FORMAT_1_NAME = re.compile(r"\d{8}-step-\d+")


@dataclass(frozen=True)
class Progress:
    """What the loop, not the trainer, has to remember.

    Attributes:
        trained: Rollouts behind the weights.
        version: Label that the weights were, or were to be, published under; empty before the first update.
        rollbacks: Fence and update of each roll-back, oldest first: what older fences made beyond it is abandoned.
    """

    trained: TrainedIds
    version: str = ""
    rollbacks: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Checkpoint:
    """A point of a run to go on from."""

    trainer: TrainerState
    progress: Progress


@dataclass(frozen=True, order=True)
class Name:
    """What a checkpoint's directory is called, in the order in which they were made."""

    fence: int
    sequence: int
    step: int

    @classmethod
    def of(cls, directory: Path) -> Self | None:
        """Reads a name; None if it is not a checkpoint's."""
        match = _NAME.fullmatch(directory.name.removeprefix(_PARTIAL))
        return cls(*map(int, match.groups())) if match else None

    @property
    def label(self) -> str:
        """Of the version with its weights."""
        return f"{self.fence}.{self.step}"

    def __str__(self) -> str:
        return f"{self.fence:06d}-{self.sequence:08d}-step-{self.step}"


class CheckpointStore:
    """Saves, lists and loads checkpoints under one directory. One writer at a time; a late one is recognised by its fence."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        """`keep` newest checkpoints stay; at least 2 leave one to fall back to when the newest is found corrupted."""
        if keep < 1:
            raise InvalidArgument("keep", f"must be at least 1, got {keep}")
        self._directory, self._keep = directory, keep

    def save(
        self,
        checkpoint: Checkpoint,
        fence: int,
        *,
        also_keep: Container[str] = (),
        good: Callable[[str], bool] = lambda label: False,
    ) -> Path:
        """Writes a checkpoint; when this returns it is durable. Older ones beyond `keep` are then removed.

        Args:
            checkpoint: What to write.
            fence: Of the writer's lease.
            also_keep: Labels of versions (`fence.step`) whose checkpoints stay too.
            good: Whether a version, by its label, is one to go back to; the newest such checkpoint stays too.

        Raises:
            FailedPrecondition: A learner with a higher fence has written here; nothing was.
            Overloaded: The disk is full; nothing that was there before is touched.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        self.clean(fence)
        newest = max(self._names(), default=None)
        if newest is not None and newest.fence > fence:
            raise FailedPrecondition(
                f"{self._directory / str(newest)} was written under fence {newest.fence}, this learner has {fence}: "
                "another learner has taken over; stop this one"
            )
        name = Name(fence, newest.sequence + 1 if newest else 1, checkpoint.trainer.step)
        final, partial = self._directory / str(name), self._directory / f"{_PARTIAL}{name}"
        try:
            partial.mkdir()
            _write(partial, checkpoint)
            partial.rename(final)
            _sync(self._directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if is_full(error):
                raise Overloaded(
                    f"no space left for checkpoint {final}: free space or move the directory; older checkpoints are intact",
                    30.0,
                ) from error
            raise
        self._retain(fence, also_keep, good)
        return final

    def clean(self, fence: int) -> None:
        """Removes what killed writers left, but nothing of a writer with a higher fence."""
        for left in self._directory.glob(f"{_PARTIAL}*"):
            name = Name.of(left)
            if name is None or name.fence <= fence:
                shutil.rmtree(left, ignore_errors=True)

    def list(self) -> list[Path]:
        """Directories of all checkpoints, oldest first, unchecked."""
        return [self._directory / str(name) for name in sorted(self._names())]

    def newest_fence(self) -> int:
        """The highest fence under which a checkpoint was written; 0 if there is none."""
        return max((name.fence for name in self._names()), default=0)

    def latest(self, *, on_skip: Callable[[Path, str], None] | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when there is none at all.

        Args:
            on_skip: told of each one that is not, with the reason; it is logged in any case.

        Raises:
            DataLoss: when there are checkpoints and not one of them is whole: starting over silently would lose the run.
            FailedPrecondition: when the checkpoints here are of an earlier format.
        """
        present = self.list()
        if not present:
            self._refuse_format_1()
        for directory in reversed(present):
            try:
                return load(directory)
            except HonedError as error:
                logger.warning("checkpoint %s skipped: %s", directory, error)
                if on_skip is not None:
                    on_skip(directory, str(error))
        if present:
            raise DataLoss(f"none of the {len(present)} checkpoints in {self._directory} can be read; see the log for reasons")
        return None

    def find(self, wanted: Callable[[Name], bool]) -> Checkpoint | None:
        """The newest whole checkpoint whose name is wanted; None if there is none."""
        for name in sorted(self._names(), reverse=True):
            if wanted(name):
                try:
                    return load(self._directory / str(name))
                except DataLoss as error:
                    logger.warning("checkpoint %s skipped: %s", name, error)
        return None

    def at_step(self, step: int) -> Checkpoint:
        """The newest whole checkpoint of an update.

        Raises:
            NotFound: when there is none.
        """
        found = self.find(lambda name: name.step == step)
        if found is None:
            raise NotFound(
                f"no whole checkpoint of update {step} in {self._directory}; kept are {[p.name for p in self.list()]}"
            )
        return found

    def _names(self) -> Iterator[Name]:
        if self._directory.is_dir():
            names = (Name.of(path) for path in self._directory.iterdir() if not path.name.startswith(_PARTIAL))
            yield from (name for name in names if name is not None)

    def _retain(self, fence: int, also_keep: Container[str], good: Callable[[str], bool]) -> None:
        """Removes old checkpoints. Several of one update and fence count once, or repeated saves would leave no fallback."""
        kept: set[str] = set()
        names = sorted(self._names(), reverse=True)
        last_good = next((name for name in names if good(name.label)), None)
        for name in names:
            if name.label not in kept and len(kept) < self._keep:
                kept.add(name.label)
            elif name.fence <= fence and name != last_good and name.label not in also_keep:
                shutil.rmtree(self._directory / str(name), ignore_errors=True)

    def _refuse_format_1(self) -> None:
        old = (
            [p.name for p in self._directory.iterdir() if _FORMAT_1_NAME.fullmatch(p.name)] if self._directory.is_dir() else []
        )
        if old:
            raise FailedPrecondition(
                f"{self._directory / max(old)} has format 1, of an earlier build that did not record which rollouts trained: "
                "finish the run with that build, or begin another run with its last version as conductor.start_from"
            )


def load(directory: Path) -> Checkpoint:
    """Reads one checkpoint and checks every byte of it.

    Raises:
        DataLoss: when a file is missing, has another size or digest, or does not hold what it should.
    """
    manifest = _read_json(directory / _MANIFEST)
    if manifest.get("format") != FORMAT:
        raise DataLoss(f"{directory / _MANIFEST} has format {manifest.get('format')!r}; this build reads {FORMAT}")
    try:
        for name, entry in manifest["files"].items():
            _verify(directory / name, int(entry["bytes"]), str(entry["sha256"]))
        progress = _read_json(directory / _PROGRESS)
        return Checkpoint(
            trainer=TrainerState(
                step=int(manifest["step"]),
                model=load_file(directory / "model.safetensors"),
                optimizer=load_file(directory / "optimizer.safetensors"),
                generator=load_file(directory / "generator.safetensors")["minibatches"],
                kl=progress["kl"],
                normaliser=progress["normaliser"],
            ),
            progress=Progress(
                trained=TrainedIds.from_bytes((directory / _TRAINED).read_bytes()),
                version=str(progress["version"]),
                rollbacks=tuple((int(fence), int(step)) for fence, step in progress["rollbacks"]),
            ),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise DataLoss(f"{directory} cannot be read: {type(error).__name__}: {error}") from error


def _write(directory: Path, checkpoint: Checkpoint) -> None:
    trainer, progress = checkpoint.trainer, checkpoint.progress
    _save_tensors(directory / "model.safetensors", trainer.model)
    _save_tensors(directory / "optimizer.safetensors", trainer.optimizer)
    _save_tensors(directory / "generator.safetensors", {"minibatches": trainer.generator})
    _save_json(
        directory / _PROGRESS,
        {
            "version": progress.version,
            "rollbacks": [list(each) for each in progress.rollbacks],
            "kl": dict(trainer.kl),
            "normaliser": dict(trainer.normaliser),
        },
    )
    (directory / _TRAINED).write_bytes(progress.trained.to_bytes())
    _sync(directory / _TRAINED)
    files = {p.name: _describe(p) for p in sorted(directory.iterdir())}
    _save_json(directory / _MANIFEST, {"format": FORMAT, "step": trainer.step, "files": files})
    _sync(directory)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    _sync(path)


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    # Python writes floats so that they read back bit for bit; NaN is not JSON and is refused.
    path.write_text(json.dumps(content, sort_keys=True, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    _sync(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataLoss(f"{path} is missing") from error
    except (OSError, ValueError) as error:
        raise DataLoss(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise DataLoss(f"{path} holds no JSON object")
    return content


def _describe(path: Path) -> dict[str, int | str]:
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _verify(path: Path, size: int, sha256: str) -> None:
    if not path.is_file():
        raise DataLoss(f"{path} is missing")
    if path.stat().st_size != size:
        raise DataLoss(f"{path} has {path.stat().st_size} bytes, not {size}")
    if _digest(path) != sha256:
        raise DataLoss(f"{path} is not what was written: its sha256 differs")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports the operating system's error in words.
    return "No space left" in str(error) or "os error 28" in str(error) or "os error 122" in str(error)

"""The checkpoints of a run: one immutable directory each, complete or not there.

`<fence>-<sequence>-step-<update>/` (its files: `checkpoint_files`) is written under a hidden name, every file and the
directory are synced, and it appears by one rename. Invariants: what carries the final name was complete when it appeared;
(fence, sequence) rises with every save, so the newest is well defined even when an update is made again after a roll-back;
nothing here is ever rewritten; and a learner that lost its lease, and does not know it yet, neither writes behind its
successor nor removes what is the successor's.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from safetensors import SafetensorError

from honed.kit.errors import DataLoss, FailedPrecondition, HonedError, InvalidArgument, NotFound, Overloaded
from honed.kit.files import sync
from honed.learner.loop.checkpoint_files import Checkpoint, is_full, load, write

logger = logging.getLogger(__name__)

_PARTIAL = ".partial-"
_NAME = re.compile(r"(\d{6,})-(\d{8})-step-(\d+)")
_FORMAT_1_NAME = re.compile(r"\d{8}-step-\d+")


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
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _tell_if_full(self._directory, error)
            raise
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
            write(partial, checkpoint)
            partial.rename(final)
            sync(self._directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            _tell_if_full(final, error)
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


def _tell_if_full(place: Path, error: Exception) -> None:
    if is_full(error):
        raise Overloaded(
            f"no space left for checkpoint {place}: free space or move the directory; older checkpoints are intact", 30.0
        ) from error

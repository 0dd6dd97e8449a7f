"""Where a run can go back to: a checkpoint, which is exact, or the weights of a version in the store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from torch import Tensor

from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument, NotFound
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint
from honed.learner.loop.journal import Journal

Weights = Mapping[str, Tensor]
_BASE: Final = VersionId(0, 0)


@dataclass(frozen=True)
class Destination:
    """A point to go back to; one of `checkpoint` and `weights` is set.

    Attributes:
        step: Its update.
        label: Its version.
        checkpoint: Everything of it.
        weights: Of the language model alone.
    """

    step: int
    label: str
    checkpoint: Checkpoint | None = None
    weights: Weights | None = None


class History:
    """The points that are kept. Calls block."""

    def __init__(
        self, checkpoints: CheckpointStore, store: PolicyStore, journal: Journal, scratch: Path, load: Callable[[Path], Weights]
    ) -> None:
        """Loads nothing yet.

        Args:
            checkpoints: Of this learner.
            store: Of the run's versions.
            journal: Knows what generators have committed.
            scratch: Where to fetch versions to.
            load: Reads the language model's weights from a model directory.
        """
        self._checkpoints, self._store, self._journal = checkpoints, store, journal
        self._scratch, self._load = scratch, load

    def last_good(self, before: int | None = None) -> Destination:
        """The newest point whose version generators have committed, of an update `before` another; or the base."""
        committed = good_versions(self._store, self._journal)

        def good(label: str) -> bool:
            return committed(label) and (before is None or VersionId.parse(label).step < before)

        checkpoint = self._checkpoints.find(lambda name: good(name.label))
        if checkpoint is not None:
            return Destination(checkpoint.trainer.step, checkpoint.progress.version, checkpoint=checkpoint)
        version = next((version for version in self._store.servable() if good(version.label)), _BASE)
        return self._from_store(version)

    def of_version(self, version: VersionId) -> Destination:
        """A version's checkpoint, or its weights.

        Raises:
            NotFound: It is not in the store, and has no checkpoint.
            FailedPrecondition: Generators have refused it.
        """
        if version in self._store.marks.all("quarantined"):
            raise FailedPrecondition(f"version {version} was refused by generators: choose another one")
        checkpoint = self._checkpoints.find(lambda name: (name.fence, name.step) == (version.fence, version.step))
        if checkpoint is not None:
            return Destination(version.step, version.label, checkpoint=checkpoint)
        return self._from_store(version)

    def of_step(self, step: int) -> Destination:
        """The newest checkpoint of an update, or the weights of its newest version.

        Raises:
            NotFound: Neither is kept.
        """
        quarantined = {version.label for version in self._store.marks.all("quarantined")}
        checkpoint = self._checkpoints.find(lambda name: name.step == step and name.label not in quarantined)
        if checkpoint is not None:
            return Destination(step, checkpoint.progress.version, checkpoint=checkpoint)
        servable = self._store.servable()
        version = next((version for version in servable if version.step == step), None)
        if version is None:
            kept = sorted({version.step for version in servable})
            raise NotFound(f"step: neither a checkpoint nor a version of update {step} is kept; kept are the updates {kept}")
        return self._from_store(version)

    def _from_store(self, version: VersionId) -> Destination:
        directory = self._store.fetch(version, self._scratch)
        return Destination(version.step, version.label, weights=self._load(directory))


def good_versions(store: PolicyStore, journal: Journal) -> Callable[[str], bool]:
    """Whether a version, by its label, is one to go back to: generators have committed it, and none refused it since.

    A checkpoint is good whether or not its version still stands in the store. Blocks.
    """
    quarantined = {version.label for version in store.marks.all("quarantined")}
    return lambda label: label not in quarantined and (label == _BASE.label or journal.committed(label))


def check_target(run: str, version_run: str, step: int, update: int) -> None:
    """Refuses what is no way back.

    Raises:
        InvalidArgument: Another run's version, or an update that is yet to come.
    """
    if version_run and version_run != run:
        raise InvalidArgument("version.run", f"this learner trains run {run!r}, not {version_run!r}")
    if step > update:
        raise InvalidArgument("step", f"{step} is after update {update}, where the learner stands")

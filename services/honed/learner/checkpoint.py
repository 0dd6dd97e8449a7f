"""Checkpoints: one immutable directory each, complete or not there, safetensors and JSON only.

`<sequence>-step-<step>/` holds `model.safetensors`, `optimizer.safetensors`, `generator.safetensors`, `progress.json`, and
`manifest.json` with the size and sha256 of each. It is written under a hidden name, every file and the directory are synced,
and it appears by one rename. Invariants: what carries the final name was complete when it appeared; the sequence number rises
with every save, so the newest is well defined even when a step is made again after a rollback; nothing here is ever rewritten.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from honed.kit.errors import DataLoss, HonedError, InvalidArgument, NotFound, Overloaded
from honed.learner.trainer_state import TrainerState

logger = logging.getLogger(__name__)

FORMAT = 1
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_NAME = re.compile(r"(\d{8})-step-(\d+)")


@dataclass(frozen=True)
class Progress:
    """What the loop, not the trainer, has to remember."""

    stream_position: str = "0-0"
    """Id of the newest stream entry that has trained or been dropped."""
    consumed: tuple[str, ...] = ()
    """Rollout ids that trained or were dropped and may not have been acknowledged: skip them when they come again."""
    drops: Mapping[str, int] = field(default_factory=dict)
    """Rollouts dropped so far, for each reason."""
    totals: Mapping[str, float] = field(default_factory=dict)
    """Running sums of the run, such as episodes and tokens."""


@dataclass(frozen=True)
class Checkpoint:
    """A point of a run to go on from."""

    trainer: TrainerState
    progress: Progress


class CheckpointStore:
    """Saves, lists and loads checkpoints under one directory. One writer at a time."""

    def __init__(self, directory: Path, *, keep: int = 2) -> None:
        """`keep` newest checkpoints stay; at least 2 leave one to fall back to when the newest is found corrupted."""
        if keep < 1:
            raise InvalidArgument("keep", f"must be at least 1, got {keep}")
        self._directory, self._keep = directory, keep

    def save(self, checkpoint: Checkpoint) -> Path:
        """Writes a checkpoint; when this returns it is durable. Older ones beyond `keep` are then removed.

        Raises:
            Overloaded: when the disk is full; nothing that was there before is touched.
        """
        self._directory.mkdir(parents=True, exist_ok=True)
        existing = self.list()
        sequence = _sequence(existing[-1]) + 1 if existing else 1
        final = self._directory / f"{sequence:08d}-step-{checkpoint.trainer.step}"
        partial = self._directory / f".partial-{final.name}"
        for left in self._directory.glob(".partial-*"):  # by a writer that was killed
            shutil.rmtree(left, ignore_errors=True)
        try:
            partial.mkdir()
            _write(partial, checkpoint)
            partial.rename(final)
            _sync(self._directory)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            if _is_full(error):
                raise Overloaded(
                    f"no space left for checkpoint {final}: free space or move the directory; older checkpoints are intact",
                    30.0,
                ) from error
            raise
        for old in self.list()[: -self._keep]:
            shutil.rmtree(old, ignore_errors=True)
        return final

    def list(self) -> list[Path]:
        """Directories of all checkpoints, oldest first, unchecked."""
        if not self._directory.is_dir():
            return []
        return sorted((p for p in self._directory.iterdir() if _NAME.fullmatch(p.name)), key=_sequence)

    def latest(self, *, on_skip: Callable[[Path, str], None] | None = None) -> Checkpoint | None:
        """The newest checkpoint that is whole; None when there is none at all.

        Args:
            on_skip: told of each one that is not, with the reason; it is logged in any case.

        Raises:
            DataLoss: when there are checkpoints and not one of them is whole: starting over silently would lose the run.
        """
        present = self.list()
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

    def at_step(self, step: int) -> Checkpoint:
        """The newest whole checkpoint of a step.

        Raises:
            NotFound: when there is none.
            DataLoss: when it is not whole.
        """
        for directory in reversed(self.list()):
            if directory.name.endswith(f"-step-{step}"):
                return load(directory)
        raise NotFound(f"no checkpoint of step {step} in {self._directory}; kept are {[p.name for p in self.list()]}")


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
                stream_position=progress["stream_position"],
                consumed=tuple(progress["consumed"]),
                drops=progress["drops"],
                totals=progress["totals"],
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
            "stream_position": progress.stream_position,
            "consumed": list(progress.consumed),
            "drops": dict(progress.drops),
            "totals": dict(progress.totals),
            "kl": dict(trainer.kl),
            "normaliser": dict(trainer.normaliser),
        },
    )
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


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports the operating system's error in words.
    return "No space left" in str(error) or "os error 28" in str(error) or "os error 122" in str(error)


def _sequence(directory: Path) -> int:
    return int(directory.name.partition("-")[0])

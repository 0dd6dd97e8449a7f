"""The files of one checkpoint: safetensors, JSON and one bitmap, each synced, and all of them digested in a manifest.

The directory holds `model.safetensors`, `optimizer.safetensors`, `generator.safetensors`, `progress.json`, `trained.bin` (see
`trained`), `average.safetensors` where the weights are averaged, and `manifest.json` with the size and sha256 of each, which is
written last.
"""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from honed.kit.errors import DataLoss
from honed.kit.files import sync
from honed.learner.sources.trained import TrainedIds
from honed.learner.train.state import TrainerState

FORMAT = 2
_MANIFEST = "manifest.json"
_PROGRESS = "progress.json"
_TRAINED = "trained.bin"
_AVERAGE = "average.safetensors"
_OF_THE_LOOP = frozenset({"version", "averaged", "rollbacks", "position"})
"""What the progress file holds beside the parts of the algorithm, each under its own name."""


@dataclass(frozen=True)
class Progress:
    """What the loop, not the trainer, has to remember.

    Attributes:
        trained: Rollouts behind the weights.
        version: Label that the weights were, or were to be, published under; empty before the first update.
        rollbacks: Fence and update of each roll-back, oldest first: what older fences made beyond it is abandoned.
        position: Where a source stands that is read in an order of its own; JSON. Empty for the scored stream.
        averaged: Label that the average of the weights was published under; empty unless it was, after the last update.
    """

    trained: TrainedIds
    version: str = ""
    rollbacks: tuple[tuple[int, int], ...] = ()
    position: Mapping[str, Any] = field(default_factory=dict)
    averaged: str = ""


@dataclass(frozen=True)
class Checkpoint:
    """A point of a run to go on from."""

    trainer: TrainerState
    progress: Progress


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
                algorithm={part: dict(numbers) for part, numbers in progress.items() if part not in _OF_THE_LOOP},
                average=load_file(directory / _AVERAGE) if _AVERAGE in manifest["files"] else {},
            ),
            progress=Progress(
                trained=TrainedIds.from_bytes((directory / _TRAINED).read_bytes()),
                version=str(progress["version"]),
                rollbacks=tuple((int(fence), int(step)) for fence, step in progress["rollbacks"]),
                position=dict(progress.get("position", {})),
                averaged=str(progress.get("averaged", "")),
            ),
        )
    except (KeyError, TypeError, AttributeError, ValueError, OSError, SafetensorError) as error:
        raise DataLoss(f"{directory} cannot be read: {type(error).__name__}: {error}") from error


def write(directory: Path, checkpoint: Checkpoint) -> None:
    """Writes one checkpoint into an empty directory; durable when this returns."""
    trainer, progress = checkpoint.trainer, checkpoint.progress
    _save_tensors(directory / "model.safetensors", trainer.model)
    _save_tensors(directory / "optimizer.safetensors", trainer.optimizer)
    _save_tensors(directory / "generator.safetensors", {"minibatches": trainer.generator})
    if trainer.average:
        _save_tensors(directory / _AVERAGE, trainer.average)
    _save_json(
        directory / _PROGRESS,
        {
            "version": progress.version,
            "rollbacks": [list(each) for each in progress.rollbacks],
            **({"position": dict(progress.position)} if progress.position else {}),
            **({"averaged": progress.averaged} if progress.averaged else {}),
            **{part: dict(numbers) for part, numbers in trainer.algorithm.items()},
        },
    )
    (directory / _TRAINED).write_bytes(progress.trained.to_bytes())
    sync(directory / _TRAINED)
    files = {p.name: _describe(p) for p in sorted(directory.iterdir())}
    _save_json(directory / _MANIFEST, {"format": FORMAT, "step": trainer.step, "files": files})
    sync(directory)


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)
    sync(path)


def _save_json(path: Path, content: Mapping[str, Any]) -> None:
    # Python writes floats so that they read back bit for bit; NaN is not JSON and is refused.
    path.write_text(json.dumps(content, sort_keys=True, allow_nan=False, indent=1) + "\n", encoding="utf-8")
    sync(path)


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


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk or a quota is full."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors reports the operating system's error in words.
    return "No space left" in str(error) or "os error 28" in str(error) or "os error 122" in str(error)

"""The learner's books: JSON lines, one a step with its metrics and the ids of the rollouts that trained it, and one a push.

A step's line is written before its checkpoint, and lines beyond the checkpoint are cut off at a resume: so the book and the
weights always tell the same story, and the ids prove that no rollout trained twice.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class StepRecord:
    """One step: its number from 1, when it ended (seconds since 1970), its metrics, and what it trained on."""

    step: int
    ended_at: float
    values: Mapping[str, float]
    rollout_ids: Sequence[str]


@dataclass(frozen=True)
class PushRecord:
    """One push of a version into the generators.

    Attributes:
        version: its label.
        ended_at: seconds since 1970.
        committed: generators that serve it.
        failures: why others do not.
        pauses_s: how long requests stood still, for each committed generator.
        canary_max_error: nats.
        carried: requests in flight at a pause that went on.
    """

    version: str
    ended_at: float
    committed: int
    failures: Sequence[str]
    pauses_s: Sequence[float]
    canary_max_error: float
    carried: int

    @property
    def succeeded(self) -> bool:
        """Whether every generator serves the version."""
        return self.committed > 0 and not self.failures


class Ledger:
    """The books of one run; readers in the same event loop can follow the steps live."""

    def __init__(self, directory: Path) -> None:
        """Opens the books, or begins new ones."""
        directory.mkdir(parents=True, exist_ok=True)
        self._steps_path, self._pushes_path = directory / "steps.jsonl", directory / "pushes.jsonl"
        for path in (self._steps_path, self._pushes_path):
            _cut_torn_line(path)
        self.steps = read_steps(directory)
        self.pushes = read_pushes(directory)
        self._grown = asyncio.Condition()

    def rewind(self, step: int) -> None:
        """Cuts off the steps that a checkpoint of `step` does not know."""
        self.steps = [record for record in self.steps if record.step <= step]
        partial = self._steps_path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        _append(partial, self.steps)
        partial.rename(self._steps_path)

    def add_step(self, record: StepRecord) -> None:
        """Adds a step; durable when this returns."""
        _append(self._steps_path, [record])
        self.steps.append(record)

    def add_push(self, record: PushRecord) -> None:
        """Adds a push; durable when this returns."""
        _append(self._pushes_path, [record])
        self.pushes.append(record)

    def has_pushed(self, version: str) -> bool:
        """Whether the book has a push of this version that succeeded."""
        return any(push.version == version and push.succeeded for push in reversed(self.pushes))

    async def announce(self) -> None:
        """Wakes those who follow."""
        async with self._grown:
            self._grown.notify_all()

    async def follow(self, from_step: int, *, live: bool) -> AsyncIterator[StepRecord]:
        """Yields the steps from one on; with `live`, also those to come."""
        position = from_step
        while True:
            for record in [r for r in self.steps if r.step >= position]:
                yield record
                position = record.step + 1
            if not live:
                return
            async with self._grown:
                if not any(record.step >= position for record in self.steps):
                    await self._grown.wait()


def read_steps(directory: Path) -> list[StepRecord]:
    """Reads the book of steps of a learner's directory.

    Raises:
        ValueError: a line before the last is damaged.
    """
    return [StepRecord(**row) for row in _rows(directory / "steps.jsonl")]


def read_pushes(directory: Path) -> list[PushRecord]:
    """Reads the book of pushes of a learner's directory.

    Raises:
        ValueError: a line before the last is damaged.
    """
    return [PushRecord(**row) for row in _rows(directory / "pushes.jsonl")]


def _append(path: Path, records: Iterable[StepRecord | PushRecord]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(asdict(record)) + "\n" for record in records)
        file.flush()
        os.fsync(file.fileno())


def _cut_torn_line(path: Path) -> None:
    """Removes a last line that a crash cut short: the next one must not be glued to it."""
    if path.exists():
        content = path.read_bytes()
        with path.open("r+b") as file:
            file.truncate(content.rfind(b"\n") + 1)


def _rows(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break  # a crash cut the last line short: its step is not in any checkpoint
            raise ValueError(f"{path}, line {number} is not JSON ({error}): the book was edited, or the disk is bad") from error
    return rows

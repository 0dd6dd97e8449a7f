"""What the learner's journal records: updates, pushes, and totals; and how they stand in the rows of its files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from honed.learner.loop.segments import Row

OF_SCORER: Final = "score/"
"""Begins the name of a figure that is the mean of what one scorer said."""


def scores_of(figures: Mapping[str, float]) -> dict[str, float]:
    """What each scorer said in the mean of an update, by the scorer's name, in the order of the names."""
    return {name.removeprefix(OF_SCORER): value for name, value in sorted(figures.items()) if name.startswith(OF_SCORER)}


@dataclass(frozen=True)
class UpdateRecord:
    """One update: its number from 1, when it ended (seconds since 1970), its metrics, and what it trained on."""

    step: int
    ended_at: float
    values: Mapping[str, float]
    rollout_ids: Sequence[str]


@dataclass(frozen=True)
class PushRecord:
    """One push of a version into the generators.

    Attributes:
        version: Its label.
        ended_at: Seconds since 1970.
        committed: Generators that serve it.
        failures: Why others do not.
        pauses_s: How long requests stood still, for each generator that changed its weights.
        canary_max_error: Nats.
        carried: Requests in flight at a pause that went on.
        refused: Whether generators refused it, so that it is never tried again.
    """

    version: str
    ended_at: float
    committed: int
    failures: Sequence[str]
    pauses_s: Sequence[float]
    canary_max_error: float
    carried: int
    refused: bool = False

    @property
    def succeeded(self) -> bool:
        """Whether a generator serves the version; those that do not will catch up by themselves."""
        return self.committed > 0


@dataclass(frozen=True)
class Totals:
    """Counts over the whole run.

    Attributes:
        trained: Rollouts behind the weights.
        undone: Rollouts that had trained, and whose effect is lost: a roll-back, or a damaged checkpoint.
        skipped: Batches whose update was not applied.
        turn: First turn of the prompt sequence after all that ever trained.
        pushed: Pushes that a generator committed.
        failed: Pushes that none committed.
        refused: Versions that generators refused.
    """

    trained: int = 0
    undone: int = 0
    skipped: int = 0
    turn: int = 0
    pushed: int = 0
    failed: int = 0
    refused: int = 0


def update_counts(rows: Sequence[Row]) -> Counter[str]:
    """What rows of updates and of skipped batches add to the totals; `turn` is their highest."""
    counts: Counter[str] = Counter()
    for row in rows:
        if "values" in row:
            counts["trained"] += len(row["ids"])
            counts["turn"] = max(counts["turn"], row["turn"])
        else:
            counts["skipped"] += 1
    return counts


def push_counts(rows: Sequence[Mapping[str, Any]]) -> Counter[str]:
    """What rows of pushes add to the totals."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts["pushed" if row["committed"] else "failed"] += 1
        counts["refused"] += bool(row["refused"])
    return counts


def update_of(row: Row, *, with_ids: bool) -> UpdateRecord:
    """The record that a row holds, without rollout ids unless asked for."""
    return UpdateRecord(row["n"], row["at"], row["values"], row["ids"] if with_ids else ())


def push_of(row: Row) -> PushRecord:
    """The record that a row holds."""
    return PushRecord(**{name: row[name] for name in PushRecord.__dataclass_fields__ if name in row})

"""Which reward models were promoted: one small JSON file beside the run's versions, the record of truth for all replicas.

The file is written whole: it holds the state before a promotion or the state after it. Its number rises
with each promotion. Whoever writes it holds the lease `promotions`, so that no promotion is lost.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from honed.artifacts.files import open_backend
from honed.artifacts.names import check_run
from honed.kit.errors import DataLoss, Unavailable
from honed.kit.rows import read_row

_FORMAT: Final = 2
_ANSWERS_KEPT: Final = 256
_MAX_BYTES: Final = 4 << 20


@dataclass(frozen=True, slots=True)
class Promoted:
    """What serves for one scorer.

    Attributes:
        source: `artifact:NAME/VERSION`, or the model directory that the settings name.
        version: Its version, a digest of the files that decide a score; checked again at each load.
        instead_of: The source in the settings that it stands in for. When the run file names another one, that one wins.
    """

    source: str
    version: str
    instead_of: str


@dataclass(frozen=True, slots=True)
class PromotionAnswer:
    """What a promotion with an idempotency key was answered."""

    name: str
    version: str
    previous: str


@dataclass(frozen=True, slots=True)
class PromotionState:
    """The content of the file.

    Attributes:
        number: How many promotions there have been.
        by_scorer: What serves, by the scorer's name.
        answers: Of promotions, by idempotency key.
    """

    number: int = 0
    by_scorer: Mapping[str, Promoted] = field(default_factory=dict)
    answers: Mapping[str, PromotionAnswer] = field(default_factory=dict)

    @property
    def versions(self) -> dict[str, str]:
        """The promoted version of each scorer."""
        return {name: promoted.version for name, promoted in self.by_scorer.items()}

    def versions_for(self, sources: Mapping[str, str]) -> dict[str, str]:
        """The promoted version of each scorer of the settings that its promotion still stands for.

        Args:
            sources: The source of each scorer in the settings, by name. A promotion in place of another source is void.
        """
        return {name: row.version for name, row in self.by_scorer.items() if sources.get(name) == row.instead_of}

    def with_promotion(self, name: str, promoted: Promoted) -> PromotionState:
        """The state after a promotion."""
        return replace(self, number=self.number + 1, by_scorer={**self.by_scorer, name: promoted})

    def with_answer(self, key: str, answer: PromotionAnswer) -> PromotionState:
        """The state that remembers an answer; the oldest ones go."""
        kept = list({**self.answers, key: answer}.items())[-_ANSWERS_KEPT:]
        return replace(self, answers=dict(kept))


class PromotionRecord:
    """The file of one run. Calls block."""

    def __init__(self, location: str | Path, run: str, *, io_timeout_s: float = 60.0) -> None:
        """`location` is that of the run's `PolicyStore`."""
        self._backend = open_backend(str(location), io_timeout_s)
        self.path = self._backend.join(check_run(run), "reward", "promoted.json")

    def read(self) -> PromotionState:
        """Reads the file; a file that does not exist is an empty state.

        Raises:
            DataLoss: It is damaged.
            Unavailable: The store does not answer.
        """
        try:
            data = self._backend.read(self.path, _MAX_BYTES)
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be read ({error})") from error
        if data is None:
            return PromotionState()
        try:
            tree = json.loads(data)
            if tree["format"] != _FORMAT:
                raise DataLoss(f"{self.path} has format {tree['format']}, this build reads {_FORMAT}")
            return PromotionState(
                int(tree["number"]),
                {name: read_row(Promoted, row) for name, row in tree["promoted"].items()},
                {key: read_row(PromotionAnswer, row) for key, row in tree["answers"].items()},
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataLoss(
                f"{self.path} is damaged ({error!r}): restore it, or remove it to serve what the run file names"
            ) from error

    def write(self, state: PromotionState) -> None:
        """Writes the file, durably.

        Raises:
            Unavailable: It cannot be written; what stood there stands.
        """
        tree = {
            "format": _FORMAT,
            "number": state.number,
            "promoted": {name: asdict(row) for name, row in state.by_scorer.items()},
            "answers": {key: asdict(row) for key, row in state.answers.items()},
        }
        try:
            self._backend.write(self.path, json.dumps(tree, indent=1).encode())
        except OSError as error:
            raise Unavailable(f"{self.path} cannot be written ({error}); the old version serves on") from error

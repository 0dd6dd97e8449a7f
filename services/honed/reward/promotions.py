"""Which versions were promoted, kept in a small JSON file so that a restart serves them again.

The file is written whole, synced and renamed: it holds the state before a promotion or the state after it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Final

from honed.kit.errors import DataLoss, Unavailable

_FORMAT: Final = 1
_ANSWERS_KEPT: Final = 256


@dataclass(frozen=True, slots=True)
class Promoted:
    """What serves for one scorer.

    Attributes:
        source: The model directory.
        version: Its version; checked again at each start.
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
class Promotions:
    """The content of the file."""

    by_scorer: Mapping[str, Promoted] = field(default_factory=dict)
    answers: Mapping[str, PromotionAnswer] = field(default_factory=dict)

    def with_promotion(self, name: str, promoted: Promoted) -> Promotions:
        """The state after a promotion."""
        return replace(self, by_scorer={**self.by_scorer, name: promoted})

    def with_answer(self, key: str, answer: PromotionAnswer) -> Promotions:
        """The state that remembers an answer; the oldest ones go."""
        kept = list({**self.answers, key: answer}.items())[-_ANSWERS_KEPT:]
        return replace(self, answers=dict(kept))

    @classmethod
    def read(cls, path: Path) -> Promotions:
        """Reads the file; a file that does not exist is an empty state.

        Raises:
            DataLoss: It is damaged.
        """
        try:
            tree = json.loads(path.read_bytes())
            if tree["format"] != _FORMAT:
                raise DataLoss(f"{path} has format {tree['format']}, this build reads {_FORMAT}")
            return cls(
                {name: Promoted(**row) for name, row in tree["promoted"].items()},
                {key: PromotionAnswer(**row) for key, row in tree["answers"].items()},
            )
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataLoss(
                f"{path} is damaged ({error!r}): restore it, or remove it to serve the reward models that the run file names"
            ) from error

    def write(self, path: Path) -> None:
        """Writes the file, durably.

        Raises:
            Unavailable: It cannot be written; what stood there stands.
        """
        tree = {
            "format": _FORMAT,
            "promoted": {name: asdict(row) for name, row in self.by_scorer.items()},
            "answers": {key: asdict(row) for key, row in self.answers.items()},
        }
        partial = path.with_suffix(".partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w") as file:
                json.dump(tree, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            partial.rename(path)
            _sync(path.parent)
        except OSError as error:
            raise Unavailable(f"{path} cannot be written ({error.strerror}); the old version serves on") from error


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

"""A result file for each recipe and seed, so that a bench that is interrupted goes on where it was.

A result belongs to the text of the recipe that was run: when the recipe has been changed since, it counts for nothing. So do
results of failures, which are told and tried again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from honed.recipes.catalogue import Recipe
from honed.recipes.figures import RecipeFigures


@dataclass(frozen=True)
class Task:
    """A recipe with a seed."""

    recipe: Recipe
    seed: int
    changes: tuple[str, ...] = ()
    """What is different from the recipe: see `recipes.changes`."""

    @property
    def label(self) -> str:
        """For people, and names of files."""
        changed = f"-{_digest(*self.changes)[:8]}" if self.changes else ""
        return f"{self.recipe.name}{changed}-{self.seed}"

    @property
    def digest(self) -> str:
        """Of the recipe's text, and of what is different."""
        return _digest(self.recipe.text, *self.changes)


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Result:
    """What became of a task: figures, or why there are none.

    Attributes:
        recipe: Its name.
        seed: Of the run.
        digest: Of the recipe's text.
        commit: Of the code that ran; the release, where it is no checkout.
        machine: It ran on, in words.
        figures: What it measured; None if it failed.
        error: Why it failed.
        changes: What was different from the recipe.
    """

    recipe: str
    seed: int
    digest: str
    commit: str
    machine: str
    figures: RecipeFigures | None = None
    error: str = ""
    changes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The recipe's name, with what was different."""
        return " ".join((self.recipe, *self.changes))


@dataclass(frozen=True)
class Results:
    """The result files under a directory."""

    directory: Path
    _known: dict[str, Result] = field(default_factory=dict)

    def of(self, task: Task) -> Result | None:
        """The result of a task, of the recipe as it is now; None if there is none, or the file cannot be read."""
        if task.label not in self._known and (found := self._read(task)) is not None:
            self._known[task.label] = found
        return self._known.get(task.label)

    def done(self, task: Task) -> bool:
        """Whether a task has figures."""
        found = self.of(task)
        return found is not None and found.figures is not None

    def write(self, task: Task, result: Result) -> None:
        """Writes a task's file whole, in place of an older one."""
        path = self._path(task)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(result), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        self._known[task.label] = result

    def forget(self, task: Task) -> None:
        """Removes a task's file."""
        self._path(task).unlink(missing_ok=True)
        self._known.pop(task.label, None)

    def _path(self, task: Task) -> Path:
        return self.directory / f"{task.label}.json"

    def _read(self, task: Task) -> Result | None:
        try:
            tree: Mapping[str, Any] = json.loads(self._path(task).read_text(encoding="utf-8"))
            figures = RecipeFigures.from_json(tree["figures"]) if tree["figures"] is not None else None
            result = Result(**{**tree, "figures": figures, "changes": tuple(tree.get("changes", ()))})
        except (OSError, ValueError, TypeError, KeyError):  # not there, cut short, or of another release
            return None
        return result if result.digest == task.digest else None

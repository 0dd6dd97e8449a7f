"""Runs recipes over seeds one after the other.

A task that fails is told in its result, and the next one runs. What all of a seed's recipes have in common, base model and
reward model, is trained by the first that needs it (the setting `reuse`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from honed.kit.errors import HonedError
from honed.recipes.bench.results import Result, Results, Task
from honed.recipes.catalogue import Recipe
from honed.recipes.figures import RecipeFigures

SEEDS: Final = 3

Runner = Callable[[Task], RecipeFigures]
"""Runs a task to its end. Raises HonedError, OSError or ValueError where it fails."""


@dataclass(frozen=True)
class Origin:
    """What results are of, beside the recipe: see `Result`."""

    commit: str
    machine: str


@dataclass(frozen=True)
class Told:
    """A task that is about to run, or has ended: then with its result."""

    task: Task
    number: int
    of: int
    result: Result | None = None


def tasks(recipes: Sequence[Recipe], seeds: int, first: int = 1, changes: Sequence[str] = ()) -> list[Task]:
    """Each recipe with each seed; seed by seed, because recipes of one seed share what they are trained on."""
    return [Task(recipe, seed, tuple(changes)) for seed in range(first, first + seeds) for recipe in recipes]


def run_bench(wanted: Sequence[Task], results: Results, run: Runner, origin: Origin) -> Iterator[Told]:
    """Runs the tasks that have no figures yet; tells of each before and after it.

    A task that is interrupted (KeyboardInterrupt, say) has no result, and is the first of the next time.
    """
    waiting = [task for task in wanted if not results.done(task)]
    for number, task in enumerate(waiting, start=1):
        yield Told(task, number, len(waiting))
        figures, error = None, ""
        try:
            figures = run(task)
        except (HonedError, OSError, ValueError) as failed:
            error = str(failed) or type(failed).__name__
        of = (task.recipe.name, task.seed, task.digest, origin.commit, origin.machine)
        result = Result(*of, figures, error, task.changes)
        results.write(task, result)
        yield Told(task, number, len(waiting), result)

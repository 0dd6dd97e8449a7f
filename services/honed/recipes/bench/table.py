"""The results as a table in Markdown, and in the part of a page between two markers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Final

from honed.kit.errors import FailedPrecondition
from honed.recipes.bench.results import Result
from honed.recipes.figures import RecipeFigures

BEGIN: Final = "<!-- recipes bench: begin -->"
END: Final = "<!-- recipes bench: end -->"
HEAD: Final = (
    *("recipe", "figure", "seeds", "before", "after", "change", "KL, nats", "examples"),
    *("training, s", "in all, s", "commit", "machine"),
)


@dataclass(frozen=True)
class Row:
    """All results of one recipe; of one code and machine each, or it says so."""

    recipe: str
    results: Sequence[Result]

    @property
    def figures(self) -> list[RecipeFigures]:
        """Of the runs that did not fail."""
        return [result.figures for result in self.results if result.figures is not None]

    @property
    def failures(self) -> list[Result]:
        """The others."""
        return [result for result in self.results if result.figures is None]

    def cells(self) -> list[str]:
        """What stands in the table's columns."""
        runs = self.figures
        commits, machines = (", ".join(sorted(set(values))) for values in self._origins())
        seeds = f"{len(runs)} of {len(self.results)}" if self.failures else str(len(runs))
        if not runs:
            return [f"`{self.recipe}`", "failed", seeds, *["–"] * (len(HEAD) - 5), commits, machines]

        def each(value: Callable[[RecipeFigures], float], form: str = ".3f") -> str:
            return spread([value(run) for run in runs], form)

        return [
            f"`{self.recipe}`",
            runs[0].figure,
            seeds,
            each(lambda run: run.before),
            each(lambda run: run.after),
            each(lambda run: run.after - run.before, "+.3f"),
            each(lambda run: run.kl_nats, ".1f"),
            f"{round(fmean(run.examples for run in runs)):,}",
            each(lambda run: run.seconds_training, ".0f"),
            each(_seconds, ".0f"),
            commits,
            machines,
        ]

    def _origins(self) -> tuple[list[str], list[str]]:
        shown = [result for result in self.results if result.figures is not None] or self.results
        return [result.commit for result in shown], [result.machine for result in shown]


def rows(results: Iterable[Result]) -> list[Row]:
    """The results by recipe, in the order in which recipes come first."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.title, []).append(result)
    return [Row(title, each) for title, each in found.items()]


def spread(values: Sequence[float], form: str) -> str:
    """The mean, and the standard deviation (n - 1) where there are several."""
    mean = format(fmean(values), form)
    return mean if len(values) < 2 else f"{mean} ± {format(stdev(values), form.removeprefix('+'))}"


def markdown(shown: Sequence[Row]) -> str:
    """The table, and each failure below it."""
    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    lines += ["| " + " | ".join(_plain(cell) for cell in row.cells()) + " |" for row in shown]
    failures = [result for row in shown for result in row.failures]
    if failures:
        lines += ["", *(f"- `{result.title}`, seed {result.seed}, failed: {_plain(result.error)}" for result in failures)]
    return "\n".join(lines) + "\n"


def write_between_markers(path: Path, text: str) -> None:
    """Puts a text between the markers of a page; all around it stays.

    Raises:
        FailedPrecondition: See `around_markers`.
    """
    before, after = around_markers(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")
    partial.replace(path)


def around_markers(path: Path) -> tuple[str, str]:
    """What a page has before and after its table.

    Raises:
        FailedPrecondition: The page is not there, or has not each marker once, in this order.
    """
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise FailedPrecondition(f"{path} cannot be read: {error.strerror}") from error
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in before + after:
        raise FailedPrecondition(f"{path} needs the lines {BEGIN} and {END}, once each: the table goes between them")
    return before, after


def _seconds(run: RecipeFigures) -> float:
    """What the run would have taken alone: with the training of what it reused."""
    return run.seconds + sum(run.reused.values())


def _plain(text: str) -> str:
    """A text inside of a table's cell."""
    return " ".join(text.replace("|", "\\|").split())

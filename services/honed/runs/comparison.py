"""What sets runs apart: settings that differ, and figures side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Final

from honed.runs.found import RunDetails

LAST_UPDATES: Final = 10
_SHOWN: Final = (
    "score_mean",
    "reward_mean",
    "kl",
    "entropy",
    "loss",
    "accuracy",
    "approxkl",
    "clip_fraction",
    "staleness_mean",
)
_SUMMED: Final = ("episodes", "pairs", "tokens", "seconds")


@dataclass(frozen=True)
class Row:
    """One setting or figure, and its value in each run; None where a run does not have it."""

    name: str
    values: tuple[str | None, ...] | tuple[float | None, ...]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        runs: In the order of every row's values.
        parameters: Settings that are not the same in all.
        figures: Of the updates and the reports.
    """

    runs: Sequence[RunDetails]
    parameters: Sequence[Row]
    figures: Sequence[Row]

    def as_json(self) -> dict[str, Any]:
        """For programs; a figure that is no number is null."""
        return {
            "runs": [
                {"name": each.run.name, "directory": str(each.run.directory), "missing": list(each.missing)}
                for each in self.runs
            ],
            "parameters": {row.name: list(row.values) for row in self.parameters},
            "figures": {row.name: [finite(value) for value in row.values] for row in self.figures},
        }


def compare(runs: Sequence[RunDetails]) -> Comparison:
    """Compares runs by what their directories hold."""
    names = sorted({name for each in runs for name in each.parameters})
    rows = [Row(name, tuple(each.parameters.get(name) for each in runs)) for name in names]
    figures = [_figures(each) for each in runs]
    known = dict.fromkeys(name for each in figures for name in each)
    return Comparison(
        runs,
        [row for row in rows if len(set(row.values)) > 1],
        [Row(name, tuple(each.get(name) for each in figures)) for name in known],
    )


def _figures(details: RunDetails) -> Mapping[str, float]:
    """A run's figures: totals, means over the last updates, the last losses of the phases, and what its reports say."""
    updates, found = details.updates, dict[str, float]()
    if updates:
        found["updates"] = float(updates[-1].step)
        found.update({name: total for name in _SUMMED if (total := sum(_of(name, updates)))})
        last = updates[-LAST_UPDATES:]
        found.update({f"{name}, last {LAST_UPDATES}": fmean(values) for name in _SHOWN if (values := list(_of(name, last)))})
    for row in details.phases:
        found.update({f"{row.phase}/{name}, last": value for name, value in row.figures.items()})
    return {**found, **details.figures}


def _of(name: str, updates: Sequence[Any]) -> Iterator[float]:
    return (update.values[name] for update in updates if name in update.values)


def finite(value: Any) -> Any:
    """A number as JSON has it: None where it is none, or has no end."""
    return value if value is not None and math.isfinite(value) else None


def formatted(value: str | float | None, form: Callable[[float], str] = "{:.4g}".format) -> str:
    """A value for people; a dash where there is none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else form(value)

"""The page of a comparison: tables, and the curves of all runs in one picture each. It needs nothing beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import Final

from honed.learner.loop.records import UpdateRecord
from honed.report.curves import COLOURS, CURVES, Curve, Line, lines
from honed.report.template import render
from honed.runs.comparison import Comparison, formatted
from honed.runs.found import RunDetails

_POINTS: Final = 400

Axis = Callable[[Sequence[UpdateRecord]], list[float]]


def write_page(path: Path, comparison: Comparison, metrics: Sequence[str] = ()) -> None:
    """Writes the page, whole.

    Args:
        path: Where.
        comparison: What it shows.
        metrics: Of the updates, beside those that every page shows.

    Raises:
        ValueError: no run has one of the metrics.
        OSError: it cannot be written.
    """
    known = {name for each in comparison.runs for update in each.updates for name in update.values}
    if unknown := [name for name in metrics if name not in known]:
        raise ValueError(f"no run has the metric {unknown[0]}; there are {', '.join(sorted(known))}")
    curves = [*CURVES, *(Curve(name, "", name) for name in metrics if name not in {curve.metric for curve in CURVES})]
    shown = [curve for curve in curves if curve.metric in known]
    by_update = [(curve.title, _drawn(comparison, curve, _updates, "update")) for curve in shown]
    by_episode = [(curve.title, _drawn(comparison, curve, _episodes, "episodes")) for curve in shown if "episodes" in known]
    phases = dict.fromkeys(row.phase for each in comparison.runs for row in each.phases if "loss" in row.figures)
    text = render(
        "honed.runs",
        "compare.html",
        comparison=comparison,
        colours=[_colour(number) for number in range(len(comparison.runs))],
        by_update=by_update,
        by_episode=by_episode,
        phases=[(f"Loss of {phase}", _phase(comparison, phase)) for phase in phases],
        formatted=formatted,
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _drawn(comparison: Comparison, curve: Curve, axis: Axis, of: str) -> str:
    found = []
    for number, each in enumerate(comparison.runs):
        xs, updates = axis(each.updates), each.updates
        points = [
            (x, update.values[curve.metric]) for x, update in zip(xs, updates, strict=True) if curve.metric in update.values
        ]
        found.append(_line(number, points))
    return lines(found, curve.unit, of)


def _phase(comparison: Comparison, phase: str) -> str:
    def points(each: RunDetails) -> list[tuple[float, float]]:
        rows = [row for row in each.phases if row.phase == phase and "loss" in row.figures]
        return [(float(row.step), row.figures["loss"]) for row in rows]

    return lines([_line(number, points(each)) for number, each in enumerate(comparison.runs)], "nats", "step")


def _updates(updates: Sequence[UpdateRecord]) -> list[float]:
    return [float(update.step) for update in updates]


def _episodes(updates: Sequence[UpdateRecord]) -> list[float]:
    """Episodes that had trained after each update; of a journal without its oldest updates, as many before as it shows."""
    each = [update.values.get("episodes", 0.0) for update in updates]
    before = (updates[0].step - 1) * fmean(each) if updates else 0.0
    return [before + total for total in accumulate(each)]


def _line(number: int, points: Sequence[tuple[float, float]]) -> Line:
    """At most `_POINTS` points: of a long run, means over equally many updates."""
    size = -(-len(points) // _POINTS) or 1
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return Line(_colour(number), [fmean(x for x, _ in part) for part in parts], [fmean(y for _, y in part) for part in parts])


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]

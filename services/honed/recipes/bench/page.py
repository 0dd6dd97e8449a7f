"""The results as a page that needs nothing beside it: the table, and the curves of each recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from honed.recipes.bench.table import HEAD, Row
from honed.report.curves import COLOURS, CURVES, Line, lines
from honed.report.template import render


@dataclass(frozen=True)
class Section:
    """One recipe on the page: a title, the table's cells, and a picture by title."""

    title: str
    cells: Sequence[str]
    pictures: Sequence[tuple[str, str]]
    failures: Sequence[str]


def write_page(path: Path, shown: Sequence[Row]) -> None:
    """Writes the page.

    Raises:
        OSError: It cannot be written.
    """
    text = render("honed.recipes.bench", "page.html", head=HEAD[1:], sections=[_section(row) for row in shown])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _section(row: Row) -> Section:
    pictures = []
    for curve in CURVES:
        runs = [(run.seed, run.curves[curve.metric]) for run in row.figures if curve.metric in run.curves]
        found = [
            Line(COLOURS[number % len(COLOURS)], range(1, len(values) + 1), values, f"seed {seed}")
            for number, (seed, values) in enumerate(runs)
        ]
        if found:
            pictures.append((curve.title, lines(found, curve.unit, "update")))
    failures = [f"seed {result.seed} failed: {result.error}" for result in row.failures]
    return Section(row.recipe, row.cells()[1:], pictures, failures)

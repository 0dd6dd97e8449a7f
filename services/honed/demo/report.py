"""The demo's report: one JSON file for programs, one HTML file for people that needs nothing beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from honed.conductor.sampling import Continuation
from honed.demo.measures import PAUSE_BAR_MS, Figures
from honed.report.curves import bars, drawn
from honed.report.measures import pauses_ms
from honed.report.template import render
from honed.v1 import learner_pb2

SHOWN_SAMPLES = 16


def write_report(
    directory: Path,
    figures: Figures,
    updates: Sequence[learner_pb2.StepMetrics],
    pushes: Sequence[learner_pb2.Push],
    before: Sequence[Continuation],
    after: Sequence[Continuation],
) -> None:
    """Writes `report.json` and `report.html`.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / "report.json").write_text(json.dumps(figures.as_json(), indent=2) + "\n")
    html = render(
        "honed.demo",
        "report.html",
        figures=figures,
        gain=figures.judge_after - figures.judge_before,
        missed=figures.missed(),
        curves=drawn(updates),
        pauses=bars(pauses_ms(pushes), "ms", "push", mark=PAUSE_BAR_MS),
        samples=list(zip(before, after, strict=True))[:SHOWN_SAMPLES],
        last=updates[-1],
    )
    (directory / "report.html").write_text(html, encoding="utf-8")

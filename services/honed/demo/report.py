"""The demo's report: one JSON file for programs, one HTML file for people that needs nothing beside it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from jinja2 import Environment
from matplotlib.figure import Figure

from honed.demo.measures import Figures
from honed.demo.sampling import Continuation
from honed.learner.ledger import PushRecord, StepRecord

SHOWN_SAMPLES = 16


@dataclass(frozen=True)
class Curve:
    """One small picture: a title, a unit, and a value for each step."""

    title: str
    unit: str
    value: Callable[[StepRecord], float]


CURVES = (
    Curve("Score", "reward model", lambda step: step.values["score_mean"]),
    Curve("KL to the base policy", "nats a response", lambda step: step.values["kl"]),
    Curve("Entropy", "nats a token", lambda step: step.values["entropy"]),
    Curve("Staleness", "versions, mean of a batch", lambda step: step.values["staleness_mean"]),
)


def write_report(
    directory: Path,
    figures: Figures,
    steps: Sequence[StepRecord],
    pushes: Sequence[PushRecord],
    before: Sequence[Continuation],
    after: Sequence[Continuation],
) -> None:
    """Writes `report.json` and `report.html`.

    Raises:
        OSError: the directory cannot be written.
    """
    (directory / "report.json").write_text(json.dumps(figures.as_json(), indent=2) + "\n")
    template = resources.files("honed.demo").joinpath("report.html").read_text(encoding="utf-8")
    page = Environment(autoescape=True).from_string(template)
    html = page.render(
        figures=figures,
        gain=figures.judge_after - figures.judge_before,
        missed=figures.missed(),
        curves=[(curve, _line(steps, curve)) for curve in CURVES],
        pauses=_pauses(pushes),
        samples=list(zip(before, after, strict=True))[:SHOWN_SAMPLES],
        last=steps[-1],
    )
    (directory / "report.html").write_text(html, encoding="utf-8")


def _line(steps: Sequence[StepRecord], curve: Curve) -> str:
    figure = _figure()
    axes = figure.subplots()
    axes.plot([step.step for step in steps], [curve.value(step) for step in steps], color="#0b6e4f", linewidth=1.8)
    axes.set_xlabel("step")
    axes.set_ylabel(curve.unit)
    return _svg(figure)


def _pauses(pushes: Sequence[PushRecord]) -> str:
    figure = _figure()
    axes = figure.subplots()
    pauses = [pause * 1e3 for push in pushes for pause in push.pauses_s]
    axes.bar(range(1, len(pauses) + 1), pauses, color="#0b6e4f")
    axes.axhline(100, color="#b23a48", linewidth=1, linestyle="--")
    axes.set_xlabel("push")
    axes.set_ylabel("ms")
    return _svg(figure)


def _figure() -> Figure:
    return Figure(figsize=(4.6, 2.6), layout="constrained")


def _svg(figure: Figure) -> str:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]

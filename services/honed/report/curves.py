"""Small pictures of a run, as SVG that stands inside a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from matplotlib.figure import Figure

from honed.learner.loop.records import OF_SCORER, scores_of
from honed.v1 import learner_pb2

COLOUR = "#0b6e4f"
WARNING = "#b23a48"
COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a6d3b")
"""Of several runs: told apart with any kind of colour vision (Okabe and Ito 2008)."""


@dataclass(frozen=True)
class Curve:
    """One picture: a title, a unit, and the metric of each update that it shows."""

    title: str
    unit: str
    metric: str


@dataclass(frozen=True)
class Line:
    """One run's line in a picture of several."""

    colour: str
    xs: Sequence[float]
    ys: Sequence[float]
    label: str = ""


CURVES = (
    Curve("Score", "reward", "score_mean"),
    Curve("KL to the base policy", "nats a response", "kl"),
    Curve("Entropy", "nats a token", "entropy"),
    Curve("Loss", "nats", "loss"),
    Curve("Pairs in the order of people's judgement", "share of a batch", "accuracy"),
    Curve("Staleness", "versions, mean of a batch", "staleness_mean"),
)


def drawn(updates: Sequence[learner_pb2.StepMetrics]) -> list[tuple[Curve, str]]:
    """Each curve that the updates have something for, with its picture: algorithms measure different things."""
    measured = {name for update in updates for name in update.values}
    scorers = scores_of(dict.fromkeys(measured, 0.0))
    curves = list(CURVES)
    if len(scorers) > 1:  # one alone is the score
        curves[1:1] = [Curve(f"Score of {name}", "before its weight", OF_SCORER + name) for name in scorers]
    return [(curve, line(updates, curve)) for curve in curves if curve.metric in measured]


def line(updates: Sequence[learner_pb2.StepMetrics], curve: Curve) -> str:
    """A metric over the updates."""
    figure = _figure()
    axes = figure.subplots()
    known = [update for update in updates if curve.metric in update.values]
    axes.plot([update.step for update in known], [update.values[curve.metric] for update in known], color=COLOUR, linewidth=1.8)
    axes.set_xlabel("update")
    axes.set_ylabel(curve.unit)
    return _svg(figure)


def lines(found: Sequence[Line], unit: str, of: str) -> str:
    """Lines of several runs; a run of one point is a dot."""
    figure = _figure()
    axes = figure.subplots()
    for each in found:
        marker = "o" if len(each.xs) == 1 else None
        axes.plot(each.xs, each.ys, color=each.colour, linewidth=1.6, marker=marker, markersize=4, label=each.label)
    if any(each.label for each in found):
        axes.legend(fontsize="small", frameon=False)
    axes.set_xlabel(of)
    axes.set_ylabel(unit)
    return _svg(figure)


def bars(values: Sequence[float], unit: str, of: str, mark: float | None = None) -> str:
    """Values one after the other, with a dashed line at `mark`."""
    figure = _figure()
    axes = figure.subplots()
    axes.bar(range(1, len(values) + 1), values, color=COLOUR)
    if mark is not None:
        axes.axhline(mark, color=WARNING, linewidth=1, linestyle="--")
    axes.set_xlabel(of)
    axes.set_ylabel(unit)
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

"""Prometheus metrics of training, beside those that every service has. docs/metrics.md says what each figure means."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import Counter, Gauge, Histogram

from honed.learner.loop.records import PushRecord

UPDATE = Gauge("honed_learner_update", "What the last update measured, by the figure's name.", ["figure"])
UPDATES = Counter("honed_learner_updates_total", "Updates of this process.")
PUSH_PAUSE = Histogram(
    "honed_learner_push_pause_seconds",
    "How long requests in flight stood still while a generator changed its weights.",
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
)
PUSHES = Counter("honed_learner_pushes_total", "Pushes by how they ended: committed, refused, unreached.", ["outcome"])


_shown: set[str] = set()


def updated(figures: Mapping[str, float]) -> None:
    """Shows an update's figures. One that this update has not measured keeps no older value."""
    for name in _shown - figures.keys():
        UPDATE.remove(name)
    _shown.intersection_update(figures)
    for name, value in figures.items():
        UPDATE.labels(name).set(value)
    _shown.update(figures)
    UPDATES.inc()


def pushed(record: PushRecord) -> None:
    """Counts a push, with its pauses."""
    outcome = "committed" if record.committed else "refused" if record.refused else "unreached"
    PUSHES.labels(outcome).inc()
    for pause_s in record.pauses_s:
        PUSH_PAUSE.observe(pause_s)

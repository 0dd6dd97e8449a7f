"""Prometheus metrics of a run, as its conductor sees it, beside those that every service has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from prometheus_client import Gauge

from honed.conductor.state import PHASE_NAMES, RunState
from honed.queue.keys import STAGES
from honed.queue.stats import StageStats
from honed.v1 import conductor_pb2, learner_pb2

if TYPE_CHECKING:
    from honed.conductor.run import Run

ALARMS = Gauge("honed_run_alarms", "What needs a person now; `honed status` says what it is.")
PHASE = Gauge("honed_run_phase", "1 for the phase that the run is in.", ["phase"])
ENTRIES = Gauge("honed_run_stream_entries", "Entries of a stream: waiting, held by a worker, dead.", ["stage", "place"])
UPDATES = Gauge("honed_run_updates", "Updates behind the learner's weights.")
TRAINED = Gauge("honed_run_rollouts_trained", "Rollouts that trained, over the whole run.")
DROPPED = Gauge("honed_run_rollouts_dropped", "Rollouts that did not train, over the whole run.")
PUSHED = Gauge("honed_run_versions_pushed", "Versions that generators committed, over the whole run.")
REFUSED = Gauge("honed_run_versions_refused", "Versions that generators refused, over the whole run.")
SKIPPED = Gauge("honed_run_batches_skipped", "Batches that were not finite or exploded, over the whole run.")

_PLACES: Final[dict[str, Callable[[StageStats], int]]] = {
    "waiting": lambda stats: stats.waiting,
    "held": lambda stats: stats.pending,
    "dead": lambda stats: stats.dead,
}
_OF_LEARNER: Final[dict[Gauge, Callable[[learner_pb2.GetStatusResponse], int]]] = {
    UPDATES: lambda status: status.version.step,
    TRAINED: lambda status: status.rollouts_trained,
    DROPPED: lambda status: sum(status.rollouts_dropped.values()),
    PUSHED: lambda status: status.versions_pushed,
    REFUSED: lambda status: status.versions_refused,
    SKIPPED: lambda status: status.batches_skipped,
}


def observe(run: Run) -> None:
    """Reads the metrics from a run from now on."""
    state = run.state
    ALARMS.set_function(lambda: len(run.alarms()))
    for phase, name in PHASE_NAMES.items():
        PHASE.labels(name).set_function(partial(_in_phase, state, phase))
    for stage in STAGES:
        for place, count in _PLACES.items():
            ENTRIES.labels(stage, place).set_function(partial(_entries, state, stage, count))
    for gauge, value in _OF_LEARNER.items():
        gauge.set_function(partial(_of_learner, state, value))


def _in_phase(state: RunState, phase: conductor_pb2.RunPhase.ValueType) -> float:
    return float(state.phase == phase)


def _entries(state: RunState, stage: str, count: Callable[[StageStats], int]) -> float:
    return float(count(state.stages.get(stage, StageStats())))


def _of_learner(state: RunState, value: Callable[[learner_pb2.GetStatusResponse], int]) -> float:
    """What the learner said last; not a number before it has said anything."""
    return float("nan") if state.learner is None else float(value(state.learner))

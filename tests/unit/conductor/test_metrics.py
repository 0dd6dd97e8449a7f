"""Claims about the conductor's metrics: they say what the run's state says."""

from __future__ import annotations

import math
from types import SimpleNamespace

from prometheus_client import REGISTRY

from honed.conductor import metrics
from honed.conductor.state import RunState
from honed.queue.stats import StageStats
from honed.v1 import common_pb2, conductor_pb2, learner_pb2


def value(name: str, **labels: str) -> float:
    found = REGISTRY.get_sample_value(name, labels)
    assert found is not None, f"{name} {labels} is not exported"
    return found


def observed(state: RunState, alarms: list[str]) -> None:
    metrics.observe(SimpleNamespace(state=state, alarms=lambda: alarms))  # type: ignore[arg-type]


def test_they_follow_the_run() -> None:
    state, alarms = RunState(), list[str]()
    observed(state, alarms)
    assert value("honed_run_alarms") == 0
    assert value("honed_run_phase", phase="starting") == 1
    assert value("honed_run_stream_entries", stage="rollouts", place="waiting") == 0

    state.enter(conductor_pb2.RUN_PHASE_PPO, "online loop")
    alarms.append("the learner has given up")
    state.stages = {"rollouts": StageStats(depth=7, pending=5, dead=2)}
    state.learner = learner_pb2.GetStatusResponse(
        version=common_pb2.PolicyVersion(step=3),
        rollouts_trained=192,
        rollouts_dropped={"stale": 4, "dead_letter": 1},
        versions_pushed=2,
        versions_refused=1,
    )
    assert value("honed_run_alarms") == 1
    assert (value("honed_run_phase", phase="starting"), value("honed_run_phase", phase="online")) == (0, 1)
    places = {place: value("honed_run_stream_entries", stage="rollouts", place=place) for place in ("waiting", "held", "dead")}
    assert places == {"waiting": 2, "held": 5, "dead": 2}
    assert value("honed_run_updates") == 3
    assert (value("honed_run_rollouts_trained"), value("honed_run_rollouts_dropped")) == (192, 5)
    assert (value("honed_run_versions_pushed"), value("honed_run_versions_refused")) == (2, 1)


def test_before_the_learner_has_spoken_its_counts_are_unknown_not_zero() -> None:
    observed(RunState(), [])
    assert math.isnan(value("honed_run_versions_pushed"))

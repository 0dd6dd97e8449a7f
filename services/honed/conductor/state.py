"""Where a run stands: written by the phases, read by the conductor's service."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from honed.conductor.feeder import Depths
from honed.queue.stats import StageStats
from honed.v1 import conductor_pb2, learner_pb2

PHASE_NAMES: Mapping[conductor_pb2.RunPhase.ValueType, str] = {
    conductor_pb2.RUN_PHASE_STARTING: "starting",
    conductor_pb2.RUN_PHASE_PRETRAIN: "pretrain",
    conductor_pb2.RUN_PHASE_REWARD_MODEL: "reward-model",
    conductor_pb2.RUN_PHASE_PPO: "online",
    conductor_pb2.RUN_PHASE_FINISHED: "finished",
    conductor_pb2.RUN_PHASE_STOPPED: "stopped",
    conductor_pb2.RUN_PHASE_FAILED: "failed",
}


@dataclass
class RunState:
    """Where the run stands.

    Attributes:
        phase: what it does.
        doing: the same in words.
        started_at: seconds since 1970, as all times here.
        ended_at: when training ended; services may go on serving.
        error: why training failed.
        alarms: what needs a person, by where it comes from.
        imported: lines of judgements that were imported at the start.
        admitted: prompts.
        stages: counters of each stage, after the last update.
        accounts: where every admitted rollout is.
        figures: of the feeder, by name.
        phase_seconds: how long each phase took.
    """

    phase: conductor_pb2.RunPhase.ValueType = conductor_pb2.RUN_PHASE_STARTING
    doing: str = "starting services"
    started_at: float = field(default_factory=time.time)
    ended_at: float | None = None
    error: str = ""
    alarms: dict[str, str] = field(default_factory=dict)
    depths: Depths | None = None
    learner: learner_pb2.GetStatusResponse | None = None
    imported: int = 0
    loop_started_at: float | None = None
    loop_ended_at: float | None = None
    admitted: int = 0
    stages: Mapping[str, StageStats] = field(default_factory=dict)
    accounts: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)
    _phase_started: float = field(default_factory=time.monotonic)

    def enter(self, phase: conductor_pb2.RunPhase.ValueType, doing: str) -> None:
        """Begins a phase, and ends the one before."""
        now = time.monotonic()
        before = PHASE_NAMES[self.phase]
        self.phase_seconds[before] = self.phase_seconds.get(before, 0.0) + now - self._phase_started
        self.phase, self.doing, self._phase_started = phase, doing, now

    def alarm(self, source: str, text: str) -> None:
        """Raises the alarm of a source, or ends it when `text` is empty."""
        if text:
            self.alarms[source] = text
        else:
            self.alarms.pop(source, None)

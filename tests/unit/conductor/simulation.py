"""The loop as a discrete-event simulation: feeder, generators with slots, scorer, learner, pushes. No clock but its own."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from honed.conductor.freshness import FreshnessController
from honed.queue.admission import AdmissionPolicy, LoopState
from honed.queue.progress import LearnerProgress

TICK_S = 0.05
SCORING_S = 0.05


@dataclass(frozen=True)
class World:
    """Times in seconds. A generator of `slots` makes slots / latency_s rollouts a second."""

    batch: int = 64
    samples: int = 1
    max_staleness: int = 2
    max_in_flight: int = 1024
    slots: int = 64
    latency_s: float = 1.0
    spread: float = 0.2
    """Sigma of the latencies' log-normal distribution."""
    update_s: float = 4.0
    push_s: float = 0.2
    overlap: bool = False
    bursts: bool = False
    """Every fourth stretch of 5 s, applications take 3/4 of the slots."""
    controlled: bool = True
    seed: int = 1


@dataclass
class Result:
    staleness: list[int] = field(default_factory=list)
    dropped: int = 0
    admitted: int = 0
    waited_s: float = 0.0
    seconds: float = 0.0
    idle_slots: float = 0.0
    """Share of slot time in which nothing ran."""
    leads: list[float] = field(default_factory=list)

    @property
    def mean_staleness(self) -> float:
        return sum(self.staleness) / len(self.staleness)

    @property
    def drop_share(self) -> float:
        return self.dropped / (self.dropped + len(self.staleness))

    @property
    def waiting_share(self) -> float:
        return self.waited_s / self.seconds


@dataclass
class Task:
    left: int
    versions: list[int] = field(default_factory=list)


class Simulation:
    def __init__(self, world: World) -> None:
        self.world = world
        self.random = random.Random(world.seed)
        self.policy = AdmissionPolicy(world.batch, world.max_staleness, world.max_in_flight, world.samples)
        self.control = FreshnessController(world.batch, world.max_staleness)
        self.now, self.update, self.served = 0.0, 0, 0
        self.queued: list[Task] = []  # one entry a sample that waits for a slot
        self.busy = self.running = 0
        self.scored: list[int] = []  # the version that sampled each
        self.in_training = 0
        self.waited = self.spare = 0.0
        self.wait_began: float | None = 0.0
        self.pushing = False
        self.result = Result()
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def run(self, updates: int, warm_up: int = 10) -> Result:
        self._at(0.0, self._tick)
        last, busy_s = 0.0, 0.0
        begun: tuple[float, float] | None = None
        while self.update < updates:
            at, _, event = heapq.heappop(self._events)
            busy_s += self.busy * (at - last)
            self.now = last = at
            event()
            assert self.now < 100_000, "the loop hangs"
            if begun is None and self.update >= warm_up:
                begun, self.result = (self.now, busy_s), Result()
        assert begun is not None
        self.result.seconds = self.now - begun[0]
        self.result.idle_slots = 1 - (busy_s - begun[1]) / (self.result.seconds * self.world.slots)
        return self.result

    def _at(self, delay: float, event: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + delay, next(self._numbers), event))

    def _tick(self) -> None:
        world = self.world
        progress = LearnerProgress(fence=1, update=self.update, served=self.served, waited_s=self.waited, spare=int(self.spare))
        state = LoopState(self.update, self.served, len(self.scored) + self.in_training, self.running)
        lead = self.control.observe(self.now, progress, self.running, len(self.queued)) if world.controlled else None
        self.result.leads.append(self.control.lead)
        for _ in range(self.policy.prompts(state, lead)):
            self.queued += [Task(world.samples)] * world.samples
            self.running += world.samples
            self.result.admitted += world.samples
        self._fill()
        self._at(TICK_S, self._tick)

    def _slots(self) -> int:
        return self.world.slots // 4 if self.world.bursts and int(self.now / 5) % 4 == 3 else self.world.slots

    def _fill(self) -> None:
        while self.queued and self.busy < self._slots():
            task = self.queued.pop(0)
            task.versions.append(self.served)
            self.busy += 1
            self._at(
                self.world.latency_s * self.random.lognormvariate(0, self.world.spread), lambda task=task: self._sampled(task)
            )

    def _sampled(self, task: Task) -> None:
        self.busy -= 1
        task.left -= 1
        if not task.left:
            self._at(SCORING_S, lambda: self._scored(task))
        self._fill()

    def _scored(self, task: Task) -> None:
        self.running -= len(task.versions)
        self.scored += task.versions
        self._collect()

    def _collect(self) -> None:
        if self.wait_began is None:
            return
        world = self.world
        fresh = [version for version in self.scored if self.update - version <= world.max_staleness]
        self.result.dropped += len(self.scored) - len(fresh)
        self.scored = fresh
        if len(fresh) < world.batch:
            return
        batch, self.scored = fresh[: world.batch], fresh[world.batch :]
        self.result.staleness += [self.update - version for version in batch]
        self.waited, self.spare = self.now - self.wait_began, len(self.scored)
        self.result.waited_s += self.waited
        self.wait_began, self.in_training = None, world.batch
        self._at(world.update_s, self._updated)

    def _updated(self) -> None:
        self.in_training = 0
        self.update += 1
        version = self.update
        if self.world.overlap:
            self._push(version)
            self._next()
        else:
            self._at(self.world.push_s, lambda: self._pushed(version))

    def _push(self, version: int) -> None:
        if not self.pushing:
            self.pushing = True
            self._at(self.world.push_s, lambda: self._pushed(version))

    def _pushed(self, version: int) -> None:
        self.pushing = False
        self.served = version
        if self.world.overlap:
            if version < self.update:
                self._push(self.update)
        else:
            self._next()

    def _next(self) -> None:
        self.wait_began = self.now
        self._collect()

"""Replicas of the reward service in one process: their registries, one store, and a Redis that is a few variables."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.unit.reward.support import FakeScorer, make_version, read_version

from honed.artifacts.promotions import PromotionRecord, PromotionState
from honed.kit.errors import Unavailable
from honed.queue.members import Member
from honed.queue.promotions import Announced, Candidate
from honed.reward.follower import RecordFollower
from honed.reward.promoter import Promoter
from honed.reward.registry import ScorerRegistry
from honed.reward.scorer import Scorer
from honed.reward.settings import ScorerSettings
from honed.reward.sources import ModelSources

FUNCTION = ScorerSettings(name="aid", kind="function", source="length")


class Clock:
    """A clock that moves when somebody sleeps; each sleep lets the others run."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        await asyncio.sleep(0)


class Board:
    """What Redis holds for the replicas; `away` makes every call fail."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.announced = Announced()
        self.replicas: list[Replica] = []
        self.away = False

    def check(self) -> None:
        if self.away:
            raise Unavailable("Redis is away")


class FakeReplicas:
    """One replica's view of the board. The others' watches run whenever it looks at them."""

    def __init__(self, board: Board, name: str) -> None:
        self._board, self._name = board, name

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        self._board.check()
        async with self._board.lock:
            yield

    async def announced(self) -> Announced:
        self._board.check()
        return self._board.announced

    async def announce(self, state: PromotionState) -> None:
        self._board.check()
        if state.number > self._board.announced.number:
            self._board.announced = Announced(state.number, state.versions, self._board.announced.candidates)

    async def offer(self, candidate: Candidate) -> None:
        self._board.check()
        before = self._board.announced
        self._board.announced = Announced(before.number, before.promoted, (candidate, *before.candidates))

    async def others(self) -> list[Member]:
        self._board.check()
        others = [replica for replica in self._board.replicas if replica.name != self._name and replica.ready]
        for replica in others:
            if replica.watching:
                await replica.follower.catch_up()
        return [Member(r.name, f"host-{r.name}:1", ready=True, facts=r.follower.facts()) for r in others]


class Replica:
    """One process: its registry and what keeps it in step."""

    def __init__(self, rig: ReplicaRig, name: str, settings: tuple[ScorerSettings, ...]) -> None:
        self.name, self.ready, self.watching = name, False, True
        self.built: list[str] = []
        self.registry = ScorerRegistry(settings)
        self.sources = ModelSources(rig.location, "demo", rig.directory / "copies" / name, [rig.root])
        self.follower = RecordFollower(
            self.registry,
            self.sources,
            rig.record,
            FakeReplicas(rig.board, name),
            clock=rig.clock,
            sleep=rig.clock.sleep,
        )
        self.promoter = Promoter(self.follower, clock=rig.clock, sleep=rig.clock.sleep)

    def build(self, settings: ScorerSettings, source: str) -> Scorer:
        self.built.append(source)
        if settings.kind == "function":
            return FakeScorer(settings.name, "pkg 1")
        return FakeScorer(settings.name, read_version(self.sources.local(source)))

    async def start(self) -> Replica:
        await self.follower.start(self.build)
        self.ready = True
        await self.follower.catch_up()
        return self

    def serving(self) -> dict[str, str]:
        return {term.scorer.name: term.scorer.version for term in self.registry.serving.terms}


class ReplicaRig:
    """A run's store, its record, and replicas on demand."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.root = directory / "models"
        self.location = str(directory / "store")
        self.record = PromotionRecord(self.location, "demo")
        self.board, self.clock = Board(), Clock()
        self.model = ScorerSettings(name="rm", kind="reward_model", source=str(self.make("first")), weight=2.0)

    def make(self, name: str, version: str | None = None) -> Path:
        return make_version(self.root / name, version or f"v-{name}")

    async def start(self, name: str = "a", *settings: ScorerSettings) -> Replica:
        replica = Replica(self, name, settings or (self.model, FUNCTION))
        self.board.replicas = [other for other in self.board.replicas if other.name != name] + [replica]
        return await replica.start()

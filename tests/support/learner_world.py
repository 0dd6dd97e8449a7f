"""A training loop whose trainer, checkpoints, journal and policy store are real, and whose surroundings are fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.duration_pb2 import Duration
from tests.support.tiny import make_tokenizer
from tests.unit.learner.samples import make_trainer, random_episodes

from honed.artifacts.draft import VersionDraft
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.learner.data.episode import TokenSpan
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.exporter import Exporter
from honed.learner.loop.journal import Journal
from honed.learner.loop.loop import LoopSettings, TrainingLoop
from honed.learner.loop.push import Pusher
from honed.learner.loop.release import Release
from honed.learner.loop.rollback import History
from honed.learner.loop.run_state import RunState
from honed.learner.loop.training import Training
from honed.learner.sources.held import Held
from honed.learner.sources.scored_stream import Intake
from honed.learner.sources.source import BrokenPolicy
from honed.learner.sources.trained import TrainedIds
from honed.learner.status import LearnerStatus
from honed.models.loader import load_language_model
from honed.queue.lease import Claim, LeaseLost
from honed.queue.messages import Delivery, Message
from honed.v1 import generation_pb2


class FakeGenerator:
    """A generator's control stub."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: dict[str, int] = {}
        """How many more times a call fails."""
        self.refuses: set[int | str] = set()
        """Updates, or versions by label, whose canaries do not fit."""
        self.code = grpc.StatusCode.UNAVAILABLE
        self.serving = ""
        self.commit_takes_s = 0.0

    async def PrepareVersion(self, request: Any, timeout: float) -> Any:
        self._note("prepare", request)
        return generation_pb2.PrepareVersionResponse()

    async def CommitVersion(self, request: Any, timeout: float) -> Any:
        await asyncio.sleep(self.commit_takes_s)
        label = self._note("commit", request)
        if self.refuses & {request.version.step, label}:
            raise rpc_error(grpc.StatusCode.ABORTED, "the canaries do not fit")
        if label == self.serving:
            return generation_pb2.CommitVersionResponse(version=request.version)
        self.serving = label
        return generation_pb2.CommitVersionResponse(
            version=request.version, pause=Duration(nanos=2_000_000), requests_carried=3
        )

    def _note(self, what: str, request: Any) -> str:
        label = f"{request.version.fence}.{request.version.step}"
        self.calls.append(f"{what} {label}")
        if self.broken.get(what, 0) > 0:
            self.broken[what] -= 1
            raise rpc_error(self.code, f"cannot {what}")
        return label


def rpc_error(code: grpc.StatusCode, details: str) -> grpc.aio.AioRpcError:
    empty = grpc.aio.Metadata()
    return grpc.aio.AioRpcError(code, empty, empty, details)


@dataclass
class FakeIntake:
    """Hands out batches as long as there are some."""

    batches: list[list[Held]]
    trained: TrainedIds = field(default_factory=lambda: TrainedIds("r"))
    rollbacks: tuple[tuple[int, int], ...] = ()
    acknowledged: list[str] = field(default_factory=list)
    dropped: list[tuple[str, str]] = field(default_factory=list)
    broken: dict[tuple[int, int], int] = field(default_factory=dict)
    """How often the policy is found broken, by roll-backs before and update."""
    waiting: int = 0
    discarding: asyncio.Event = field(default_factory=asyncio.Event)
    arrival: asyncio.Event | None = None
    """What `receive` waits for."""
    starved: asyncio.Event = field(default_factory=asyncio.Event)

    progress, restore, learned, forget = Intake.progress, Intake.restore, Intake.learned, Intake.forget

    async def take_over(self, predecessors: list[str]) -> None:
        pass

    async def collect(self, size: int, step: int) -> list[Held]:
        await self.drop([h for batch in self.batches for h in batch if h.is_abandoned(self.rollbacks)], "rolled_back")
        self.batches = [batch for batch in self.batches if not any(h.is_abandoned(self.rollbacks) for h in batch)]
        if self.broken.get((len(self.rollbacks), step)):
            self.broken[len(self.rollbacks), step] -= 1
            raise BrokenPolicy(f"{size} responses with the padding token")
        if not self.batches:
            self.starved.set()
            await asyncio.Event().wait()
        return self.batches.pop(0)

    async def acknowledge(self, held: Sequence[Held]) -> None:
        self.acknowledged += [each.rollout_id for each in held]

    async def drop(self, held: Sequence[Held], reason: str) -> None:
        self.dropped += [(each.rollout_id, reason) for each in held]

    def put_back(self, held: Sequence[Held]) -> None:
        if held:
            self.batches.insert(0, list(held))

    def holds(self, rollout_id: str) -> bool:
        return any(each.rollout_id == rollout_id for batch in self.batches for each in batch)

    async def receive(self) -> None:
        self.discarding.set()
        await asyncio.sleep(0.001)
        if self.arrival is not None:
            await self.arrival.wait()

    async def discard(self, reason: str) -> int:
        rest, self.batches = [held for batch in self.batches for held in batch], []
        await self.drop(rest, reason)
        return len(rest)

    async def release(self) -> None:
        pass


class FakeLease:
    """A held lease that a successor can take."""

    def __init__(self, fence: int) -> None:
        self.claim = Claim("learner", "me", fence)
        self.lost = False

    async def check(self) -> None:
        if self.lost:
            raise LeaseLost("learner", self.claim.fence, self.claim.fence + 1)

    async def raise_fence(self, above: int = 0) -> Claim:
        await self.check()
        self.claim = Claim("learner", "me", self.claim.fence + 1)
        return self.claim


@dataclass
class FakeReporter:
    """Remembers what was reported."""

    status: LearnerStatus
    reports: list[tuple[int, int]] = field(default_factory=list)
    """Update and rollouts unsaved."""

    def soon(self) -> None:
        pass

    async def write(self) -> None:
        self.reports.append((self.status.update, self.status.unsaved))


@dataclass
class Learner:
    """A loop with all that belongs to it."""

    loop: TrainingLoop
    history: History
    state: RunState
    release: Release
    journal: Journal
    lease: FakeLease
    status: LearnerStatus
    reporter: FakeReporter
    stopping: asyncio.Event
    slept: list[float]


@dataclass
class World:
    """What outlives a learner."""

    root: Path
    store: PolicyStore
    generators: list[FakeGenerator]
    intake: FakeIntake
    steps: int | None = 3
    checkpoint_every: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    ema_decay: float | None = None

    @property
    def home(self) -> Path:
        return self.root / "learner"

    @property
    def generator(self) -> FakeGenerator:
        return self.generators[0]

    def pusher(self) -> Pusher:
        async def generators() -> list[Any]:
            return list(self.generators)

        return Pusher(generators, timeout_s=5)

    def learner(self, *, fence: int = 1, keep: int = 100, load: bool = True, paused: bool = False) -> Learner:
        trainer, slept, stopping = make_trainer(ema_decay=self.ema_decay), [], asyncio.Event()
        status, lease = LearnerStatus(), FakeLease(fence)
        journal, checkpoints = Journal(self.home), CheckpointStore(self.home / "checkpoints")

        async def sleep(seconds: float) -> None:
            slept.append(seconds)
            await asyncio.sleep(0.001)

        release = Release(
            self.store,
            Exporter(trainer.model, self.root / "base", self.root / "export"),
            self.pusher(),
            journal,
            lease,  # type: ignore[arg-type]
            status,
            keep=keep,
            config_hash="hash",
            clock=lambda: 0.0,
            sleep=sleep,
        )
        reporter = FakeReporter(status)
        state = RunState(
            Training(trainer, checkpoints), self.intake, checkpoints, journal, release, lease, status, reporter,  # type: ignore[arg-type]
            clock=lambda: 0.0,
        )  # fmt: skip
        history = History(
            checkpoints, self.store, journal, self.root / "fetched",
            lambda directory: load_language_model(directory, device=trainer.model.device).state_dict(),
        )  # fmt: skip
        if load:
            state.load()
        settings = LoopSettings(4, self.steps, self.checkpoint_every, **self.settings)
        loop = TrainingLoop(state, history, settings, stopping, paused=paused, sleep=sleep)
        return Learner(loop, history, state, release, journal, lease, status, reporter, stopping, slept)

    async def start(self, **options: Any) -> Learner:
        """A learner that has taken over from its predecessor."""
        learner = self.learner(**options)
        await learner.state.take_over([])
        return learner

    async def until(self, learner: Learner, event: asyncio.Event | Callable[[], bool]) -> None:
        """Runs it until something has happened, then stops it."""
        running = asyncio.ensure_future(learner.loop.run())
        async with asyncio.timeout(60):
            if isinstance(event, asyncio.Event):
                happened = asyncio.ensure_future(event.wait())
                await asyncio.wait({running, happened}, return_when=asyncio.FIRST_COMPLETED)
                happened.cancel()
            else:
                while not event() and not running.done():
                    await asyncio.sleep(0.001)
            learner.stopping.set()
            await running

    async def to_the_end(self, learner: Learner) -> None:
        """Runs it until the updates are done."""
        await self.until(learner, self.intake.discarding)


def batches(count: int, size: int = 4, fence: int = 1, start: int = 0) -> list[list[Held]]:
    """Batch k was sampled by the version before its own."""
    ids = itertools.count(start * size)
    result = []
    for number in range(start, start + count):
        batch = []
        for episode in random_episodes(size, seed=number):
            index = next(ids)
            span = TokenSpan(VersionId(fence, max(0, number - 1)), 0, len(episode.response))
            episode = replace(episode, rollout_id=f"r-{index}/0", spans=(span,))
            delivery = Delivery(f"{index}-0", Message(f"r-{index}/0", b""), 1, "me", "scored")
            batch.append(Held(delivery, episode, {"rm": "1"}))
        result.append(batch)
    return result


def spoiled(batch: list[Held]) -> list[Held]:
    """A batch whose sampler was another model's: the mean ratio explodes."""
    return [replace(h, episode=replace(h.episode, logprobs=(-40.0,) * len(h.episode.response))) for h in batch]


def make_world(root: Path) -> World:
    """A run whose base version is published, three batches waiting, and one generator."""
    trainer = make_trainer()
    (root / "base").mkdir(parents=True)
    make_tokenizer(root / "base")
    store = PolicyStore(root / "policy", "r")
    directory, canaries = Exporter(trainer.model, root / "base", root / "first").export(VersionId(0, 0))
    store.publish(directory, VersionDraft(VersionId(0, 0), canaries))
    return World(root, store, [FakeGenerator()], FakeIntake(batches(3)))

"""A training loop whose trainer, store of checkpoints, policy store and ledger are real, and whose surroundings are fakes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.duration_pb2 import Duration
from tests.support.tiny import make_tokenizer
from tests.unit.learner.samples import make_trainer, random_episodes

from honed.artifacts import PolicyStore, VersionId
from honed.learner.checkpoint import CheckpointStore
from honed.learner.episodes import TokenSpan
from honed.learner.exporter import Exporter
from honed.learner.intake import Held
from honed.learner.ledger import Ledger
from honed.learner.loop import LoopSettings, Status, TrainingLoop
from honed.learner.publisher import Publisher
from honed.queue.lease import LeaseLost
from honed.queue.messages import Delivery, Message
from honed.v1 import generation_pb2


class FakeGenerator:
    """A generator's control stub."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: dict[str, int] = {}
        """How many more times a call fails."""
        self.serving = ""
        self.commit_takes_s = 0.0

    async def PrepareVersion(self, request: Any, timeout: float) -> Any:
        self._note("prepare", request)
        return generation_pb2.PrepareVersionResponse()

    async def CommitVersion(self, request: Any, timeout: float) -> Any:
        await asyncio.sleep(self.commit_takes_s)
        label = self._note("commit", request)
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
            empty = grpc.aio.Metadata()
            raise grpc.aio.AioRpcError(grpc.StatusCode.UNAVAILABLE, empty, empty, f"cannot {what}")
        return label


@dataclass
class FakeIntake:
    """Hands out batches as long as there are some."""

    batches: list[list[Held]]
    acknowledged: list[str] = field(default_factory=list)
    discarding: asyncio.Event = field(default_factory=asyncio.Event)

    async def collect(self, size: int, step: int) -> list[Held]:
        if not self.batches:
            await asyncio.Event().wait()
        return self.batches.pop(0)

    async def acknowledge(self, held: list[Held]) -> None:
        self.acknowledged += [each.episode.rollout_id for each in held]

    async def discard(self, reason: str) -> int:
        self.discarding.set()
        await asyncio.sleep(0.001)
        return 0

    async def release(self) -> None:
        pass


@dataclass
class Lease:
    """A claim that a successor can take."""

    lost: bool = False

    async def check(self) -> None:
        if self.lost:
            raise LeaseLost("learner", 1, 2)


@dataclass
class World:
    """All that a loop touches."""

    root: Path
    store: PolicyStore
    generator: FakeGenerator
    intake: FakeIntake
    lease: Lease
    steps: int = 3
    checkpoint_every: int = 1

    @property
    def home(self) -> Path:
        return self.root / "learner"

    def publisher(self, *generators: FakeGenerator, keep: int = 100) -> Publisher:
        return Publisher(
            self.store, generators or (self.generator,), keep=keep, timeout_s=5, check_lease=self.lease.check  # type: ignore[arg-type]
        )  # fmt: skip

    def loop(self, *, fence: int = 1, push_retry_s: float = 0.0, overlap_push: bool = True) -> TrainingLoop:
        trainer = make_trainer()
        return TrainingLoop(
            trainer,
            self.intake,  # type: ignore[arg-type]
            CheckpointStore(self.home / "checkpoints"),
            Ledger(self.home),
            Exporter(trainer.policy, self.root / "base", self.root / "export"),
            self.publisher(),
            LoopSettings(4, self.steps, self.checkpoint_every, push_retry_s, "hash", overlap_push=overlap_push),
            Status(fence=fence),
            check_lease=self.lease.check,
            clock=lambda: 0.0,
        )

    async def to_the_end(self, loop: TrainingLoop) -> None:
        """Runs until the steps are done."""
        stopping = asyncio.Event()
        async with asyncio.timeout(60):
            running = asyncio.ensure_future(loop.run(stopping, self.store.latest()))
            done = asyncio.ensure_future(self.intake.discarding.wait())
            await asyncio.wait({running, done}, return_when=asyncio.FIRST_COMPLETED)
            stopping.set()
            done.cancel()
            await running


def batches(count: int, size: int = 4) -> list[list[Held]]:
    """Batch k was sampled by the version before its own."""
    ids = itertools.count()
    result = []
    for number in range(count):
        batch = []
        for episode in random_episodes(size, seed=number):
            index = next(ids)
            span = TokenSpan(VersionId(1, max(0, number - 1)), 0, len(episode.response))
            episode = replace(episode, rollout_id=f"r-{index}", spans=(span,))
            batch.append(Held(Delivery(f"{index}-0", Message(f"r-{index}", b""), 1, "me", "scored"), episode, "rm@1"))
        result.append(batch)
    return result


@pytest.fixture
def world(tmp_path: Path) -> World:
    (tmp_path / "base").mkdir()
    make_tokenizer(tmp_path / "base")
    store = PolicyStore(tmp_path / "policy", "r")
    return World(tmp_path, store, FakeGenerator(), FakeIntake(batches(3)), Lease())


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, the policy store's disk has room for small files only."""
    import errno
    from collections.abc import Iterator

    from honed.artifacts.files import LocalBackend

    write = LocalBackend._write

    def cramped(self: LocalBackend, target: Path, pieces: Iterator[bytes]) -> tuple[int, str]:
        if target.suffix == ".safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, target, pieces)

    return lambda: monkeypatch.setattr(LocalBackend, "_write", cramped)

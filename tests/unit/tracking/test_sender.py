"""Claims about what reaches a tracker that is away, slow or restarted, from a learner's real journal by RPC."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.support.run import until
from tests.support.tracking import RUN, JournalLearner

from honed.tracking import source
from honed.tracking.port import UPDATES, Mark, Opened, Outcome, Point, Sent, TrackedRun
from honed.tracking.position import PositionFile
from honed.tracking.sender import Sender


@dataclass
class Ledger:
    """A tracker that keeps what it is told in memory; it may be away, and may know how much it has."""

    tells: bool = False
    away: bool = False
    points: list[Point] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    known: list[str | None] = field(default_factory=list)
    name = "ledger"
    store = "memory"

    def _answer(self) -> None:
        if self.away:
            raise ConnectionError("nobody listens at https://me:hunter2@mlflow/")

    def open(self, run: TrackedRun, known: str | None, sent: Sent) -> Opened:
        self._answer()
        self.known.append(known)
        have = {UPDATES: Mark(self.points[-1].at_ms, self.points[-1].step)} if self.points else {}
        return Opened("the-run", have if self.tells else None)

    def log(self, points: Sequence[Point]) -> None:
        self._answer()
        self.points += points

    def finish(self, outcome: Outcome) -> None:
        self._answer()
        self.outcomes.append(outcome)

    def close(self) -> None: ...

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.points]


class World:
    """A learner, a ledger, and a sender between them that can be started again."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.learner, self.ledger = JournalLearner(root / "learner"), Ledger()
        self.alarms: list[str] = []

    @asynccontextmanager
    async def sending(self, **options: Any) -> AsyncIterator[Sender]:
        sender = Sender(
            "ledger",
            lambda: self.ledger,
            RUN,
            lambda sent: source.updates(self.learner.channel, sent.get(UPDATES)),
            PositionFile(self.root / "ledger.json"),
            self.alarms.append,
            pauses_s=(0.01, 0.05),
            **options,
        )
        task = asyncio.create_task(sender.run())
        try:
            yield sender
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def arrives(self, steps: list[int]) -> None:
        await until(lambda: self.ledger.steps == steps, 60, f"{self.ledger.steps} becomes {steps}")


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[World]:
    monkeypatch.setattr(source, "_ASK_AGAIN_S", 0.02)
    world = World(tmp_path)
    async with world.learner.serving():
        yield world
        await world.learner.journal.close()


async def test_what_a_tracker_missed_is_sent_when_it_is_back_and_said_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.ledger.away = True
    with caplog.at_level(logging.INFO, "honed.tracking"):
        async with world.sending(alarm_after_s=0.1):
            for step in (1, 2, 3):
                await world.learner.train(step)
            await until(lambda: bool(world.alarms), 60, "it has been away for long")
            world.ledger.away = False
            await world.arrives([1, 2, 3])
            await world.learner.train(4)
            await world.arrives([1, 2, 3, 4])
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "nobody listens at https://mlflow/" in world.alarms[0]
    assert "hunter2" not in f"{world.alarms}{[record.__dict__ for record in caplog.records]}"
    assert world.alarms[-1] == ""


@pytest.mark.parametrize("tells", [False, True])
async def test_a_start_after_the_end_goes_on_in_the_same_run_without_hole_or_double(world: World, tells: bool) -> None:
    world.ledger.tells = tells
    await world.learner.train(1)
    async with world.sending():
        await world.arrives([1])
    await world.learner.train(2)
    if tells:  # killed between the sending and the note of it
        world.ledger.log([Point(UPDATES, 2, int(world.learner.clock * 1000), {"kl": 0.2})])
    await world.learner.train(3)
    async with world.sending():
        await world.arrives([1, 2, 3])
    assert world.ledger.known == [None, "the-run"]


async def test_updates_made_again_after_a_roll_back_are_sent_again(world: World) -> None:
    for step in (1, 2, 3, 4):
        await world.learner.train(step)
    async with world.sending():
        await world.arrives([1, 2, 3, 4])
        await world.learner.go_back(2)
        await world.learner.train(3)
        await world.arrives([1, 2, 3, 4, 3])
    await world.learner.go_back(1)  # while nobody is sending
    await world.learner.train(2)
    await world.learner.train(3)
    async with world.sending():
        await world.arrives([1, 2, 3, 4, 3, 2, 3])


async def test_the_outcome_comes_after_the_last_update_and_a_run_that_goes_back_trains_on(world: World) -> None:
    async with world.sending() as sender:
        sender.finish(Outcome("finished", 1, 2))
        await world.learner.train(1)
        await world.arrives([1])
        assert not world.ledger.outcomes
        await world.learner.train(2)
        await asyncio.wait_for(sender.settled(), 10)
        assert [outcome.state for outcome in world.ledger.outcomes] == ["finished"]
        await world.learner.go_back(1)
        await world.learner.train(2)
        await world.arrives([1, 2, 2])
        sender.finish(Outcome("stopped", 2, 2))
        await asyncio.wait_for(sender.settled(), 10)
    assert [outcome.state for outcome in world.ledger.outcomes] == ["finished", "stopped"]


async def test_a_tracker_that_hangs_holds_nobody_up(world: World) -> None:
    hangs = threading.Event()
    world.ledger.log = lambda points: hangs.wait(30)  # type: ignore[method-assign]
    await world.learner.train(1)
    async with world.sending() as sender:
        sender.finish(Outcome("finished", 1, 1))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sender.settled(), 0.2)
    hangs.set()


async def test_another_store_gets_the_run_from_its_beginning(world: World) -> None:
    await world.learner.train(1)
    async with world.sending():
        await world.arrives([1])
    world.ledger = Ledger()
    world.ledger.store = "another"
    async with world.sending():
        await world.arrives([1])
    assert world.ledger.known == [None]

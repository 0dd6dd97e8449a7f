"""Claims about the admission of prompts, over a loop that is only numbers."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honed.conductor import admitter as module
from honed.conductor.admitter import Admitter
from honed.conductor.prompts import PromptSequence
from honed.config import ConductorSettings
from honed.queue.admission import AdmissionPolicy
from honed.queue.keys import PROMPTS, ROLLOUTS, SCORED
from honed.queue.lease import Claim
from honed.queue.messages import Message
from honed.queue.stats import StageStats


@dataclass
class FakeLoop:
    """Counts of entries; `prompts` counts prompts, the others rollouts."""

    prompts: int = 0
    rollouts: int = 0
    scored: int = 0
    trained: int = 0
    dropped: int = 0
    position: int = 0
    admissions: list[list[str]] = field(default_factory=list)

    def queues(self) -> dict[str, Any]:
        return {stage: FakeQueue(self, stage) for stage in (PROMPTS, ROLLOUTS, SCORED)}


@dataclass
class FakeQueue:
    loop: FakeLoop
    stage: str

    async def stats(self) -> StageStats:
        acked = self.loop.trained if self.stage == "scored" else 0
        return StageStats(depth=int(getattr(self.loop, self.stage)), acked=acked)


@dataclass
class FakeAdmission:
    loop: FakeLoop
    admitted: asyncio.Event = field(default_factory=asyncio.Event)

    async def position(self) -> int:
        return self.loop.position

    async def admit(self, claim: Claim, position: int, prompts: list[Message], skipped: int = 0) -> int:
        assert position == self.loop.position
        self.loop.position += len(prompts)
        self.loop.prompts += len(prompts)
        self.loop.admissions.append([message.id for message in prompts])
        self.admitted.set()
        return self.loop.position


def make(loop: FakeLoop, *, batch: int = 8, staleness: int = 1, in_flight: int = 1000, samples: int = 1, steps: int = 10):
    sequence = PromptSequence("r", [[1], [2], [3]], 0, ConductorSettings(samples_per_prompt=samples))
    admission = FakeAdmission(loop)
    admitter = Admitter(
        AdmissionPolicy(batch, staleness, in_flight),
        admission,  # type: ignore[arg-type]
        Claim("conductor", "me", 1),
        loop.queues(),
        sequence,
        samples_per_prompt=samples,
        target=steps * batch,
    )
    return admitter, admission


async def settle(admitter: Admitter) -> None:
    """Lets it admit all that it may, and stops it."""
    stopping = asyncio.Event()
    running = asyncio.create_task(admitter.run(stopping))
    before = -1
    async with asyncio.timeout(10):
        while before != admitter.position:
            before = admitter.position
            await asyncio.sleep(3 * module.TICK_S)
    stopping.set()
    await running


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK_S", 0.001)


async def test_it_admits_no_more_than_stays_fresh() -> None:
    loop = FakeLoop()
    await settle(make(loop, batch=8, staleness=1)[0])
    assert loop.prompts == 16, "two batches: the one that trains next and the one that may be a version old"


async def test_it_admits_no_more_than_may_be_in_flight() -> None:
    loop = FakeLoop(rollouts=3)
    await settle(make(loop, in_flight=7)[0])
    assert loop.prompts == 4


async def test_it_admits_again_as_the_learner_trains_and_stops_at_the_target() -> None:
    loop = FakeLoop()
    admitter, _ = make(loop, batch=8, staleness=1, steps=3)
    for _ in range(6):
        await settle(admitter)
        loop.trained, loop.prompts = loop.trained + loop.prompts, 0
    assert (loop.trained, loop.position) == (24, 24)


async def test_what_was_dropped_is_admitted_again() -> None:
    loop = FakeLoop()
    admitter, _ = make(loop, batch=8, staleness=1, steps=2)
    await settle(admitter)
    loop.prompts, loop.trained, loop.dropped = 0, 11, 5
    await settle(admitter)
    assert loop.prompts == 5, "the target counts what trained"
    loop.prompts, loop.trained = 0, 16
    await settle(admitter)
    assert (loop.prompts, loop.position) == (0, 21)


async def test_a_prompt_of_many_samples_counts_as_its_rollouts() -> None:
    loop = FakeLoop()
    await settle(make(loop, batch=8, staleness=0, samples=4)[0])
    assert loop.prompts == 2


async def test_turns_are_admitted_in_order_each_once_also_by_a_successor() -> None:
    loop = FakeLoop()
    await settle(make(loop, batch=4, staleness=0, steps=2)[0])
    loop.prompts, loop.trained = 0, 4
    await settle(make(loop, batch=4, staleness=0, steps=2)[0])
    assert [turn for step in loop.admissions for turn in step] == [f"r-{turn}" for turn in range(8)]


@settings(deadline=None, max_examples=60)
@given(
    batch=st.integers(1, 9), staleness=st.integers(0, 3), in_flight=st.integers(1, 40), samples=st.sampled_from([1, 2, 3]),
    scored=st.integers(0, 40), rollouts=st.integers(0, 40), trained=st.integers(0, 40), steps=st.integers(1, 8),
)  # fmt: skip
def test_capacity_and_target_hold_wherever_the_loop_stands(
    batch: int, staleness: int, in_flight: int, samples: int, scored: int, rollouts: int, trained: int, steps: int
) -> None:
    batch *= samples
    loop = FakeLoop(scored=scored, rollouts=rollouts, trained=trained)
    admitter, _ = make(loop, batch=batch, staleness=staleness, in_flight=in_flight, samples=samples, steps=steps)
    asyncio.run(settle(admitter))
    new = loop.prompts * samples
    if new:
        assert rollouts + new <= in_flight
        assert scored + rollouts + new <= (staleness + 1) * batch
        assert trained + scored + rollouts + new < steps * batch + samples

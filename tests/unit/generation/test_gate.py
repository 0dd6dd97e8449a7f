"""RequestGate: fair to both classes, bounded, and exact when callers leave."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from honed.generation.gate import RequestGate, RequestKind
from honed.kit.errors import Overloaded, Unavailable

APPLICATION, TRAINING = RequestKind.APPLICATION, RequestKind.TRAINING


class Samples:
    """Samples that stay in the engine until the test ends them."""

    def __init__(self, gate: RequestGate) -> None:
        self.gate = gate
        self.entered: list[str] = []
        self._ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def ask(self, kind: RequestKind, *names: str) -> None:
        for name in names:
            self._ends[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._run(kind, name))
        await settle()

    async def end(self, *names: str) -> None:
        for name in names:
            self._ends[name].set()
        await settle()

    async def cancel(self, name: str) -> None:
        self.tasks[name].cancel()
        await settle()

    async def _run(self, kind: RequestKind, name: str) -> None:
        async with self.gate.enter(kind):
            self.entered.append(name)
            await self._ends[name].wait()


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


@asynccontextmanager
async def samples(gate: RequestGate, *, opened: bool = True) -> AsyncIterator[Samples]:
    made = Samples(gate)
    if opened:
        gate.open()
    yield made
    for task in made.tasks.values():
        task.cancel()
    await asyncio.gather(*made.tasks.values(), return_exceptions=True)
    assert gate.in_flight == 0, "nothing is left behind"


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


async def test_the_window_bounds_what_is_in_the_engine_and_each_class_keeps_its_order() -> None:
    async with samples(RequestGate(3, 100, 0.7)) as made:
        await made.ask(APPLICATION, *names("a", 6))
        assert made.entered == ["a0", "a1", "a2"]
        await made.end("a1")
        await made.end("a0")
        assert made.entered == ["a0", "a1", "a2", "a3", "a4"]
        assert (made.gate.running, made.gate.in_flight) == (3, 4)


async def test_a_sample_whose_claim_is_released_has_left_before_its_block_ends() -> None:
    gate = RequestGate(2, 100, 0.5)
    gate.open()
    async with gate.enter() as first, gate.enter():
        entering = gate.enter()
        third = asyncio.create_task(entering.__aenter__())
        await settle()
        assert not third.done()
        first.release()
        await settle()
        assert third.done()
        assert gate.running == 2
    assert gate.running == 1, "left once, though its block has ended too"
    await entering.__aexit__(None, None, None)
    assert gate.in_flight == 0


async def test_without_applications_training_has_the_whole_window() -> None:
    async with samples(RequestGate(8, 100, application_share=0.75)) as made:
        assert made.gate.training_room == 8
        await made.ask(TRAINING, *names("t", 9))
        assert made.entered == names("t", 8)


async def test_training_gets_its_floor_from_applications_that_fill_the_engine() -> None:
    gate = RequestGate(8, 100, 0.75)
    assert gate.training_floor == 2
    async with samples(gate) as made:
        await made.ask(APPLICATION, *names("a", 30))
        assert gate.training_room == 2, "it may take work though no slot is free: it is next"
        await made.ask(TRAINING, *names("t", 4))
        await made.end("a0", "a1", "a2")
        assert made.entered == [*names("a", 8), "t0", "t1", "a8"], "two for training, the third for applications"


async def test_applications_get_every_slot_beyond_the_floor_from_training_that_fills_the_engine() -> None:
    async with samples(RequestGate(8, 100, 0.75)) as made:
        await made.ask(TRAINING, *names("t", 20))
        await made.ask(APPLICATION, "a0", "a1")
        assert made.gate.training_room == 2, "applications wait: training is held to its floor"
        await made.end("t0", "t1", "t2")
        assert made.entered == [*names("t", 8), "a0", "a1"], "the slot left over stays free for the next application"
        await made.ask(APPLICATION, "a2")
        assert made.entered[-1] == "a2"


async def test_a_few_applications_leave_training_the_rest_of_the_window() -> None:
    async with samples(RequestGate(16, 100, 0.75)) as made:
        await made.ask(APPLICATION, "a0")
        assert made.gate.training_room == 16 - 1 - 2, "one runs, and an eighth is kept free"
        await made.ask(APPLICATION, *names("b", 14))
        assert made.gate.training_room == 4, "never less than the floor"
        await made.end("a0", *names("b", 14))
        assert made.gate.training_room == 16


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("window", [2, 3, 80])
def test_neither_class_can_be_shut_out_by_a_setting(window: int, share: float) -> None:
    assert 1 <= RequestGate(window, 4, share).training_floor <= window - 1


def test_a_window_too_small_for_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        RequestGate(1, 10, application_share=0.75)


async def test_applications_beyond_the_queue_limit_are_refused_and_training_is_not() -> None:
    gate = RequestGate(4, 8, 0.75)
    async with samples(gate) as made:
        await made.ask(APPLICATION, *names("a", 8))
        assert isinstance(made.tasks["a7"].exception(), Overloaded), "one of the eight places is the training floor's"
        gate.check_application(0)
        with pytest.raises(Overloaded, match="of 7 at most"):
            gate.check_application(1)
        await made.ask(TRAINING, *names("t", 20))
        assert not any(made.tasks[name].done() for name in names("t", 20))
        await made.end("a0")
        gate.check_application(1)


async def test_the_time_to_come_back_follows_the_pace_of_the_queue() -> None:
    now = 0.0
    gate = RequestGate(2, 11, 0.5, clock=lambda: now)
    async with samples(gate) as made:
        await made.ask(APPLICATION, *names("a", 10))
        with pytest.raises(Overloaded) as unknown:
            gate.check_application(1)
        assert unknown.value.retry_after_s == 1.0, "nothing has ended yet"
        for number in range(5):
            now += 0.5
            await made.end(f"a{number}")
            await made.ask(APPLICATION, f"b{number}")
        with pytest.raises(Overloaded) as refused:
            gate.check_application(1)
        assert refused.value.retry_after_s == pytest.approx(10 * 0.5 / 2)


async def test_a_shut_gate_lets_samples_wait_and_gives_training_no_room() -> None:
    gate = RequestGate(4, 100, application_share=0.75)
    async with samples(gate, opened=False) as made:
        await made.ask(APPLICATION, "a0")
        await made.ask(TRAINING, "t0")
        assert (made.entered, gate.running, gate.in_flight, gate.training_room) == ([], 0, 2, 0)
        gate.open()
        await settle()
        assert sorted(made.entered) == ["a0", "t0"]
        gate.shut()
        await made.end("a0")
        await made.ask(APPLICATION, "a1")
        assert "a1" not in made.entered


async def test_the_end_refuses_those_that_wait_and_those_that_come() -> None:
    gate = RequestGate(2, 100, application_share=0.75)
    async with samples(gate) as made:
        await made.ask(APPLICATION, *names("a", 3))
        assert await gate.wait_for_training_room() == 1
        with gate.claim(1):
            blocked = asyncio.create_task(gate.wait_for_training_room())
            await settle()
            gate.end("the engine is closed")
            with pytest.raises(Unavailable, match="closed"):
                await blocked
        await settle()
        assert isinstance(made.tasks["a2"].exception(), Unavailable)
        assert not made.tasks["a0"].done(), "what runs is the engine's to end"
        await made.ask(TRAINING, "t0")
        assert isinstance(made.tasks["t0"].exception(), Unavailable)
        with pytest.raises(Unavailable):
            gate.check_application(1)


async def test_a_caller_that_leaves_frees_its_slot_or_its_turn() -> None:
    async with samples(RequestGate(2, 100, 0.5)) as made:
        await made.ask(APPLICATION, *names("a", 4))
        await made.cancel("a2")
        await made.cancel("a0")
        assert made.entered == ["a0", "a1", "a3"]


async def test_a_caller_that_leaves_in_the_moment_in_which_it_is_let_in_frees_the_slot() -> None:
    async with samples(RequestGate(2, 100, 0.5)) as made:
        await made.ask(APPLICATION, *names("a", 4))
        made._ends["a0"].set()
        await asyncio.sleep(0)  # a0 leaves, and a2 is let in but has not run yet
        made.tasks["a2"].cancel()
        await settle()
        assert made.entered == ["a0", "a1", "a3"]
        assert made.gate.running == 2


async def test_training_that_leaves_the_queue_lets_applications_pass() -> None:
    async with samples(RequestGate(2, 100, 0.5)) as made:
        await made.ask(APPLICATION, "a0", "a1", "a2")
        await made.ask(TRAINING, "t0")
        await made.cancel("t0")
        await made.end("a0")
        assert made.entered == ["a0", "a1", "a2"]


async def test_claims_take_training_room_until_they_end() -> None:
    gate = RequestGate(8, 100, 0.75)
    gate.open()
    with gate.claim(16):
        assert gate.training_room == 0
        waiting = asyncio.create_task(gate.wait_for_training_room())
        await settle()
        assert not waiting.done()
    assert await waiting == 8


async def test_room_that_applications_leave_wakes_training() -> None:
    async with samples(RequestGate(4, 100, 0.75)) as made:
        await made.ask(APPLICATION, *names("a", 6))
        with made.gate.claim(1):
            waiting = asyncio.create_task(made.gate.wait_for_training_room())
            await settle()
            assert not waiting.done()
            await made.end(*names("a", 6))
            assert await waiting == 3


async def test_the_training_limit_holds_though_the_window_is_free() -> None:
    assert RequestGate(80, 100, 0.0, training_limit=16).training_floor == 16
    async with samples(RequestGate(80, 100, 0.75, training_limit=16)) as made:
        assert made.gate.training_room == 16


@pytest.mark.parametrize("seed", range(20))
async def test_whatever_comes_and_goes_the_invariants_hold(seed: int) -> None:
    rng = random.Random(seed)
    gate = RequestGate(rng.randint(2, 9), 20, rng.random())
    async with samples(gate) as made:
        kinds: dict[str, RequestKind] = {}
        for number in range(300):
            live = [name for name, task in made.tasks.items() if not task.done()]
            inside = [name for name in live if name in made.entered]
            action = rng.random()
            if action < 0.5 or not live:
                name = f"s{number}"
                kinds[name] = rng.choice(list(RequestKind))
                await made.ask(kinds[name], name)
            elif action < 0.85 and inside:
                await made.end(rng.choice(inside))
            elif action < 0.95:
                await made.cancel(rng.choice(live))
            else:
                gate.shut()
                await settle()
                gate.open()
                await settle()
            live = [name for name, task in made.tasks.items() if not task.done()]
            waiting = {kind: [n for n in live if n not in made.entered and kinds[n] is kind] for kind in RequestKind}
            training = gate.in_flight_of(TRAINING) - len(waiting[TRAINING])
            assert gate.running == len([name for name in live if name in made.entered]) <= gate.window
            assert gate.in_flight == len(live)
            assert gate.in_flight_of(APPLICATION) <= gate.queue_limit
            if waiting[APPLICATION] or (waiting[TRAINING] and training < gate.training_floor):
                assert gate.running == gate.window, "nobody whose turn it is waits beside a free slot"
        for kind in RequestKind:  # each class entered in the order of its names, those that left early aside
            order = [int(name[1:]) for name in made.entered if kinds[name] is kind]
            assert order == sorted(order)

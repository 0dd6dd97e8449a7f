"""Claims about what the intake holds when a wait is cut short."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest
from tests.integration.learner.harness import recorded

from honed.learner.data.episode import Vocabulary
from honed.learner.sources.scored_stream import Intake, IntakeSettings
from honed.learner.sources.source import BrokenPolicy
from honed.learner.sources.trained import TrainedIds
from honed.queue.holding import Holding
from honed.queue.messages import Delivery, Message
from honed.v1 import common_pb2


class Queue:
    """Ends deliveries as soon as the gate is open."""

    def __init__(self, messages: Sequence[Message]) -> None:
        self.waiting = [Delivery(f"{at}-0", message, 1, "me", "scored") for at, message in enumerate(messages, start=1)]
        self.gate = asyncio.Event()
        self.ended: list[tuple[str, str]] = []
        """Message id, and how it ended."""

    async def take(self, count: int, block_ms: int) -> list[Delivery]:
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        if not taken:
            await asyncio.Event().wait()
        return taken

    async def drop(self, deliveries: Sequence[Delivery], reason: str) -> int:
        await self.gate.wait()
        self.ended += [(delivery.message.id, reason) for delivery in deliveries]
        return len(deliveries)

    async def fail(self, delivery: Delivery, reason: str, *, retry: bool) -> str:
        await self.gate.wait()
        self.ended.append((delivery.message.id, "dead"))
        return "dead"

    async def hand_on_each(self, work: Sequence[tuple[Delivery, Sequence[Message]]], to: str) -> list[bool]:
        await self.gate.wait()
        self.ended += [(message.id, to) for _, messages in work for message in messages]
        return [True] * len(work)


def intake_of(queue: Queue, pad: int | None = None, group: int = 1) -> Intake:
    settings = IntakeSettings(1, on_promotion="rescore" if pad is None else "keep", group=group)
    typed = cast(Any, queue)
    return Intake(typed, Holding(typed), Vocabulary(258, pad), settings, TrainedIds("small"), lambda: {"rm": "new"})


def sampled_by(message: Message, fence: int, step: int) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    version = scored.rollout.version_spans[0].version
    version.fence, version.step = fence, step
    return Message(message.id, scored.SerializeToString())


async def cut_short(intake: Intake, step: int) -> None:
    """A wait for a batch that ends while its first entry is being ended."""
    collecting = asyncio.ensure_future(intake.collect(9, step))
    async with asyncio.timeout(30):
        while intake._ending is None:
            await asyncio.sleep(0.001)
    collecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await collecting


async def settled(intake: Intake, queue: Queue) -> list[tuple[str, str]]:
    """How everything has ended, once the gate is open."""
    queue.gate.set()
    collecting = asyncio.ensure_future(intake.collect(9, 9))
    async with asyncio.timeout(30):
        while intake._ending is not None:
            await asyncio.sleep(0.001)
    collecting.cancel()
    await asyncio.wait([collecting])
    await intake.close()
    return queue.ended


async def test_a_wait_that_is_cut_short_leaves_nothing_in_hand_that_waits_no_more() -> None:
    """What goes under the other reasons was never let go, and counted as in hand for ever."""
    abandoned, stale, old = list(recorded(3, 3))
    queue = Queue([sampled_by(abandoned, 1, 9), sampled_by(stale, 1, 0), sampled_by(old, 2, 9)])
    intake = intake_of(queue)
    intake.rollbacks = ((2, 0),)
    await cut_short(intake, 9)
    assert [intake.holds(message.id) for message in (abandoned, stale, old)] == [False, False, False]
    assert (intake.waiting, len(intake._hand._leases)) == (0, 0)
    assert await settled(intake, queue) == [(stale.id, "stale"), (abandoned.id, "rolled_back"), (old.id, "rollouts")]


async def test_a_wait_that_is_cut_short_keeps_what_came_behind_an_entry_that_nobody_can_read() -> None:
    """They would come again after their lease, out of order."""
    good = next(recorded(1, 1))
    queue = Queue([Message("junk", b"\xff"), sampled_by(good, 1, 9)])
    intake = intake_of(queue)
    await cut_short(intake, 9)
    assert intake.holds(good.id)
    assert (await settled(intake, queue))[0] == ("junk", "dead")


async def test_what_redis_gave_in_the_turn_in_which_the_wait_was_cancelled_is_in_the_next_batch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It was in nobody's hands, and came again after its lease."""
    [message] = recorded(1, 1)
    queue, empty = Queue([message]), Queue([])
    answer: asyncio.Future[list[Delivery]] = asyncio.get_running_loop().create_future()
    monkeypatch.setattr(queue, "take", lambda count, block_ms: answer)
    intake = intake_of(queue, pad=1)
    collecting = asyncio.ensure_future(intake.collect(1, 0))
    async with asyncio.timeout(30):
        while intake._taking is None:
            await asyncio.sleep(0)
    answer.set_result(queue.waiting)
    collecting.cancel()
    await asyncio.wait([collecting])
    assert collecting.cancelled()
    monkeypatch.setattr(queue, "take", empty.take)
    async with asyncio.timeout(30):
        assert [held.rollout_id for held in await intake.collect(1, 0)] == [message.id]


def padded(message: Message) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.rollout.response_token_ids[-1] = 1
    return Message(message.id, scored.SerializeToString())


async def test_as_many_responses_with_padding_as_a_batch_has_are_a_broken_policy_and_fewer_are_left_out() -> None:
    messages = [padded(message) if number in (0, 2, 3, 4, 5, 7) else message for number, message in enumerate(recorded(10, 10))]
    queue = Queue(messages)
    queue.gate.set()
    intake = intake_of(queue, pad=1)
    told = r"\d responses with the padding token came before there was a batch of 4 others: `honed dead"
    with pytest.raises(BrokenPolicy, match=told):
        await intake.collect(4, 0)
    batch = await intake.collect(4, 0)
    assert [held.rollout_id for held in batch] == [messages[n].id for n in (1, 6, 8, 9)]
    assert [ended for ended in queue.ended if ended[1] == "dead"] == [(messages[n].id, "dead") for n in (0, 2, 3, 4, 5, 7)]


@pytest.mark.parametrize(("fence", "step"), [(1, 6), (2, 2)], ids=["abandoned", "stale"])
async def test_padding_of_versions_that_may_train_no_more_is_not_charged_to_the_version_that_serves(
    fence: int, step: int
) -> None:
    """After a roll-back there may be several batches of it on the way: they would end the training of a sound policy."""
    messages = list(recorded(12, 12))
    old = [sampled_by(padded(message), fence, step) for message in messages[:8]]
    sound = [sampled_by(message, 2, 4) for message in messages[8:]]
    queue = Queue([*old, *sound])
    queue.gate.set()
    intake = intake_of(queue, pad=1)
    intake.rollbacks = ((2, 4),)
    assert [held.rollout_id for held in await intake.collect(4, 4)] == [message.id for message in sound]
    assert [ended for ended in queue.ended if ended[1] == "dead"] == [(message.id, "dead") for message in old]


def without_reward(message: Message) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.reward = float("nan")
    return Message(message.id, scored.SerializeToString())


@pytest.mark.parametrize("broken", [padded, without_reward])
async def test_the_others_of_a_group_of_which_one_cannot_train_leave_as_they_come(
    broken: Callable[[Message], Message],
) -> None:
    """They waited for it until the time of groups was over, and held their places in admission."""
    messages = [grouped(message, number // 2) for number, message in enumerate(recorded(8, 8))]
    late = messages.pop(1)
    queue = Queue([broken(messages[0]), *messages[1:5], late, *messages[5:]])
    queue.gate.set()
    intake = intake_of(queue, pad=1, group=2)
    async with asyncio.timeout(30):
        batches = [[held.rollout_id for held in await intake.collect(size, 0)] for size in (4, 2)]
    assert [each for batch in batches for each in batch] == [message.id for message in messages[1:]]
    assert sorted(queue.ended) == sorted([(messages[0].id, "dead"), (late.id, "incomplete_group")])


def grouped(message: Message, group: int) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.rollout.group_id = f"group-{group}"
    return Message(message.id, scored.SerializeToString())


async def test_a_group_is_not_given_up_while_the_rest_of_it_stands_in_the_stream() -> None:
    """An update, or a pause, that takes longer than the rest of a group is waited for."""
    a0, b0, b1, a1 = (grouped(message, group) for message, group in zip(recorded(4, 4), (0, 1, 1, 0), strict=True))
    queue, now = Queue([a0, b0, b1]), [0.0]
    queue.gate.set()
    typed, settings = cast(Any, queue), IntakeSettings(1, group=2, group_timeout_s=600.0)
    intake = Intake(typed, Holding(typed), Vocabulary(258), settings, TrainedIds("small"), clock=lambda: now[0])
    async with asyncio.timeout(30):
        assert [held.rollout_id for held in await intake.collect(2, 0)] == [b0.id, b1.id]
        queue.waiting.append(Delivery("9-0", a1, 1, "me", "scored"))
        now[0] = 700.0
        assert [held.rollout_id for held in await intake.collect(2, 0)] == [a0.id, a1.id]
    assert queue.ended == []

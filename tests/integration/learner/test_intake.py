"""What the learner takes from the stream, on a real redis-server: each rollout once, whatever happens to its delivery."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import pytest
from tests.integration.learner.harness import recorded
from tests.support.run import until

from honed.learner.data.episode import Vocabulary
from honed.learner.sources.held import Held
from honed.learner.sources.scored_stream import Intake, IntakeSettings, OnPromotion
from honed.learner.sources.trained import TrainedIds
from honed.queue.connection import RedisLink
from honed.queue.dead import DeadLetters
from honed.queue.holding import holding
from honed.queue.keys import ROLLOUTS, SCORED, RunKeys
from honed.queue.messages import Message
from honed.queue.stream import DeliverySettings, WorkQueue
from honed.v1 import common_pb2

pytestmark = pytest.mark.redis

Open = Callable[..., AbstractAsyncContextManager[Intake]]


@pytest.fixture
def queue(link: RedisLink, keys: RunKeys) -> Callable[..., WorkQueue]:
    def make(consumer: str) -> WorkQueue:
        return WorkQueue(link, keys, SCORED, consumer, DeliverySettings(lease_ms=60_000, sweep_ms=1))

    return make


@pytest.fixture
def intake(queue: Callable[..., WorkQueue]) -> Open:
    @asynccontextmanager
    async def open_intake(
        consumer: str = "learner-1",
        staleness: int = 1,
        trained: Iterable[str] = (),
        promoted: Mapping[str, str] | None = None,
        on_promotion: OnPromotion = "rescore",
        group: int = 1,
        group_timeout_s: float = 60.0,
    ) -> AsyncIterator[Intake]:
        own, known = queue(consumer), TrainedIds("small")
        known.add(trained)
        async with holding(own) as held, asyncio.timeout(30):
            settings = IntakeSettings(staleness, on_promotion=on_promotion, group=group, group_timeout_s=group_timeout_s)
            async with closing(Intake(own, held, Vocabulary(258), settings, known, lambda: promoted or {})) as taking:
                yield taking

    return open_intake


@pytest.fixture
def expire(link: RedisLink, keys: RunKeys) -> Callable[..., Awaitable[None]]:
    """Lets leases run out now, as while the process or Redis stood still."""

    async def expire(*held: Held) -> None:
        for each in held:
            d = each.delivery
            await link.redis.xclaim(keys.stream(SCORED), "workers", d.consumer, 0, [d.entry], idle=3_600_000, justid=True)

    return expire


@asynccontextmanager
async def closing(intake: Intake) -> AsyncIterator[Intake]:
    try:
        yield intake
    finally:
        await intake.close()


def ids(held: list[Held]) -> list[str]:
    return [each.episode.rollout_id for each in held]


async def take_up(taking: Intake, count: int) -> None:
    """Has so many in hand, and waits for more in vain."""
    collecting = asyncio.ensure_future(taking.collect(99, 0))
    await until(lambda: len(taking._waiting) == count, 60, f"{count} rollouts in hand")
    collecting.cancel()
    await asyncio.wait([collecting])


def work(count: int, batch: int = 4) -> list[Message]:
    return list(recorded(count, batch))


async def dropped(queue: Callable[..., WorkQueue]) -> Mapping[str, int]:
    stats = await queue("test").stats()
    assert stats.balance == 0
    return {**stats.dropped, **({"dead_letter": stats.dead} if stats.dead else {})}


def scored_by(message: Message, version: str) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.scores.add(scorer="rm", scorer_version=version, value=scored.reward)
    return Message(message.id, scored.SerializeToString())


async def finish(taking: Intake, held: list[Held]) -> None:
    """As the loop: it has trained, and the checkpoint is durable."""
    taking.trained.add(ids(held))
    await taking.acknowledge(held)


def at_version(message: Message, step: int) -> Message:
    scored = common_pb2.ScoredRollout.FromString(message.body)
    scored.rollout.version_spans[0].version.step = step
    return Message(message.id, scored.SerializeToString())


async def test_batches_come_full_and_in_the_order_of_the_stream(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = work(8)
    await queue("test").put(messages)
    async with intake() as taking:
        first, second = await taking.collect(4, 0), await taking.collect(4, 1)
    assert ids(first) + ids(second) == [message.id for message in messages]


async def test_staleness_is_checked_when_a_batch_is_made_not_when_its_rollouts_came(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    messages = [at_version(message, 0) for message in work(2)] + [at_version(message, 2) for message in work(8)[2:]]
    await queue("test").put(messages)
    async with intake(staleness=1) as taking:
        await take_up(taking, len(messages))  # fresh as they all are at step 0
        batch = await taking.collect(4, 2)
        assert ids(batch) == [message.id for message in messages[2:6]]
        assert await dropped(queue) == {"stale": 2}


async def test_one_old_token_makes_a_rollout_as_old(queue: Callable[..., WorkQueue], intake: Open) -> None:
    message, fresh = work(2)
    scored = common_pb2.ScoredRollout.FromString(message.body)
    length = len(scored.rollout.response_token_ids)
    new = common_pb2.VersionSpan(version=common_pb2.PolicyVersion(run="small", fence=1, step=5), start=1, end=length)
    scored.rollout.version_spans[0].end = 1
    scored.rollout.version_spans.append(new)
    await queue("test").put([Message(message.id, scored.SerializeToString()), at_version(fresh, 5)])
    async with intake(staleness=1) as taking:
        assert ids(await taking.collect(1, 5)) == [fresh.id]
        assert await dropped(queue) == {"stale": 1}


async def test_what_cannot_be_read_is_a_dead_letter_with_the_reason(
    queue: Callable[..., WorkQueue], intake: Open, link: RedisLink, keys: RunKeys
) -> None:
    broken, good = work(2)
    scored = common_pb2.ScoredRollout.FromString(broken.body)
    scored.rollout.logprobs[1] = float("nan")
    await queue("test").put([Message("junk", b"\xff\xff"), Message(broken.id, scored.SerializeToString()), good])
    async with intake() as taking:
        assert ids(await taking.collect(1, 0)) == [good.id]
        assert await dropped(queue) == {"dead_letter": 2}
    reasons = [letter.death.reason for letter in await DeadLetters(link, keys, SCORED).list()]
    assert "rollout.logprobs[1]" in reasons[1]


async def test_a_successor_trains_what_its_predecessors_held_and_acknowledges_what_had_trained(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    messages = work(12)
    await queue("test").put(messages)
    async with intake("learner-1") as first:
        trained = await first.collect(4, 0)
    async with intake("learner-2") as second:
        await second.collect(4, 0)
    async with intake("learner-3", trained=ids(trained)) as third:  # the acknowledgement never arrived
        await third.take_over(["learner-1", "learner-2"])
        assert ids(await third.collect(8, 1)) == [message.id for message in messages[4:]]
        stats = await queue("test").stats()
        assert (stats.acked, stats.depth, stats.balance) == (4, 8, 0)


async def test_a_rollout_whose_lease_ran_out_while_it_waited_is_taken_up_once(
    queue: Callable[..., WorkQueue], intake: Open, expire: Callable[..., Awaitable[None]]
) -> None:
    messages = work(4)
    await queue("test").put(messages[:2])
    async with intake() as taking:
        await take_up(taking, 2)
        await expire(*taking._waiting)
        await queue("test").put(messages[2:])
        batch = await taking.collect(4, 0)
        assert ids(batch) == [message.id for message in messages]
        await finish(taking, batch)
    stats = await queue("test").stats()
    assert (stats.acked, stats.depth, stats.balance) == (4, 0, 0)


async def test_a_rollout_whose_lease_ran_out_while_it_trained_does_not_train_again(
    queue: Callable[..., WorkQueue], intake: Open, expire: Callable[..., Awaitable[None]]
) -> None:
    messages = work(8)
    await queue("test").put(messages[:4])
    async with intake() as taking:
        first = await taking.collect(4, 0)
        await expire(*first)  # in a long update; then it comes again before the checkpoint is durable
        await queue("test").put(messages[4:])
        second = await taking.collect(4, 1)
        assert ids(first) + ids(second) == [message.id for message in messages]
        await finish(taking, [*first, *second])
    stats = await queue("test").stats()
    assert (stats.acked, stats.depth, stats.balance) == (8, 0, 0)


async def test_a_rollout_that_trained_and_comes_again_is_a_counted_duplicate(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    """L3, as after a crash of Redis that lost its last second: the checkpoint knows what the stream has forgotten."""
    messages = work(8)
    await queue("test").put(messages[:4])
    async with intake() as taking:
        await finish(taking, await taking.collect(4, 0))
        await queue("test").put([*messages[:4], *messages[4:]])
        assert ids(await taking.collect(4, 1)) == [message.id for message in messages[4:]]
        stats = await queue("test").stats()
        assert (stats.acked, stats.dropped, stats.depth) == (4, {"duplicate": 4}, 4)


@pytest.mark.parametrize("where", ["waiting", "training"])
async def test_a_rollout_that_comes_under_another_entry_while_it_is_in_hand_trains_once(
    queue: Callable[..., WorkQueue], intake: Open, where: str
) -> None:
    """H1: Redis lost the hand-on, and the rollout was scored again, within a second."""
    messages = work(8)
    await queue("test").put(messages[:4])
    async with intake() as taking:
        held = await taking.collect(4, 0)
        if where == "waiting":
            taking.put_back(held)
        await queue("test").put([*messages[:4], *messages[4:]])
        batch = await taking.collect(8 if where == "waiting" else 4, 1)
        assert ids(batch) == [message.id for message in (messages if where == "waiting" else messages[4:])]
        await finish(taking, batch if where == "waiting" else [*held, *batch])
    stats = await queue("test").stats()
    assert (stats.acked, stats.dropped, stats.depth, stats.balance) == (8, {"duplicate": 4}, 0, 0)


async def test_an_entry_id_that_comes_a_second_time_for_another_rollout_is_that_rollout(
    queue: Callable[..., WorkQueue], intake: Open, link: RedisLink, keys: RunKeys
) -> None:
    """After a failover to a Redis whose clock is behind."""
    first, other = work(2)
    await queue("test").put([first])
    async with intake() as taking:
        held = await taking.collect(1, 0)
        entry = held[0].delivery.entry
        await link.redis.delete(keys.stream(SCORED))  # the new master has never seen it
        await link.redis.xadd(keys.stream(SCORED), {"id": other.id, "body": other.body, "traceparent": ""}, id=entry)
        assert ids(await taking.collect(1, 0)) == [other.id]


async def test_what_a_roll_back_abandoned_is_dropped_and_counted(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = [at_version(message, step) for message, step in zip(work(4), (3, 5, 6, 5), strict=True)]
    scored = common_pb2.ScoredRollout.FromString(messages[3].body)
    scored.rollout.version_spans[0].version.fence = 4
    messages[3] = Message(messages[3].id, scored.SerializeToString())
    await queue("test").put(messages)
    async with intake(staleness=9) as taking:
        taking.rollbacks = ((4, 4),)
        assert ids(await taking.collect(2, 5)) == [messages[0].id, messages[3].id]
        assert await dropped(queue) == {"rolled_back": 2}


@pytest.mark.parametrize("on_promotion", ["rescore", "drop", "keep"])
async def test_what_a_replaced_reward_model_scored_does_as_the_run_says(
    queue: Callable[..., WorkQueue], intake: Open, link: RedisLink, keys: RunKeys, on_promotion: OnPromotion
) -> None:
    """H11: also if it waits already when the promotion comes."""
    messages = [scored_by(message, version) for message, version in zip(work(4), "1121", strict=True)]
    await queue("test").put(messages)
    promoted: dict[str, str] = {}
    async with intake(promoted=promoted, on_promotion=on_promotion) as taking:
        await take_up(taking, 4)
        promoted["rm"] = "2"
        taking._promoted = lambda: promoted
        if on_promotion == "keep":
            assert len(await taking.collect(4, 0)) == 4
            return
        assert ids(await taking.collect(1, 0)) == [messages[2].id]
        back = await WorkQueue(link, keys, ROLLOUTS, "reward").take(9)
        if on_promotion == "drop":
            assert back == []
            assert await dropped(queue) == {"old_reward_model": 3}
            return
        assert [delivery.message.id for delivery in back] == [messages[0].id, messages[1].id, messages[3].id]
        rollout = common_pb2.Rollout.FromString(back[0].message.body)
        assert rollout == common_pb2.ScoredRollout.FromString(messages[0].body).rollout
        assert await dropped(queue) == {}


async def test_after_the_last_step_the_rest_is_dropped_and_counted(queue: Callable[..., WorkQueue], intake: Open) -> None:
    await queue("test").put(work(5))
    async with intake() as taking:
        await taking.receive()
        assert await taking.discard("run_finished") == 5
        assert await dropped(queue) == {"run_finished": 5}


async def test_at_a_stop_what_waits_goes_back(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = work(3)
    await queue("test").put(messages)
    async with intake("learner-1") as taking:
        await take_up(taking, 3)
        await taking.release()
    async with intake("learner-2") as successor:
        assert sorted(ids(await successor.collect(3, 0))) == [message.id for message in messages]


async def test_a_cancelled_wait_ends_whenever_the_cancellation_comes(queue: Callable[..., WorkQueue], intake: Open) -> None:
    async with intake() as taking:
        for turn in range(200):
            collecting = asyncio.ensure_future(taking.collect(999, 0))
            for _ in range(turn % 12):
                await asyncio.sleep(0)
            collecting.cancel()
            assert await asyncio.wait([collecting], timeout=5) == ({collecting}, set())


async def test_what_redis_gave_to_a_cancelled_wait_is_in_the_next_batch_in_its_order(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    """A pause or a roll-back ends the wait; what was on its way must not come back after its lease, out of order."""
    messages = work(4)
    async with intake() as taking:
        collecting = asyncio.ensure_future(taking.collect(4, 0))
        await asyncio.sleep(0.05)  # it waits in Redis
        collecting.cancel()
        await asyncio.wait([collecting])
        await queue("test").put(messages)
        assert ids(await taking.collect(4, 0)) == [message.id for message in messages]


def in_groups(messages: list[Message], *names: str) -> list[Message]:
    """The same rollouts as responses to prompts of these names."""
    grouped = []
    for message, name in zip(messages, names, strict=True):
        scored = common_pb2.ScoredRollout.FromString(message.body)
        scored.rollout.group_id = name
        grouped.append(Message(message.id, scored.SerializeToString()))
    return grouped


async def test_responses_to_one_prompt_come_in_one_batch(queue: Callable[..., WorkQueue], intake: Open) -> None:
    messages = in_groups(work(8, batch=8), "a", "b", "c", "a", "c", "d", "d", "b")
    await queue("test").put(messages)
    async with intake(group=2) as taking:
        first, second = await taking.collect(4, 0), await taking.collect(4, 0)
    assert [held.episode.group_id for held in first] == ["a", "a", "c", "c"], "b's second is not there yet"
    assert {held.episode.group_id for held in second} == {"b", "d"}


async def test_a_group_leaves_whole_with_its_stale_member_and_after_its_deadline(
    queue: Callable[..., WorkQueue], intake: Open
) -> None:
    old, *rest = in_groups(work(5, batch=8), "a", "a", "b", "c", "c")
    await queue("test").put([at_version(old, 0), *(at_version(message, 2) for message in rest)])
    async with intake(group=2, staleness=1, group_timeout_s=0.2) as taking:
        held = await taking.collect(2, 2)
        assert {each.episode.group_id for each in held} == {"c"}
        collecting = asyncio.ensure_future(taking.collect(2, 2))
        await until(lambda: not taking.waiting, 60, "the torn group leaves")
        collecting.cancel()
        await asyncio.wait([collecting])
        await finish(taking, held)
    assert await dropped(queue) == {"stale": 2, "incomplete_group": 1}

"""What the queue promises, one claim a test, on a real redis-server."""

import asyncio

import pytest

from honed.kit.errors import FailedPrecondition, InvalidArgument, Unavailable
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.dead import DeadLetters
from honed.queue.holding import holding
from honed.queue.messages import Message

pytestmark = pytest.mark.redis


def messages(*ids: str) -> list[Message]:
    return [Message(i, f"body of {i}".encode()) for i in ids]


def ids(deliveries) -> list[str]:
    return [d.message.id for d in deliveries]


async def test_a_message_arrives_as_it_was_sent(queue):
    sent = Message("r-1", bytes(range(256)), "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
    await queue().put([sent])
    [delivery] = await queue().take(10)
    assert delivery.message == sent
    assert (delivery.count, delivery.consumer, delivery.stage) == (1, "a", "rollouts")


async def test_new_entries_come_in_order_and_to_one_consumer_each(queue):
    await queue().put(messages("1", "2", "3", "4"))
    assert ids(await queue("a").take(3)) == ["1", "2", "3"]
    assert ids(await queue("b").take(3)) == ["4"]
    assert await queue("a").take(3) == []


async def test_a_blocked_take_wakes_when_work_comes(queue):
    taker = queue("a", sweep_ms=5000)
    taking = asyncio.create_task(taker.take(1, block_ms=5000))
    await taker.put(messages("1"))
    async with asyncio.timeout(4.5):
        assert ids(await taking) == ["1"]


async def test_a_blocked_take_finds_a_lease_that_runs_out_meanwhile(queue, expire):
    await queue().put(messages("1"))
    held = await queue("a").take(1)
    other = queue("b", sweep_ms=20)
    assert await other.take(1) == []
    taking = asyncio.create_task(other.take(1, block_ms=5000))
    await expire(*held)
    async with asyncio.timeout(4.5):
        assert ids(await taking) == ["1"]


async def test_take_gives_up_after_its_block_time(queue):
    async with asyncio.timeout(30):
        assert await queue().take(1, block_ms=60) == []


async def test_take_refuses_a_block_that_the_socket_would_not_survive(queue):
    with pytest.raises(InvalidArgument, match="block_ms"):
        await queue().take(1, block_ms=5001)
    with pytest.raises(InvalidArgument, match="max_count"):
        await queue().take(0)


async def test_a_hand_on_moves_one_entry_to_its_results(queue):
    a, scored = queue(), queue("s", "scored")
    await a.put(messages("p"))
    [delivery] = await a.take(1)
    assert await a.hand_on(delivery, messages("p-0", "p-1", "p-2"), "scored")
    assert await a.depth() == 0
    assert ids(await scored.take(10)) == ["p-0", "p-1", "p-2"]


async def test_a_second_hand_on_of_the_same_delivery_adds_nothing(queue):
    a = queue()
    await a.put(messages("p"))
    [delivery] = await a.take(1)
    assert await a.hand_on(delivery, messages("p-0"), "scored")
    assert not await a.hand_on(delivery, messages("p-0"), "scored")
    assert await queue("s", "scored").depth() == 1


async def test_a_reclaimed_entry_is_handed_on_once(queue, expire):
    a, b = queue("a"), queue("b")
    await a.put(messages("1"))
    [slow] = await a.take(1)
    await expire(slow)
    [again] = await b.take(1)
    assert (again.entry, again.count, again.consumer) == (slow.entry, 2, "b")
    assert not await a.hand_on(slow, messages("late"), "scored")
    assert await b.hand_on(again, messages("once"), "scored")
    assert not await a.hand_on(slow, messages("late"), "scored")
    assert ids(await queue("s", "scored").take(10)) == ["once"]


async def test_a_worker_that_reclaims_its_own_entry_can_only_end_the_later_delivery(queue, expire):
    a = queue("a")
    await a.put(messages("1"))
    [first] = await a.take(1)
    await expire(first)
    [second] = await a.take(1, block_ms=1000)
    assert not await a.hand_on(first, messages("late"), "scored")
    assert await a.ack([first]) == 0
    assert await a.drop([first], "stale") == 0
    assert await a.fail(first, "late") == "lost"
    assert await a.renew([first]) == []
    assert await a.release([first]) == 0
    assert await a.hand_on(second, messages("once"), "scored")


async def test_in_a_batch_each_delivery_stands_for_itself(queue, expire):
    a, b = queue("a"), queue("b")
    await a.put(messages("1", "2", "3"))
    held = await a.take(3)
    await expire(held[1])
    await b.take(1)
    done = await a.hand_on_each([(d, messages(f"{d.message.id}-out")) for d in held], "scored")
    assert done == [True, False, True]
    assert ids(await queue("s", "scored").take(10)) == ["1-out", "3-out"]


async def test_a_renewed_lease_is_not_taken_over_and_a_lost_one_is_not_renewed(queue, expire):
    a, b = queue("a"), queue("b")
    await a.put(messages("1", "2"))
    held = await a.take(2)
    await expire(*held)
    assert ids(await b.take(1)) == ["1"]
    assert ids(await a.renew(held)) == ["2"]
    assert await b.take(1) == []
    assert await a.ack([held[1]]) == 1


async def test_holding_renews_in_the_background_and_work_on_what_was_lost_can_be_cancelled(queue, expire):
    a, b = queue("a", lease_ms=90), queue("b", lease_ms=60_000)
    await a.put(messages("kept", "lost"))
    held = await a.take(2)
    async with holding(a) as hold, asyncio.timeout(30):
        work = [asyncio.create_task(asyncio.Event().wait()) for _ in held]
        for delivery, task in zip(held, work, strict=True):
            hold.add([delivery], on_lost=lambda _, task=task: task.cancel())
        await expire(held[1])
        [taken] = await b.take(1)
        assert taken.entry == held[1].entry
        await asyncio.wait([work[1]])
        assert (work[0].done(), work[1].cancelled(), len(hold)) == (False, True, 1)
        work[0].cancel()
        await asyncio.sleep(0.2)  # more than two leases: time itself is under test
        assert "kept" not in ids(await queue("c", lease_ms=90).take(5))
        assert await a.ack([held[0]]) == 1
        hold.discard(held)
        assert len(hold) == 0


async def test_a_redis_that_is_away_does_not_end_the_holding_block(redis_url, keys, queue):
    async with RedisLink(redis_url, retry=RetryPolicy(deadline_s=0.01)) as link:
        a = queue("a", via=link, lease_ms=60)
        await a.put(messages("1"))
        held = await a.take(1)
        async with asyncio.timeout(30), holding(a, held):
            answers = iter([Unavailable("away"), Unavailable("away")])
            renewed, renew = asyncio.Event(), a.renew

            async def fail_twice(deliveries):
                for error in answers:
                    raise error
                renewed.set()
                return await renew(deliveries)

            a.renew = fail_twice
            await renewed.wait()


async def test_an_error_leaves_the_holding_block_as_itself(queue):
    with pytest.raises(KeyError):
        async with holding(queue()):
            raise KeyError("mine")


async def test_a_release_rests_and_costs_no_delivery_however_often(queue, link, keys):
    a = queue("a", lease_ms=60_000, max_deliveries=2)
    await a.put(messages("1"))
    for _ in range(5):
        [delivery] = await a.take(1, block_ms=1000)
        assert delivery.count == 1
        assert await a.release([delivery], after_ms=50_000) == 1
        assert await a.take(1) == []
        [row] = await link.redis.xpending_range(keys.stream("rollouts"), "workers", "-", "+", 1)
        assert 10_000 <= row["time_since_delivered"] < 20_000, "it can be taken in the lease less what has passed"
        await link.redis.xclaim(
            keys.stream("rollouts"), "workers", "(released)", 0, [delivery.entry], idle=60_000, justid=True, retrycount=0
        )
    assert await a.release([delivery], after_ms=1) == 0
    assert (await a.stats()).dead == 0


async def test_a_release_rests_for_its_lease_at_most(queue):
    a = queue("a", lease_ms=40)
    await a.put(messages("1"))
    assert await a.release(await a.take(1), after_ms=3_600_000) == 1
    async with asyncio.timeout(30):
        while not await a.take(1):
            await asyncio.sleep(0.01)


async def test_names_of_consumers_that_are_gone_and_hold_nothing_are_removed(queue, link, keys):
    working, gone, me = queue("working"), queue("gone"), queue("me")
    await working.put(messages("1", "2"))
    await working.take(1)
    await gone.ack(await gone.take(1))
    await asyncio.sleep(0.02)  # idle time is the server's: time itself is under test
    assert await me.forget_idle(idle_ms=3_600_000) == 0
    assert await me.forget_idle(idle_ms=10) == 1
    names = {row["name"] for row in await link.redis.xinfo_consumers(keys.stream("rollouts"), "workers")}
    assert names == {b"working"}
    assert await gone.take(1) == [], "one that lives after all comes back by itself"


async def test_take_removes_names_now_and_then(queue, monkeypatch):
    asked = []
    now = [0.0]
    a = queue("a", clock=lambda: now[0])

    async def forget_idle():
        asked.append(now[0])

    monkeypatch.setattr(a, "forget_idle", forget_idle)
    for now[0] in (0.0, 10.0, 500.0, 650.0, 1300.0):
        await a.take(1)
    assert asked == [0.0, 650.0, 1300.0]


async def test_ack_and_drop_are_counted_and_the_books_balance(queue):
    a = queue()
    await a.put(messages("1", "2", "3", "4"))
    held = await a.take(3)
    assert await a.ack(held[:1]) == 1
    assert await a.drop(held[1:], "stale") == 2
    assert await a.drop(held[1:], "stale") == 0
    stats = await a.stats()
    assert (stats.depth, stats.pending, stats.waiting, stats.acked) == (1, 0, 1, 1)
    assert stats.dropped == {"stale": 2}
    assert stats.balance == 0


async def test_what_is_released_can_be_taken_at_once_and_counts_no_try(queue):
    a, b = queue("a"), queue("b")
    await a.put(messages("1"))
    assert await a.release(await a.take(1)) == 1
    [delivery] = await b.take(1)
    assert (delivery.message.id, delivery.count) == ("1", 1)


async def test_a_failed_entry_is_tried_again_at_once_or_after_its_pause(queue):
    a = queue("a", lease_ms=60_000)
    await a.put(messages("now", "later"))
    now, later = await a.take(2)
    assert await a.fail(now, "flaky") == "retry"
    assert await a.fail(later, "flaky", retry_after_ms=59_000) == "retry"
    [again] = await queue("b").take(10)
    assert (again.message.id, again.count) == ("now", 2)


async def test_a_poison_entry_that_kills_its_workers_goes_to_the_dead_letters(queue, link, keys, expire):
    await queue().put(messages("poison"))
    for n in range(3):
        [delivery] = await queue(f"worker-{n}", max_deliveries=3).take(1)
        assert delivery.count == n + 1
        await expire(delivery)
    assert await queue("worker-3", max_deliveries=3).take(1) == []
    [letter] = await DeadLetters(link, keys, "rollouts").list()
    assert letter.message == messages("poison")[0]
    assert (letter.death.deliveries, letter.stage, letter.entry) == (3, "rollouts", delivery.entry)
    assert letter.death.reason == "delivered 3 times and never finished"
    assert (await queue().stats()).balance == 0


async def test_a_dead_letter_says_the_last_failure(queue, link, keys, expire):
    a = queue("a", max_deliveries=2)
    await a.put(messages("1"))
    [first] = await a.take(1)
    await a.fail(first, "scorer raised ZeroDivisionError")
    [second] = await a.take(1, block_ms=1000)
    await expire(second)
    assert await a.take(1, block_ms=20) == []
    [letter] = await DeadLetters(link, keys, "rollouts").list()
    assert letter.death.reason.endswith("last failure: scorer raised ZeroDivisionError")


async def test_the_last_allowed_failure_buries_with_its_own_reason(queue, link, keys):
    a = queue("a", max_deliveries=2)
    await a.put(messages("1"))
    assert await a.fail((await a.take(1))[0], "first") == "retry"
    assert await a.fail((await a.take(1, block_ms=1000))[0], "second") == "dead"
    [letter] = await DeadLetters(link, keys, "rollouts").list()
    assert (letter.death.reason, letter.death.deliveries, letter.death.consumer) == ("second", 2, "a")


async def test_a_failure_that_no_retry_can_help_buries_at_once(queue, link, keys):
    a = queue()
    await a.put(messages("1"))
    assert await a.fail((await a.take(1))[0], "not a Rollout", retry=False) == "dead"
    assert await DeadLetters(link, keys, "rollouts").count() == 1


async def test_empty_pages_of_a_sweep_are_passed_over_until_the_cursor_comes_round(queue, link, keys, expire):
    a = queue("a")
    await a.put(messages(*(str(n) for n in range(500))))
    held = await a.take(500)
    page = await link.command("XAUTOCLAIM", keys.stream("rollouts"), "workers", "b", 3_600_000, "0-0", "COUNT", 1)
    assert page[0] != b"0-0", "the first page is not the only one"
    assert page[1] == [], "and it is empty"
    await expire(held[-1])
    assert ids(await queue("b").take(1)) == ["499"]


async def test_a_sweep_goes_on_where_the_last_one_stopped(queue, expire):
    a, b = queue("a"), queue("b", sweep_ms=3_600_000)
    await a.put(messages("1", "2", "3"))
    await expire(*await a.take(3))
    assert [ids(await b.take(1)) for _ in range(3)] == [["1"], ["2"], ["3"]]


async def test_a_restarted_learner_reads_what_it_held_in_stream_order(queue):
    a = queue("learner")
    await a.put(messages(*(str(n) for n in range(600))))
    held = await a.take(600)
    await a.ack(held[:2])
    again = await queue("learner").pending_of()
    assert ids(again) == [str(n) for n in range(2, 600)]
    assert {d.count for d in again} == {1}
    assert await a.take(1) == []


async def test_a_successor_takes_over_and_its_predecessor_can_end_nothing(queue):
    old, new = queue("learner-1"), queue("learner-2")
    await old.put(messages("1", "2", "3"))
    held = await old.take(2)
    taken = await new.pending_of("learner-1")
    assert ids(taken) == ["1", "2"]
    assert await old.ack(held) == 0
    assert await new.ack(taken) == 2
    assert ids(await new.take(5)) == ["3"]


async def test_what_was_taken_over_from_one_predecessor_is_not_returned_for_the_next(queue):
    first, second, new = queue("learner-1"), queue("learner-2"), queue("learner-3")
    await first.put(messages("1", "2", "3"))
    await first.take(1)
    await second.take(1)
    assert ids(await new.pending_of("learner-1")) == ["1"]
    assert ids(await new.pending_of("learner-2")) == ["2"]
    assert ids(await new.pending_of("learner-1")) == []
    assert ids(await new.pending_of()) == ["1", "2"]


async def test_a_missing_group_is_made_anew_from_the_first_entry(queue, link, keys):
    a = queue()
    await a.put(messages("1", "2"))
    held = await a.take(1)
    await link.command("XGROUP", "DESTROY", keys.stream("rollouts"), "workers")
    assert not await a.hand_on(held[0], messages("late"), "scored")
    assert ids(await a.take(5)) == ["1", "2"]


async def test_a_stream_that_vanishes_under_a_blocked_take_is_ridden_out(queue, link, keys):
    a = queue("a", sweep_ms=5000)
    await a.put(messages("1"))
    await a.ack(await a.take(1))
    taking = asyncio.create_task(a.take(1, block_ms=5000))
    while not (await link.redis.info("clients"))["blocked_clients"]:
        await asyncio.sleep(0.01)
    await link.command("DEL", keys.stream("rollouts"))
    await a.put(messages("2"))
    async with asyncio.timeout(4.5):
        assert ids(await taking) == ["2"]


async def test_a_server_that_forgot_the_scripts_gets_them_again(queue, link):
    a = queue()
    await a.put(messages("1"))
    await link.command("SCRIPT", "FLUSH")
    assert await a.hand_on((await a.take(1))[0], messages("out"), "scored")


async def test_an_entry_deleted_from_outside_is_written_off_in_the_books(queue, link, keys, expire):
    a = queue()
    await a.put(messages("1", "2"))
    held = await a.take(2)
    await expire(*held)
    await link.command("XDEL", keys.stream("rollouts"), held[0].entry)
    assert ids(await queue("b").take(5)) == ["2"]
    stats = await a.stats()
    assert stats.dropped == {"deleted_outside": 1}
    assert (stats.balance, stats.pending) == (0, 1)


async def test_a_consumer_leaves_only_with_empty_hands(queue):
    a = queue()
    await a.put(messages("1"))
    held = await a.take(1)
    assert not await a.leave()
    await a.ack(held)
    assert await a.leave()


async def test_a_key_of_another_type_is_an_error_that_says_so(queue, link, keys):
    await link.command("SET", keys.stream("rollouts"), "x")
    with pytest.raises(FailedPrecondition, match="WRONGTYPE"):
        await queue().take(1)


class TestLostReplies:
    """Redis did the work, the connection died before the reply: the call is repeated, and must answer as if once."""

    async def test_a_hand_on_adds_once_and_says_done(self, wire, queue):
        async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
            a = queue("a", via=link)
            await a.put(messages("1"))
            [delivery] = await a.take(1)
            wire.lose_reply_to(b"result-0")
            assert await a.hand_on(delivery, messages("result-0"), "scored")
            assert wire.lost == 1
            assert await queue("s", "scored").depth() == 1

    async def test_put_ack_drop_fail_release_count_once(self, wire, queue):
        async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
            a = queue("a", via=link)
            wire.lose_reply_to(b"body of 1")
            await a.put(messages("1", "2", "3", "4"))
            held = await a.take(4)
            assert len(held) == 4
            wire.lose_reply_to(held[0].entry.encode())
            assert await a.ack(held[:1]) == 1
            wire.lose_reply_to(held[1].entry.encode())
            assert await a.drop(held[1:2], "stale") == 1
            wire.lose_reply_to(held[2].entry.encode())
            assert await a.fail(held[2], "broken", retry=False) == "dead"
            wire.lose_reply_to(held[3].entry.encode())
            assert await a.release(held[3:]) == 1
            assert wire.lost == 5
            stats = await a.stats()
            assert (stats.came_in, stats.acked, stats.dropped, stats.buried) == (4, 1, {"stale": 1}, 1)
            assert stats.balance == 0

    async def test_taken_from_me_is_told_apart_from_done_by_me(self, wire, queue, expire):
        async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
            a, b = queue("a", via=link), queue("b")
            await a.put(messages("1"))
            [slow] = await a.take(1)
            await expire(slow)
            [again] = await b.take(1)
            assert await b.hand_on(again, messages("once"), "scored")
            wire.lose_reply_to(b"late")
            assert not await a.hand_on(slow, messages("late"), "scored")
            assert wire.lost == 1

    async def test_a_take_over_is_complete(self, wire, queue):
        async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
            old, new = queue("learner-1"), queue("learner-2", via=link)
            await old.put(messages("1", "2"))
            await old.take(2)
            wire.lose_reply_to(b"learner-1")
            assert ids(await new.pending_of("learner-1")) == ["1", "2"]
            assert wire.lost == 1

    async def test_answers_do_not_pile_up(self, queue, link, keys):
        a = queue()
        await a.put(messages(*(str(n) for n in range(50))))
        for delivery in await a.take(50):
            await a.hand_on(delivery, messages("out"), "scored")
        assert await link.command("HLEN", keys.answers("rollouts", "a")) == 1
        assert await link.command("TTL", keys.answers("rollouts", "a")) > 120

    async def test_a_lost_new_delivery_comes_again_after_its_lease(self, wire, queue, keys, expire):
        async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
            a = queue("a", via=link)
            await a.put(messages("1"))
            wire.lose_reply_to(b"XREADGROUP")
            assert await a.take(1) == []
            [delivery] = await queue("a").pending_of()
            await expire(delivery)
            assert ids(await queue("b").take(1)) == ["1"]

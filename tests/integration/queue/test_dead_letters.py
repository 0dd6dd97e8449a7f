"""Dead letters: listed in pages, shown, and replayed with their history."""

from datetime import UTC, datetime, timedelta

import pytest

from honed.kit.errors import InvalidArgument, NotFound
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.dead import DeadLetters
from honed.queue.messages import Message

pytestmark = pytest.mark.redis


@pytest.fixture
def dead(link, keys):
    return DeadLetters(link, keys, "rollouts")


async def bury(queue, *ids: str, reason: str = "broken") -> None:
    a = queue()
    await a.put([Message(i, b"\x00\xff" + i.encode(), f"trace-{i}") for i in ids])
    for delivery in await a.take(len(ids)):
        assert await a.fail(delivery, reason, retry=False) == "dead"


async def test_letters_are_listed_in_pages_oldest_first(queue, dead):
    await bury(queue, "1", "2", "3")
    first = await dead.list(limit=2)
    second = await dead.list(limit=2, after=first[-1].letter)
    assert [letter.message.id for letter in first + second] == ["1", "2", "3"]
    assert await dead.list(after=second[-1].letter) == []
    assert await dead.count() == 3


async def test_a_letter_shows_what_why_when_and_how_often(queue, dead):
    await bury(queue, "1", reason="a “scorer” raised: 零")
    [listed] = await dead.list()
    letter = await dead.show(listed.letter)
    assert letter == listed
    assert letter.message == Message("1", b"\x00\xff1", "trace-1")
    assert (letter.death.reason, letter.death.deliveries, letter.stage) == ("a “scorer” raised: 零", 1, "rollouts")
    assert abs(letter.death.at - datetime.now(UTC)) < timedelta(minutes=1)
    assert letter.history == ()


async def test_a_replayed_letter_is_fresh_work_and_keeps_its_history(queue, dead):
    await bury(queue, "1", reason="first")
    [letter] = await dead.list()
    entry = await dead.replay(letter.letter)
    a = queue()
    [delivery] = await a.take(1)
    assert (delivery.entry, delivery.count, delivery.message) == (entry, 1, letter.message)
    assert await dead.count() == 0

    await a.fail(delivery, "second", retry=False)
    [again] = await dead.list()
    assert again.death.reason == "second"
    assert again.history == (letter.death,)

    await dead.replay(again.letter)
    await a.fail((await a.take(1))[0], "third", retry=False)
    [third] = await dead.list()
    assert [death.reason for death in third.history] == ["first", "second"]
    stats = await a.stats()
    assert (stats.buried, stats.replayed, stats.dead, stats.balance) == (3, 2, 1, 0)


async def test_a_replay_happens_once_however_often_it_is_asked_for(queue, dead):
    await bury(queue, "1")
    [letter] = await dead.list()
    assert await dead.replay(letter.letter) == await dead.replay(letter.letter)
    assert await queue().depth() == 1


async def test_a_replay_whose_reply_was_lost_happens_once(wire, queue, dead, keys):
    await bury(queue, "1")
    [letter] = await dead.list()
    async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
        wire.lose_reply_to(letter.letter.encode())
        await DeadLetters(link, keys, "rollouts").replay(letter.letter)
    assert wire.lost == 1
    assert await queue().depth() == 1


async def test_an_unknown_letter_is_not_found_and_a_malformed_one_is_refused(dead):
    with pytest.raises(NotFound, match="rollouts has no dead letter 5-0"):
        await dead.show("5-0")
    with pytest.raises(NotFound):
        await dead.replay("5-0")
    for call in (dead.show("x"), dead.replay("1"), dead.list(after="-")):
        with pytest.raises(InvalidArgument):
            await call
    with pytest.raises(InvalidArgument, match="limit"):
        await dead.list(limit=0)


async def test_a_deleted_letter_is_gone_and_counted_and_a_repeat_changes_nothing(queue, dead, wire, keys):
    await bury(queue, "1", "2")
    first, second = await dead.list()
    async with wire as url, RedisLink(url, retry=RetryPolicy(deadline_s=5)) as link:
        wire.lose_reply_to(first.letter.encode())
        await DeadLetters(link, keys, "rollouts").delete(first.letter)
    assert wire.lost == 1
    assert await dead.list() == [second]
    with pytest.raises(NotFound):
        await dead.replay(first.letter)
    with pytest.raises(NotFound):
        await dead.delete("5-0")
    stats = await queue().stats()
    assert (stats.buried, stats.deleted, stats.dead, stats.depth, stats.balance) == (2, 1, 1, 0, 0)


async def test_a_replayed_letter_cannot_be_deleted(queue, dead):
    await bury(queue, "1")
    [letter] = await dead.list()
    await dead.replay(letter.letter)
    with pytest.raises(NotFound):
        await dead.delete(letter.letter)
    assert (await queue().stats()).deleted == 0


async def test_all_letters_are_deleted_over_many_pages(queue, dead):
    await bury(queue, *map(str, range(450)))
    assert await dead.delete_all() == 450
    assert await dead.delete_all() == 0
    assert (await queue().stats()).deleted == 450


async def test_letters_of_a_window_are_counted_by_their_ids(queue, dead, link, keys):
    now = int((await link.redis.time())[0]) * 1000
    await link.redis.xadd(keys.dead("rollouts"), {"reason": "old"}, id=f"{now - 700_000}-0")
    await bury(queue, *map(str, range(150)))
    assert await dead.recent(600) == 150
    assert await dead.recent(600, at_most=100) == 100
    assert await dead.recent(800) == 151
    assert await DeadLetters(link, keys, "scored").recent(600) == 0

"""What replicas and the learner hear of promotions, through a real Redis."""

from __future__ import annotations

import asyncio
import json

import pytest

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.promotions import Announced, Candidate, PromotedScorers, PromotionBoard

pytestmark = pytest.mark.redis


@pytest.fixture
def board(link: RedisLink, keys: RunKeys) -> PromotionBoard:
    return PromotionBoard(link, keys)


async def test_nothing_is_announced_at_first(board: PromotionBoard) -> None:
    assert await board.read() == Announced()


async def test_an_older_promotion_never_replaces_a_newer_one(board: PromotionBoard) -> None:
    assert await board.announce(2, {"rm": "b"}) == 2
    assert await board.announce(1, {"rm": "a"}) == 2
    assert await board.announce(2, {"rm": "c"}) == 2
    assert await board.read() == Announced(2, {"rm": "b"})
    await board.announce(10, {"rm": "d"})
    assert await board.read() == Announced(10, {"rm": "d"})


async def test_candidates_are_bounded_for_each_scorer_and_the_newest_comes_first(board: PromotionBoard) -> None:
    for name, version in (("rm", "1"), ("other", "1"), ("rm", "2"), ("rm", "3"), ("rm", "2")):
        await board.offer(Candidate(name, version, f"artifact:{name}/0.{version}"))
    found = (await board.read()).candidates
    assert [(c.name, c.version) for c in found if c.name == "rm"] == [("rm", "2"), ("rm", "3")]
    assert [c.source for c in found if c.name == "other"] == ["artifact:other/0.1"]


async def test_a_candidate_of_the_next_release_is_read_without_what_is_new(
    board: PromotionBoard, link: RedisLink, keys: RunKeys
) -> None:
    row = {"name": "rm", "version": "1", "source": "artifact:rm/0.1", "zz_newer": 1}
    await link.command("HSET", keys.promotions(), "candidates", json.dumps([row]))
    assert (await board.read()).candidates == (Candidate("rm", "1", "artifact:rm/0.1"),)


async def test_a_follower_sees_a_promotion_and_keeps_it_when_redis_loses_it(
    board: PromotionBoard, link: RedisLink, keys: RunKeys
) -> None:
    recorded = {"rm": "a"}
    async with PromotedScorers(board, lambda: dict(recorded)).following(every_s=0.01) as scorers, asyncio.timeout(20):
        assert scorers.promoted() == {"rm": "a"}, "Redis says nothing yet: the record does"
        recorded["rm"] = "b"
        await board.announce(2, {"rm": "b", "gone": "1"})
        while scorers.promoted() != {"rm": "b"}:
            await asyncio.sleep(0.005)
        await link.redis.delete(keys.promotions())
        for _ in range(10):
            await asyncio.sleep(0.005)
            assert scorers.promoted() == {"rm": "b"}


async def test_what_was_heard_last_holds_while_redis_is_away(board: PromotionBoard, keys: RunKeys) -> None:
    async with RedisLink("redis://127.0.0.1:1", retry=RetryPolicy(deadline_s=0.01, first_s=0.001)) as nowhere:
        scorers = PromotedScorers(PromotionBoard(nowhere, keys), dict)
        async with scorers.following(every_s=0.01):
            await asyncio.sleep(0.03)
            assert scorers.promoted() == {}

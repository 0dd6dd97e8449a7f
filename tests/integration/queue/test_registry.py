"""Members under leases, and the learner's progress, on a real redis-server."""

import asyncio
import json

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.keys import RunKeys
from honed.queue.members import GENERATION, Member, Members, registered
from honed.queue.progress import LearnerProgress, ProgressBoard

KEYS = RunKeys("registry")


async def test_a_member_is_listed_until_its_lease_runs_out(link: RedisLink) -> None:
    members = Members(link, KEYS, GENERATION)
    await members.register(Member("b", "host:2", ready=True), lease_s=60)
    await members.register(Member("a", "host:1"), lease_s=0.05)
    assert [member.name for member in await members.list()] == ["a", "b"]
    async with asyncio.timeout(30):
        while len(await members.list()) > 1:
            await asyncio.sleep(0.01)
    assert await members.list() == [Member("b", "host:2", ready=True)]
    assert await link.command("HLEN", KEYS.members(GENERATION)) == 1  # expired ones leave nothing behind


async def test_a_member_of_the_next_release_is_listed_without_what_is_new(link: RedisLink) -> None:
    members = Members(link, RunKeys("next-release"), GENERATION)
    row = json.dumps({"name": "a", "address": "host:1", "zz_newer": 1})
    await members._scripts.run("register", members._keys, ["a", 60_000, row])
    assert await members.list() == [Member("a", "host:1")]


async def test_a_heartbeat_brings_the_news_and_survives_a_lost_list(link: RedisLink) -> None:
    members = Members(link, KEYS, GENERATION)
    version = "0.0"
    async with registered(members, lambda: Member("a", "host:1", version=version), lease_s=0.3) as announce:
        async with asyncio.timeout(30):
            while not await members.list():
                await asyncio.sleep(0.01)
            await link.command("DEL", KEYS.members(GENERATION))
            version = "1.1"
            announce()
            while [member.version for member in await members.list()] != ["1.1"]:
                await asyncio.sleep(0.01)
    assert await members.list() == []


async def test_an_outage_ends_no_registration(link: RedisLink) -> None:
    gone = RedisLink("redis://127.0.0.1:1", retry=RetryPolicy(deadline_s=0.05, first_s=0.01))
    async with gone, registered(Members(gone, KEYS, GENERATION), lambda: Member("a", "host:1"), lease_s=0.1):
        await asyncio.sleep(0.2)  # several heartbeats fail; the block goes on


async def test_a_learner_with_a_lower_fence_reports_nothing(link: RedisLink) -> None:
    board = ProgressBoard(link, KEYS)
    assert await board.read() is None
    assert await board.write(LearnerProgress(fence=2, update=5, scorers=("words@1",)))
    assert not await board.write(LearnerProgress(fence=1, update=9))
    assert await board.read() == LearnerProgress(fence=2, update=5, scorers=("words@1",))

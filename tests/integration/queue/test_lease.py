"""The fenced lease: one holder, a rising number, and a loser that learns it."""

import asyncio

import pytest

from honed.kit.errors import FailedPrecondition, Unavailable
from honed.queue.lease import Claim, LeaseHeld, LeaseLost, Leases, TermOver

pytestmark = pytest.mark.redis

LONG = 60_000


@pytest.fixture
def leases(link, keys):
    return Leases(link, keys)


@pytest.fixture
def run_out(link, keys):
    """The lease's life ends now."""

    async def run_out(name: str = "learner") -> None:
        await link.command("PEXPIRE", keys.lease(name), 0)

    return run_out


async def test_one_owner_holds_it_and_the_other_is_told_who(leases):
    claim = await leases.acquire("learner", "a", LONG)
    assert claim == Claim("learner", "a", 1)
    with pytest.raises(FailedPrecondition, match="held by a with fence 1"):
        await leases.acquire("learner", "b", LONG)


async def test_the_holder_gets_the_same_fence_again(leases):
    assert await leases.acquire("learner", "a", LONG) == await leases.acquire("learner", "a", LONG)


async def test_each_takeover_raises_the_fence_and_the_loser_learns_it(leases, run_out):
    old = await leases.acquire("learner", "a", LONG)
    await run_out()
    new = await leases.acquire("learner", "b", LONG)
    assert new.fence == 2
    for asked in (leases.check(old), leases.renew(old, LONG)):
        with pytest.raises(LeaseLost) as caught:
            await asked
        assert caught.value.fence == 2
    assert not await leases.release(old)
    await leases.check(new)


async def test_a_lease_that_ran_out_with_nobody_waiting_is_renewed_with_its_fence(leases, run_out):
    claim = await leases.acquire("learner", "a", LONG)
    await run_out()
    await leases.check(claim)
    await leases.renew(claim, LONG)
    with pytest.raises(FailedPrecondition):
        await leases.acquire("learner", "b", LONG)


async def test_a_released_lease_is_free_at_once(leases):
    assert await leases.release(await leases.acquire("learner", "a", LONG))
    assert (await leases.acquire("learner", "b", LONG)).fence == 2


async def test_the_fence_exceeds_what_is_known_from_elsewhere_even_if_redis_lost_its_counter(leases, link, keys):
    await leases.acquire("learner", "a", LONG)
    await link.command("DEL", keys.lease("learner"), keys.fence("learner"))
    assert (await leases.acquire("learner", "b", LONG, above=7)).fence == 8


async def test_after_redis_lost_a_takeover_the_higher_fence_wins(leases, link, keys, run_out):
    old = await leases.acquire("learner", "a", LONG)
    await run_out()
    new = await leases.acquire("learner", "b", LONG)
    # As if the append-only file had lost the last second: the old holder's lease is back.
    await link.command("SET", keys.fence("learner"), old.fence)
    await link.command("HSET", keys.lease("learner"), "owner", "a", "fence", old.fence)
    await leases.renew(new, LONG)
    with pytest.raises(LeaseLost):
        await leases.renew(old, LONG)


async def test_of_many_who_ask_at_once_one_gets_it(leases):
    got = await asyncio.gather(*(leases.acquire("learner", f"o{n}", LONG) for n in range(16)), return_exceptions=True)
    assert sum(isinstance(claim, Claim) for claim in got) == 1


async def test_leases_of_other_names_are_others(leases):
    await leases.acquire("learner", "a", LONG)
    await leases.acquire("conductor", "b", LONG)


async def test_losing_the_lease_cancels_the_holders_work(leases, run_out):
    claim = await leases.acquire("learner", "a", 30)

    async def hold_and_work() -> None:
        async with asyncio.timeout(30), asyncio.TaskGroup() as group:
            group.create_task(leases.keep(claim, 30))
            await asyncio.Event().wait()

    working = asyncio.create_task(hold_and_work())
    await asyncio.sleep(0.1)  # more than three lives: time itself is under test
    await leases.check(claim)
    await run_out()
    await leases.acquire("learner", "b", LONG)
    with pytest.raises(ExceptionGroup) as caught:
        await working
    assert caught.group_contains(LeaseLost)


async def test_a_lease_is_held_as_long_as_the_block_runs_and_released_after_it(leases):
    async with leases.held("learner", "a", 30, above=4) as lease:
        assert lease.claim == Claim("learner", "a", 5)
        await asyncio.sleep(0.1)  # more than three lives: time itself is under test
        await lease.check()
        with pytest.raises(LeaseHeld):
            async with leases.held("learner", "b", LONG, wait_s=0):
                pass
    assert (await leases.acquire("learner", "b", LONG)).fence == 6


async def test_a_block_waits_for_a_dead_predecessors_lease(leases):
    await leases.acquire("learner", "dead", 40)
    reasons: list[LeaseHeld] = []
    async with asyncio.timeout(30), leases.held("learner", "b", 40, on_wait=reasons.append) as lease:
        assert lease.claim.fence == 2
    assert "is held by dead" in str(reasons[0])


async def test_losing_the_lease_cancels_the_block_with_that_error_alone(leases, run_out):
    async def hold_and_lose() -> None:
        async with asyncio.timeout(30), leases.held("learner", "a", 30):
            await run_out()
            await leases.acquire("learner", "b", LONG)
            await asyncio.Event().wait()

    with pytest.raises(LeaseLost):
        await hold_and_lose()


async def test_an_error_of_the_block_leaves_as_itself_and_the_lease_is_free(leases):
    with pytest.raises(KeyError):
        async with leases.held("learner", "a", LONG):
            raise KeyError("mine")
    assert (await leases.acquire("learner", "b", LONG)).fence == 2


async def test_an_outage_does_not_end_the_block(leases, monkeypatch):
    renewed = asyncio.Event()
    renew, answers = leases.renew, iter([Unavailable("away"), Unavailable("away")])

    async def fail_twice(claim, ttl_ms):
        for error in answers:
            raise error
        await renew(claim, ttl_ms)
        renewed.set()

    monkeypatch.setattr(leases, "renew", fail_twice)
    async with asyncio.timeout(30), leases.held("learner", "a", 60) as lease:
        await renewed.wait()
        await lease.check()


async def test_the_holder_raises_its_own_fence_while_it_renews(leases):
    async with asyncio.timeout(30), leases.held("learner", "a", 15) as lease:
        old = lease.claim
        for expected in range(2, 12):
            assert (await lease.raise_fence()).fence == expected
            await asyncio.sleep(0.005)  # renewals fall in between
        with pytest.raises(LeaseLost):
            await leases.check(old)
        assert (await lease.raise_fence(above=40)).fence == 41
        await asyncio.sleep(0.03)
        await lease.check()


async def test_a_new_term_takes_the_lease_from_its_holder_at_once(leases):
    old = await leases.acquire("conductor", "a", LONG, above=3, term=3)
    assert (old.fence, await leases.term("conductor")) == (4, 3)
    new = await leases.acquire("conductor", "b", LONG, above=4, term=4)
    assert (new.fence, await leases.term("conductor")) == (5, 4)
    for asked in (leases.check(old), leases.renew(old, LONG)):
        with pytest.raises(LeaseLost):
            await asked
    await leases.check(new)


async def test_a_term_that_is_over_gets_nothing_even_if_the_lease_is_free(leases):
    new = await leases.acquire("conductor", "b", LONG, term=4)
    for _ in range(2):
        with pytest.raises(TermOver, match="was taken in term 4, and this process was chosen in term 3"):
            await leases.acquire("conductor", "a", LONG, term=3)
        await leases.release(new)
    assert await leases.term("conductor") == 4


async def test_within_a_term_the_lease_is_held_as_ever(leases):
    first = await leases.acquire("conductor", "a", LONG, term=4)
    assert await leases.acquire("conductor", "a", LONG, term=4) == first
    with pytest.raises(LeaseHeld, match="held by a"):
        await leases.acquire("conductor", "b", LONG, term=4)
    assert await leases.acquire("conductor", "a", LONG, term=5) == first, "its own holder goes on"


async def test_a_new_term_outnumbers_a_holder_whose_counter_redis_lost(leases, link, keys):
    old = await leases.acquire("conductor", "a", LONG, above=7, term=1)
    await link.command("DEL", keys.fence("conductor"))
    new = await leases.acquire("conductor", "b", LONG, above=2, term=2)
    assert new.fence > old.fence
    with pytest.raises(LeaseLost):
        await leases.renew(old, LONG)

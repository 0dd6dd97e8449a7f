"""Claims about the Lease that chooses one conductor of several, over a stand-in of the cluster's API and a real Redis."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.cluster import Cluster, Fault
from tests.support.cluster_run import SOON_S, api_of, section
from tests.support.run import until

from honed.conductor.cluster.api import ApiUnavailable
from honed.conductor.cluster.lease import NAME, ClusterLease, LeaseTaken
from honed.queue.admission import Cursor, PromptAdmitter
from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.embedded import EmbeddedRedis
from honed.queue.keys import RunKeys
from honed.queue.lease import Claim, LeaseLost, Leases, TermOver

LIFE_S = 1.0


@dataclass
class Candidate:
    """A conductor that holds the Lease, or waits for it, until it is told to end."""

    lease: ClusterLease
    waits: list[str] = field(default_factory=list)
    outages: list[str] = field(default_factory=list)
    chosen: asyncio.Event = field(default_factory=asyncio.Event)
    end: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None

    async def stand(self) -> None:
        async with self.lease.held(self.waits.append, self.outages.append):
            self.chosen.set()
            await self.end.wait()

    async def is_chosen(self, timeout_s: float = 10.0) -> int:
        async with asyncio.timeout(timeout_s):
            await self.chosen.wait()
        return self.lease.number

    async def ended(self, timeout_s: float = 10.0) -> None:
        assert self.task is not None
        async with asyncio.timeout(timeout_s):
            await self.task


Make = Callable[..., Any]


@pytest.fixture
async def candidate(tmp_path: Path, cluster: Cluster) -> AsyncIterator[Make]:
    """Starts candidates, each with a connection of its own."""
    numbers = itertools.count()
    async with AsyncExitStack() as stack:

        async def make(identity: str, clock: Callable[[], float] = time.monotonic) -> Candidate:
            root = tmp_path / str(next(numbers))
            root.mkdir()
            settings = section(root, cluster, identity=identity, lease_s=LIFE_S)
            api = await stack.enter_async_context(api_of(root, cluster, request_timeout_s=SOON_S))
            found = Candidate(ClusterLease(api, settings, clock))
            found.task = asyncio.create_task(found.stand())

            async def stop() -> None:
                assert found.task is not None
                found.task.cancel()
                await asyncio.gather(found.task, return_exceptions=True)

            stack.push_async_callback(stop)
            return found

        yield make


def spec(cluster: Cluster) -> dict[str, Any]:
    lease = cluster.object("leases", NAME)
    return dict(lease["spec"]) if lease else {}


async def test_the_first_one_makes_the_lease_renews_it_and_lets_go_of_it(cluster: Cluster, candidate: Make) -> None:
    one = await candidate("pod-a_uid-1")
    assert await one.is_chosen() == 1
    first = spec(cluster)
    assert (first["holderIdentity"], first["leaseDurationSeconds"], first["leaseTransitions"]) == ("pod-a_uid-1", 1, 1)
    await until(lambda: spec(cluster)["renewTime"] > first["renewTime"], 60, "it is renewed")
    assert spec(cluster)["acquireTime"] == first["acquireTime"]
    one.end.set()
    await one.ended()
    assert "holderIdentity" not in spec(cluster)
    assert spec(cluster)["leaseTransitions"] == 1


async def test_a_second_one_waits_says_for_whom_and_follows_at_once(cluster: Cluster, candidate: Make) -> None:
    one = await candidate("a")
    await one.is_chosen()
    two = await candidate("b")
    await until(lambda: two.waits, 60, "it waits")
    assert two.waits[0] == f"the Lease {NAME} is held by a with number 1"
    await asyncio.sleep(1.5 * LIFE_S)
    assert not two.chosen.is_set(), "a Lease that is renewed does not run out"
    one.end.set()
    await one.ended()
    began = time.monotonic()
    assert await two.is_chosen() == 2
    assert time.monotonic() - began < LIFE_S


async def test_a_holder_that_cannot_reach_the_server_is_succeeded_and_ends_when_it_can(
    cluster: Cluster, candidate: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(*_: object) -> None:
        raise ApiUnavailable("no route to host")

    one = await candidate("a")
    await one.is_chosen()
    with monkeypatch.context() as partition:
        partition.setattr(one.lease._api, "replace", away)
        two = await candidate("b")
        began = time.monotonic()
        assert await two.is_chosen() == 2
        assert time.monotonic() - began > 0.9 * LIFE_S, "not before its life is over"
        assert one.task is not None
        assert not one.task.done(), "it cannot know"
    with pytest.raises(LeaseTaken, match="went to b with number 2, and this conductor had number 1"):
        await one.ended()


async def test_of_many_who_wait_one_is_chosen(cluster: Cluster, candidate: Make) -> None:
    many = [await candidate(f"c{n}") for n in range(8)]
    await until(lambda: any(one.chosen.is_set() for one in many), 60, "one is chosen")
    for expected in range(1, 4):
        await asyncio.sleep(0.3 * LIFE_S)
        [chosen] = [one for one in many if one.chosen.is_set()]
        assert chosen.lease.number == expected
        many.remove(chosen)
        chosen.end.set()
        await chosen.ended()
        await until(lambda: any(one.chosen.is_set() for one in many), 60, "the next one")


async def test_who_is_succeeded_ends_with_the_reason(cluster: Cluster, candidate: Make) -> None:
    one = await candidate("a")
    await one.is_chosen()
    lease = cluster.object("leases", NAME)
    assert lease is not None
    await cluster.put("leases", {**lease, "spec": {**lease["spec"], "holderIdentity": "b", "leaseTransitions": 2}})
    with pytest.raises(LeaseTaken, match="went to b with number 2, and this conductor had number 1"):
        await one.ended()
    assert spec(cluster)["holderIdentity"] == "b", "it lets go of nothing that is not its own"


async def test_doubt_looks_at_once(cluster: Cluster, candidate: Make) -> None:
    one = await candidate("a")
    await one.is_chosen()
    lease = cluster.object("leases", NAME)
    assert lease is not None
    await cluster.put("leases", {**lease, "spec": {**lease["spec"], "holderIdentity": "b", "leaseTransitions": 2}})
    began = time.monotonic()
    one.lease.doubt()
    with pytest.raises(LeaseTaken):
        await one.ended()
    assert time.monotonic() - began < LIFE_S / 3


async def test_an_earlier_process_of_the_same_pod_is_succeeded_without_a_wait(cluster: Cluster, candidate: Make) -> None:
    await cluster.put("leases", lease_of("pod-a_uid-1", 7))
    one = await candidate("pod-a_uid-1")
    assert await one.is_chosen(0.5) == 8


async def test_a_lease_that_others_label_or_delete_is_held_on_with_its_number(cluster: Cluster, candidate: Make) -> None:
    await cluster.put("leases", {"metadata": {"name": NAME}, "spec": {"leaseTransitions": 4}})
    one = await candidate("a")
    assert await one.is_chosen() == 5
    lease = cluster.object("leases", NAME)
    assert lease is not None
    await cluster.put("leases", {**lease, "metadata": {**lease["metadata"], "labels": {"a": "b"}}})
    renewed = spec(cluster)["renewTime"]
    await until(lambda: spec(cluster)["renewTime"] > renewed, 60, "it is renewed")
    assert (cluster.object("leases", NAME) or {})["metadata"]["labels"] == {"a": "b"}
    await cluster.delete("leases", NAME)
    await until(lambda: spec(cluster), 60, "it is made again")
    assert (spec(cluster)["holderIdentity"], spec(cluster)["leaseTransitions"]) == ("a", 5)


@pytest.mark.parametrize("kind", ["lost", "cut", "refused", "silent"])
async def test_calls_that_fail_cost_the_holder_nothing(cluster: Cluster, candidate: Make, kind: str) -> None:
    cluster.faults = [Fault(kind, 503) for _ in range(2)]
    one = await candidate("a")
    number = await one.is_chosen()
    cluster.faults = [Fault(kind, 503)]
    renewed = spec(cluster)["renewTime"]
    await until(lambda: not cluster.faults and spec(cluster)["renewTime"] > renewed, 60, "it is renewed")
    await asyncio.sleep(0.4)
    assert (spec(cluster)["holderIdentity"], spec(cluster)["leaseTransitions"]) == ("a", number)
    assert one.task is not None
    assert not one.task.done()


async def test_an_api_that_is_away_beyond_the_leases_life_is_an_alarm_and_ends_nothing(
    cluster: Cluster, candidate: Make
) -> None:
    one = await candidate("a")
    await one.is_chosen()
    cluster.role.discard(("update", "leases", NAME))
    await until(lambda: one.outages, 60, "the alarm")
    assert "has run out and cannot be renewed" in one.outages[0]
    assert one.task is not None
    assert not one.task.done()
    cluster.role.add(("update", "leases", NAME))
    await until(lambda: one.outages[-1] == "", 60, "the alarm ends")
    assert one.lease.number == 1


async def test_a_number_that_fell_behind_is_raised_above_what_the_queue_has_seen(cluster: Cluster, candidate: Make) -> None:
    one = await candidate("a")
    await one.is_chosen()
    assert await one.lease.above(0) == 1
    assert await one.lease.above(1) == 1
    assert await one.lease.above(9) == 10
    assert spec(cluster)["leaseTransitions"] == 10
    renewed = spec(cluster)["renewTime"]
    await until(lambda: spec(cluster)["renewTime"] > renewed, 60, "it is renewed")
    await cluster.put("leases", lease_of("b", 11))
    with pytest.raises(LeaseTaken):
        await one.lease.above(20)


def lease_of(holder: str, number: int) -> dict[str, Any]:
    claim = {"holderIdentity": holder, "leaseTransitions": number, "leaseDurationSeconds": 1, "renewTime": "2026"}
    return {"metadata": {"name": NAME}, "spec": claim}


async def take(leases: Leases, one: Candidate) -> Claim:
    """The run's lease in Redis, as the online loop takes it."""
    term = await one.lease.above(await leases.term("conductor"))
    return await leases.acquire("conductor", one.lease.identity, 60_000, above=term, term=term)


@pytest.mark.redis
async def test_two_conductors_race_and_the_queue_refuses_the_loser(tmp_path: Path, cluster: Cluster, candidate: Make) -> None:
    keys = RunKeys("race")
    one, two = await candidate("a"), await candidate("b")
    await until(lambda: one.chosen.is_set() or two.chosen.is_set(), 60, "one is chosen")
    await asyncio.sleep(0.2)
    assert one.chosen.is_set() != two.chosen.is_set()
    first, second = (one, two) if one.chosen.is_set() else (two, one)
    async with (
        asyncio.timeout(20),
        EmbeddedRedis(tmp_path / "redis") as url,
        RedisLink(url, retry=RetryPolicy(10)) as link,
    ):
        leases, admitter = Leases(link, keys), PromptAdmitter(link, keys)
        old = await take(leases, first)
        await admitter.admit(old, 0, [], Cursor(1))
        # The first one is succeeded while its lease in Redis has a minute to live: the queue is the second one's at once.
        lease = cluster.object("leases", NAME)
        assert lease is not None
        await cluster.put("leases", {**lease, "spec": {**lease["spec"], "holderIdentity": ""}})
        assert await second.is_chosen() == 2
        new = await take(leases, second)
        assert new.fence > old.fence > 1
        await admitter.admit(new, 1, [], Cursor(2))
        with pytest.raises(LeaseLost):
            await admitter.admit(old, 2, [], Cursor(3))
        with pytest.raises(LeaseLost):
            await leases.renew(old, 60_000)
        # It asks anew with the number that it had, while the successor works and after that.
        for _ in range(2):
            with pytest.raises(TermOver):
                await leases.acquire("conductor", first.lease.identity, 60_000, above=1, term=1)
            assert await leases.acquire("conductor", second.lease.identity, 60_000, term=2) == new, "nothing has changed"
            await leases.release(new)
            new = replace(new, fence=new.fence + 1)
        with pytest.raises(LeaseTaken):
            await first.ended()

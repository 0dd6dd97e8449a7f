"""Hypothesis drives several consumers against a real redis-server, and after each step asks where every message is.

The model knows one thing of each message: who holds it, at which delivery count, or how it ended. Consumers take, hand on
(also late, also with the reply lost), crash, are reclaimed, renew, release, fail, drop, acknowledge and take over; the
server forgets its scripts, and is killed and started again from its append-only file.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from tests.integration.queue.servers import LossyWire, Server

from honed.queue.connection import RedisLink, RetryPolicy
from honed.queue.dead import DeadLetters
from honed.queue.keys import RunKeys
from honed.queue.messages import Delivery, Message
from honed.queue.stream import DeliverySettings, WorkQueue

pytestmark = [pytest.mark.redis, pytest.mark.timeout(180)]

T = TypeVar("T")
RUNS = itertools.count(1)
LIMITS = DeliverySettings(lease_ms=3_600_000, max_deliveries=3, sweep_ms=1)
NOBODY = "(released)"
ACTS = ("hand_on", "ack", "drop", "fail", "fail_for_good", "release", "renew")


@dataclass
class Known:
    """What the model knows of one message."""

    entry: str = ""
    holder: str | None = None  # None: waiting
    count: int = 0
    expired: bool = False
    ended: str = ""  # hand_on, ack, drop or dead


class QueueMachine(RuleBasedStateMachine):
    server: ClassVar[Server]

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.keys = RunKeys(f"machine-{next(RUNS)}")
        self.wire = LossyWire(self.server.url)
        self.link = RedisLink(self.run(self.wire.__aenter__()), retry=RetryPolicy(deadline_s=20))
        self.names = (f"c{n}" for n in itertools.count())
        self.everyone: dict[str, WorkQueue] = {}
        self.consumers = [self.new_consumer() for _ in range(3)]
        self.dead = DeadLetters(self.link, self.keys, "rollouts")
        self.known: dict[str, Known] = {}
        self.deliveries: list[Delivery] = []
        self.results: Counter[str] = Counter()
        self.replays = 0
        self.restarts = 0

    def run(self, work: Awaitable[T]) -> T:
        async def bounded() -> T:
            async with asyncio.timeout(30):
                return await work

        return self.runner.run(bounded())

    def new_consumer(self) -> WorkQueue:
        hours: Iterator[float] = itertools.count(0, 3600)  # a sweep is always due
        queue = WorkQueue(self.link, self.keys, "rollouts", next(self.names), LIMITS, clock=hours.__next__)
        self.everyone[queue.consumer] = queue
        return queue

    def teardown(self) -> None:
        try:
            self.drain()
        finally:
            self.run(self.link.close())
            self.run(self.wire.__aexit__())
            self.runner.close()

    # The model's view

    def is_mine(self, queue: WorkQueue, delivery: Delivery) -> bool:
        known = self.known[delivery.message.id]
        place = (known.entry, known.holder, known.count)
        return not known.ended and place == (delivery.entry, queue.consumer, delivery.count)

    def received(self, queue: WorkQueue, deliveries: list[Delivery]) -> None:
        for delivery in deliveries:
            known = self.known[delivery.message.id]
            assert not known.ended, "what has ended is delivered no more"
            assert known.holder is None or known.expired, "a running lease is nobody else's"
            assert delivery.count == known.count + 1 <= LIMITS.max_deliveries
            known.entry, known.holder, known.count, known.expired = delivery.entry, queue.consumer, delivery.count, False
        self.deliveries += deliveries

    def notice_burials(self) -> None:
        """A sweep buries what was delivered too often; only that."""
        for letter in self.run(self.dead.list(limit=1000)):
            known = self.known[letter.message.id]
            if not known.ended:
                assert known.expired
                assert known.count == LIMITS.max_deliveries == letter.death.deliveries
                known.ended = "dead"

    # The rules

    @rule(n=st.integers(1, 2), lose=st.booleans(), who=st.integers(0, 2))
    def put(self, n: int, lose: bool, who: int) -> None:
        ids = [f"m{len(self.known) + i}" for i in range(n)]
        self.known |= {i: Known() for i in ids}
        if lose:
            self.wire.lose_reply_to(ids[0].encode())
        self.run(self.consumers[who].put([Message(i, i.encode()) for i in ids]))

    @rule(who=st.integers(0, 2), room=st.integers(1, 4), slow=st.none() | st.integers(0, 2))
    def takes(self, who: int, room: int, slow: int | None) -> None:
        """If there is a slow one (who lives, and may be the same), its leases have run out by now."""
        if slow is not None:
            self.expire(self.consumers[slow].consumer)
        self.take(who, room)

    def take(self, who: int, room: int) -> None:
        queue = self.consumers[who]
        deliveries = self.run(queue.take(room))
        self.received(queue, deliveries)
        if len(deliveries) < room:
            assert not [i for i, known in self.known.items() if not known.ended and known.holder is None]
        self.notice_burials()

    def draw(self, data: st.DataObject) -> tuple[WorkQueue, Delivery]:
        """A delivery, in the hands of whoever got it: one that lives, one that was lost, or one that was lost to itself."""
        lives = [d for d in self.deliveries if self.is_mine(self.everyone[d.consumer], d)]
        lost = [d for d in self.deliveries if d not in lives and not self.known[d.message.id].ended]
        to_itself = [d for d in lost if self.known[d.message.id].holder == d.consumer]
        wanted = data.draw(st.sampled_from([lives, lost, to_itself]))
        delivery = data.draw(st.sampled_from(wanted or lives or self.deliveries))
        return self.everyone[delivery.consumer], delivery

    @precondition(lambda self: self.deliveries)
    @rule(data=st.data(), acts=st.lists(st.tuples(st.sampled_from(ACTS), st.booleans()), min_size=1, max_size=4))
    def act(self, data: st.DataObject, acts: list[tuple[str, bool]]) -> None:
        """Does things with deliveries, some with the reply lost on the wire."""
        for name, lose in acts:
            queue, delivery = self.draw(data)
            mine = self.is_mine(queue, delivery)
            if lose and name != "renew":
                self.wire.lose_reply_to(delivery.entry.encode())
            getattr(self, name)(queue, delivery, mine, self.known[delivery.message.id])

    def hand_on(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        results = [f"{delivery.message.id}-{i}" for i in range(len(self.deliveries) % 4)]
        assert self.run(queue.hand_on(delivery, [Message(r, b"") for r in results], "scored")) == mine
        if mine:
            known.ended = "hand_on"
            self.results.update(results)

    def ack(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        assert self.run(queue.ack([delivery])) == mine
        known.ended = "ack" if mine else known.ended

    def drop(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        assert self.run(queue.drop([delivery], "stale")) == mine
        known.ended = "drop" if mine else known.ended

    def fail(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known, retry: bool = True) -> None:
        last = not retry or delivery.count >= LIMITS.max_deliveries
        outcome = self.run(queue.fail(delivery, "broken", retry=retry))
        assert outcome == (("dead" if last else "retry") if mine else "lost")
        if mine and last:
            known.ended = "dead"
        elif mine:
            known.holder, known.expired = NOBODY, True

    def fail_for_good(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        self.fail(queue, delivery, mine, known, retry=False)

    def release(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        assert self.run(queue.release([delivery])) == mine
        if mine:
            known.holder, known.expired, known.count = NOBODY, True, known.count - 1

    def renew(self, queue: WorkQueue, delivery: Delivery, mine: bool, known: Known) -> None:
        assert self.run(queue.renew([delivery])) == ([delivery] if mine else [])
        known.expired = known.expired and not mine

    def expire(self, holder: str) -> None:
        held = [k for k in self.known.values() if not k.ended and k.holder == holder]
        for known in held:
            known.expired = True
        if held:
            self.run(
                self.link.redis.xclaim(
                    self.keys.stream("rollouts"), "workers", holder, 0, [k.entry for k in held],
                    idle=LIMITS.lease_ms, justid=True,
                )
            )  # fmt: skip

    @rule(who=st.integers(0, 2))
    def crash(self, who: int) -> None:
        """The consumer dies; another process comes in its place, and its leases run out."""
        self.expire(self.consumers[who].consumer)
        self.consumers[who] = self.new_consumer()

    @rule(who=st.integers(0, 2), of=st.integers(0, 2), lose=st.booleans())
    def take_over(self, who: int, of: int, lose: bool) -> None:
        queue, predecessor = self.consumers[who], self.consumers[of].consumer
        if lose:
            self.wire.lose_reply_to(b"EVALSHA")
        deliveries = self.run(queue.pending_of(predecessor))
        held = {i for i, k in self.known.items() if not k.ended and k.holder == predecessor}
        assert {d.message.id for d in deliveries} == held
        order = [tuple(map(int, d.entry.split("-"))) for d in deliveries]
        assert order == sorted(order)
        for delivery in deliveries:
            known = self.known[delivery.message.id]
            assert delivery.count == known.count
            known.holder, known.expired = queue.consumer, False
        self.deliveries += deliveries

    @rule(data=st.data(), lose=st.booleans())
    def replay(self, data: st.DataObject, lose: bool) -> None:
        letters = self.run(self.dead.list())
        if not letters:
            return
        letter = data.draw(st.sampled_from(letters))
        if lose:
            self.wire.lose_reply_to(letter.letter.encode())
        self.run(self.dead.replay(letter.letter))
        self.replays += 1
        self.known[letter.message.id] = Known()

    @rule()
    def forget_scripts(self) -> None:
        self.run(self.link.command("SCRIPT", "FLUSH"))

    @precondition(lambda self: self.restarts == 0 and len(self.deliveries) > 4)
    @rule()
    def kill_the_server(self) -> None:
        self.restarts += 1
        self.server.kill()
        self.server.start()

    # The invariants

    @invariant()
    def every_message_is_in_exactly_one_place(self) -> None:
        stream, scored, dead = self.run(self.read())
        assert stream == Counter(i for i, known in self.known.items() if not known.ended)
        assert dead == Counter(i for i, known in self.known.items() if known.ended == "dead")
        assert scored == self.results
        assert max(scored.values(), default=1) == 1, "no result twice"

    async def read(self) -> list[Counter[str]]:
        counts = []
        for key in (self.keys.stream("rollouts"), self.keys.stream("scored"), self.keys.dead("rollouts")):
            entries = await self.link.command("XRANGE", key, "-", "+")
            counts.append(Counter(fields[b"id"].decode() for _, fields in entries))
        return counts

    @invariant()
    def the_books_add_up(self) -> None:
        stats = self.run(self.consumers[0].stats())
        ends = Counter(known.ended for known in self.known.values())
        assert stats.balance == 0
        assert (stats.came_in, stats.replayed) == (len(self.known), self.replays)
        assert (stats.handed_on, stats.acked) == (ends["hand_on"], ends["ack"])
        assert stats.dropped.get("stale", 0) == ends["drop"]
        assert (stats.dead, stats.buried) == (ends["dead"], ends["dead"] + self.replays)
        assert stats.pending == sum(not k.ended and k.holder is not None for k in self.known.values())

    def drain(self) -> None:
        """Whatever happened, one healthy consumer can finish all that is left."""
        for consumer in {k.holder for k in self.known.values() if not k.ended and k.holder}:
            self.expire(consumer)
        queue = self.new_consumer()
        while deliveries := self.run(queue.take(8)):
            self.received(queue, deliveries)
            work = [(d, [Message(f"{d.message.id}-0", b"")]) for d in deliveries]
            assert all(self.run(queue.hand_on_each(work, "scored")))
            for delivery in deliveries:
                self.known[delivery.message.id].ended = "hand_on"
                self.results[f"{delivery.message.id}-0"] += 1
        self.notice_burials()
        left = {i: known for i, known in self.known.items() if not known.ended}
        assert not left
        self.every_message_is_in_exactly_one_place()
        self.the_books_add_up()


def test_every_message_is_in_one_place_whatever_happens(tmp_path):
    # The model knows what was acknowledged, so nothing acknowledged may be lost when the server is killed.
    with Server(tmp_path, "--appendfsync", "always") as server:
        QueueMachine.server = server
        run_state_machine_as_test(
            QueueMachine,
            settings=settings(
                max_examples=30,
                stateful_step_count=50,
                deadline=None,
                derandomize=True,
                suppress_health_check=list(HealthCheck),
            ),
        )

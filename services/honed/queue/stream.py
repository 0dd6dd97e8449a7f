"""One stage's work queue: entries are delivered at least once, and each one's effect on the next stage happens exactly once.

Invariants, kept by `hop.lua`:
- An entry is in one place: waiting, held by one consumer, handed on, dead, or counted as acknowledged or dropped.
- A delivery ends at most once. A worker whose entry was reclaimed adds nothing, acknowledges nothing, drops nothing.
- Every call may be repeated after a lost reply, and answers as if it had run once.
- Work streams have no MAXLEN, which would drop work that nobody has finished: admission bounds them.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, cast

from honed.kit.errors import InvalidArgument
from honed.queue.connection import RedisLink
from honed.queue.keys import RunKeys
from honed.queue.messages import Delivery, Message, as_arguments, from_fields, from_row
from honed.queue.scripts import GROUP, Argument, HopScripts
from honed.queue.stats import DROPPED, StageStats

Outcome = Literal["retry", "dead", "lost"]

_FORGET_EVERY_S: Final = 600.0
_FORGET_IDLE_MS: Final = 3_600_000  # far above any lease: whoever is idle for so long does not live
_PAGE: Final = 64  # entries of a take-over whose bodies may have to be kept until the reply has arrived
_REASON_CHARS: Final = 2000


@dataclass(frozen=True)
class DeliverySettings:
    """How a stage treats its deliveries.

    Attributes:
        lease_ms: A delivery that is neither ended nor renewed for so long is taken over by another consumer.
        max_deliveries: After so many deliveries an entry goes to the dead letters.
        sweep_ms: How often a consumer that takes work looks for leases that ran out.
    """

    lease_ms: int = 60_000
    max_deliveries: int = 5
    sweep_ms: int = 1_000

    def __post_init__(self) -> None:
        for name in ("lease_ms", "max_deliveries", "sweep_ms"):
            if getattr(self, name) < 1:
                raise InvalidArgument(f"queue.{name}", f"must be at least 1, is {getattr(self, name)}")


class WorkQueue:
    """One consumer of one stage.

    Give every process its own consumer name (host, pid and start time, say): two processes under one name could end each
    other's deliveries. One queue object may be shared by the tasks of a process.
    """

    def __init__(
        self,
        link: RedisLink,
        keys: RunKeys,
        stage: str,
        consumer: str,
        settings: DeliverySettings | None = None,
        clock: Callable[[], float] = time.monotonic,
        token_prefix: str | None = None,
    ) -> None:
        """Connects to nothing yet.

        Args:
            link: The connections, shared.
            keys: The run's keys.
            stage: One of `keys.STAGES`, or another name.
            consumer: This process' name in the group; no whitespace, no parentheses.
            settings: Leases and tries.
            clock: Seconds, monotonic; times the sweeps.
            token_prefix: Tells this object's calls from every other's; random by default.

        Raises:
            InvalidArgument: a name that the queue cannot use.
        """
        if not consumer or any(c.isspace() or c in "()" for c in consumer):
            raise InvalidArgument("consumer", f"{consumer!r} must be a name without whitespace or parentheses")
        self.stage = stage
        self.consumer = consumer
        self.settings = settings or DeliverySettings()
        self._link = link
        self._keys = keys
        self._clock = clock
        self._stream = keys.stream(stage)
        self._dead = [keys.dead(stage)]
        self._scripts = HopScripts(link, keys, stage, consumer, token_prefix or secrets.token_hex(8))
        self._cursor = "0-0"
        self._sweep_due = clock()
        self._forget_due = clock()

    async def put(self, messages: Sequence[Message]) -> None:
        """Adds new work, all or nothing. The conductor uses `admission.Admission` instead."""
        if messages:
            await self._scripts.change("put", as_arguments(messages))

    async def take(self, max_count: int, block_ms: int = 0) -> list[Delivery]:
        """Takes up to `max_count` entries: first those whose lease ran out, then new ones.

        Waits up to `block_ms` for the first one, and sweeps for expired leases meanwhile. Returns an empty list if none came.
        If this call is cancelled, what it had just been given waits for its lease to run out.

        Raises:
            InvalidArgument: `max_count` below 1, or `block_ms` above the link's longest block.
            Unavailable: Redis stayed away beyond the outage deadline.
        """
        if max_count < 1:
            raise InvalidArgument("max_count", f"must be at least 1, is {max_count}")
        if not 0 <= block_ms <= self._link.longest_block_s * 1000:
            raise InvalidArgument("block_ms", f"must be 0 to {self._link.longest_block_s * 1000:g}, is {block_ms}")
        deadline = self._clock() + block_ms / 1000
        while True:
            deliveries = await self._sweep(max_count)
            left_ms = 0 if deliveries else max(0, int((deadline - self._clock()) * 1000))
            if len(deliveries) < max_count:
                deliveries += await self._read_new(max_count - len(deliveries), min(left_ms, self.settings.sweep_ms))
            if deliveries or left_ms <= 0:
                return deliveries

    async def hand_on(self, delivery: Delivery, results: Sequence[Message], to: str) -> bool:
        """Ends the delivery and adds its results to stage `to`, in one atomic step.

        Returns:
            Whether it was handed on. False: the entry was taken over meanwhile, and nothing was added.
        """
        return (await self.hand_on_each([(delivery, results)], to))[0]

    async def hand_on_each(self, work: Sequence[tuple[Delivery, Sequence[Message]]], to: str) -> list[bool]:
        """As `hand_on` for several deliveries in one round trip. Each stands for itself: one that was lost stops no other."""
        if not work:
            return []
        arguments: list[Argument] = []
        for delivery, results in work:
            arguments += [delivery.entry, delivery.count, len(results), *as_arguments(results)]
        return _flags(await self._scripts.change("hand_on", arguments, [self._keys.stream(to), self._keys.tally(to)]))

    async def ack(self, deliveries: Sequence[Delivery]) -> int:
        """Ends deliveries whose work is done and durable elsewhere. Returns how many were still this consumer's."""
        return await self._settle("acked", deliveries)

    async def drop(self, deliveries: Sequence[Delivery], reason: str) -> int:
        """Ends deliveries without effect, counted under `reason` (a short constant, such as `stale`). Returns how many."""
        return await self._settle(DROPPED + reason, deliveries)

    async def renew(self, deliveries: Sequence[Delivery]) -> list[Delivery]:
        """Starts the leases afresh, and returns the deliveries that this consumer still holds. The counts stay."""
        if not deliveries:
            return []
        held = _flags(await self._scripts.read("renew", _named(deliveries)))
        return [delivery for delivery, ours in zip(deliveries, held, strict=True) if ours]

    async def release(self, deliveries: Sequence[Delivery], after_ms: int = 0) -> int:
        """Gives back what this consumer cannot do now through no fault of the entry: no delivery is counted.

        Args:
            deliveries: What to give back.
            after_ms: How long it rests before anybody can take it again; at most the lease.

        Returns:
            How many were still this consumer's.
        """
        if not deliveries:
            return 0
        return sum(_flags(await self._scripts.change("release", [self._idle_ms(after_ms), *_named(deliveries)])))

    async def fail(self, delivery: Delivery, reason: str, *, retry: bool = True, retry_after_ms: int = 0) -> Outcome:
        """Ends a delivery that went wrong.

        Args:
            delivery: What went wrong.
            reason: Why, for the dead letter.
            retry: False sends it to the dead letters now: another try cannot help.
            retry_after_ms: How long it rests before it can be taken again; at most the lease.

        Returns:
            `retry`: it will be delivered again. `dead`: it is a dead letter. `lost`: it was no longer this consumer's.
        """
        idle_ms = self._idle_ms(retry_after_ms)
        most = self.settings.max_deliveries if retry else 0
        arguments: list[Argument] = [self.stage, delivery.entry, delivery.count, reason[:_REASON_CHARS], most, idle_ms]
        answer: bytes = await self._scripts.change("fail", arguments, self._dead)
        return cast(Outcome, answer.decode())

    async def pending_of(self, holder: str | None = None) -> list[Delivery]:
        """Takes up again what a consumer holds, in stream order, with fresh leases and unchanged counts.

        For the learner after a restart: what its last checkpoint has consumed it acknowledges, the rest it trains on in
        the order in which it came. By default this consumer's own; or a predecessor's, which then holds them no more, so
        that a second call returns none of them. Call that only when the predecessor is gone (the fenced lease says so).
        """
        # A take-over cannot simply run again: it would find nothing left. So its answer is kept until it has arrived.
        run = self._scripts.read if holder in (None, self.consumer) else self._scripts.change
        deliveries: list[Delivery] = []
        after = "-"
        while after:
            last, rows = await run("adopt", [holder or self.consumer, after, _PAGE])
            deliveries += [from_row(row, self.consumer, self.stage) for row in rows]
            after = last.decode()
        return deliveries

    async def leave(self) -> bool:
        """Takes this consumer's name off the group, at the end of its life. False, and no change, if it holds something."""
        return bool(await self._scripts.read("leave"))

    async def forget_idle(self, idle_ms: int = _FORGET_IDLE_MS) -> int:
        """Removes the names of consumers that hold nothing and have not come for so long; returns how many.

        `take` does so now and then: processes that were killed leave their names behind.
        """
        return int(await self._scripts.read("forget", [idle_ms]))

    async def depth(self) -> int:
        """Entries in the stream, waiting and pending."""
        return int(await self._link.command("XLEN", self._stream))

    async def stats(self) -> StageStats:
        """The stage's accounts, read at one instant."""
        return StageStats.from_reply(await self._scripts.read("stats", keys=self._dead))

    async def _sweep(self, room: int) -> list[Delivery]:
        """Takes over expired leases, page by page until the cursor has come round or there is no more room."""
        if self._cursor == "0-0" and self._clock() < self._sweep_due:
            return []
        deliveries: list[Delivery] = []
        limits = self.settings
        while len(deliveries) < room:
            room_left = room - len(deliveries)
            cursor, rows = await self._scripts.read(
                "reclaim", [self.stage, limits.lease_ms, self._cursor, room_left, limits.max_deliveries], self._dead
            )
            deliveries += [from_row(row, self.consumer, self.stage) for row in rows]
            self._cursor = cursor.decode()
            if self._cursor == "0-0":
                self._sweep_due = self._clock() + limits.sweep_ms / 1000
                break
        if self._clock() >= self._forget_due:
            self._forget_due = self._clock() + _FORGET_EVERY_S
            await self.forget_idle()
        return deliveries

    def _idle_ms(self, pause_ms: int) -> int:
        """The idle time of an entry that may be taken over `pause_ms` from now."""
        return max(0, self.settings.lease_ms - pause_ms)

    async def _read_new(self, count: int, block_ms: int) -> list[Delivery]:
        command: list[Argument] = ["XREADGROUP", "GROUP", GROUP, self.consumer, "COUNT", count]
        if block_ms > 0:  # BLOCK 0 would wait for ever
            command += ["BLOCK", block_ms]
        command += ["STREAMS", self._stream, ">"]
        reply = await self._scripts.with_group(lambda: self._link.command(*command))
        return [
            Delivery(entry.decode(), from_fields(fields), 1, self.consumer, self.stage)
            for _, entries in reply or []
            for entry, fields in entries
        ]

    async def _settle(self, counter: str, deliveries: Sequence[Delivery]) -> int:
        if not deliveries:
            return 0
        return sum(_flags(await self._scripts.change("settle", [counter, *_named(deliveries)])))


def _named(deliveries: Sequence[Delivery]) -> list[Argument]:
    return [part for delivery in deliveries for part in (delivery.entry, delivery.count)]


def _flags(answers: Sequence[int]) -> list[bool]:
    return [bool(answer) for answer in answers]

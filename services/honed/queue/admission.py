"""How many rollouts may start, and the atomic step that starts them.

Admission is what bounds the streams, and what bounds staleness: a prompt is admitted only if its rollouts can still be
fresh when their turn comes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from honed.kit.errors import Conflict, InvalidArgument
from honed.queue.connection import RedisLink
from honed.queue.keys import APPLICATION, PROMPTS, SUBMITTED, RunKeys
from honed.queue.lease import Claim, LeaseLost
from honed.queue.messages import Message, as_arguments
from honed.queue.scripts import Argument, Scripts


@dataclass(frozen=True)
class LoopState:
    """Where the loop stands, in the learner's own counts and those of the streams.

    Attributes:
        update: Updates behind the learner's weights.
        served: Updates behind the version that generators have committed last: what is admitted now is sampled by it.
        waiting: Scored rollouts that the learner has not trained on yet. Those that it trained on and that stand in the
            stream until its next checkpoint are not among them; those of the update under way are.
        running: Rollouts that are admitted and not yet scored.
    """

    update: int
    served: int
    waiting: int
    running: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 0:
                raise InvalidArgument(name, f"counts rollouts or updates, so it cannot be {value}")


@dataclass(frozen=True)
class AdmissionPolicy:
    """How many more rollouts may start now.

    A rollout that starts now is sampled by the version `served`. Before it the learner consumes `waiting + running` others,
    so it is number k = waiting + running (from 0) and trains in the update from update + k // batch on. It is then
    update + k // batch - served updates old, which stays within a bound s as long as

        k < (s + 1) * batch - (update - served) * batch

    With s = max_staleness that is the hard bound. With a smaller s, the `lead`, rollouts start later and train fresher;
    but what the learner needs to fill its next batch is never held back by the lead.

    Attributes:
        batch: Rollouts of one update.
        max_staleness: The most updates that a rollout may be behind the weights that train on it.
        max_in_flight: The most rollouts that are sampled or scored at once.
        samples: Rollouts of one prompt; a prompt is admitted whole.
    """

    batch: int
    max_staleness: int
    max_in_flight: int
    samples: int = 1

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("max_staleness", 0), ("max_in_flight", 1), ("samples", 1)):
            if getattr(self, name) < least:
                raise InvalidArgument(name, f"must be at least {least}, is {getattr(self, name)}")

    def fresh(self, state: LoopState, lead: float) -> int:
        """Rollouts that may start and train at most `lead` updates late; negative when too many are on their way."""
        allowed = int((lead + 1) * self.batch) - (state.update - state.served) * self.batch
        return allowed - state.waiting - state.running

    def capacity(self, state: LoopState, lead: float | None = None) -> int:
        """Rollouts that may start: the formula above, at most `max_in_flight` at once; never negative.

        Args:
            state: Where the loop stands.
            lead: Between 0 and `max_staleness`; by default `max_staleness`.
        """
        hard = self.fresh(state, self.max_staleness)
        by_lead = hard if lead is None else self.fresh(state, min(lead, self.max_staleness))
        next_batch = self.batch - state.waiting - state.running
        return max(0, min(self.max_in_flight - state.running, hard, max(by_lead, next_batch)))

    def prompts(self, state: LoopState, lead: float | None = None, wanted: int | None = None) -> int:
        """Prompts to admit, each with all its samples.

        Where the samples of one prompt do not fit, nothing runs, and the learner lacks rollouts, one prompt is admitted all
        the same: its surplus may drop as stale, while waiting for room that never comes would end the run.

        Args:
            state: Where the loop stands.
            lead: As for `capacity`.
            wanted: Rollouts that the run still needs; None when it has no end.
        """
        room = self.capacity(state, lead)
        if wanted is not None and wanted <= 0:
            return 0
        count = room // self.samples
        if not count and room and not state.running and state.waiting < self.batch:
            count = 1
        return count if wanted is None else min(count, -(-wanted // self.samples))


@dataclass(frozen=True)
class Cursor:
    """How far the run's prompts have come. It moves in the same step that admits them.

    Attributes:
        position: Turns that have been passed; the next prompt is this turn.
        skipped: Turns among them that were left out, because Redis had lost where the run was.
        file: Prompts that the prompt file has given.
        carried: Counts by name that Redis had before it lost everything.
    """

    position: int = 0
    skipped: int = 0
    file: int = 0
    carried: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def from_fields(cls, fields: Mapping[bytes, bytes]) -> Self:
        """Reads the hash; an empty one is a run that has not begun."""
        position = int(fields.get(b"position", 0))
        if b"state" not in fields:
            return cls(position=position, file=position)
        state: dict[str, Any] = json.loads(fields[b"state"])
        return cls(position, state.get("skipped", 0), state.get("file", position), state.get("carried", {}))

    def state(self) -> str:
        """What the hash holds beside the position."""
        return json.dumps({"skipped": self.skipped, "file": self.file, "carried": dict(self.carried)})


class CursorMoved(Conflict):
    """Another step has moved the run's prompt cursor since it was read, or Redis lost a step.

    Attributes:
        position: Where the cursor is.
    """

    def __init__(self, expected: int, position: int) -> None:
        """`expected` is what the caller had read."""
        super().__init__(f"the prompt cursor is at {position}, not at {expected}: nothing was admitted; read it again")
        self.position = position


class PromptAdmitter:
    """Puts a run's prompts into stream `prompts`, each turn once, in order, by the holder of a lease only."""

    def __init__(self, link: RedisLink, keys: RunKeys) -> None:
        self._link = link
        self._keys = keys
        self._scripts = Scripts(link, "run.lua")

    async def cursor(self) -> Cursor:
        """How far the run's prompts have come."""
        return Cursor.from_fields(await self._link.command("HGETALL", self._keys.cursor()))

    async def admit(
        self,
        claim: Claim,
        read: int,
        prompts: Sequence[Message],
        cursor: Cursor,
        taken: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Adds prompts, moves the cursor over them, and takes them off the lists they waited in, in one atomic step.

        Safe to repeat with the same arguments: a step that the same claim has made already is not made again. So two
        conductors, or one that crashed in between, neither admit a turn twice nor skip one.

        Args:
            claim: The lease that the caller holds.
            read: The cursor's position as the caller read it.
            prompts: The prompts of the next turns.
            cursor: Where the cursor is then.
            taken: For each source (`SUBMITTED`, `APPLICATION`), the entries that are used up.

        Raises:
            LeaseLost: the claim does not stand any more; nothing was admitted.
            CursorMoved: the cursor is elsewhere; nothing was admitted.
            InvalidArgument: the cursor would move back, or by less than the prompts.
        """
        if cursor.position < read + len(prompts):
            raise InvalidArgument("cursor.position", f"{cursor.position} is before {read} and {len(prompts)} prompts")
        taken = taken or {}
        keys = [self._keys.lease(claim.name), self._keys.fence(claim.name), self._keys.cursor()]
        keys += [self._keys.stream(PROMPTS), self._keys.tally(PROMPTS)]
        keys += [self._keys.inbox(SUBMITTED), self._keys.inbox(APPLICATION)]
        arguments: list[Argument] = [claim.owner, claim.fence, read, cursor.position, cursor.state()]
        for source in (SUBMITTED, APPLICATION):
            arguments += [len(taken.get(source, ())), *taken.get(source, ())]
        outcome, at, fence = await self._scripts.run("admit", keys, [*arguments, *as_arguments(prompts)])
        if outcome == b"fenced":
            raise LeaseLost(claim.name, claim.fence, fence)
        if outcome == b"moved":
            raise CursorMoved(read, int(at))

"""How many prompts may start, and the atomic step that starts them.

Admission is what bounds the streams, and what bounds staleness: a prompt is admitted only if its rollouts can still be
fresh when their turn comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from honed.kit.errors import Conflict, InvalidArgument
from honed.queue.connection import Link
from honed.queue.keys import PROMPTS, RunKeys
from honed.queue.lease import Claim, LeaseLost
from honed.queue.messages import Message, as_arguments
from honed.queue.scripts import Scripts


@dataclass(frozen=True)
class AdmissionPolicy:
    """How many more rollouts may start now.

    With `version` the learner's current version, `accepted` the rollouts that a batch has or will have (trained on, or
    waiting to be), and `running` those that are being sampled or scored:

        capacity = max(0, min(max_in_flight - running,
                              (max_staleness + version + 1) * batch - accepted - running))

    The second bound is the staleness bound. Version v has trained on v * batch rollouts. The rollout that is admitted as
    number k (from 0) is trained on in step k // batch, so its policy is at most (k // batch) - version versions old by
    then; that stays within `max_staleness` as long as k < (max_staleness + version + 1) * batch.

    Attributes:
        batch: Rollouts of one optimizer step.
        max_staleness: The most versions that a rollout may be behind the version that is trained.
        max_in_flight: The most rollouts that are sampled or scored at once.
    """

    batch: int
    max_staleness: int
    max_in_flight: int

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("max_staleness", 0), ("max_in_flight", 1)):
            if getattr(self, name) < least:
                raise InvalidArgument(name, f"must be at least {least}, is {getattr(self, name)}")

    def capacity(self, version: int, accepted: int, running: int) -> int:
        """The formula above: rollouts that may start, never negative.

        Raises:
            InvalidArgument: a negative count.
        """
        for name, value in (("version", version), ("accepted", accepted), ("running", running)):
            if value < 0:
                raise InvalidArgument(name, f"counts rollouts or versions, so it cannot be {value}")
        fresh = (self.max_staleness + version + 1) * self.batch - accepted - running
        return max(0, min(self.max_in_flight - running, fresh))

    def accepted_at_resume(self, version: int) -> int:
        """What `accepted` is when a run resumes at `version`: with 0 a burst of stale work would follow."""
        return version * self.batch


class CursorMoved(Conflict):
    """Another step has moved the run's prompt cursor since it was read.

    Attributes:
        position: Where the cursor is.
    """

    def __init__(self, expected: int, position: int) -> None:
        """`expected` is what the caller had read."""
        super().__init__(f"the prompt cursor is at {position}, not at {expected}: nothing was admitted; go on from {position}")
        self.position = position


class Admission:
    """Puts a run's prompts into stream `prompts`, each turn once, in order, by the holder of a lease only."""

    def __init__(self, link: Link, keys: RunKeys) -> None:
        """Connects to nothing yet."""
        self._link = link
        self._keys = keys
        self._scripts = Scripts(link, "run.lua")

    async def position(self) -> int:
        """The cursor: how many turns of the run's prompt sequence have been passed. 0 before the first."""
        return int(await self._link.command("HGET", self._keys.cursor(), "position") or 0)

    async def admit(self, claim: Claim, position: int, prompts: Sequence[Message], skipped: int = 0) -> int:
        """Adds prompts and moves the cursor over them, in one atomic step; returns the new position.

        Safe to repeat with the same arguments: a step that the same claim has made already is not made again. So two
        conductors, or one that crashed in between, neither admit a turn twice nor skip one.

        Args:
            claim: The lease that the caller holds.
            position: The cursor as the caller read it.
            prompts: The prompts of the next turns.
            skipped: Turns among them that have no prompt to admit, for example one that is too long.

        Raises:
            LeaseLost: the claim does not stand any more; nothing was admitted.
            CursorMoved: the cursor is elsewhere; nothing was admitted.
        """
        target = position + len(prompts) + skipped
        if target == position:
            return position
        keys = [self._keys.lease(claim.name), self._keys.fence(claim.name), self._keys.cursor()]
        keys += [self._keys.stream(PROMPTS), self._keys.tally(PROMPTS)]
        outcome, at, fence = await self._scripts.run(
            "admit", keys, [claim.owner, claim.fence, position, target, *as_arguments(prompts)]
        )
        if outcome == b"fenced":
            raise LeaseLost(claim.name, claim.fence, fence)
        if outcome == b"moved":
            raise CursorMoved(position, int(at))
        return target

"""A stage's accounts: how many entries came in, where they are now, and how each of the others left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Self

DROPPED: Final = "dropped:"
"""Opens the names of the tally's fields that count drops; the reason follows."""


@dataclass(frozen=True)
class StageStats:
    """A stage's accounts at one instant.

    Attributes:
        depth: Entries in the stream, waiting and pending.
        pending: Entries that consumers hold.
        dead: Dead letters now.
        came_in: Entries that were ever put in, admitted, or handed on to here.
        handed_on: Entries that ended with a hand-on.
        acked: Entries that ended with an acknowledgement.
        buried: Entries that ever became dead letters.
        replayed: Dead letters that went back to work.
        deleted: Dead letters that somebody deleted.
        dropped: Entries that ended with a drop, for each reason.
    """

    depth: int = 0
    pending: int = 0
    dead: int = 0
    came_in: int = 0
    handed_on: int = 0
    acked: int = 0
    buried: int = 0
    replayed: int = 0
    deleted: int = 0
    dropped: Mapping[str, int] = field(default_factory=dict)

    @property
    def waiting(self) -> int:
        """Entries that nobody holds."""
        return self.depth - self.pending

    @property
    def balance(self) -> int:
        """Entries that came in, less those whose place is known: 0 unless somebody wrote to the streams from outside."""
        left = self.handed_on + self.acked + self.buried + sum(self.dropped.values())
        return self.came_in + self.replayed - self.depth - left

    @classmethod
    def from_reply(cls, reply: Sequence[Any]) -> Self:
        """Reads the answer of the script `stats`."""
        depth, pending, dead, flat = reply
        pairs = iter(flat)
        tally = {name.decode(): int(value) for name, value in zip(pairs, pairs, strict=True)}
        return cls(
            depth=depth,
            pending=pending,
            dead=dead,
            came_in=tally.get("came_in", 0),
            handed_on=tally.get("handed_on", 0),
            acked=tally.get("acked", 0),
            buried=tally.get("dead", 0),
            replayed=tally.get("replayed", 0),
            deleted=tally.get("deleted", 0),
            dropped={name.removeprefix(DROPPED): n for name, n in sorted(tally.items()) if name.startswith(DROPPED)},
        )

"""Which rollouts have trained: one bit each, exact for the whole run.

A rollout's id is `<run>-<turn>/<sample>`: turn is its position in the sequence of prompts. One bitmap over turns for each
sample index holds 26 million rollouts in 3.3 MB, and compresses to little, for nearly all bits are set. Ids of another form
(put in from outside, or from a run of another name) are remembered in order, the newest `FOREIGN` of them.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable
from typing import Final, Self

from honed.kit.errors import DataLoss

FOREIGN: Final = 100_000
"""Ids of another form that are remembered."""

_ID: Final = re.compile(r"(0|[1-9][0-9]{0,11})/(0|[1-9][0-9]{0,3})")
_MOST_BYTES: Final = 1 << 28
"""Of one bitmap: two thousand million turns. A larger turn is a foreign id, not a reason to fill the memory."""


class TrainedIds:
    """A set of rollout ids of one run."""

    def __init__(self, run: str) -> None:
        """Holds none yet."""
        self.run = run
        self._prefix = f"{run}-"
        self._bitmaps: list[bytearray] = []
        self._foreign: dict[str, None] = {}
        self.turn = 0
        """First turn after all that are in the set."""

    @classmethod
    def all_before(cls, run: str, turn: int) -> Self:
        """Sample 0 of each turn before one."""
        found = cls(run)
        full, rest = divmod(turn, 8)
        found._bitmaps = [bytearray(b"\xff" * full + bytes([(1 << rest) - 1]))]
        found.turn = turn
        return found

    def __contains__(self, rollout_id: str) -> bool:
        found = self._parsed(rollout_id)
        if found is None:
            return rollout_id in self._foreign
        turn, sample = found
        if sample >= len(self._bitmaps):
            return False
        bitmap = self._bitmaps[sample]
        return turn >> 3 < len(bitmap) and bool(bitmap[turn >> 3] >> (turn & 7) & 1)

    def add(self, rollout_ids: Iterable[str]) -> None:
        """Adds ids; the oldest foreign ones beyond `FOREIGN` are forgotten."""
        for rollout_id in rollout_ids:
            found = self._parsed(rollout_id)
            if found is None:
                self._foreign[rollout_id] = None
                continue
            turn, sample = found
            while sample >= len(self._bitmaps):
                self._bitmaps.append(bytearray())
            bitmap = self._bitmaps[sample]
            if turn >> 3 >= len(bitmap):
                # Grown by an eighth at least, so that adding stays cheap however long the run.
                bitmap.extend(bytes(max((turn >> 3) + 1, len(bitmap) * 9 // 8) - len(bitmap)))
            bitmap[turn >> 3] |= 1 << (turn & 7)
            self.turn = max(self.turn, turn + 1)
        while len(self._foreign) > FOREIGN:
            del self._foreign[next(iter(self._foreign))]

    def discard(self, rollout_ids: Iterable[str]) -> None:
        """Removes ids whose training was undone; `turn` stays."""
        for rollout_id in rollout_ids:
            found = self._parsed(rollout_id)
            if found is None:
                self._foreign.pop(rollout_id, None)
            elif rollout_id in self:
                turn, sample = found
                self._bitmaps[sample][turn >> 3] &= ~(1 << (turn & 7))

    def __len__(self) -> int:
        return len(self._foreign) + sum(int.from_bytes(bitmap, "little").bit_count() for bitmap in self._bitmaps)

    def to_bytes(self) -> bytes:
        """The set as `from_bytes` reads it."""
        bitmaps = [bytes(bitmap).rstrip(b"\0") for bitmap in self._bitmaps]
        head = {"run": self.run, "turn": self.turn, "bytes": [len(b) for b in bitmaps], "foreign": list(self._foreign)}
        return zlib.compress(b"\n".join((json.dumps(head).encode(), b"".join(bitmaps))), level=1)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Reads a set.

        Raises:
            DataLoss: the bytes are not such a set.
        """
        try:
            head, _, body = zlib.decompress(data).partition(b"\n")
            fields = json.loads(head)
            found = cls(str(fields["run"]))
            found.turn = int(fields["turn"])
            found._foreign = dict.fromkeys(map(str, fields["foreign"]))
            at = 0
            for size in fields["bytes"]:
                found._bitmaps.append(bytearray(body[at : at + int(size)]))
                at += int(size)
            if at != len(body):
                raise ValueError(f"{len(body)} bytes of bitmaps, not {at}")
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise DataLoss(f"the set of trained rollouts cannot be read: {error}") from error
        return found

    def _parsed(self, rollout_id: str) -> tuple[int, int] | None:
        """Turn and sample of an id of this run."""
        if not rollout_id.startswith(self._prefix):
            return None
        match = _ID.fullmatch(rollout_id, len(self._prefix))
        if match is None:
            return None
        turn, sample = int(match[1]), int(match[2])
        return (turn, sample) if turn >> 3 < _MOST_BYTES else None

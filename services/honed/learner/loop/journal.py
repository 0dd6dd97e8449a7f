"""The learner's journal: each update with its metrics and the ids of its rollouts, each batch that was skipped, each push.

An update is written before its checkpoint, and what lies beyond the checkpoint is cut off at a resume: so the journal and
the weights always agree, and the ids prove that no rollout trained twice. Memory holds the newest updates; older ones are
read from disk when somebody asks. See `segments` for the files.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain, islice
from pathlib import Path
from typing import Final

from honed.learner.loop.records import PushRecord, Totals, UpdateRecord, push_counts, push_of, update_counts, update_of
from honed.learner.loop.segments import Row, Segments

IN_MEMORY: Final = 1000
"""Updates, and pushes, that are kept in memory."""
_WITH_IDS: Final = 16
"""Updates whose rollout ids are kept in memory too."""


class Journal:
    """The journal of one run, open for writing. Readers in the same event loop can follow it live."""

    def __init__(self, directory: Path, *, most_mb: int = 512, rows: int = IN_MEMORY) -> None:
        """Opens the journal, or begins a new one.

        Args:
            directory: The learner's; the journal lies in `journal/` under it.
            most_mb: Disk space; the oldest updates go first, then the oldest pushes. Totals stay.
            rows: Updates, or pushes, of one file at most.

        Raises:
            DataLoss: the newest file is damaged.
        """
        self._most_bytes = most_mb << 20
        each = max(64 << 10, min(16 << 20, self._most_bytes // 16))
        self._updates = Segments(directory / "journal" / "updates", rows=rows, most_bytes=each)
        self._pushes = Segments(directory / "journal" / "pushes", rows=rows, most_bytes=each)
        before, found = self._updates.open()
        self._counts = Counter({name: int(value) for name, value in before.items()})
        self._newest: deque[UpdateRecord] = deque(maxlen=IN_MEMORY)
        self._ids: dict[int, Sequence[str]] = {}
        self._take_updates(found)
        before, found = self._pushes.open()
        self._counts.update({name: int(value) for name, value in before.items()})
        self._counts.update(push_counts(found))
        self._push_number = found[-1]["n"] if found else 0
        recent = chain.from_iterable(self._pushes.rows(self._push_number - IN_MEMORY + 1))
        self._newest_pushes = deque(((row["n"], push_of(row)) for row in recent), maxlen=IN_MEMORY)
        self._cuts: list[int] = []
        """Where updates were cut off since the start: those who follow go back there."""
        self._grown = asyncio.Condition()
        self._closed = False

    @property
    def totals(self) -> Totals:
        """Counts over the whole run, kept along the way."""
        return Totals(**{name: self._counts[name] for name in Totals.__dataclass_fields__})

    def add_update(self, record: UpdateRecord, turn: int = 0) -> None:
        """Adds an update; durable when this returns. `turn` is the first turn after all of its rollouts."""
        row = {"at": record.ended_at, "values": dict(record.values), "ids": list(record.rollout_ids), "turn": turn}
        self._add(record.step, row)
        self._take_updates([{"n": record.step, **row}])

    def add_skipped(self, step: int, ended_at: float, rollout_ids: Sequence[str], reason: str) -> None:
        """Adds a batch that was not applied to the weights of `step`; durable when this returns."""
        row = {"at": ended_at, "skipped": reason, "ids": list(rollout_ids)}
        self._add(step, row)
        self._take_updates([{"n": step, **row}])

    def add_push(self, record: PushRecord) -> None:
        """Adds a push; durable when this returns."""
        totals = {name: self._counts[name] for name in ("pushed", "failed", "refused")}
        row = asdict(record)
        self._push_number += 1
        self._pushes.append(self._push_number, row, totals)
        self._newest_pushes.append((self._push_number, record))
        self._counts.update(push_counts([row]))

    def cut(self, step: int, gone: int, undone: int) -> None:
        """Removes the updates after one; durable when this returns.

        Args:
            step: The last one that stays.
            gone: How many rollouts the others trained on.
            undone: How many of those will not come again.
        """
        if not gone and not undone:
            return
        wanted = Counter({name: self._counts[name] for name in ("trained", "undone", "skipped", "turn")})
        wanted["trained"] -= gone
        wanted["undone"] += undone

        def header(rows: list[Row]) -> Mapping[str, float]:
            own = update_counts(rows)
            return {name: wanted[name] - (0 if name == "turn" else own[name]) for name in wanted}

        rows = self._updates.cut(step, header)
        for name, value in header(rows).items():
            self._counts[name] = int(value)
        self._cuts.append(step)
        self._newest.clear()
        self._ids.clear()
        self._take_updates(rows)

    def committed(self, label: str) -> bool:
        """Whether a generator has committed this version, as far as memory goes back."""
        pushes = tuple(self._newest_pushes)  # at once: threads ask while the event loop adds
        return any(push.version == label and push.succeeded for _, push in reversed(pushes))

    @property
    def last(self) -> int:
        """The newest update; 0 if there is none."""
        return self._newest[-1].step if self._newest else 0

    def read(self, from_step: int, *, with_rollouts: bool) -> Iterator[UpdateRecord]:
        """The updates from one on that are known now, from memory if it has them, else from disk.

        Raises:
            DataLoss: a file is damaged.
        """
        known = self._from_memory(from_step, with_rollouts)
        yield from self._from_disk(from_step, with_rollouts) if known is None else known

    async def follow(self, from_step: int, *, live: bool, with_rollouts: bool = False) -> AsyncIterator[UpdateRecord]:
        """Yields the updates from one on; with `live`, also those to come, until the journal is closed.

        After a roll-back the updates that are made again come again.
        """
        position, cuts = max(1, from_step), len(self._cuts)
        while True:
            position, cuts = min((position, *(step + 1 for step in self._cuts[cuts:]))), len(self._cuts)
            for record in (page := await self._page(position, with_rollouts)):
                yield record
                position = record.step + 1
            if page:
                continue
            if not live or self._closed:
                return
            async with self._grown:
                while not self._closed and self.last < position and len(self._cuts) == cuts:
                    await self._grown.wait()

    async def follow_pushes(self, from_step: int, *, live: bool) -> AsyncIterator[PushRecord]:
        """Yields the pushes of the versions of an update and of later ones, in the order in which they ended."""
        position = 1
        while True:
            for number, record in (page := await self._push_page(position)):
                position = number + 1
                if int(record.version.partition(".")[2]) >= from_step:
                    yield record
            if page:
                continue
            if not live or self._closed:
                return
            async with self._grown:
                while not self._closed and self._push_number < position:
                    await self._grown.wait()

    async def announce(self) -> None:
        """Wakes those who follow."""
        async with self._grown:
            self._grown.notify_all()

    async def close(self) -> None:
        """Ends the live streams; nothing more will be written."""
        self._closed = True
        await self.announce()

    def _add(self, number: int, row: Row) -> None:
        totals = {name: self._counts[name] for name in ("trained", "undone", "skipped", "turn")}
        if self._updates.append(number, row, totals):
            self._bound()

    def _take_updates(self, rows: Sequence[Row]) -> None:
        """Counts rows, and keeps them in memory."""
        counts = update_counts(rows)
        turn = max(self._counts["turn"], counts.pop("turn", 0))
        self._counts.update(counts)
        self._counts["turn"] = turn
        for row in rows:
            if "values" in row:
                self._newest.append(update_of(row, with_ids=False))
                self._ids[row["n"]] = row["ids"]
        for step in list(self._ids)[:-_WITH_IDS]:
            del self._ids[step]

    def _bound(self) -> None:
        """Removes the oldest files beyond the bound; the file that is written stays."""
        sizes: dict[Path, int] = {}
        for path in (*self._updates.paths()[:-1], *self._pushes.paths()[:-1]):
            with contextlib.suppress(FileNotFoundError):
                sizes[path] = path.stat().st_size
        kept = sum(path.stat().st_size for log in (self._updates, self._pushes) for path in log.paths()[-1:])
        total = sum(sizes.values()) + kept
        for path, size in sizes.items():
            if total <= self._most_bytes:
                return
            path.unlink(missing_ok=True)
            total -= size

    async def _page(self, position: int, with_rollouts: bool) -> list[UpdateRecord]:
        """The next updates, at most a file's worth."""
        known = self._from_memory(position, with_rollouts)
        if known is not None:
            return known
        return await asyncio.to_thread(lambda: list(islice(self._from_disk(position, with_rollouts), IN_MEMORY)))

    def _from_memory(self, from_step: int, with_rollouts: bool) -> list[UpdateRecord] | None:
        """The updates from one on; None if memory does not go back so far."""
        if from_step > self.last:
            return []
        if from_step < self._newest[0].step or (with_rollouts and from_step not in self._ids):
            return None
        return [self._with_ids(record) for record in self._newest if record.step >= from_step]

    def _from_disk(self, from_step: int, with_rollouts: bool) -> Iterator[UpdateRecord]:
        for rows in self._updates.rows(from_step):
            yield from (update_of(row, with_ids=with_rollouts) for row in rows if "values" in row)

    def _with_ids(self, record: UpdateRecord) -> UpdateRecord:
        return UpdateRecord(record.step, record.ended_at, record.values, self._ids.get(record.step, ()))

    async def _push_page(self, position: int) -> list[tuple[int, PushRecord]]:
        if not self._newest_pushes or self._newest_pushes[0][0] <= position:
            return [(number, record) for number, record in self._newest_pushes if number >= position]
        rows = await asyncio.to_thread(lambda: next(self._pushes.rows(position), []))
        return [(row["n"], push_of(row)) for row in rows]


def read_updates(directory: Path) -> list[UpdateRecord]:
    """All updates that are kept of a learner's directory, for tools and tests. Services stream them from the learner.

    Raises:
        DataLoss: a row before the last is damaged.
    """
    rows = chain.from_iterable(Segments(directory / "journal" / "updates").rows())
    return [update_of(row, with_ids=True) for row in rows if "values" in row]


def read_newest_update(directory: Path) -> UpdateRecord | None:
    """The newest update of a learner's directory, without its rollouts; as `read_updates`, from the newest file alone."""
    updates = Segments(directory / "journal" / "updates")
    numbers = [int(path.stem) for path in updates.paths()[-1:]]
    rows = chain.from_iterable(updates.rows(*numbers)) if numbers else ()
    return max(
        (update_of(row, with_ids=False) for row in rows if "values" in row), key=lambda update: update.step, default=None
    )


def read_pushes(directory: Path) -> list[PushRecord]:
    """All pushes that are kept of a learner's directory; as `read_updates`."""
    return [push_of(row) for row in chain.from_iterable(Segments(directory / "journal" / "pushes").rows())]

"""The record of judgements: what was acknowledged stays, what is exported comes in the order of commits.

The store is an asynchronous context that migrates the schema when it opens. Many stores, in many processes, may share one
database.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from honed.kit.errors import Conflict, InvalidArgument, NotFound, Unavailable
from honed.preference import erasure, writing
from honed.preference import selection as select
from honed.preference.content import ERASED, Entry, Row, SnapshotHash, canonical, to_judgement, to_row
from honed.preference.database import Database, DatabaseOptions
from honed.preference.erasure import Erased
from honed.preference.group_commit import GroupCommit, GroupOptions, Outcome
from honed.preference.migrate import migrate, wait_for_schema
from honed.preference.stats import Stats, read_stats
from honed.preference.tables import erasures, record_state, snapshots
from honed.v1 import preference_pb2 as pb

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoreOptions:
    """Limits of a store; see the parts.

    Attributes:
        erase_page: how many judgements one transaction of an erasure changes.
        migrate: bring the schema up to date; otherwise wait until a job has, as long as a migration may take.
    """

    database: DatabaseOptions = field(default_factory=DatabaseOptions)
    writer: GroupOptions = field(default_factory=GroupOptions)
    page: select.PageSize = field(default_factory=select.PageSize)
    erase_page: int = 5000
    migrate: bool = True


@dataclass(frozen=True)
class Snapshot:
    """A selection of judgements that does not change any more.

    Attributes:
        snapshot_id: names it.
        content_sha256: see `honed.preference.content`.
        judgements: how many.
    """

    snapshot_id: str
    content_sha256: str
    judgements: int


class PreferenceStore:
    """The record in one database."""

    def __init__(
        self, url: str, *, clock: Callable[[], int], new_id: Callable[[], str], options: StoreOptions | None = None
    ) -> None:
        """Prepares the store; `async with` opens it.

        Args:
            url: `sqlite:///file` or `postgresql://...`.
            clock: microseconds since 1970, UTC.
            new_id: makes a unique name for a snapshot.
            options: limits.

        Raises:
            FailedPrecondition: the URL cannot be used.
        """
        self._options = options or StoreOptions()
        self._database = Database(url, self._options.database)
        self._clock = clock
        self._new_id = new_id
        self._writer = GroupCommit(self._commit, self._options.writer)

    @property
    def name(self) -> str:
        """The database's URL without its password."""
        return self._database.name

    async def __aenter__(self) -> Self:
        """Brings the schema up to date, or waits for who does, and starts the writer.

        Raises:
            FailedPrecondition: the schema is newer than this build.
            Unavailable: the database cannot be reached, or nobody has migrated it in time.
        """
        try:
            if self._options.migrate:
                await migrate(self._database)
            else:
                await wait_for_schema(self._database, self._options.database.migration_deadline_s)
        except BaseException:
            await self._database.close()
            raise
        await self._writer.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Commits what was submitted, and closes every connection."""
        try:
            await self._writer.__aexit__(kind, error, trace)
        finally:
            await self._database.close()

    async def check(self) -> None:
        """Reads one row.

        Raises:
            Unavailable: the database is not there.
        """
        async with self._database.reading() as connection:
            await connection.execute(sa.select(record_state.c.last_id))

    async def record(self, entries: Sequence[Entry], *, wait_for_room: bool = False) -> list[Outcome]:
        """Stores valid entries in one transaction; they are durable when this returns.

        Args:
            entries: what to store.
            wait_for_room: see `GroupCommit.submit`.

        Returns:
            For each entry its id, or why its key cannot be used. A conflict keeps only its own entry out.

        Raises:
            Overloaded: too many wait to be written.
            Unavailable: the database did not take them. A repetition is safe.
        """
        return await self._writer.submit([to_row(entry) for entry in entries], wait_for_room=wait_for_room)

    async def export(self, selection: pb.JudgementFilter, snapshot_id: str = "") -> AsyncIterator[list[pb.Judgement]]:
        """Yields pages of judgements by rising id, as of the first page or as of a snapshot.

        No transaction is open between pages, so a slow reader holds nothing up.

        Args:
            selection: which; with a snapshot only `after_id` counts.
            snapshot_id: names a snapshot; empty for none.

        Raises:
            NotFound: no such snapshot.
            Unavailable: the database is not there. Resume after the last id.
        """
        async with self._database.reading() as connection:
            if snapshot_id:
                cursor = selection.after_id
                selection, up_to_id = await _frozen(connection, snapshot_id)
                selection.after_id = max(cursor, selection.after_id)
            else:
                up_to_id = await _last_id(connection)
        after_id = selection.after_id
        where = select.conditions(selection, up_to_id)
        while after_id < up_to_id:
            async with self._database.reading() as connection:
                page = await select.contents(connection, where, after_id, self._options.page)
            if not page:
                return
            after_id = page[-1].id
            yield [to_judgement(*row) for row in page]

    async def create_snapshot(self, selection: pb.JudgementFilter, key: str) -> Snapshot:
        """Freezes what is selected now; the same key again returns the same snapshot.

        Raises:
            Conflict: the key names a snapshot of another selection.
            Unavailable: the database is not there.
        """
        frozen = canonical(selection)
        async with self._database.reading() as connection:
            existing = await _snapshot(connection, key, frozen)
            up_to_id = await _last_id(connection)
        if existing is not None:
            return existing
        content, after_id = SnapshotHash(), selection.after_id
        where = select.conditions(selection, up_to_id)
        while after_id < up_to_id:
            async with self._database.reading() as connection:
                page = await select.digests(connection, where, after_id, rows=10_000)
            if not page:
                break
            after_id = page[-1].id
            content.update(row.content_sha256 for row in page)
        made = Snapshot(self._new_id(), content.hexdigest(), content.judgements)
        async with self._database.writing() as connection:
            await writing.lock(connection)  # one of two callers with one key comes second, and sees the first
            existing = await _snapshot(connection, key, frozen)
            if existing is not None:
                return existing
            await connection.execute(
                sa.insert(snapshots).values(
                    snapshot_id=made.snapshot_id,
                    idempotency_key=key,
                    filter=frozen,
                    up_to_id=up_to_id,
                    content_sha256=made.content_sha256,
                    judgements=made.judgements,
                    created_at=self._clock(),
                )
            )
        return made

    async def stats(self, selection: pb.JudgementFilter) -> Stats:
        """Counts what is selected; see `honed.preference.stats` for what it costs.

        Raises:
            Unavailable: the database is not there.
        """
        async with self._database.reading() as connection:
            return await read_stats(connection, selection)

    async def erase_annotator(self, annotator: str, key: str = "") -> Erased:
        """Forgets who somebody was. Judgements stay, under the name that all erased annotators share.

        Content stays too: whoever writes a person's name into a label, a text or an idempotency key keeps it there. Judgements
        of the same annotator that are recorded while this runs are erased with the others.

        Args:
            annotator: the pseudonym.
            key: names the call; a repetition returns the first answer, and still erases what came in between, or what was
                left when the first call broke off.

        Raises:
            InvalidArgument: the pseudonym is the one of erased annotators.
            Unavailable: the database is not there. Some judgements may be erased; repeat the call for the rest.
        """
        if annotator == ERASED:
            raise InvalidArgument("annotator", f"{ERASED!r} stands for erased annotators; name the one to erase")
        erased, answer = 0, 0
        after_id: int | None = 0
        while after_id is not None:
            async with self._database.writing() as connection:
                page = await erasure.erase_page(connection, annotator, after_id, self._options.erase_page)
                erased, after_id = erased + page.judgements, page.last_id
                answer = await self._answered(connection, key, page.judgements) if key else erased
        if not answer:
            return Erased(0, ())
        cleaned = await self._clean() if erased else True
        return Erased(answer, erasure.remaining_traces(sqlite=self._database.is_sqlite, cleaned=cleaned))

    async def _clean(self) -> bool:
        # The erasure is committed: failing now would deny what was done.
        try:
            cleaned = await self._database.clean(erasure.TABLES)
        except Unavailable as error:
            logger.warning("the database could not be cleaned after an erasure", extra={"reason": str(error)})
            return False
        if not cleaned:
            logger.warning("an erased pseudonym may stay in the write-ahead log: a reader holds it")
        return cleaned

    async def _answered(self, connection: AsyncConnection, key: str, erased: int) -> int:
        before = await connection.scalar(sa.select(erasures.c.judgements).where(erasures.c.idempotency_key == key))
        if before is None:
            row = {"idempotency_key": key, "judgements": erased, "erased_at": self._clock()}
            await connection.execute(sa.insert(erasures).values(row))
            return erased
        if erased:
            changed = sa.update(erasures).where(erasures.c.idempotency_key == key)
            await connection.execute(changed.values(judgements=before + erased))
        return int(before) + erased

    async def _commit(self, rows: Sequence[Row]) -> list[Outcome]:
        async with self._database.writing() as connection:
            return await writing.insert_rows(connection, rows, self._clock())


async def _last_id(connection: AsyncConnection) -> int:
    return int((await connection.execute(sa.select(record_state.c.last_id))).scalar_one())


async def _snapshot(connection: AsyncConnection, key: str, frozen: bytes) -> Snapshot | None:
    row = (await connection.execute(sa.select(snapshots).where(snapshots.c.idempotency_key == key))).one_or_none()
    if row is None:
        return None
    if pb.JudgementFilter.FromString(row.filter) != pb.JudgementFilter.FromString(frozen):
        raise Conflict(f"idempotency key {key!r} names snapshot {row.snapshot_id} of another selection; use a new key")
    return Snapshot(row.snapshot_id, row.content_sha256, row.judgements)


async def _frozen(connection: AsyncConnection, snapshot_id: str) -> tuple[pb.JudgementFilter, int]:
    row = (
        await connection.execute(
            sa.select(snapshots.c.filter, snapshots.c.up_to_id).where(snapshots.c.snapshot_id == snapshot_id)
        )
    ).one_or_none()
    if row is None:
        raise NotFound(f"no snapshot {snapshot_id!r} in this database; CreateSnapshot returns the ids that exist")
    return pb.JudgementFilter.FromString(row.filter), int(row.up_to_id)

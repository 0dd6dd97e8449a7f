"""Forgets who somebody was, a page of judgements at a time.

An annotator may have millions of judgements. Each page is a transaction of its own, short enough for the database's ordinary
deadline, and other writers come in between. The counts are right after every page, so an erasure that breaks off is
half done and nothing else; its repetition does the rest.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from honed.preference.content import ERASED
from honed.preference.tables import annotator_counts, judgements, record_state
from honed.preference.writing import add_counts, lock

TABLES = ("judgements", "annotator_counts")
"""Where an annotator's name stands."""


@dataclass(frozen=True)
class Erased:
    """What an erasure did.

    Attributes:
        judgements: how many had named the annotator.
        remaining: where the name may still be found, in words for whoever asked: empty when nothing was erased.
    """

    judgements: int
    remaining: tuple[str, ...]


@dataclass(frozen=True)
class Page:
    """One page: how many judgements it changed, and the largest id among them; None when it was the last page."""

    judgements: int
    last_id: int | None


async def erase_page(connection: AsyncConnection, annotator: str, after_id: int, rows: int) -> Page:
    """Puts `ERASED` in the place of an annotator in the next judgements.

    Args:
        connection: a write transaction.
        annotator: the pseudonym.
        after_id: the last id of the page before; 0 for the first.
        rows: the most judgements to change.
    """
    await lock(connection)
    j, c = judgements.c, annotator_counts.c
    found = (
        await connection.execute(
            sa.select(j.id, j.kind, j.source).where(j.annotator == annotator, j.id > after_id).order_by(j.id).limit(rows)
        )
    ).all()
    if not found:
        return Page(0, None)
    last_id = int(found[-1].id)
    await connection.execute(
        sa.update(judgements).where(j.annotator == annotator, j.id > after_id, j.id <= last_id).values(annotator=ERASED)
    )
    moved = Counter((row.kind, row.source) for row in found)
    for (kind, source), n in moved.items():
        its = (c.annotator == annotator, c.kind == kind, c.source == source)
        await connection.execute(sa.update(annotator_counts).where(*its).values(judgements=c.judgements - n))
    await connection.execute(sa.delete(annotator_counts).where(c.annotator == annotator, c.judgements <= 0))
    left = await connection.scalar(sa.select(sa.func.count()).select_from(annotator_counts).where(c.annotator == annotator))
    if not left:
        await connection.execute(sa.update(record_state).values(annotators=record_state.c.annotators - 1))
    erased = [{"annotator": ERASED, "kind": k, "source": s, "judgements": n} for (k, s), n in moved.items()]
    await add_counts(connection, annotator_counts, erased)
    # The lock keeps new judgements out: a page that is not full was the last.
    return Page(len(found), last_id if len(found) == rows else None)


def remaining_traces(*, sqlite: bool, cleaned: bool) -> tuple[str, ...]:
    """Where a name may still be found after its rows were changed.

    Args:
        sqlite: which database.
        cleaned: whether `Database.clean` succeeded.
    """
    everywhere = ("backups and copies of the database that were made before", "files that judgements were exported to before")
    if sqlite:
        file = "free space inside the database's file and its write-ahead log, until a VACUUM"
        return everywhere if cleaned else (file, *everywhere)
    dead = (
        "dead rows that a transaction older than the erasure can still see, until a VACUUM after its end"
        if cleaned
        else "dead rows, until the next VACUUM of judgements and annotator_counts"
    )
    return (
        dead,
        "free space inside PostgreSQL's files, until it is written over",
        "the write-ahead log, its archive and replicas that lag",
        *everywhere,
    )

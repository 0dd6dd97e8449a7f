"""Inserts a batch of judgements in one transaction, each at most once.

Invariants:
    Ids rise in the order of commits. Every writer first locks the one row of `record_state`, takes its ids from it, and holds
    the lock until its commit (on SQLite the file's write lock does the same). A database makes a commit visible before it
    releases the locks of the transaction, so whoever gets a larger id began after every smaller one could be seen: a cursor
    never passes over a judgement that shows up later. (A sequence would not do: it hands out ids outside of transactions.)
    Counts are changed by the transaction that changes what they count.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.ext.asyncio import AsyncConnection

from honed.kit.errors import Conflict
from honed.preference.content import ERASED, Row
from honed.preference.tables import annotator_counts, judgement_counts, judgement_labels, judgements, record_state
from honed.v1 import preference_pb2 as pb


@dataclass(frozen=True, slots=True)
class Recorded:
    """What became of one entry: its id, and whether it was there before."""

    id: int
    duplicate: bool


@dataclass(frozen=True, slots=True)
class _Stored:
    id: int
    annotator: str
    content: bytes


async def lock(connection: AsyncConnection) -> sa.Row[Any]:
    """Makes this the one writer until its commit, and returns the row of `record_state`."""
    return (await connection.execute(sa.select(record_state).with_for_update())).one()


async def insert_rows(connection: AsyncConnection, rows: Sequence[Row], now: int) -> list[Recorded | Conflict]:
    """Inserts what is not there yet.

    Args:
        connection: a write transaction.
        rows: the entries, keys may repeat.
        now: microseconds since 1970, UTC.

    Returns:
        For each entry what became of it; a conflict keeps only its own entry out.
    """
    state = await lock(connection)
    known = await _stored(connection, [row.key for row in rows])
    outcomes: list[Recorded | Conflict] = []
    fresh: list[dict[str, Any]] = []
    labels: list[dict[str, Any]] = []
    for row in rows:
        stored = known.get(row.key)
        if stored is not None:
            outcomes.append(_repeated(row, stored))
            continue
        id_ = int(state.last_id) + len(fresh) + 1
        known[row.key] = _Stored(id_, row.annotator, row.content)
        outcomes.append(Recorded(id_, duplicate=False))
        fresh.append(
            {
                "id": id_,
                "idempotency_key": row.key,
                "kind": row.kind,
                "source": row.source,
                "annotator": row.annotator,
                "judged_at": now if row.judged_at is None else row.judged_at,
                "stored_at": now,
                "content_sha256": row.content_sha256,
                "content": row.content,
            }
        )
        labels += [{"judgement_id": id_, "name": name, "value": value} for name, value in row.labels.items()]
    if fresh:
        await connection.execute(sa.insert(judgements), fresh)
        if labels:
            await connection.execute(sa.insert(judgement_labels), labels)
        await _count(connection, fresh)
    return outcomes


async def _stored(connection: AsyncConnection, keys: Sequence[str]) -> dict[str, _Stored]:
    c = judgements.c
    found = await connection.execute(
        sa.select(c.idempotency_key, c.id, c.annotator, c.content).where(c.idempotency_key.in_(keys))
    )
    return {key: _Stored(id_, annotator, content) for key, id_, annotator, content in found}


def _repeated(row: Row, stored: _Stored) -> Recorded | Conflict:
    # An erased annotator stays erased: the repetition of an import that named them changes nothing.
    same_annotator = stored.annotator in (row.annotator, ERASED)
    if same_annotator and _same_content(row.content, stored.content):
        return Recorded(stored.id, duplicate=True)
    return Conflict(
        f"idempotency key {row.key!r} names judgement {stored.id}, which has other content; use a new key for a new judgement"
    )


def _same_content(one: bytes, other: bytes) -> bool:
    # Bytes that differ may still be one message, if an older library wrote them in another order.
    return one == other or pb.Judgement.FromString(one) == pb.Judgement.FromString(other)


async def _count(connection: AsyncConnection, fresh: Sequence[dict[str, Any]]) -> None:
    last_id = fresh[-1]["id"]
    by_source = Counter((row["kind"], row["source"]) for row in fresh)
    last = {(row["kind"], row["source"]): row["id"] for row in fresh}
    by_annotator = Counter((row["annotator"], row["kind"], row["source"]) for row in fresh)
    named = sorted({row["annotator"] for row in fresh} - {ERASED})
    c = annotator_counts.c
    seen = await connection.execute(sa.select(c.annotator).where(c.annotator.in_(named)).distinct())
    new_annotators = len(named) - len(seen.all())
    await add_counts(
        connection,
        judgement_counts,
        [{"kind": k, "source": s, "judgements": n, "last_id": last[k, s]} for (k, s), n in by_source.items()],
    )
    await add_counts(
        connection,
        annotator_counts,
        [{"annotator": a, "kind": k, "source": s, "judgements": n} for (a, k, s), n in by_annotator.items()],
    )
    await connection.execute(
        sa.update(record_state).values(last_id=last_id, annotators=record_state.c.annotators + new_annotators)
    )


async def add_counts(connection: AsyncConnection, table: sa.Table, rows: Sequence[dict[str, Any]]) -> None:
    """Adds to the counts of existing rows, and inserts the others."""
    insert = sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert
    statement = insert(table)
    changed = {"judgements": table.c.judgements + statement.excluded.judgements}
    if "last_id" in table.c:
        changed["last_id"] = statement.excluded.last_id
    await connection.execute(
        statement.on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=changed), list(rows)
    )

"""A filter of the contract as SQL, and pages of what it selects.

Pages go by id, so a page costs what it returns, wherever it starts. A page ends at a number of rows or at a number of content
bytes, whichever comes first: memory stays constant however large single judgements are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from honed.preference.tables import judgement_labels, judgements
from honed.v1 import preference_pb2 as pb


@dataclass(frozen=True)
class PageSize:
    """Where a page ends. One row always fits, whatever its size."""

    rows: int = 1000
    content_bytes: int = 4 * 1024 * 1024


def conditions(selection: pb.JudgementFilter, up_to_id: int | None = None) -> list[sa.ColumnElement[bool]]:
    """The filter as conditions on `judgements` that must all hold.

    Args:
        selection: the filter; its empty fields select all.
        up_to_id: the largest id that may match; None for no bound.
    """
    found: list[sa.ColumnElement[bool]] = []
    kinds = [kind for kind in selection.kinds if kind != pb.JUDGEMENT_KIND_UNSPECIFIED]
    if kinds and len(kinds) == len(selection.kinds):
        found.append(judgements.c.kind.in_(sorted(set(kinds))))
    if selection.sources:
        found.append(judgements.c.source.in_(sorted(set(selection.sources))))
    for name, value in sorted(selection.labels.items()):
        found.append(
            sa.exists().where(
                judgement_labels.c.name == name,
                judgement_labels.c.value == value,
                judgement_labels.c.judgement_id == judgements.c.id,
            )
        )
    if selection.after_id:
        found.append(judgements.c.id > selection.after_id)
    if up_to_id is not None:
        found.append(judgements.c.id <= up_to_id)
    return found


def only_after_id(selection: pb.JudgementFilter) -> bool:
    """Whether the filter asks for nothing but a position."""
    return not (selection.kinds or selection.sources or selection.labels)


async def contents(
    connection: AsyncConnection, where: Sequence[sa.ColumnElement[bool]], after_id: int, size: PageSize
) -> Sequence[sa.Row[int, str, int, bytes]]:
    """The next page as (id, annotator, stored_at, content), in the order of ids; empty at the end."""
    # Both databases know a value's length without reading it.
    page = (
        sa.select(judgements.c.id, sa.func.length(judgements.c.content).label("size"))
        .where(*where, judgements.c.id > after_id)
        .order_by(judgements.c.id)
        .limit(size.rows)
        .subquery()
    )
    before = sa.func.sum(page.c.size).over(order_by=page.c.id) - page.c.size
    running = sa.select(page.c.id, before.label("before")).subquery()
    c = judgements.c
    result = await connection.execute(
        sa.select(c.id, c.annotator, c.stored_at, c.content)
        .join(running, running.c.id == c.id)
        .where(running.c.before < size.content_bytes)
        .order_by(c.id)
    )
    return result.all()


async def digests(
    connection: AsyncConnection, where: Sequence[sa.ColumnElement[bool]], after_id: int, rows: int
) -> Sequence[sa.Row[int, bytes]]:
    """The next page as (id, content_sha256), in the order of ids; empty at the end."""
    result = await connection.execute(
        sa.select(judgements.c.id, judgements.c.content_sha256)
        .where(*where, judgements.c.id > after_id)
        .order_by(judgements.c.id)
        .limit(rows)
    )
    return result.all()

"""Counts of a selection, from the tables of counts as far as they know.

| selection | reads |
|---|---|
| everything | one row for each kind and source |
| kinds, sources | the same, and one row for each annotator in them |
| after an id | the judgements after it |
| labels | the judgements that have them |
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection

from honed.preference.content import ERASED, KIND_NAMES
from honed.preference.selection import conditions, only_after_id
from honed.preference.tables import annotator_counts, judgement_counts, judgements, record_state
from honed.v1 import preference_pb2 as pb


@dataclass(frozen=True)
class Stats:
    """What is selected, counted. `annotators` leaves erased ones out; `last_id` is 0 when nothing is selected."""

    judgements: int
    by_kind: dict[str, int]
    by_source: dict[str, int]
    annotators: int
    last_id: int


async def read_stats(connection: AsyncConnection, selection: pb.JudgementFilter) -> Stats:
    """Counts inside one transaction."""
    if selection.labels or selection.after_id:
        where = conditions(selection)
        c = judgements.c
        counts = sa.select(c.kind, c.source, sa.func.count().label("judgements"), sa.func.max(c.id).label("last_id"))
        counts = counts.where(*where).group_by(c.kind, c.source)
        people = sa.select(sa.func.count(c.annotator.distinct())).where(*where, c.annotator != ERASED)
    else:
        counts = sa.select(judgement_counts).where(*_of(judgement_counts, selection))
        people = sa.select(record_state.c.annotators)
        if not only_after_id(selection):
            a = annotator_counts.c.annotator
            people = sa.select(sa.func.count(a.distinct())).where(*_of(annotator_counts, selection), a != ERASED)
    by_kind: Counter[str] = Counter()
    by_source: Counter[str] = Counter()
    last_id = 0
    for row in await connection.execute(counts):
        by_kind[KIND_NAMES[row.kind]] += row.judgements
        by_source[row.source] += row.judgements
        last_id = max(last_id, row.last_id)
    annotators = int((await connection.execute(people)).scalar_one())
    return Stats(by_kind.total(), dict(by_kind), dict(by_source), annotators, last_id)


def _of(table: sa.Table, selection: pb.JudgementFilter) -> list[sa.ColumnElement[bool]]:
    """The conditions on kind and source, on a table of counts."""
    found: list[sa.ColumnElement[bool]] = []
    if selection.kinds and pb.JUDGEMENT_KIND_UNSPECIFIED not in selection.kinds:
        found.append(table.c.kind.in_(sorted(set(selection.kinds))))
    if selection.sources:
        found.append(table.c.source.in_(sorted(set(selection.sources))))
    return found

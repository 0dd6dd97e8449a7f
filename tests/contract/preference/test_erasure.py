"""Forgetting somebody with very many judgements: in pages, each within the ordinary deadline, right after each of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from tests.support.judgements import entries, pair
from tests.support.preference_reading import everything

from honed.kit.errors import Unavailable
from honed.preference.content import ERASED, KINDS
from honed.preference.database import Database, DatabaseOptions
from honed.preference.erasure import Erased
from honed.preference.store import PreferenceStore, StoreOptions
from honed.v1 import preference_pb2 as pb

MANY = {"sqlite": 400_000, "postgresql": 200_000}
"""More than one UPDATE changes within `DEADLINE_S`: about 2 s and 3 s of it."""

DEADLINE_S = 1.0

ROWS = {
    "sqlite": "WITH RECURSIVE n(g) AS (SELECT 1 UNION ALL SELECT g + 1 FROM n WHERE g < :many) ",
    "postgresql": "WITH n(g) AS (SELECT generate_series(1, :many)) ",
}
INSERT = "INSERT INTO judgements (id, idempotency_key, kind, source, annotator, judged_at, stored_at, content_sha256, content) "
SELECT = "SELECT g, 'many-' || g, :kind, 'import', 'jane', 0, 0, :digest, :content FROM n"


async def fill(url: str) -> int:
    """Puts `MANY` judgements of one annotator into an empty record, as so many imports would, and returns how many."""
    database = Database(url, DatabaseOptions(deadline_s=120))
    many = MANY[database.url.get_backend_name()]
    kind, backend = KINDS["pairwise"], database.url.get_backend_name()
    content = pair(1)
    content.ClearField("annotator")
    async with database.writing() as connection:
        start, end = (ROWS[backend] + INSERT, SELECT) if backend == "sqlite" else (INSERT + ROWS[backend], SELECT)
        values = {"many": many, "kind": kind, "digest": bytes(32), "content": content.SerializeToString()}
        await connection.execute(sa.text(start + end), values)
        await connection.execute(sa.text("UPDATE record_state SET last_id = :n, annotators = 1"), {"n": many})
        for table, columns, rest in (
            ("judgement_counts", "kind, source, judgements, last_id", ", :n"),
            ("annotator_counts", "kind, source, judgements, annotator", ", 'jane'"),
        ):
            statement = f"INSERT INTO {table} ({columns}) VALUES (:kind, 'import', :n{rest})"
            await connection.execute(sa.text(statement), {"kind": kind, "n": many})
    await database.close()
    return many


async def erase_with_repetitions(store: PreferenceStore, annotator: str, key: str) -> Erased:
    """An erasure as a caller does it: a page that a busy disk holds up past the deadline is a reason to call again.

    One UPDATE of everything would fail each time, since a repetition would begin where the first one did.
    """
    for _ in range(4):
        with contextlib.suppress(Unavailable):
            return await store.erase_annotator(annotator, key)
    return await store.erase_annotator(annotator, key)


async def test_an_annotator_with_very_many_judgements_is_erased_within_ordinary_deadlines(
    url: str, make_store: Callable[..., PreferenceStore]
) -> None:
    async with make_store(url):
        pass  # makes the tables
    many = await fill(url)
    impatient = StoreOptions(database=DatabaseOptions(deadline_s=DEADLINE_S), erase_page=2000)
    async with make_store(url, impatient) as store:
        erasing = asyncio.create_task(erase_with_repetitions(store, "jane", "out"))
        written = 0
        while not erasing.done():  # others write in between
            with contextlib.suppress(Unavailable):  # the database is being cleaned
                await store.record(entries(1, start=written, annotator="john"))
                written += 1
        assert (await erasing).judgements == many
        assert written > 1
        stats = await store.stats(pb.JudgementFilter())
        assert (stats.judgements, stats.annotators) == (many + written, 1)
        async with store._database.reading() as connection:
            found = await connection.execute(
                sa.text("SELECT annotator, count(*) FROM judgements GROUP BY annotator ORDER BY annotator")
            )
            assert [tuple(row) for row in found] == [(ERASED, many), ("john", written)]
            counted = await connection.execute(sa.text("SELECT annotator, judgements FROM annotator_counts ORDER BY annotator"))
            assert [tuple(row) for row in counted] == [(ERASED, many), ("john", written)]


async def test_an_erasure_that_broke_off_is_right_as_far_as_it_came_and_goes_on(
    url: str, make_store: Callable[..., PreferenceStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from honed.preference import erasure

    pages, erase_page = 0, erasure.erase_page

    async def broken(*arguments: object) -> erasure.Page:
        nonlocal pages
        pages += 1
        if pages == 3:
            raise asyncio.CancelledError
        return await erase_page(*arguments)  # type: ignore[arg-type]

    async with make_store(url, StoreOptions(erase_page=2)) as store:
        await store.record(entries(7, annotator="jane") + entries(1, start=7, annotator="john"))
        monkeypatch.setattr(erasure, "erase_page", broken)
        with pytest.raises(asyncio.CancelledError):
            await store.erase_annotator("jane", "out")
        monkeypatch.undo()
        annotators = [judgement.annotator for judgement in await everything(store)]
        assert annotators == [ERASED] * 4 + ["jane"] * 3 + ["john"]
        assert (await store.stats(pb.JudgementFilter())).annotators == 2
        assert (await store.erase_annotator("jane", "out")).judgements == 7
        assert (await store.stats(pb.JudgementFilter())).annotators == 1
        assert (await store.stats(pb.JudgementFilter(kinds=[KINDS["pairwise"]]))).annotators == 1


async def test_the_answer_says_where_a_name_may_still_be(url: str, make_store: Callable[..., PreferenceStore]) -> None:
    async with make_store(url) as store:
        await store.record(entries(1, annotator="jane"))
        erased = await store.erase_annotator("jane", "out")
        assert any("backups" in place for place in erased.remaining)
        assert any("write-ahead log" in place for place in erased.remaining) is url.startswith("postgresql")
        assert await store.erase_annotator("jane", "out") == erased
        assert (await store.erase_annotator("nobody")).remaining == ()


@pytest.mark.postgres
async def test_the_dead_rows_of_an_erasure_are_vacuumed_at_once(
    postgres_url: str, make_store: Callable[..., PreferenceStore]
) -> None:
    async with make_store(postgres_url) as store:
        await store.record(entries(50, annotator="jane"))
        await store.erase_annotator("jane")
        async with store._database.reading() as connection:
            found = await connection.execute(
                sa.text("SELECT relname FROM pg_stat_user_tables WHERE vacuum_count = 1 ORDER BY relname")
            )
            assert [name for (name,) in found] == ["annotator_counts", "judgements"]

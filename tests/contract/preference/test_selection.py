"""Export, snapshots, counts: what a filter selects, in order, and unchanged by what comes later."""

from __future__ import annotations

import pytest
from tests.support.judgements import entries, full, pair
from tests.support.preference_reading import everything

from honed.kit.errors import Conflict, InvalidArgument, NotFound
from honed.preference.content import ERASED, KINDS, Entry, SnapshotHash, content_sha256
from honed.preference.selection import PageSize
from honed.preference.stats import Stats
from honed.preference.store import PreferenceStore, StoreOptions
from honed.v1 import preference_pb2 as pb

FILTERS = {
    "kinds": (pb.JudgementFilter(kinds=[KINDS["thumbs"], KINDS["flag"]]), [4, 6]),
    "any kind": (pb.JudgementFilter(kinds=[0, KINDS["flag"]]), list(range(1, 11))),
    "sources": (pb.JudgementFilter(sources=["movies", "tweets"]), [7, 8, 9, 10]),
    "one label": (pb.JudgementFilter(labels={"split": "test"}), [8, 10]),
    "all labels": (pb.JudgementFilter(labels={"split": "test", "set": "a"}), [8]),
    "after": (pb.JudgementFilter(after_id=8), [9, 10]),
    "together": (pb.JudgementFilter(kinds=[1], sources=["tweets"], labels={"split": "test"}, after_id=3), [10]),
    "nothing": (pb.JudgementFilter(sources=["nowhere"]), []),
}


async def fill(store: PreferenceStore) -> None:
    await store.record([Entry(f"full-{kind}", full(kind, annotator=f"ann-{kind}")) for kind in KINDS])
    await store.record(
        [
            Entry("m1", pair(1, source="movies", split="train", set="a")),
            Entry("m2", pair(2, source="movies", split="test", set="a")),
            Entry("t1", pair(3, source="tweets", split="train")),
            Entry("t2", pair(4, annotator="ann-2", source="tweets", split="test")),
        ]
    )


@pytest.mark.parametrize("name", FILTERS)
async def test_export_stats_and_snapshot_select_the_same(store: PreferenceStore, name: str) -> None:
    await fill(store)
    selection, ids = FILTERS[name]
    exported = await everything(store, selection)
    assert [judgement.id for judgement in exported] == ids
    stats = await store.stats(selection)
    assert stats.judgements == sum(stats.by_kind.values()) == sum(stats.by_source.values()) == len(ids)
    assert stats.annotators == len({judgement.annotator for judgement in exported})
    assert stats.last_id == max(ids, default=0)
    snapshot = await store.create_snapshot(selection, "key")
    assert snapshot.judgements == len(ids)
    assert [judgement.id for judgement in await everything(store, snapshot_id=snapshot.snapshot_id)] == ids


async def test_stats_count_by_kind_and_source(store: PreferenceStore) -> None:
    assert await store.stats(pb.JudgementFilter()) == Stats(0, {}, {}, 0, 0)
    await fill(store)
    await store.record([Entry("m1", pair(1, source="movies", split="train", set="a"))])  # a duplicate
    assert await store.stats(pb.JudgementFilter()) == Stats(
        judgements=10,
        by_kind={"pairwise": 5, "ranking": 1, "rating": 1, "thumbs": 1, "edit": 1, "flag": 1},
        by_source={"console": 6, "movies": 2, "tweets": 2},
        annotators=8,
        last_id=10,
    )


@pytest.mark.parametrize("page", [PageSize(rows=3), PageSize(content_bytes=1), PageSize(content_bytes=200)])
async def test_pages_lose_and_repeat_nothing(url: str, make_store, page: PageSize) -> None:
    async with make_store(url, StoreOptions(page=page)) as store:
        await store.record(entries(25))
        sizes = [len(found) async for found in store.export(pb.JudgementFilter())]
        assert sum(sizes) == 25
        assert max(sizes) <= (3 if page.rows == 3 else 5)
        assert [judgement.id for judgement in await everything(store)] == list(range(1, 26))


async def test_an_export_ends_where_it_stood_when_it_began(url: str, make_store) -> None:
    async with make_store(url, StoreOptions(page=PageSize(rows=2))) as store:
        await store.record(entries(5))
        pages = store.export(pb.JudgementFilter())
        seen = [judgement.id for judgement in await anext(pages)]
        await store.record(entries(5, start=5))
        async for page in pages:
            seen += [judgement.id for judgement in page]
        assert seen == [1, 2, 3, 4, 5]


async def test_a_snapshot_stays_as_it_was(store: PreferenceStore) -> None:
    await store.record(entries(5))
    snapshot = await store.create_snapshot(pb.JudgementFilter(sources=["import"]), "key")
    before = await everything(store, snapshot_id=snapshot.snapshot_id)
    await store.record(entries(5, start=5))
    assert await everything(store, snapshot_id=snapshot.snapshot_id) == before
    assert await store.create_snapshot(pb.JudgementFilter(sources=["import"]), "key") == snapshot
    later = await store.create_snapshot(pb.JudgementFilter(sources=["import"]), "later")
    assert later.judgements == 10
    assert later.content_sha256 != snapshot.content_sha256


async def test_a_snapshot_is_resumed_after_an_id(store: PreferenceStore) -> None:
    await store.record(entries(5))
    snapshot = await store.create_snapshot(pb.JudgementFilter(after_id=1), "key")
    rest = await everything(store, pb.JudgementFilter(after_id=3), snapshot.snapshot_id)
    assert [judgement.id for judgement in rest] == [4, 5]


async def test_a_reader_of_an_export_can_compute_the_snapshot_hash(store: PreferenceStore) -> None:
    await fill(store)
    snapshot = await store.create_snapshot(pb.JudgementFilter(), "key")
    content = SnapshotHash()
    content.update(content_sha256(judgement) for judgement in await everything(store, snapshot_id=snapshot.snapshot_id))
    assert content.hexdigest() == snapshot.content_sha256


async def test_a_snapshot_hash_is_the_same_on_every_database(store: PreferenceStore) -> None:
    """A golden value: it holds for both databases and for every version of the libraries."""
    await fill(store)
    snapshot = await store.create_snapshot(pb.JudgementFilter(), "key")
    assert snapshot.content_sha256 == GOLDEN


async def test_a_snapshot_key_with_another_selection_is_a_conflict(store: PreferenceStore) -> None:
    await store.create_snapshot(pb.JudgementFilter(), "key")
    with pytest.raises(Conflict, match="'key'"):
        await store.create_snapshot(pb.JudgementFilter(sources=["a"]), "key")


async def test_an_unknown_snapshot_is_not_found(store: PreferenceStore) -> None:
    with pytest.raises(NotFound, match="nothing"):
        await everything(store, snapshot_id="nothing")


async def test_an_erased_annotator_is_gone_and_the_judgements_stay(store: PreferenceStore) -> None:
    await store.record(entries(3, annotator="jane") + entries(2, start=3, annotator="john"))
    snapshot = await store.create_snapshot(pb.JudgementFilter(), "key")
    assert (await store.erase_annotator("jane", "erase-1")).judgements == 3
    exported = await everything(store, snapshot_id=snapshot.snapshot_id)
    assert [judgement.annotator for judgement in exported] == [ERASED] * 3 + ["john"] * 2
    assert (await store.create_snapshot(pb.JudgementFilter(), "again")).content_sha256 == snapshot.content_sha256
    for selection in (pb.JudgementFilter(), pb.JudgementFilter(sources=["import"]), pb.JudgementFilter(after_id=1)):
        assert (await store.stats(selection)).annotators == 1
    assert (await store.stats(pb.JudgementFilter())).judgements == 5


async def test_an_erasure_repeated_gives_the_first_answer_and_still_erases_what_came_since(store: PreferenceStore) -> None:
    await store.record(entries(3, annotator="jane"))
    assert (await store.erase_annotator("jane", "erase-1")).judgements == 3
    assert (await store.erase_annotator("jane", "erase-1")).judgements == 3
    assert (await store.erase_annotator("jane")).judgements == 0
    await store.record(entries(2, start=3, annotator="jane"))
    assert (await store.erase_annotator("jane", "erase-1")).judgements == 5
    assert {judgement.annotator for judgement in await everything(store)} == {ERASED}


async def test_importing_again_does_not_bring_an_erased_annotator_back(store: PreferenceStore) -> None:
    await store.record(entries(3, annotator="jane"))
    await store.erase_annotator("jane")
    outcomes = await store.record(entries(3, annotator="jane"))
    assert all(getattr(outcome, "duplicate", False) for outcome in outcomes)
    assert {judgement.annotator for judgement in await everything(store)} == {ERASED}


async def test_the_name_of_the_erased_cannot_be_erased(store: PreferenceStore) -> None:
    with pytest.raises(InvalidArgument, match="annotator"):
        await store.erase_annotator(ERASED)


@pytest.mark.parametrize("name", ["jane-of-a-unique-name", "j~q~y"])  # longer and shorter than what takes its place
async def test_no_byte_of_an_erased_pseudonym_stays_in_the_sqlite_files(tmp_path, make_store, name: str) -> None:
    async with make_store(f"sqlite:///{tmp_path}/honed.db") as store:
        await store.record(entries(2000, annotator=name) + entries(200, start=2000, annotator="john"))
        assert any(name.encode() in file.read_bytes() for file in tmp_path.iterdir())
        await store.erase_annotator(name)
        assert not any(name.encode() in file.read_bytes() for file in tmp_path.iterdir())


GOLDEN = "82056c928fcbf2b8605bcbffff8364820f384dc733c16d42a1774bc99a45334d"

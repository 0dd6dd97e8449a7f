"""Recording: exact, once, in the order of commits."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.judgements import entries, full, pair
from tests.support.preference_reading import everything

from honed.kit.errors import Conflict
from honed.preference.content import KINDS, Entry
from honed.preference.store import PreferenceStore
from honed.preference.writing import Recorded
from honed.v1 import preference_pb2 as pb


@pytest.mark.parametrize("kind", KINDS)
async def test_every_kind_comes_back_exactly(store: PreferenceStore, kind: str) -> None:
    judgement = full(kind)
    (outcome,) = await store.record([Entry("key", judgement)])
    (back,) = await everything(store)
    assert back.id == 1 == outcome.id
    back.ClearField("id")
    assert back == judgement
    assert back.SerializeToString(deterministic=True) == judgement.SerializeToString(deterministic=True)


async def test_fields_of_a_newer_client_are_kept(store: PreferenceStore) -> None:
    newer = pb.Judgement.FromString(pair(1).SerializeToString() + b"\xfa\x7f\x03new")
    await store.record([Entry("key", newer)])
    (back,) = await everything(store)
    assert back.SerializeToString().endswith(b"\xfa\x7f\x03new")


async def test_a_judgement_without_a_time_gets_that_of_its_storing(store: PreferenceStore) -> None:
    await store.record([Entry("key", pair(1))])
    (back,) = await everything(store)
    assert back.judged_at.ToMicroseconds() == 1_800_000_000_000_000


async def test_the_id_in_a_request_is_ignored(store: PreferenceStore) -> None:
    judgement = pair(1)
    judgement.id = 77
    assert await store.record([Entry("key", judgement)]) == [Recorded(1, duplicate=False)]
    judgement.id = 78
    assert await store.record([Entry("key", judgement)]) == [Recorded(1, duplicate=True)]


async def test_one_key_from_many_tasks_is_one_row(store: PreferenceStore) -> None:
    outcomes = await asyncio.gather(*(store.record([Entry("key", pair(1))]) for _ in range(50)))
    assert {outcome.id for (outcome,) in outcomes if isinstance(outcome, Recorded)} == {1}
    assert sum(not outcome.duplicate for (outcome,) in outcomes if isinstance(outcome, Recorded)) == 1
    assert len(await everything(store)) == 1


@pytest.mark.parametrize("change", ["content", "annotator", "judged_at"])
async def test_a_key_with_other_content_is_a_conflict_that_spares_the_rest(store: PreferenceStore, change: str) -> None:
    await store.record([Entry("key", full())])
    other = full()
    if change == "content":
        other.responses[0].text = "another"
    elif change == "annotator":
        other.annotator = "somebody else"
    else:
        other.judged_at.nanos += 1
    conflict, stored = await store.record([Entry("key", other), Entry("new", pair(1))])
    assert isinstance(conflict, Conflict)
    assert "'key'" in str(conflict)
    assert stored == Recorded(2, duplicate=False)


async def test_a_key_twice_in_one_batch_is_stored_once(store: PreferenceStore) -> None:
    same, again, other = await store.record([Entry("k", pair(1)), Entry("k", pair(1)), Entry("k", pair(2))])
    assert (same, again) == (Recorded(1, duplicate=False), Recorded(1, duplicate=True))
    assert isinstance(other, Conflict)


async def test_a_cursor_never_passes_over_a_row_that_commits_later(url: str, make_store, store: PreferenceStore) -> None:
    """Two services write at once while a reader follows with the last id that it saw."""
    writers, per_writer = 8, 30
    async with make_store(url) as second:
        followed: list[int] = []
        written = asyncio.Event()

        async def follow() -> None:
            while True:
                last = written.is_set()
                async for page in store.export(pb.JudgementFilter(after_id=followed[-1] if followed else 0)):
                    followed.extend(judgement.id for judgement in page)
                if last:
                    return
                await asyncio.sleep(0)

        async def write(number: int) -> None:
            for entry in entries(per_writer, prefix=f"w{number}-"):
                await (store if number % 2 else second).record([entry])

        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            reader = group.create_task(follow())
            async with asyncio.TaskGroup() as writing:
                for number in range(writers):
                    writing.create_task(write(number))
            written.set()
            await reader
    assert followed == list(range(1, writers * per_writer + 1))

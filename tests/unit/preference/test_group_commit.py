"""The one writer: groups, fails, ends and refuses as it says."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
from tests.support.judgements import pair

from honed.kit.errors import Overloaded, Unavailable
from honed.preference.content import Entry, Row, to_row
from honed.preference.group_commit import GroupCommit, GroupOptions, Outcome
from honed.preference.writing import Recorded


def row(key: str) -> Row:
    return to_row(Entry(key, pair(1)))


class Commits:
    """A database whose commits end when the test says so."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self.begun = asyncio.Event()
        self.gate = asyncio.Event()
        self.error: Exception | None = None

    async def __call__(self, rows: Sequence[Row]) -> list[Outcome]:
        self.groups.append([row.key for row in rows])
        self.begun.set()
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return [Recorded(int(row.key), duplicate=False) for row in rows]


@pytest.fixture
async def commits() -> Commits:
    return Commits()


async def waiting(writer: GroupCommit, keys: Sequence[str], commits: Commits) -> list[asyncio.Task[list[Outcome]]]:
    """Submits the first key, and the others while its commit is under way."""
    first = asyncio.create_task(writer.submit([row(keys[0])], wait_for_room=False))
    await commits.begun.wait()
    others = [asyncio.create_task(writer.submit([row(key)], wait_for_room=False)) for key in keys[1:]]
    await asyncio.sleep(0)
    return [first, *others]


async def test_who_arrives_during_a_commit_shares_the_next(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits) as writer:
        tasks = await waiting(writer, ["1", "2", "3", "4"], commits)
        commits.gate.set()
        outcomes = await asyncio.gather(*tasks)
    assert commits.groups == [["1"], ["2", "3", "4"]]
    assert [outcome for (outcome,) in outcomes] == [Recorded(n, duplicate=False) for n in (1, 2, 3, 4)]


async def test_a_group_ends_at_its_limits_and_keeps_the_order(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits, GroupOptions(rows=2)) as writer:
        tasks = await waiting(writer, ["1", "2", "3", "4"], commits)
        commits.gate.set()
        await asyncio.gather(*tasks)
    assert commits.groups == [["1"], ["2", "3"], ["4"]]


async def test_large_contents_are_committed_apart(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits, GroupOptions(content_bytes=1)) as writer:
        tasks = await waiting(writer, ["1", "2", "3"], commits)
        commits.gate.set()
        await asyncio.gather(*tasks)
    assert commits.groups == [["1"], ["2"], ["3"]]


async def test_a_failed_commit_fails_its_callers_and_no_others(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits) as writer:
        commits.error = Unavailable("gone")
        commits.gate.set()
        with pytest.raises(Unavailable, match="gone"):
            await writer.submit([row("1")], wait_for_room=False)
        commits.error = None
        assert await writer.submit([row("2")], wait_for_room=False) == [Recorded(2, duplicate=False)]


async def test_a_caller_that_left_does_not_stop_its_commit(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits) as writer:
        first, second = await waiting(writer, ["1", "2"], commits)
        first.cancel()
        commits.gate.set()
        assert await second == [Recorded(2, duplicate=False)]
        with pytest.raises(asyncio.CancelledError):
            await first
    assert commits.groups == [["1"], ["2"]]


async def test_closing_commits_what_waits_and_refuses_what_comes(commits: Commits) -> None:
    async with asyncio.timeout(30):
        writer = GroupCommit(commits)
        async with writer:
            tasks = await waiting(writer, ["1", "2"], commits)
            commits.gate.set()
        assert [outcome for task in tasks for outcome in await task] == [Recorded(n, duplicate=False) for n in (1, 2)]
        with pytest.raises(Unavailable, match="closed"):
            await writer.submit([row("3")], wait_for_room=False)


async def test_no_room_refuses_or_waits_as_the_caller_wants(commits: Commits) -> None:
    async with asyncio.timeout(30), GroupCommit(commits, GroupOptions(waiting=1)) as writer:
        tasks = await waiting(writer, ["1", "2"], commits)
        with pytest.raises(Overloaded):
            await writer.submit([row("3")], wait_for_room=False)
        patient = asyncio.create_task(writer.submit([row("4")], wait_for_room=True))
        await asyncio.sleep(0)
        commits.gate.set()
        await asyncio.gather(*tasks, patient)
    assert commits.groups == [["1"], ["2"], ["4"]] or commits.groups == [["1"], ["2", "4"]]


async def test_what_waits_is_bounded_by_its_bytes_too(commits: Commits) -> None:
    size = len(row("1").content)
    async with asyncio.timeout(30), GroupCommit(commits, GroupOptions(waiting_bytes=2 * size)) as writer:
        tasks = await waiting(writer, ["1", "2", "3"], commits)
        with pytest.raises(Overloaded, match=rf"2 judgements of {2 * size} bytes wait"):
            await writer.submit([row("4")], wait_for_room=False)
        patient = asyncio.create_task(writer.submit([row("5")], wait_for_room=True))
        await asyncio.sleep(0)
        commits.gate.set()
        await asyncio.gather(*tasks, patient)
    assert sorted(key for group in commits.groups for key in group) == ["1", "2", "3", "5"]


async def test_by_default_no_more_than_128_mib_wait(commits: Commits) -> None:
    """M16: 1,024 submissions of up to 64 MiB each would be 64 GiB."""
    large = bytes(60 << 20)  # one buffer for all of them
    async with asyncio.timeout(30), GroupCommit(commits) as writer:

        def submit(key: str) -> asyncio.Task[list[Outcome]]:
            return asyncio.create_task(writer.submit([replace(row(key), content=large)], wait_for_room=False))

        tasks = [submit("1")]
        await commits.begun.wait()  # it is being written, and waits no more
        tasks += [submit("2"), submit("3")]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match=f"2 judgements of {2 * len(large)} bytes wait"):
            await writer.submit([replace(row("4"), content=large)], wait_for_room=False)
        small = asyncio.create_task(writer.submit([row("5")], wait_for_room=False))
        await asyncio.sleep(0)
        commits.gate.set()
        await asyncio.gather(*tasks, small)
    assert sorted(key for group in commits.groups for key in group) == ["1", "2", "3", "5"]


async def test_one_submission_always_fits_where_nothing_waits(commits: Commits) -> None:
    commits.gate.set()
    async with asyncio.timeout(30), GroupCommit(commits, GroupOptions(waiting_bytes=1)) as writer:
        assert await writer.submit([row("1"), row("2")], wait_for_room=False)


async def test_who_waits_for_room_when_the_writer_ends_is_told_so(commits: Commits) -> None:
    async with asyncio.timeout(30):
        async with GroupCommit(commits, GroupOptions(waiting=1)) as writer:
            tasks = await waiting(writer, ["1", "2"], commits)
            patient = asyncio.create_task(writer.submit([row("3")], wait_for_room=True))
            await asyncio.sleep(0)
            asyncio.get_running_loop().call_soon(commits.gate.set)
        await asyncio.gather(*tasks)
        with pytest.raises(Unavailable, match="closed"):
            await patient

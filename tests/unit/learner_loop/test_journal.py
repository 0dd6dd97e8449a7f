"""Claims about the learner's journal."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from honed.kit.errors import DataLoss
from honed.learner.loop.journal import Journal, read_pushes, read_updates
from honed.learner.loop.records import PushRecord, Totals, UpdateRecord


def update(number: int) -> UpdateRecord:
    return UpdateRecord(number, 1.0 * number, {"kl": 0.1 * number}, [f"r-{number}/0", f"r-{number}/1"])


def push(version: str, *failures: str, refused: bool = False) -> PushRecord:
    return PushRecord(version, 0.0, 0 if failures else 1, list(failures), [0.01], 1e-6, 2, refused)


def filled(directory: Path, count: int, *, rows: int = 4) -> Journal:
    journal = Journal(directory, rows=rows)
    for number in range(1, count + 1):
        journal.add_update(update(number), number + 1)
    return journal


def files(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "journal" / "updates").iterdir())


async def followed(journal: Journal, from_step: int, **options: bool) -> list[UpdateRecord]:
    return [record async for record in journal.follow(from_step, live=False, **options)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    journal = filled(tmp_path, 2)
    journal.add_push(push("1.1"))
    journal.add_push(push("1.2", "commit: ABORTED", refused=True))
    journal.add_skipped(2, 3.0, ["r-9/0"], "exploded")
    assert read_updates(tmp_path) == [update(1), update(2)]
    assert read_pushes(tmp_path) == [push("1.1"), push("1.2", "commit: ABORTED", refused=True)]
    expected = Totals(trained=4, skipped=1, turn=3, pushed=1, failed=1, refused=1)
    assert journal.totals == Journal(tmp_path).totals == expected
    assert Journal(tmp_path).committed("1.1")
    assert not Journal(tmp_path).committed("1.2")


def test_a_start_reads_the_newest_file_alone(tmp_path: Path) -> None:
    """F5: it takes as long after a week as after an hour."""
    filled(tmp_path, 11)
    for path in sorted((tmp_path / "journal" / "updates").iterdir())[:-1]:
        path.write_text("unreadable")
    again = Journal(tmp_path)
    assert again.totals == Totals(trained=22, turn=12)
    again.add_update(update(12), 13)
    assert again.totals.trained == 24


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8, 10])
def test_a_cut_removes_what_the_checkpoint_does_not_know_and_keeps_the_totals_right(tmp_path: Path, step: int) -> None:
    journal = filled(tmp_path, 10)
    journal.cut(step, gone=2 * (10 - step), undone=1)
    expected = Totals(trained=2 * step, undone=1, turn=11)
    assert journal.totals == Journal(tmp_path).totals == expected
    journal.add_update(update(step + 1), step + 2)
    assert [record.step for record in read_updates(tmp_path)] == list(range(1, step + 2))
    assert journal.totals.trained == Journal(tmp_path).totals.trained == 2 * step + 2


def test_a_cut_that_was_killed_half_way_is_finished_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = filled(tmp_path, 10)
    unlink, left = Path.unlink, 1

    def killed(self: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if self.suffix == ".jsonl":
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
        unlink(self, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            journal.cut(2, gone=16, undone=16)
    again = Journal(tmp_path)
    assert again.totals == Totals(trained=4, undone=16, turn=11)
    assert [record.step for record in read_updates(tmp_path)] == [1, 2]
    assert files(tmp_path) == ["000000000001.jsonl"]


@pytest.mark.parametrize("torn", ['{"n": 3, "at', "", '{"format": 1'])
def test_a_row_that_a_crash_cut_short_does_not_count_and_does_not_spoil_the_next(tmp_path: Path, torn: str) -> None:
    filled(tmp_path, 2)
    with (tmp_path / "journal" / "updates" / "000000000001.jsonl").open("a") as file:
        file.write(torn)
    assert read_updates(tmp_path) == [update(1), update(2)]
    again = Journal(tmp_path)
    again.add_update(update(3))
    assert [record.step for record in read_updates(tmp_path)] == [1, 2, 3]


def test_a_file_whose_header_a_crash_cut_short_does_not_count(tmp_path: Path) -> None:
    filled(tmp_path, 4)
    (tmp_path / "journal" / "updates" / "000000000005.jsonl").write_text('{"format": 1, "tot')
    again = Journal(tmp_path, rows=4)
    assert again.totals.trained == 8
    again.add_update(update(5))
    assert read_updates(tmp_path)[-1] == update(5)


@pytest.mark.parametrize("written", [b"", b'{"form'])
def test_a_reader_passes_over_a_file_whose_header_is_just_being_written(tmp_path: Path, written: bytes) -> None:
    filled(tmp_path, 4)
    (tmp_path / "journal" / "updates" / f"{5:012d}.jsonl").write_bytes(written)
    assert [record.step for record in read_updates(tmp_path)] == [1, 2, 3, 4]


def test_damage_is_an_error_that_names_file_and_line(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    path = tmp_path / "journal" / "updates" / "000000000001.jsonl"
    head, first, second = path.read_text().splitlines()
    path.write_text("\n".join((head, first[5:], second)) + "\n")
    with pytest.raises(DataLoss, match=r"updates/000000000001\.jsonl, line 2 is not JSON"):
        Journal(tmp_path)


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = filled(tmp_path, 2)
    with monkeypatch.context() as patch:

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            journal.add_update(update(3))
    assert journal.totals.trained == 4
    journal.add_update(update(3))
    assert [record.step for record in read_updates(tmp_path)] == [1, 2, 3]


def test_the_disk_space_is_bounded_and_the_totals_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path, most_mb=1)
    wide = {f"metric_{i}": 1.0 / 3 for i in range(400)}
    for number in range(1, 301):
        journal.add_update(UpdateRecord(number, 0.0, wide, [f"r-{number}/0"]), number + 1)
    size = sum(path.stat().st_size for path in (tmp_path / "journal").rglob("*.jsonl"))
    assert size < 1.2 * (1 << 20)
    kept = [record.step for record in read_updates(tmp_path)]
    assert kept == list(range(kept[0], 301))
    assert kept[0] > 1
    assert Journal(tmp_path, most_mb=1).totals == Totals(trained=300, turn=301)


async def test_metrics_are_streamed_from_memory_and_from_disk_alike(tmp_path: Path) -> None:
    filled(tmp_path, 30)
    again = Journal(tmp_path, rows=4)  # knows the newest file
    assert [record.step for record in await followed(again, 0)] == list(range(1, 31))
    assert [record.step for record in await followed(again, 7)] == list(range(7, 31))
    assert [record.step for record in await followed(again, 30)] == [30]
    assert await followed(again, 31) == []
    assert await followed(again, 5, with_rollouts=True) == [update(number) for number in range(5, 31)]
    assert (await followed(again, 5))[0].rollout_ids == ()


async def test_a_follower_sees_old_updates_and_new_ones_once_and_those_made_again_after_a_cut(tmp_path: Path) -> None:
    journal = filled(tmp_path, 3)
    seen: list[int] = []

    async def follow() -> None:
        async for record in journal.follow(2, live=True, with_rollouts=True):
            assert record == update(record.step)
            seen.append(record.step)

    async def reached(count: int) -> None:
        while len(seen) < count:
            await asyncio.sleep(0)

    async with asyncio.timeout(30), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await reached(2)
        journal.add_update(update(4))
        await journal.announce()
        await reached(3)
        journal.cut(2, gone=4, undone=4)
        journal.add_update(update(3))
        await journal.announce()
        await reached(4)
        await journal.close()
    assert seen == [2, 3, 4, 3]


async def test_pushes_are_streamed_from_an_update_on(tmp_path: Path) -> None:
    journal = Journal(tmp_path, rows=3)
    for step in range(1, 11):
        journal.add_push(push(f"1.{step}"))
    again = Journal(tmp_path, rows=3)
    assert [p.version async for p in again.follow_pushes(9, live=False)] == ["1.9", "1.10"]
    assert [p.version async for p in again.follow_pushes(0, live=False)] == [f"1.{step}" for step in range(1, 11)]

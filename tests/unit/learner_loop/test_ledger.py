"""Claims about the learner's books."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from honed.learner.ledger import Ledger, PushRecord, StepRecord, read_pushes, read_steps


def step(number: int) -> StepRecord:
    return StepRecord(number, 1.0 * number, {"kl": 0.1 * number}, [f"r-{number}"])


def push(version: str, *failures: str) -> PushRecord:
    return PushRecord(version, 0.0, 0 if failures else 1, list(failures), [0.01], 1e-6, 2)


def test_books_read_back_as_they_were_written(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in (1, 2):
        ledger.add_step(step(number))
    ledger.add_push(push("1.1"))
    assert read_steps(tmp_path) == Ledger(tmp_path).steps == [step(1), step(2)]
    assert read_pushes(tmp_path) == [push("1.1")]


def test_a_rewind_cuts_off_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    for number in range(1, 6):
        ledger.add_step(step(number))
    ledger.rewind(3)
    ledger.add_step(step(4))
    assert [record.step for record in read_steps(tmp_path)] == [1, 2, 3, 4]


def test_a_rewind_that_was_killed_left_the_book_as_it_was(tmp_path: Path) -> None:
    Ledger(tmp_path).add_step(step(1))
    (tmp_path / "steps.partial").write_text('{"half')
    again = Ledger(tmp_path)
    again.rewind(1)
    assert read_steps(tmp_path) == [step(1)]


def test_a_line_that_a_crash_cut_short_is_not_a_step(tmp_path: Path) -> None:
    Ledger(tmp_path).add_step(step(1))
    with (tmp_path / "steps.jsonl").open("a") as book:
        book.write('{"step": 2, "ended')
    assert read_steps(tmp_path) == [step(1)]


def test_a_damaged_line_in_the_middle_is_an_error_that_names_it(tmp_path: Path) -> None:
    Ledger(tmp_path).add_step(step(1))
    path = tmp_path / "steps.jsonl"
    path.write_text("not json\n" + path.read_text())
    with pytest.raises(ValueError, match=r"steps\.jsonl, line 1 is not JSON"):
        read_steps(tmp_path)


def test_a_push_that_a_crash_cut_short_does_not_spoil_the_next(tmp_path: Path) -> None:
    Ledger(tmp_path).add_push(push("1.1"))
    with (tmp_path / "pushes.jsonl").open("a") as book:
        book.write('{"version": "1.2", "en')
    again = Ledger(tmp_path)
    again.add_push(push("2.2"))
    again.add_push(push("2.3"))
    assert [record.version for record in read_pushes(tmp_path)] == ["1.1", "2.2", "2.3"]


def test_only_a_push_that_reached_every_generator_succeeded(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_push(push("1.1", "commit: UNAVAILABLE"))
    assert not ledger.has_pushed("1.1")
    ledger.add_push(push("1.1"))
    assert ledger.has_pushed("1.1")


async def test_a_follower_sees_old_steps_and_new_ones_once(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.add_step(step(1))
    ledger.add_step(step(2))
    seen: list[int] = []

    async def follow() -> None:
        async for record in ledger.follow(2, live=True):
            seen.append(record.step)
            if record.step == 3:
                return

    async with asyncio.timeout(10), asyncio.TaskGroup() as group:
        group.create_task(follow())
        await asyncio.sleep(0)
        ledger.add_step(step(3))
        await ledger.announce()
    assert seen == [2, 3]
    assert [record.step async for record in ledger.follow(0, live=False)] == [1, 2, 3]

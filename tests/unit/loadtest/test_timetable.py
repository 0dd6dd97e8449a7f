"""When the faults of a soak are due."""

from __future__ import annotations

import random

from loadtest.timetable import AGAIN_AFTER_S, KILL, Timetable


def all_due(table: Timetable, until_s: int) -> list[tuple[int, str]]:
    found = []
    for now in range(until_s):
        while (name := table.next(now)) is not None:
            found.append((now, name))
    return found


def test_kills_come_at_a_steady_pace_and_every_other_fault_once() -> None:
    table = Timetable(["empty", "pause", "fill"], 60.0, 600.0, random.Random(1))
    found = all_due(table, 700)
    assert [at for at, name in found if name == KILL] == list(range(60, 600, 60))
    assert sorted(name for _, name in found if name != KILL) == ["empty", "fill", "pause"]


def test_nothing_is_due_in_the_quiet_time_at_the_end() -> None:
    table = Timetable(["empty", "pause"], 7.0, 100.0, random.Random(2))
    assert max(at for at, _ in all_due(table, 200)) < 100


def test_a_fault_that_could_not_be_done_comes_again_and_counts_as_undone_until_then() -> None:
    table = Timetable(["empty"], 1000.0, 600.0, random.Random(1))
    assert table.next(300.0) == "empty"
    table.failed("empty", 300.0)
    assert table.undone == {"empty"}
    assert table.next(300.0 + AGAIN_AFTER_S - 1) is None
    assert table.next(300.0 + AGAIN_AFTER_S) == "empty"
    table.done("empty")
    assert not table.undone


def test_a_fault_for_which_there_is_no_time_left_stays_undone() -> None:
    table = Timetable(["empty"], 1000.0, 100.0, random.Random(1))
    assert table.next(50.0) == "empty"
    table.failed("empty", 90.0)
    assert all_due(table, 500) == []
    assert table.undone == {"empty"}

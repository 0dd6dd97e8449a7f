"""Claims about the figures of `honed top`: the learner's pace, and what an alarm is."""

from __future__ import annotations

import pytest

from honed.cli.top import _alarms, per_minute

TENS = [0.0, 10.0, 20.0, 30.0]


@pytest.mark.parametrize(
    ("ended", "now", "pace"),
    [
        ([], 5.0, None),
        ([1.0], 5.0, None),
        (TENS, 30.0, 6.0),
        (TENS, 45.0, 6.0),  # the next one is due
        (TENS, 90.0, 2.0),  # it has stopped
        (TENS, 25.0, 6.0),  # another machine's clock
        ([1.0, 1.0], 1.0, None),
    ],
)
def test_the_pace_is_that_of_the_last_updates_and_falls_when_none_come(
    ended: list[float], now: float, pace: float | None
) -> None:
    assert per_minute(ended, now) == pace


def test_an_alarm_is_told_once() -> None:
    learner = {"alarm": "the disk is full"}
    assert _alarms({"alarms": ["learner: the disk is full"]}, learner) == ["learner: the disk is full"]
    assert _alarms({"alarms": []}, learner) == ["the disk is full"]
    assert _alarms({"error": "away"}, {"error": "away"}) == []

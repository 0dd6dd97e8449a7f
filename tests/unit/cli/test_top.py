"""Claims about the figures of `honed top`: the learner's pace, and what an alarm is."""

from __future__ import annotations

import pytest

from honed.cli.top import _alarms, _learner, per_minute
from honed.learner.loop.records import scores_of

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


def test_several_scorers_are_shown_each_by_itself() -> None:
    learner = {
        "version": "1.2", "target_steps": 3, "rollouts_trained": 8, "rollouts_dropped": {}, "versions_pushed": 2,
        "pushes_failed": 0, "state": "training", "served_version": "1.2", "updates_per_minute": None, "staleness_mean": 1.0,
        "staleness_max": 1.0, "score_mean": 0.5, "kl": 0.1, "entropy": 2.0,
    }  # fmt: skip
    assert _learner({**learner, "scores": {"people": 0.25, "price": -1.0}})["scores"] == "people +0.250, price -1.000"
    assert "scores" not in _learner({**learner, "scores": {"people": 0.25}}), "one alone is the score"
    assert scores_of({"score_mean": 1.0, "score/b": 2.0, "score/a": 3.0, "kl": 4.0}) == {"a": 3.0, "b": 2.0}


def test_an_alarm_is_told_once() -> None:
    learner = {"alarm": "the disk is full"}
    assert _alarms({"alarms": ["learner: the disk is full"]}, learner) == ["learner: the disk is full"]
    assert _alarms({"alarms": []}, learner) == ["the disk is full"]
    assert _alarms({"error": "away"}, {"error": "away"}) == []


@pytest.mark.parametrize(
    ("figures", "shown"),
    [
        ({"score_mean": 1.0, "kl": 3.5, "entropy": 2.0}, "1 at most; score +1.000, KL 3.50, entropy 2.00"),
        ({"score_mean": 1.0, "kl": None, "entropy": 2.0}, "1 at most; score +1.000, entropy 2.00"),
        ({"score_mean": None, "kl": None, "entropy": None}, "1 at most"),
    ],
)
def test_what_the_algorithm_does_not_measure_is_not_shown(figures: dict[str, float | None], shown: str) -> None:
    learner = {
        "state": "training", "version": "1.2", "target_steps": 9, "rollouts_trained": 4, "rollouts_dropped": {},
        "served_version": "1.2", "versions_pushed": 2, "pushes_failed": 0, "updates_per_minute": 6.0,
        "staleness_mean": 0.5, "staleness_max": 1.0, "scores": {}, **figures,
    }  # fmt: skip
    assert _learner(learner)["pace"].endswith(shown)

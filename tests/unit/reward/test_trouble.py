"""Claims about what is told of scorers that do not work."""

from __future__ import annotations

import pytest

from honed.reward.scorer import NotAScore, ScorerFailed
from honed.reward.trouble import Trouble, reason_of

WRONG = NotAScore("tone", "1", "it returned nan, which is not finite", 3)
RAISED = ScorerFailed("tone", "1", "KeyError: 'lexicon'", 0)
AWAY = ScorerFailed("far", "1", "UNAVAILABLE: no connection", 0)
AWAY.__cause__ = ConnectionError("refused")


class Times:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def seen_for(trouble: Trouble, times: Times, seconds: float, *errors: Exception) -> None:
    """Fails once a second for so long."""
    for _ in range(int(seconds) + 1):
        trouble.failed(errors)
        times.now += 1.0


def test_the_alarm_names_the_scorer_and_what_to_do_and_ends_with_the_next_score() -> None:
    trouble = Trouble()
    assert trouble.facts() == {}
    trouble.failed([WRONG, WRONG])
    assert trouble.facts() == {
        "alarm": "scorer 'tone' (1) failed: it returned nan, which is not finite; rollouts go back to the queue and none "
        "trains until it works: mend the scorer, and start the reward service again"
    }
    trouble.failed([AWAY])
    assert trouble.alarm.endswith("if it does not come back by itself, see to what it calls")
    trouble.scored()
    assert trouble.facts() == {}


def test_answers_of_the_wrong_form_alone_for_a_minute_are_taken_for_a_broken_scorer() -> None:
    times = Times()
    trouble = Trouble(times)
    seen_for(trouble, times, 59, WRONG, WRONG)
    assert trouble.broken == ""
    trouble.failed([WRONG, WRONG])
    assert trouble.facts()["broken"].startswith("scorer 'tone' (1) failed: it returned nan, which is not finite; ")


def test_a_scorer_is_not_broken_by_two_answers_however_long_it_takes_for_them() -> None:
    times = Times()
    trouble = Trouble(times)
    for broken in (False, False, True):
        trouble.failed([WRONG])
        times.now += 100.0
        assert bool(trouble.broken) == broken


@pytest.mark.parametrize("other", [RAISED, AWAY, RuntimeError("out of memory")])
def test_whatever_may_pass_is_waited_for_under_the_alarm(other: Exception) -> None:
    times = Times()
    trouble = Trouble(times)
    seen_for(trouble, times, 200, WRONG, other)
    seen_for(trouble, times, 50, WRONG)
    assert (bool(trouble.alarm), trouble.broken) == (True, "")
    seen_for(trouble, times, 20, WRONG)
    assert trouble.broken


def test_a_scorer_that_has_scored_is_never_taken_for_broken() -> None:
    times = Times()
    trouble = Trouble(times)
    trouble.scored()
    seen_for(trouble, times, 200, WRONG)
    assert (bool(trouble.alarm), trouble.broken) == (True, "")


def test_reasons_leave_out_where_in_its_batch_a_sample_stood() -> None:
    assert reason_of(RAISED) == "scorer 'tone' (1) failed: KeyError: 'lexicon'"
    assert reason_of(RuntimeError("out of memory")) == "RuntimeError: out of memory"

"""Claims about what the conductor makes of the members that have registered."""

from __future__ import annotations

from typing import Any

from honed.conductor.roster import Roster
from honed.config import RunSettings
from honed.queue.members import Member

NO_FLEET: Any = None


def test_what_a_member_calls_an_alarm_is_an_alarm_of_the_run() -> None:
    roster = Roster(RunSettings(), NO_FLEET)
    assert roster.alarms == []
    late = Member("generation-0", "a:1", facts={"replica": "0", "alarm": "a prompt is never finished in time"})
    roster.members = {"generation": [late, Member("generation-1", "a:2")], "reward": []}
    assert roster.alarms == ["generation-0: a prompt is never finished in time"]


def test_scoring_is_broken_where_every_process_of_the_reward_service_says_so() -> None:
    roster = Roster(RunSettings(), NO_FLEET)
    assert roster.broken == ""
    wrong = Member("reward-0", "b:1", facts={"broken": "scorer 'f' gave no score"})
    roster.members = {"generation": [Member("generation-0", "a:1")], "reward": [wrong, Member("reward-1", "b:2")]}
    assert roster.broken == "", "the other one may score"
    roster.members = {"generation": [], "reward": [wrong, wrong]}
    assert roster.broken == "scorer 'f' gave no score"

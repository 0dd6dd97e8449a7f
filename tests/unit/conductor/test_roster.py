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

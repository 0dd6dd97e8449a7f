"""Claims about the windows of the benchmark of own cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from loadtest.own_cores import Window, bind_beside_the_learner, updates_per_second


def test_a_rate_counts_what_ended_in_the_window():
    assert updates_per_second([9.0, 14.0, 10.5, 12.5, 11.5, 20.0], Window(10.0, 13.0)) == 1.0
    with pytest.raises(ValueError, match="held 1 updates: make --seconds longer"):
        updates_per_second([9.0, 10.5], Window(10.0, 13.0))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux binds processes to cores")
def test_everything_beside_the_learner_is_bound_and_nothing_else():
    everywhere = os.sched_getaffinity(0)
    one = {min(everywhere)}
    wait = [sys.executable, "-c", "input()"]
    learner, other = (subprocess.Popen([*wait, *name], stdin=subprocess.PIPE) for name in (["serve", "learner", "x"], ["x"]))
    try:
        bind_beside_the_learner(os.getpid(), sorted(one))
        assert [os.sched_getaffinity(pid) for pid in (learner.pid, other.pid, 0)] == [everywhere, one, everywhere]
    finally:
        for child in (learner, other):
            child.communicate(b"\n")

"""The admission formula, every branch."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from honed.kit.errors import InvalidArgument
from honed.queue.admission import AdmissionPolicy

POLICY = AdmissionPolicy(batch=8, max_staleness=2, max_in_flight=16)


def test_a_fresh_run_may_fill_what_is_in_flight():
    assert POLICY.capacity(version=0, accepted=0, running=0) == 16


def test_running_rollouts_take_their_share_of_what_is_in_flight():
    assert POLICY.capacity(version=0, accepted=0, running=10) == 6


def test_the_staleness_bound_holds_when_it_is_the_tighter_one():
    # (2 + 0 + 1) * 8 = 24 rollouts may ever be accepted at version 0.
    assert POLICY.capacity(version=0, accepted=20, running=0) == 4
    assert POLICY.capacity(version=0, accepted=20, running=3) == 1


def test_nothing_is_admitted_when_the_next_rollout_would_be_too_stale():
    assert POLICY.capacity(version=0, accepted=24, running=0) == 0


def test_a_new_version_makes_room_for_one_batch():
    assert POLICY.capacity(version=1, accepted=24, running=0) == 8


def test_capacity_is_never_negative():
    assert POLICY.capacity(version=0, accepted=100, running=0) == 0
    assert POLICY.capacity(version=0, accepted=0, running=100) == 0


def test_without_staleness_exactly_one_batch_runs_at_a_time():
    policy = AdmissionPolicy(batch=8, max_staleness=0, max_in_flight=100)
    assert policy.capacity(version=5, accepted=40, running=0) == 8
    assert policy.capacity(version=5, accepted=40, running=8) == 0


def test_after_a_resume_there_is_no_burst():
    policy = AdmissionPolicy(batch=8, max_staleness=1, max_in_flight=1000)
    assert policy.capacity(version=50, accepted=policy.accepted_at_resume(50), running=0) == 2 * 8
    assert policy.capacity(version=50, accepted=0, running=0) > 400  # what it prevents


@given(
    batch=st.integers(1, 64),
    max_staleness=st.integers(0, 8),
    max_in_flight=st.integers(1, 256),
    version=st.integers(0, 100),
    ahead=st.integers(0, 1000),
)
def test_whatever_is_admitted_is_fresh_enough_when_its_turn_comes(batch, max_staleness, max_in_flight, version, ahead):
    policy = AdmissionPolicy(batch, max_staleness, max_in_flight)
    accepted = version * batch + ahead
    admitted = policy.capacity(version, accepted, running=0)
    for k in range(accepted, accepted + admitted):
        assert k // batch - version <= max_staleness


@pytest.mark.parametrize("field", ["batch", "max_in_flight", "max_staleness"])
def test_a_senseless_policy_is_refused_by_name(field):
    values = {"batch": 1, "max_staleness": 0, "max_in_flight": 1} | {field: -1}
    with pytest.raises(InvalidArgument, match=field):
        AdmissionPolicy(**values)


@pytest.mark.parametrize("field", ["version", "accepted", "running"])
def test_a_negative_count_is_refused_by_name(field):
    values = {"version": 0, "accepted": 0, "running": 0} | {field: -1}
    with pytest.raises(InvalidArgument, match=field):
        POLICY.capacity(**values)

"""The admission formula, without a clock or a server."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from honed.kit.errors import InvalidArgument
from honed.queue.admission import AdmissionPolicy, Cursor, LoopState

POLICY = AdmissionPolicy(batch=8, max_staleness=2, max_in_flight=100)


def state(update: int = 0, served: int | None = None, waiting: int = 0, running: int = 0) -> LoopState:
    return LoopState(update, update if served is None else served, waiting, running)


@pytest.mark.parametrize(
    ("at", "lead", "expected"),
    [
        (state(), None, 24),
        (state(), 1.0, 16),
        (state(), 1.5, 20),
        (state(update=7), None, 24),
        (state(update=7, served=6), None, 16),
        (state(update=7, served=4), None, 0),
        (state(update=7, waiting=8), 1.0, 8),
        (state(update=7, waiting=8, running=8), 1.0, 0),
        (state(update=7, served=6, waiting=8), 1.0, 0),
        (state(running=95), None, 0),
        (state(waiting=30), None, 0),
    ],
)
def test_the_formula(at: LoopState, lead: float | None, expected: int) -> None:
    assert POLICY.capacity(at, lead) == expected


def test_no_more_than_may_be_in_flight() -> None:
    assert AdmissionPolicy(8, 2, 7).capacity(state(running=3)) == 4


def test_the_lead_never_holds_back_what_the_next_batch_lacks() -> None:
    behind = state(update=9, served=7, waiting=3)
    assert POLICY.fresh(behind, 1.0) < 0
    assert POLICY.capacity(behind, 1.0) == 5
    assert POLICY.capacity(state(update=9, served=6, waiting=3), 1.0) == 0, "these would drop as stale"


@given(
    batch=st.integers(1, 20), bound=st.integers(0, 4), in_flight=st.integers(1, 60), update=st.integers(0, 50),
    behind=st.integers(0, 5), waiting=st.integers(0, 60), running=st.integers(0, 60), lead=st.none() | st.floats(0, 6),
)  # fmt: skip
def test_what_is_admitted_stays_fresh_if_each_batch_is_taken_in_order(
    batch: int, bound: int, in_flight: int, update: int, behind: int, waiting: int, running: int, lead: float | None
) -> None:
    at = LoopState(update, max(0, update - behind), waiting, running)
    capacity = AdmissionPolicy(batch, bound, in_flight).capacity(at, lead)
    assert capacity >= 0
    if capacity:
        assert running + capacity <= in_flight
        last = waiting + running + capacity - 1
        assert update + last // batch - at.served <= bound


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize("lost", range(8))
def test_a_remainder_that_is_no_whole_prompt_does_not_hang_the_run(max_staleness: int, lost: int) -> None:
    policy = AdmissionPolicy(batch=8, max_staleness=max_staleness, max_in_flight=100, samples=4)
    waiting = 8 - lost
    if waiting < 8:
        assert policy.prompts(state(waiting=waiting), lead=0.0) >= 1
    assert policy.prompts(state(waiting=8), lead=0.0) == 0
    assert policy.prompts(state(waiting=5, running=2), lead=0.0) == 0, "it may fit once these have come"


def test_a_run_that_ends_admits_what_it_still_needs_in_whole_prompts() -> None:
    policy = AdmissionPolicy(batch=8, max_staleness=2, max_in_flight=100, samples=4)
    assert [policy.prompts(state(), wanted=wanted) for wanted in (-3, 0, 1, 4, 5, 1000)] == [0, 0, 1, 1, 2, 6]


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"max_staleness": -1}, {"max_in_flight": 0}, {"samples": 0}])
def test_a_policy_that_can_admit_nothing_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(InvalidArgument, match=next(iter(wrong))):
        AdmissionPolicy(**{"batch": 8, "max_staleness": 2, "max_in_flight": 9, **wrong})


@pytest.mark.parametrize("name", ["update", "served", "waiting", "running"])
def test_counts_are_not_negative(name: str) -> None:
    with pytest.raises(InvalidArgument, match=name):
        LoopState(**{"update": 1, "served": 1, "waiting": 1, "running": 1, name: -1})


def test_a_cursor_is_read_as_it_was_written() -> None:
    cursor = Cursor(position=9, skipped=2, file=5, carried={"scored/dropped:stale": 4})
    assert Cursor.from_fields({b"position": b"9", b"state": cursor.state().encode()}) == cursor
    assert Cursor.from_fields({}) == Cursor()
    assert Cursor.from_fields({b"position": b"7"}) == Cursor(position=7, file=7), "of a build before prompt sources"

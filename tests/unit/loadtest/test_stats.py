"""The arithmetic of a load test."""

import random
import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from loadtest.stats import Objectives, Outcome, Quantiles, percentile, poisson_arrivals, summarise


def done(scheduled: float, *arrivals: float, sent: float | None = None, units: tuple[int, ...] = ()) -> Outcome:
    return Outcome(scheduled, scheduled if sent is None else sent, "OK", arrivals, units or (1,) * len(arrivals))


def failed(scheduled: float, code: str = "UNAVAILABLE", *arrivals: float) -> Outcome:
    return Outcome(scheduled, scheduled, code, arrivals, (1,) * len(arrivals), "gone")


def test_arrivals_repeat_with_their_seed_and_differ_without():
    assert list(poisson_arrivals(20, 5, random.Random(1))) == list(poisson_arrivals(20, 5, random.Random(1)))
    assert list(poisson_arrivals(20, 5, random.Random(1))) != list(poisson_arrivals(20, 5, random.Random(2)))


def test_arrivals_rise_within_the_test():
    arrivals = list(poisson_arrivals(50, 3, random.Random(3)))
    assert arrivals == sorted(arrivals)
    assert arrivals[0] > 0
    assert arrivals[-1] < 3


def test_arrivals_are_poisson():
    """Mean and deviation of an exponential gap are both 1 / rate; the counts of seconds have their mean as variance."""
    arrivals = list(poisson_arrivals(40, 500, random.Random(4)))
    gaps = [b - a for a, b in pairwise(arrivals)]
    assert statistics.mean(gaps) == pytest.approx(1 / 40, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(1 / 40, rel=0.05)
    counts = [0] * 500
    for at in arrivals:
        counts[int(at)] += 1
    assert statistics.variance(counts) == pytest.approx(40, rel=0.2)


@pytest.mark.parametrize(("rate", "seconds"), [(0, 1), (-1, 1), (1, 0), (float("nan"), 1), (1, float("inf"))])
def test_a_load_without_rate_or_length_is_refused(rate: float, seconds: float):
    with pytest.raises(ValueError, match="must be a positive number"):
        poisson_arrivals(rate, seconds, random.Random(0))


def test_a_percentile_is_a_value_that_occurred():
    values = [float(n) for n in range(1, 101)]
    random.Random(0).shuffle(values)
    assert [percentile(values, share) for share in (0.5, 0.9, 0.99, 1.0, 0.07)] == [50, 90, 99, 100, 7]
    assert percentile([3.0], 0.5) == 3.0
    assert percentile([1.0, 2.0], 0.5) == 1.0


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0.01, 1.0))
def test_a_percentile_has_its_share_at_or_below(values: list[float], share: float):
    found = percentile(values, share)
    below = sum(value < found for value in values)
    assert found in values
    assert below < share * len(values) + 1e-6
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0), ([1.0], 1.1)])
def test_a_percentile_of_nothing_is_refused(values: list[float], share: float):
    with pytest.raises(ValueError, match=r"values|share"):
        percentile(values, share)


def test_quantiles_are_in_milliseconds():
    assert Quantiles.of([0.001 * n for n in range(1, 101)]) == Quantiles(100, 50.0, 90.0, 99.0)
    assert Quantiles.of([]) is None


def test_latency_counts_from_the_scheduled_arrival():
    """A request that the generator sent two seconds late shows them, or a stalled server would look fast."""
    outcome = done(1.0, 3.5, 4.0, sent=3.0)
    assert outcome.ttft == 2.5
    assert outcome.e2e == 3.0
    [lag] = [summarise([outcome], Objectives(), 1.0).lag]
    assert lag is not None
    assert lag.p50_ms == 2000


def test_gaps_share_a_message_among_its_tokens():
    assert list(done(0, 1.0, 2.0, 2.5, units=(3, 2, 1)).gaps) == [0.5, 0.5, 0.5]
    assert list(done(0, 1.0).gaps) == []
    assert list(done(0, 1.0, 2.0, units=(1, 0)).gaps) == []


def test_goodput_counts_what_met_every_objective():
    outcomes = [done(0, 0.1, 0.5), done(0, 0.3, 0.5), done(0, 0.1, 1.5), failed(0)]
    assert summarise(outcomes, Objectives(), 2.0).goodput == 1.5
    assert summarise(outcomes, Objectives(ttft=0.2), 2.0).goodput == 1.0
    assert summarise(outcomes, Objectives(e2e=1.0), 2.0).goodput == 1.0
    both = summarise(outcomes, Objectives(ttft=0.2, e2e=1.0), 2.0)
    assert both.goodput == 0.5
    assert both.good_unit_rate == 1.0
    assert both.unit_rate == 3.0


def test_errors_are_counted_by_code_and_give_no_latency():
    outcomes = [done(0, 0.1), failed(0), failed(1), failed(1, "DEADLINE_EXCEEDED", 9.0)]
    summary = summarise(outcomes, Objectives(), 2.0)
    assert summary.errors == {"UNAVAILABLE": 2, "DEADLINE_EXCEEDED": 1}
    assert (summary.requests, summary.succeeded, summary.offered_rate) == (4, 1, 2.0)
    assert summary.ttft == Quantiles(1, 100.0, 100.0, 100.0)


def test_an_answer_without_a_message_is_no_success():
    summary = summarise([Outcome(0, 0, "OK")], Objectives(), 1.0)
    assert (summary.succeeded, summary.errors) == (0, {"OK": 1})


def test_rates_count_the_time_until_the_last_answer():
    assert summarise([done(0, 4.0)], Objectives(), 2.0).achieved_rate == 0.25
    assert summarise([done(0, 1.0)], Objectives(), 2.0).achieved_rate == 0.5


def test_a_test_without_requests_has_no_latencies():
    summary = summarise([], Objectives(), 2.0)
    assert (summary.requests, summary.ttft, summary.e2e, summary.goodput) == (0, None, None, 0.0)

"""The arithmetic of a load test: arrivals, latencies, percentiles, goodput. No clock and no I/O.

Times are seconds from the start of the test. A latency counts from the *scheduled* arrival of its request, not from the moment
that it was sent: a generator that falls behind adds its own delay to what it reports, and so cannot hide a slow server
("coordinated omission").
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

OK = "OK"


def poisson_arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    """Arrival times in `[0, seconds)` of a Poisson process: independent, exponential gaps with mean `1 / rate`.

    Args:
        rate: Mean arrivals a second.
        seconds: Length of the test.
        rng: Source of the gaps.

    Raises:
        ValueError: `rate` or `seconds` is not a positive finite number.
    """
    for name, value in (("rate", rate), ("seconds", seconds)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be a positive number, got {value}")
    return _arrivals(rate, seconds, rng)


def _arrivals(rate: float, seconds: float, rng: random.Random) -> Iterator[float]:
    at = rng.expovariate(rate)
    while at < seconds:
        yield at
        at += rng.expovariate(rate)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least `share` of `values` do not exceed (nearest rank): always a value that occurred.

    Raises:
        ValueError: there are no values, or `share` is not in (0, 1].
    """
    if not values:
        raise ValueError("no values, so no percentile")
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    # A little less than the product: 0.07 * 100 is 7.000000000000001 in floating point.
    return sorted(values)[math.ceil(share * len(values) - 1e-9) - 1]


@dataclass(frozen=True, slots=True)
class Quantiles:
    """Percentiles of one latency, in milliseconds; `count` values went in."""

    count: int
    p50_ms: float
    p90_ms: float
    p99_ms: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Quantiles | None:
        """The percentiles of times in seconds; None if there are none."""
        if not seconds:
            return None
        p50, p90, p99 = (round(percentile(seconds, share) * 1e3, 3) for share in (0.5, 0.9, 0.99))
        return cls(len(seconds), p50, p90, p99)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        scheduled: When it was to arrive.
        sent: When it was sent.
        code: gRPC's status, by name.
        arrivals: When each message of the answer came; a unary call has one.
        units: Tokens (or scored items) in each of these messages.
        reason: What the error said; empty for a success.
    """

    scheduled: float
    sent: float
    code: str
    arrivals: tuple[float, ...] = ()
    units: tuple[int, ...] = ()
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether a whole answer came."""
        return self.code == OK and bool(self.arrivals)

    @property
    def ttft(self) -> float:
        """Seconds from the scheduled arrival to the first message: the time to the first token."""
        return self.arrivals[0] - self.scheduled

    @property
    def e2e(self) -> float:
        """Seconds from the scheduled arrival to the last message."""
        return self.arrivals[-1] - self.scheduled

    @property
    def gaps(self) -> Iterator[float]:
        """Seconds between tokens. A message of k tokens counts as k gaps of one k-th of the wait for it."""
        for before, at, units in zip(self.arrivals, self.arrivals[1:], self.units[1:], strict=False):
            for _ in range(units):
                yield (at - before) / units


@dataclass(frozen=True, slots=True)
class Objectives:
    """What a request must reach to count as good, in seconds; None asks for nothing."""

    ttft: float | None = None
    e2e: float | None = None

    def met(self, outcome: Outcome) -> bool:
        """Whether a request succeeded in time."""
        return outcome.ok and not (
            (self.ttft is not None and outcome.ttft > self.ttft) or (self.e2e is not None and outcome.e2e > self.e2e)
        )


@dataclass(frozen=True, slots=True)
class Summary:
    """The figures of a test.

    Attributes:
        requests: Requests sent.
        succeeded: Requests with a whole answer.
        errors: How many ended under each other status.
        offered_rate: Requests a second that were to arrive.
        achieved_rate: Requests a second that succeeded.
        goodput: Requests a second that succeeded within the objectives.
        unit_rate: Tokens (or scored items) a second of all successes.
        good_unit_rate: The same of the good ones.
        ttft: Time to the first message.
        inter_token: Time between tokens.
        e2e: Time to the last message.
        lag: How late requests were sent: the generator's own delay. It should be small beside the latencies, or the generator
            is what was measured.
        seconds: From the start to the last answer, at least the length of the test.
    """

    requests: int
    succeeded: int
    errors: dict[str, int]
    offered_rate: float
    achieved_rate: float
    goodput: float
    unit_rate: float
    good_unit_rate: float
    ttft: Quantiles | None
    inter_token: Quantiles | None
    e2e: Quantiles | None
    lag: Quantiles | None
    seconds: float


def summarise(outcomes: Sequence[Outcome], objectives: Objectives, seconds: float) -> Summary:
    """Adds up a test that was scheduled to last `seconds`."""
    succeeded = [outcome for outcome in outcomes if outcome.ok]
    good = [outcome for outcome in succeeded if objectives.met(outcome)]
    # What is answered after the last arrival took time too; leaving that out would make an overloaded server look faster.
    elapsed = max([seconds, *(outcome.arrivals[-1] for outcome in succeeded)])
    return Summary(
        requests=len(outcomes),
        succeeded=len(succeeded),
        errors=dict(Counter(outcome.code for outcome in outcomes if not outcome.ok).most_common()),
        offered_rate=len(outcomes) / seconds,
        achieved_rate=len(succeeded) / elapsed,
        goodput=len(good) / elapsed,
        unit_rate=_units(succeeded) / elapsed,
        good_unit_rate=_units(good) / elapsed,
        ttft=Quantiles.of([outcome.ttft for outcome in succeeded]),
        inter_token=Quantiles.of([gap for outcome in succeeded for gap in outcome.gaps]),
        e2e=Quantiles.of([outcome.e2e for outcome in succeeded]),
        lag=Quantiles.of([outcome.sent - outcome.scheduled for outcome in outcomes]),
        seconds=elapsed,
    )


def _units(outcomes: Sequence[Outcome]) -> int:
    return sum(sum(outcome.units) for outcome in outcomes)

"""From updates to what is compared: episodes a second, what one costs, the score at a time, and whether it fell again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

WARM_UP = 2
"""Updates after the first that are left out of a rate: caches fill, and the first rollouts came while services started."""
_FALL = 0.9


@dataclass(frozen=True)
class Update:
    """One update of a side: when it ended, seconds of the clock, and the mean score of its batch."""

    at: float
    score: float


@dataclass(frozen=True)
class Training:
    """What a side did.

    Attributes:
        updates: In their order.
        cpu: Seconds of the clock, and the processor time that all processes of the side had used by then: at the beginning and
            at the end of what is looked at.
    """

    updates: Sequence[Update]
    cpu: tuple[tuple[float, float], tuple[float, float]]


@dataclass(frozen=True)
class Side:
    """What came of one side's training with one seed.

    Attributes:
        episodes_per_second: From the end of the warm-up on.
        cpu_ms_per_episode: Processor time of all its processes. Other load on the machine changes it little.
        score: Mean of the updates in the last tenth of the common time.
        best: The best mean of any tenth.
        updates: In the common time.
    """

    episodes_per_second: float
    cpu_ms_per_episode: float
    score: float
    best: float
    updates: int

    @property
    def collapsed(self) -> bool:
        """Whether the score fell under nine tenths of what it had been."""
        return not self.score >= _FALL * self.best


def measure(training: Training, *, batch: int, seconds: float) -> Side:
    """Reads what a side did.

    Args:
        training: Of one seed.
        batch: Episodes of an update.
        seconds: The common time, from the end of the first update on.

    Raises:
        ValueError: There are too few updates.
    """
    updates = training.updates
    start = updates[0].at if updates else 0.0
    within = [update for update in updates if update.at - start <= seconds]
    if len(within) < WARM_UP + 3:
        raise ValueError(f"{len(within)} updates in {seconds:g} s are too few to measure: train longer")
    steady = within[WARM_UP:]
    rate = batch * (len(steady) - 1) / (steady[-1].at - steady[0].at)
    tenths = [
        statistics.fmean(scores)
        for number in range(10)
        if (scores := [update.score for update in within if min(9, int(10 * (update.at - start) / seconds)) == number])
    ]
    return Side(rate, _cpu_ms_per_episode(training, batch), tenths[-1], max(tenths), len(within))


def _cpu_ms_per_episode(training: Training, batch: int) -> float:
    (began, before), (ended, after) = training.cpu
    count = sum(began < update.at <= ended for update in training.updates)
    return 1e3 * (after - before) / (batch * count) if count else math.nan


def medians(sides: Sequence[Side]) -> dict[str, float]:
    """Of all figures over the seeds; how many collapsed."""
    return {
        "episodes_per_second": statistics.median(side.episodes_per_second for side in sides),
        "cpu_ms_per_episode": statistics.median(side.cpu_ms_per_episode for side in sides),
        "score": statistics.median(side.score for side in sides),
        "collapsed": float(sum(side.collapsed for side in sides)),
    }

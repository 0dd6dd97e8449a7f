"""Claims about the normalisation of scores."""

from __future__ import annotations

import random
import statistics

import pytest

from honed.kit.errors import InvalidArgument
from honed.learner.normalise import GainBias, Running

_SOURCE = random.Random(0)
SCORES = [_SOURCE.gauss(3.0, 5.0) for _ in range(256)]


def test_detail_7_gain_and_bias_give_the_reference_samples_mean_0_and_deviation_1() -> None:
    normaliser = GainBias()
    assert normaliser([1.0, 2.0]) == [1.0, 2.0]
    normaliser.fit(SCORES)
    rewards = normaliser(SCORES)
    assert statistics.fmean(rewards) == pytest.approx(0.0, abs=1e-12)
    assert statistics.pstdev(rewards) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("scores", [[], [1.0], [2.0] * 256])
def test_scores_that_say_nothing_cannot_be_normalised_by(scores: list[float]) -> None:
    with pytest.raises(InvalidArgument, match="scores"):
        GainBias().fit(scores)


def test_running_moments_are_those_of_all_scores_however_they_came() -> None:
    normaliser = Running(shift_mean=True)
    normaliser(SCORES[:1])
    normaliser(SCORES[1:100])
    last = normaliser(SCORES[100:])
    assert normaliser.std == pytest.approx(statistics.stdev(SCORES), rel=1e-12)
    assert last[0] == pytest.approx((SCORES[100] - statistics.fmean(SCORES)) / statistics.stdev(SCORES), rel=1e-9)


def test_running_keeps_the_mean_unless_told_otherwise() -> None:
    assert Running()([9.0, 11.0]) == pytest.approx([9.0 / 2**0.5, 11.0 / 2**0.5])


def test_rewards_are_clipped_after_scaling() -> None:
    assert GainBias(gain=2.0, clip=3.0)([-5.0, 1.0, 5.0]) == [-3.0, 2.0, 3.0]


def test_a_normaliser_goes_on_from_its_state() -> None:
    first, second = Running(clip=10.0), Running(clip=10.0)
    first(SCORES[:100])
    second.load_state(first.state())
    assert second(SCORES[100:]) == first(SCORES[100:])

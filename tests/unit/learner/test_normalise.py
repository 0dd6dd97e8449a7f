"""Claims about the normalisation of scores."""

from __future__ import annotations

import dataclasses
import logging
import random
import statistics
from collections.abc import Callable

import pytest
from tests.unit.learner.samples import random_episodes

from honed.kit.errors import InvalidArgument
from honed.learner.data.episode import Episode
from honed.learner.objectives.normalise import (
    FittedOnFirstBatch,
    GainBias,
    RewardNormaliser,
    Running,
    batch_rewards,
    placed_rewards,
)

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


def test_a_first_batch_whose_scores_are_all_equal_gives_rewards_of_zero_and_the_next_one_fits(
    caplog: pytest.LogCaptureFixture,
) -> None:
    normaliser = FittedOnFirstBatch(GainBias())
    with caplog.at_level(logging.WARNING):
        assert normaliser([3.0, 3.0, 3.0]) == [0.0, 0.0, 0.0]
    assert "all scores of the batch are the same" in caplog.text
    assert normaliser([4.0]) == [0.0]
    restarted = FittedOnFirstBatch(GainBias())
    restarted.load_state(normaliser.state())
    for each in (normaliser, restarted):
        assert each([1.0, 3.0]) == [-1.0, 1.0]
        assert each([5.0, 5.0]) == [3.0, 3.0], "fitted for good"


def test_the_price_of_a_missing_token_neither_fits_the_normalisation_nor_passes_through_it() -> None:
    scores = [-10.0, -12.0, -1.0, -8.0, -1.0]
    missing = [False, False, True, False, True]
    episodes = [
        dataclasses.replace(episode, reward=score, missing=lacks)
        for episode, score, lacks in zip(random_episodes(5), scores, missing, strict=True)
    ]
    rewards = batch_rewards(FittedOnFirstBatch(GainBias(clip=0.5)), episodes)
    alone = FittedOnFirstBatch(GainBias(clip=0.5))([-10.0, -12.0, -8.0])
    assert rewards == [alone[0], alone[1], -1.0, alone[2], -1.0]
    assert statistics.fmean([rewards[0], rewards[1], rewards[3]]) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("normaliser", [FittedOnFirstBatch(GainBias()), Running(), GainBias()])
def test_a_batch_in_which_every_token_is_missing_has_its_price_alone(normaliser: RewardNormaliser) -> None:
    before = normaliser.state()
    episodes = [dataclasses.replace(episode, reward=-1.0, missing=True) for episode in random_episodes(3)]
    assert batch_rewards(normaliser, episodes) == [-1.0, -1.0, -1.0]
    assert normaliser.state() == before


def dense_episodes() -> list[Episode]:
    """Every second one has rewards of tokens, and something for the whole response beside them; one lacks its token."""
    source = random.Random(1)
    episodes = []
    for index, episode in enumerate(random_episodes(8, seed=2)):
        tokens = tuple(source.gauss(0, 1) for _ in episode.response) if index % 2 else ()
        episodes.append(dataclasses.replace(episode, token_rewards=tokens, reward=episode.reward + sum(tokens)))
    episodes[0] = dataclasses.replace(episodes[0], missing=True)
    return episodes


@pytest.mark.parametrize("make", [GainBias, lambda: FittedOnFirstBatch(GainBias()), Running, lambda: Running(shift_mean=True)])
def test_rewards_of_tokens_add_up_to_the_normalised_reward_and_keep_their_proportions(
    make: Callable[[], RewardNormaliser],
) -> None:
    episodes, normaliser = dense_episodes(), make()
    rewards = batch_rewards(normaliser, episodes)
    placed = placed_rewards(normaliser, episodes, rewards)
    assert placed is not None
    gain, _ = normaliser.line
    for episode, reward, row in zip(episodes, rewards, placed, strict=True):
        assert len(row) == len(episode.response)
        assert sum(row) == pytest.approx(reward, abs=1e-9)
        expected = [gain * each for each in episode.token_rewards] or [0.0] * len(row)
        assert row[:-1] == pytest.approx(expected[:-1])
    assert placed[0][-1] == episodes[0].reward, "the price of a missing token is not normalised"


def test_the_clip_bounds_each_token_and_what_is_for_the_whole_response() -> None:
    normaliser = GainBias(clip=1.0)
    normaliser.load_state({"gain": 2.0, "bias": -0.5})
    [episode] = random_episodes(1, longest=1)
    episode = dataclasses.replace(
        episode, response=(1, 2, 3), logprobs=(-1.0,) * 3, token_rewards=(3.0, 0.25, -3.0), reward=0.25 + 5.0
    )
    assert placed_rewards(normaliser, [episode], batch_rewards(normaliser, [episode])) == [[1.0, 0.5, -1.0 + 1.0]]


def test_without_rewards_of_tokens_nothing_is_placed() -> None:
    episodes = random_episodes(3)
    assert placed_rewards(GainBias(), episodes, [e.reward for e in episodes]) is None

"""Claims about updates on rewards of tokens."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.unit.learner.samples import make_trainer, random_episodes

from honed.learner.data.episode import Episode
from honed.learner.objectives import advantage
from honed.learner.objectives.kl import FixedKL
from honed.learner.train.trainer import TrainSettings

GROUPS = 2


def episodes(at: int | None) -> list[Episode]:
    """The same rewards each time: of whole responses (None), or of one token, the first or the last."""
    found = []
    for index, episode in enumerate(random_episodes(12, seed=5)):
        tokens: tuple[float, ...] = ()
        if at is not None:
            row = [0.0] * len(episode.response)
            row[at] = episode.reward
            tokens = tuple(row)
        scores = (("rule", episode.reward), ("price", float(index)))
        found.append(dataclasses.replace(episode, token_rewards=tokens, group_id=f"g{index // GROUPS}", scores=scores))
    return found


def trained(batch: list[Episode], algorithm: str, **options: Any) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    trainer = make_trainer(TrainSettings(epochs=2, minibatches=2), {"algorithm": algorithm, **options}, kl=FixedKL(0.1))
    figures = trainer.update(batch)
    return {name: value.clone() for name, value in trainer.model.tensors().items()}, dict(figures)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_a_value_head_learns_where_the_rewards_stand_and_at_the_last_token_they_are_the_score(algorithm: str) -> None:
    whole, figures = trained(episodes(None), algorithm)
    last, _ = trained(episodes(-1), algorithm)
    first, early = trained(episodes(0), algorithm)
    assert same(whole, last), "the same bits as a score of the whole response"
    assert not same(whole, first)
    assert early["score_mean"] == figures["score_mean"]
    assert early["reward_mean"] == pytest.approx(figures["reward_mean"], rel=1e-5), "the sum is the same wherever they stand"


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "reinforce"])
def test_without_a_value_head_the_sum_is_what_counts(algorithm: str) -> None:
    whole, _ = trained(episodes(None), algorithm)
    first, _ = trained(episodes(0), algorithm)
    assert same(whole, first)


def test_each_scorers_mean_is_told() -> None:
    batch = episodes(None)
    batch[0] = dataclasses.replace(batch[0], scores=(("price", 100.0),), finish_reason="length")
    _, figures = trained(batch, "ppo")
    assert figures["score/price"] == pytest.approx((100.0 + sum(range(1, 12))) / 12)
    assert figures["score/rule"] == pytest.approx(sum(e.reward for e in batch[1:]) / 11), "over what it scored"
    assert figures["cut_share"] == pytest.approx(1 / 12)


def test_placed_rewards_stand_in_place_of_the_scores_and_never_on_pads() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    logprobs, reference = torch.full((2, 3), -1.0), torch.full((2, 3), -1.5)
    placed = torch.tensor([[1.0, 2.0, 9.0], [0.0, 0.0, 4.0]])
    rewards = advantage.token_rewards(logprobs, reference, torch.tensor([5.0, 5.0]), mask, beta=2.0, placed=placed)
    assert rewards.tolist() == [[0.0, 1.0, 0.0], [-1.0, -1.0, 3.0]]

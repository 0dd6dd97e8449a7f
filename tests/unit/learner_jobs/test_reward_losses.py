import math

import pytest
import torch

from honed.learner.objectives.preference import best_of_k, bradley_terry, ranked_pairs, scalar_compare, scalar_rating


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_bradley_terry_by_hand():
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0]))
    assert loss.item() == pytest.approx((softplus(-0.5) + softplus(2.0)) / 2)


def test_best_of_four_by_hand():
    scores = torch.tensor([[1.0, 2.0, 0.0, -1.0]])
    total = sum(math.exp(s) for s in (1, 2, 0, -1))
    assert best_of_k(scores, torch.tensor([1])).item() == pytest.approx(-math.log(math.exp(2) / total))


def test_two_responses_make_every_form_bradley_terry():
    scores = torch.tensor([[1.0, 0.5], [0.0, 2.0]])
    expected = bradley_terry(scores[:, 0], scores[:, 1])
    torch.testing.assert_close(best_of_k(scores, torch.zeros(2, dtype=torch.int64)), expected)
    torch.testing.assert_close(ranked_pairs(scores), expected)


def test_a_ranking_of_three_counts_its_three_pairs_alike():
    loss = ranked_pairs(torch.tensor([[3.0, 1.0, 2.0]]))
    assert loss.item() == pytest.approx((softplus(-2.0) + softplus(-1.0) + softplus(1.0)) / 3)


def test_scalar_losses_by_hand():
    assert scalar_rating(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])).item() == pytest.approx(0.5)
    loss = scalar_compare(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0]))
    assert loss.item() == pytest.approx(0.5)

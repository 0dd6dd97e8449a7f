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


def test_ties_of_a_ranking_are_no_pairs():
    scores = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    loss = ranked_pairs(scores, torch.tensor([[0, 0, 5], [0, 1, 1]]))
    assert loss.item() == pytest.approx(((softplus(-1.0) + softplus(1.0)) / 2 + (softplus(1.0) + softplus(2.0)) / 2) / 2)
    assert torch.equal(ranked_pairs(scores, torch.tensor([[0, 1, 2]] * 2)), ranked_pairs(scores))


def test_scalar_losses_by_hand():
    assert scalar_rating(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])).item() == pytest.approx(0.5)
    loss = scalar_compare(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 3.0]))
    assert loss.item() == pytest.approx(0.5)


def test_a_margin_asks_for_scores_that_far_apart():
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    loss = bradley_terry(chosen, rejected, torch.tensor([1.0, 0.25]))
    assert loss.item() == pytest.approx((softplus(0.5) + softplus(2.25)) / 2)
    assert torch.equal(bradley_terry(chosen, rejected, torch.zeros(2)), bradley_terry(chosen, rejected))


def test_weights_by_hand():
    weights = torch.tensor([3.0, 1.0])
    chosen, rejected = torch.tensor([1.0, 0.0]), torch.tensor([0.5, 2.0])
    expected = (3 * softplus(-0.5) + softplus(2.0)) / 4
    pairs = torch.stack([chosen, rejected], 1)
    assert bradley_terry(chosen, rejected, weights=weights).item() == pytest.approx(expected)
    assert ranked_pairs(pairs, weights=weights).item() == pytest.approx(expected)
    assert best_of_k(pairs, torch.zeros(2, dtype=torch.int64), weights=weights).item() == pytest.approx(expected)
    assert scalar_rating(chosen, rejected, weights=weights).item() == pytest.approx((3 * 0.25 + 4.0) / 4)
    zeros = torch.zeros(2)
    assert scalar_compare(chosen, zeros, rejected, weights=weights).item() == pytest.approx((3 * 0.25 + 4.0) / 4)


def test_weights_that_are_all_the_same_change_nothing_and_a_weight_of_zero_is_no_judgement():
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(3))
    best, ratings = torch.tensor([0, 3, 1, 1, 2]), torch.arange(5.0)
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0])
    losses = {
        "bradley_terry": lambda at, w: bradley_terry(scores[at, 0], scores[at, 1], weights=w),
        "best_of_k": lambda at, w: best_of_k(scores[at], best[at], weights=w),
        "ranked_pairs": lambda at, w: ranked_pairs(scores[at], weights=w),
        "scalar_rating": lambda at, w: scalar_rating(scores[at, 0], ratings[at], weights=w),
        "scalar_compare": lambda at, w: scalar_compare(scores[at, 0], scores[at, 1], ratings[at], weights=w),
    }
    everything = torch.ones(5, dtype=torch.bool)
    for name, loss in losses.items():
        torch.testing.assert_close(loss(everything, torch.full((5,), 0.3)), loss(everything, None), msg=name)
        torch.testing.assert_close(loss(everything, kept), loss(kept.bool(), None), msg=name)

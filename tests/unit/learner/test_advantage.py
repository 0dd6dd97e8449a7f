"""Claims about rewards per token, advantages and whitening."""

from __future__ import annotations

import random

import pytest
import torch
from tests.unit.learner import reference
from torch import Tensor

from honed.learner.objectives import advantage

ATOL = 1e-6


def ragged(seed: int, *names: str, rows: int = 7, longest: int = 12) -> dict[str, list[list[float]]]:
    source = random.Random(seed)
    lengths = [source.randint(1, longest) for _ in range(rows)]
    return {name: [[source.gauss(0, 1) for _ in range(n)] for n in lengths] for name in names}


def padded(rows: list[list[float]], fill: float = 0.0) -> Tensor:
    width = max(map(len, rows)) + 2  # pads in every row
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def mask_of(rows: list[list[float]]) -> Tensor:
    return padded([[1.0] * len(row) for row in rows]).bool()


def flat(rows: list[list[float]]) -> Tensor:
    return torch.tensor([x for row in rows for x in row])


def test_detail_5_whitening_gives_the_golden_of_lm_human_preferences() -> None:
    values = torch.tensor([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = torch.tensor([[0.0508, 0.4381, 0.8254], [1.2127, 1.6000, 1.9873], [2.3746, 2.7619, 3.1492]])
    got = advantage.whiten(values, torch.ones_like(values, dtype=torch.bool), shift_mean=False)
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=0)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_whitening_equals_the_loop_and_pads_do_not_count(seed: int, shift_mean: bool) -> None:
    rows = ragged(seed, "x")["x"]
    got = advantage.whiten(padded(rows, fill=1e3), mask_of(rows), shift_mean=shift_mean)
    torch.testing.assert_close(got[mask_of(rows)], flat(reference.whiten(rows, shift_mean=shift_mean)), atol=ATOL, rtol=0)
    assert bool((got[~mask_of(rows)] == 0).all())


@pytest.mark.parametrize("seed", range(20))
def test_advantages_equal_the_definition_on_ragged_rows(seed: int) -> None:
    data = ragged(seed, "rewards", "values")
    mask = mask_of(data["rewards"])
    got = advantage.generalised_advantages(
        padded(data["rewards"], 7.0), padded(data["values"], -3.0), mask, gamma=0.99, lam=0.95
    )
    expected = flat(reference.advantages_of(data["rewards"], data["values"], 0.99, 0.95))
    torch.testing.assert_close(got[mask], expected, atol=2e-6, rtol=1e-6)
    assert bool((got[~mask] == 0).all())


@pytest.mark.parametrize("seed", range(20))
def test_detail_5_order_whiten_rewards_then_estimate_then_whiten_and_returns_stay_unwhitened(seed: int) -> None:
    data = ragged(seed, "rewards", "values")
    mask = mask_of(data["rewards"])
    got = advantage.estimate(padded(data["rewards"]), padded(data["values"]), mask, gamma=1.0, lam=0.95)
    advantages, returns = reference.estimate(data["rewards"], data["values"], 1.0, 0.95)
    torch.testing.assert_close(got.advantages[mask], flat(advantages), atol=ATOL, rtol=1e-6)
    torch.testing.assert_close(got.returns[mask], flat(returns), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_detail_4_the_score_lands_on_the_last_sampled_token_and_never_on_a_pad(seed: int) -> None:
    data = ragged(seed, "logprobs", "reference")
    scores = [float(i + 1) * 10 for i in range(len(data["logprobs"]))]
    mask = mask_of(data["logprobs"])
    got = advantage.token_rewards(
        padded(data["logprobs"], 5.0), padded(data["reference"], 9.0), torch.tensor(scores), mask, beta=0.15
    )
    torch.testing.assert_close(
        got[mask], flat(reference.token_rewards(data["logprobs"], data["reference"], scores, 0.15)), atol=ATOL, rtol=1e-6
    )
    assert bool((got[~mask] == 0).all())


def test_a_response_of_one_token_gets_its_whole_return_at_once() -> None:
    mask = torch.tensor([[True, False]])
    got = advantage.generalised_advantages(torch.tensor([[3.0, 99.0]]), torch.tensor([[1.0, 99.0]]), mask, gamma=1.0, lam=0.95)
    assert got.tolist() == [[2.0, 0.0]]

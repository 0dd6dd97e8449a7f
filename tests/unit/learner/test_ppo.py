"""Claims about the losses of PPO."""

from __future__ import annotations

import math

import pytest
import torch
from tests.unit.learner import reference
from torch import Tensor

from honed.learner.objectives import policy_gradient, value


def random_tokens(seed: int, count: int = 200) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(seed)
    names = ("logprobs", "proximal", "behaviour", "advantages", "values", "old_values", "returns")
    noise = {name: torch.randn(count, generator=source) for name in names}
    base = -3 + noise["logprobs"]
    return noise | {
        "logprobs": base,
        "proximal": base + 0.3 * noise["proximal"],
        "behaviour": base + 0.8 * noise["behaviour"],
    }


@pytest.mark.parametrize("seed", range(10))
def test_losses_equal_the_loop(seed: int) -> None:
    t = random_tokens(seed)
    expected = reference.losses(*(t[name].tolist() for name in t), clip=0.2, clip_value=0.2, cap=2.0)
    weights = policy_gradient.behaviour_weights(t["proximal"], t["behaviour"], 2.0)
    got = {
        "policy": policy_gradient.policy_loss_terms(t["logprobs"], t["proximal"], t["advantages"], clip=0.2, weights=weights),
        "value": value.value_loss_terms(t["values"], t["old_values"], t["returns"], clip=0.2),
        "approxkl": policy_gradient.approximate_kl_terms(t["logprobs"], t["proximal"]),
        "clipped": policy_gradient.clipped_terms(t["logprobs"], t["proximal"], t["advantages"], clip=0.2),
    }
    for name, terms in got.items():
        assert float(terms.mean()) == pytest.approx(expected[name], abs=1e-6), name


def test_decoupled_ppo_is_plain_ppo_when_the_sampler_had_the_proximal_weights() -> None:
    t = random_tokens(0)
    weights = policy_gradient.behaviour_weights(t["proximal"], t["proximal"].clone(), 2.0)
    assert torch.equal(weights, torch.ones_like(weights))
    plain = policy_gradient.policy_loss_terms(t["logprobs"], t["proximal"], t["advantages"], clip=0.2)
    decoupled = policy_gradient.policy_loss_terms(t["logprobs"], t["proximal"], t["advantages"], clip=0.2, weights=weights)
    assert torch.equal(plain, decoupled)


def test_behaviour_weights_are_capped_for_each_token_and_carry_no_gradient() -> None:
    proximal = torch.tensor([-1.0, -1.0, -1.0], requires_grad=True)
    weights = policy_gradient.behaviour_weights(proximal, torch.tensor([-1.0 - math.log(1.5), -200.0, -0.5]), 2.0)
    torch.testing.assert_close(weights, torch.tensor([1.5, 2.0, math.exp(-0.5)]))
    assert not weights.requires_grad


@pytest.mark.parametrize(
    ("ratio", "advantage", "moves"), [(1.5, 1.0, False), (0.5, -1.0, False), (1.5, -1.0, True), (0.5, 1.0, True)]
)
def test_a_ratio_past_the_clip_stops_only_the_gradient_that_would_push_it_further(
    ratio: float, advantage: float, moves: bool
) -> None:
    logprob = torch.tensor([math.log(ratio)], requires_grad=True)
    loss = policy_gradient.policy_loss_terms(logprob, torch.zeros(1), torch.tensor([advantage]), clip=0.2).sum()
    (gradient,) = torch.autograd.grad(loss, logprob)
    assert bool(gradient.abs() > 0) is moves


def test_at_the_old_policy_the_gradient_is_the_policy_gradient() -> None:
    logprob = torch.tensor([-2.0, -3.0], requires_grad=True)
    advantages = torch.tensor([1.5, -0.5])
    policy_gradient.policy_loss_terms(logprob, logprob.detach().clone(), advantages, clip=0.2).sum().backward()
    assert logprob.grad is not None
    torch.testing.assert_close(logprob.grad, -advantages)


def test_detail_11_approxkl_is_half_the_mean_square() -> None:
    assert float(
        policy_gradient.approximate_kl_terms(torch.tensor([-1.0, -2.0]), torch.tensor([-1.2, -2.0])).mean()
    ) == pytest.approx(0.01)


def test_entropy_of_a_uniform_distribution_is_the_log_of_its_size_and_impossible_tokens_add_nothing() -> None:
    logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]])
    torch.testing.assert_close(policy_gradient.entropy(logits), torch.tensor([math.log(4), math.log(2)]))

"""Claims about the losses of PPO."""

from __future__ import annotations

import math

import pytest
import torch
from tests.unit.learner import reference
from torch import Tensor

from honed.kit.errors import InvalidArgument
from honed.learner.algorithms.base import make_algorithm, options_of
from honed.learner.algorithms.ppo import Options
from honed.learner.models.policy import TokenEvaluation
from honed.learner.objectives import policy_gradient, value
from honed.learner.settings import LearnerSettings


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


def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative_by_hand() -> None:
    ratio = torch.tensor([0.5, 2.0, 3.5, 10.0, 10.0, 0.5, 0.0])
    advantages = torch.tensor([-2.0, -2.0, -2.0, -2.0, 2.0, 2.0, 0.0])
    got = policy_gradient.clipped_surrogate(ratio, advantages, low=0.2, high=0.2, dual=3.0)
    # 2 x 0.8, 2 x 2, then the bound 2 x 3 twice; a positive advantage is clipped as ever: -2 x 1.2, and -2 x 0.5.
    torch.testing.assert_close(got, torch.tensor([1.6, 4.0, 6.0, 6.0, -2.4, -1.0, 0.0]))


@pytest.mark.parametrize("seed", range(5))
def test_without_dual_clip_and_under_its_bound_the_loss_and_its_gradient_are_the_same_bits(seed: int) -> None:
    t = random_tokens(seed)
    gradients = []
    for options in ({}, {"dual": None}, {"dual": 1e6}):
        logprobs = t["logprobs"].clone().requires_grad_()
        policy_gradient.policy_loss_terms(logprobs, t["proximal"], t["advantages"], clip=0.2, **options).sum().backward()
        gradients.append(logprobs.grad)
    assert torch.equal(gradients[0], gradients[1])
    assert torch.equal(gradients[0], gradients[2])


def test_a_token_past_the_dual_clip_has_no_gradient_and_its_behaviour_weight_still_counts() -> None:
    logprobs = torch.tensor([2.0, 0.5], dtype=torch.float64, requires_grad=True)  # ratios 7.4 and 1.6
    loss = policy_gradient.policy_loss_terms(
        logprobs, torch.zeros(2), torch.tensor([-1.0, -1.0]), clip=0.2, weights=torch.tensor([0.5, 0.5]), dual=3.0
    )
    assert loss.tolist() == pytest.approx([1.5, 0.5 * math.exp(0.5)])
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx([0.0, 0.5 * math.exp(0.5)])


def test_the_gradient_of_the_dual_clip_is_that_of_finite_differences() -> None:
    logprobs = torch.linspace(-2.0, 2.03, 14, dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor([1.0, -1.5] * 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: policy_gradient.policy_loss_terms(x, torch.zeros_like(x), advantages, clip=0.2, dual=3.0), [logprobs]
    )


def test_ppo_takes_a_dual_clip_of_more_than_one_and_no_other() -> None:
    options = options_of("ppo", {"dual_clip": 3.0})
    assert isinstance(options, Options)
    assert options.dual_clip == 3.0
    assert Options().dual_clip is None
    with pytest.raises(InvalidArgument, match=r"learner\.options\.dual_clip"):
        options_of("ppo", {"dual_clip": 1.0})


def test_the_option_reaches_the_loss_of_ppo() -> None:
    at = dict.fromkeys(("proximal", "values", "returns"), torch.zeros(1)) | {
        "advantages": torch.tensor([-1.0]),
        "weights": torch.ones(1),
    }
    now = TokenEvaluation(logprobs=torch.tensor([2.0]), values=torch.zeros(1))
    for dual_clip, expected in ((None, math.exp(2.0)), (3.0, 3.0)):
        algorithm = make_algorithm(LearnerSettings(options={"dual_clip": dual_clip}))
        losses = algorithm.losses(None, now, at)
        assert losses.sums["tokens"].item() == pytest.approx(expected)
        assert losses.per_token["policy_loss"].item() == pytest.approx(expected)


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

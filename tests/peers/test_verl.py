"""Against verl's functions, which take rows and a mask of numbers, and answer with a loss or with rows."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.peers.parity import CAP, SHAPES, Batch, loss_of, same, weights_of
from torch import Tensor
from verl.trainer.ppo import core_algos, rollout_corr_helper
from verl.utils import torch_functional
from verl.workers.config import ActorConfig

from honed.learner.objectives import advantage, group, policy_gradient
from honed.learner.settings import LearnerSettings

CONSTANT = 17
"""What a response's sum is divided by in Dr. GRPO."""

MODES = {
    "GRPO": ("seq-mean-token-mean", {"reduction": "responses"}),
    "DAPO": ("token-mean", {"reduction": "tokens"}),
    "Dr. GRPO": ("seq-mean-token-sum-norm", {"reduction": "constant", "constant": CONSTANT}),
}


def settings(mode: str = "token-mean", high: float = 0.28, dual: float = 1e6) -> ActorConfig:
    return ActorConfig(
        strategy="fsdp",
        clip_ratio=0.2,
        clip_ratio_low=0.2,
        clip_ratio_high=high,
        clip_ratio_c=dual,
        loss_agg_mode=mode,
        use_dynamic_bsz=True,
        rollout_n=1,
        global_batch_info={"loss_scale_factor": CONSTANT},
    )


def policy_loss(name: str, batch: Batch, advantages: Tensor, config: ActorConfig, weights: Tensor | None = None) -> Tensor:
    loss, _ = core_algos.get_policy_loss_fn(name)(
        batch.proximal, batch.logprobs, advantages, batch.mask.float(), config.loss_agg_mode, config, weights
    )
    return loss


@pytest.mark.parametrize("shape", SHAPES)
def test_generalised_advantages_and_returns(shape: str) -> None:
    batch = Batch.random(shape)
    mask = batch.mask.float()
    whitened, returns = core_algos.compute_gae_advantage_return(batch.rewards, batch.old_values, mask, 0.98, 0.9)
    ours = advantage.generalised_advantages(batch.rewards, batch.old_values, batch.mask, gamma=0.98, lam=0.9)
    estimated = advantage.estimate(batch.rewards, batch.old_values, batch.mask, gamma=0.98, lam=0.9, whiten_rewards=False)
    peer = "core_algos.compute_gae_advantage_return"
    kept = batch.mask
    same((ours + batch.old_values)[kept], returns[kept], what="generalised_advantages plus values", peer=peer)
    same(estimated.returns[kept], returns[kept], what="estimate, returns", peer=peer)
    count = int(kept.sum())
    rescaled = estimated.advantages * ((count - 1) / count) ** 0.5
    same(rescaled[kept], whitened[kept], what="estimate, advantages, times sqrt((n - 1) / n)", peer=peer)


@pytest.mark.parametrize("shift_mean", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_whitening_follows_openais_population_variance_where_verl_divides_by_one_less(shape: str, shift_mean: bool) -> None:
    batch = Batch.random(shape)
    count, kept = int(batch.mask.sum()), batch.mask
    mean = 0.0 if shift_mean else float(batch.rewards[kept].mean())
    ours = advantage.whiten(batch.rewards, kept, shift_mean=shift_mean)
    theirs = torch_functional.masked_whiten(batch.rewards, kept.float(), shift_mean=shift_mean)
    rescaled = (ours - mean) * ((count - 1) / count) ** 0.5 + mean
    what = f"whiten, shift_mean {shift_mean}, times sqrt((n - 1) / n)"
    same(rescaled[kept], theirs[kept], what=what, peer="torch_functional.masked_whiten")


@pytest.mark.parametrize("shape", SHAPES)
def test_estimates_of_the_kl(shape: str) -> None:
    batch = Batch.random(shape)

    def theirs(kind: str) -> Tensor:
        return core_algos.kl_penalty(batch.logprobs, batch.reference, kind)

    k1 = -advantage.token_rewards(batch.logprobs, batch.reference, torch.zeros_like(batch.scores), batch.mask, beta=1.0)
    same(k1, theirs("k1"), what="token_rewards, k1", peer="core_algos.kl_penalty, k1")
    k2 = policy_gradient.approximate_kl_terms(batch.logprobs, batch.reference)
    same(k2, theirs("k2"), what="approximate_kl_terms, k2", peer="core_algos.kl_penalty, k2")
    k3 = policy_gradient.reference_kl_terms(batch.logprobs, batch.reference)
    same(k3, theirs("k3"), what="reference_kl_terms, k3", peer="core_algos.kl_penalty, k3")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dual", [None, 1.4])
def test_ppo_with_and_without_dual_clip(dual: float | None, shape: str) -> None:
    ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
    learner = LearnerSettings(options={"dual_clip": dual}, clip_ratio=0.2, clip_value=0.3, value_coefficient=0.5)
    loss = loss_of(learner, ours, {"advantages": ours.advantages, "returns": ours.rewards})
    expected = policy_loss("vanilla", theirs, theirs.advantages, settings(high=0.2, dual=dual or 1e6))
    value_loss, _ = core_algos.compute_value_loss(
        theirs.values, theirs.rewards, theirs.old_values, theirs.mask.float(), cliprange_value=0.3
    )
    expected = expected + 0.5 * value_loss
    what, peer = f"ppo{', dual_clip' if dual else ''}", "core_algos.compute_policy_loss_vanilla, compute_value_loss"
    same(loss, expected, what=what, peer=peer)
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what=f"gradient of {what} by log-probabilities", peer=peer)
    same(ours.values.grad, theirs.values.grad, what=f"gradient of {what} by values", peer=peer)


@pytest.mark.parametrize("shape", SHAPES)
def test_ppo_decoupled_by_truncated_weights_of_stale_tokens(shape: str) -> None:
    ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
    weights, _ = rollout_corr_helper.compute_rollout_correction_weights(
        (theirs.proximal - theirs.behaviour).detach(), theirs.mask.float(), "token", CAP
    )
    peer = "rollout_corr_helper.compute_rollout_correction_weights, token"
    same(weights_of(ours) * ours.mask, weights, what="behaviour_weights", peer=peer)
    learner = LearnerSettings(clip_ratio=0.2, value_coefficient=0.0)
    loss = loss_of(learner, ours, {"advantages": ours.advantages, "returns": ours.rewards}, decoupled=True)
    expected = policy_loss("vanilla", theirs, theirs.advantages, settings(high=0.2), weights)
    peer = "core_algos.compute_policy_loss_vanilla, rollout_is_weights"
    same(loss, expected, what="ppo, decoupled", peer=peer)
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what="gradient of ppo, decoupled", peer=peer)


@pytest.mark.parametrize("shape", SHAPES)
def test_reinforce_plus_plus_from_rewards_to_gradient(shape: str) -> None:
    """Returns of rewards with the KL's price in them, whitened over the batch; verl divides their variance by n - 1."""
    ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
    mask, beta, gamma = theirs.mask.float(), 0.05, 0.98
    rewards = -beta * core_algos.kl_penalty(theirs.proximal, theirs.reference, "k1") * mask
    rewards = rewards.detach().scatter_add(1, theirs.mask.sum(1, keepdim=True) - 1, theirs.scores.unsqueeze(1))
    advantages, returns = core_algos.compute_reinforce_plus_plus_outcome_advantage(rewards, mask, SimpleNamespace(gamma=gamma))
    peer = "core_algos.compute_reinforce_plus_plus_outcome_advantage"
    same(advantage.returns_to_go(rewards, ours.mask, gamma=gamma) * ours.mask, returns, what="returns_to_go", peer=peer)
    count = int(ours.mask.sum())
    rescaled = advantages * (count / (count - 1)) ** 0.5
    learner = LearnerSettings(
        algorithm="reinforce",
        clip_ratio=0.2,
        gamma=gamma,
        options={"baseline": "whiten", "clipped": True},
        kl={"coefficient": beta, "controller": "fixed"},
    )
    loss = loss_of(learner, ours)
    expected = policy_loss("vanilla", theirs, rescaled, settings(high=0.2))
    peer = f"{peer}, times sqrt(n / (n - 1)), and compute_policy_loss_vanilla"
    same(loss, expected, what="reinforce, REINFORCE++", peer=peer)
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what="gradient of reinforce, REINFORCE++", peer=peer)


def outcomes(batch: Batch) -> tuple[Tensor, Tensor, np.ndarray]:
    """Scores as verl has them: the reward of a token."""
    rewards = torch.zeros_like(batch.rewards)
    rewards[:, 0] = batch.scores
    return rewards, batch.mask.float(), batch.groups.numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_group_advantages_whose_deviation_is_unbiased_and_gets_trls_epsilon(shape: str) -> None:
    """verl adds 1e-6 to the deviation unless it is told another number; TRL and we add 1e-4."""
    batch = Batch.random(shape)
    rewards, mask, index = outcomes(batch)
    peer = "core_algos.compute_grpo_outcome_advantage"
    for scale in ("group", "none"):
        theirs, _ = core_algos.compute_grpo_outcome_advantage(
            rewards, mask, index, epsilon=group.EPSILON, norm_adv_by_std_in_grpo=scale == "group"
        )
        ours = group.relative_advantages(batch.scores, batch.groups, scale).unsqueeze(1) * batch.mask
        same(ours, theirs, what=f"relative_advantages, scale {scale}", peer=peer)
    theirs, _ = core_algos.compute_rloo_outcome_advantage(rewards, mask, index)
    ours = group.leave_one_out_advantages(batch.scores, batch.groups).unsqueeze(1) * batch.mask
    same(ours, theirs, what="leave_one_out_advantages", peer="core_algos.compute_rloo_outcome_advantage")


def test_a_response_without_another_to_its_prompt_has_no_advantage_where_verl_gives_it_its_score() -> None:
    batch = Batch.random("a pair")
    rewards, mask, _ = outcomes(batch)
    alone = torch.arange(2)
    theirs, _ = core_algos.compute_rloo_outcome_advantage(rewards, mask, alone.numpy())
    assert torch.equal(theirs[:, 0], batch.scores)
    assert group.leave_one_out_advantages(batch.scores, alone).tolist() == [0.0, 0.0]
    assert group.relative_advantages(batch.scores, alone).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODES)
def test_reductions_of_the_loss_of_groups(name: str, shape: str) -> None:
    mode, options = MODES[name]
    ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
    learner = LearnerSettings(algorithm="grpo", clip_ratio=0.2, options={"clip_high": 0.28, **options}, kl={"coefficient": 0.0})
    loss = loss_of(learner, ours, {"advantages": ours.advantages})
    expected = policy_loss("vanilla", theirs, theirs.advantages, settings(mode))
    peer = f"core_algos.compute_policy_loss_vanilla, {mode}"
    # verl adds 1e-8 to a response's count of tokens.
    same(loss, expected, what=f"grpo, {name}", peer=peer)
    loss.backward()
    expected.backward()
    same(ours.logprobs.grad, theirs.logprobs.grad, what=f"gradient of grpo, {name}", peer=peer)


@pytest.mark.parametrize("shape", SHAPES)
def test_gspo_and_cispo(shape: str) -> None:
    """verl's GSPO has the same value and, since a response's tokens share one advantage, the same gradient as the paper's."""
    of_responses = group.relative_advantages(Batch.random(shape).scores, Batch.random(shape).groups)
    options = {
        "gspo": {"ratio": "response", "clip_high": 0.28},
        "cispo": {"surrogate": "cispo", "reduction": "tokens", "clip_high": 0.28},
    }
    for name, mode in (("gspo", "seq-mean-token-mean"), ("cispo", "token-mean")):
        ours, theirs = (Batch.random(shape).with_gradient() for _ in range(2))
        if name == "cispo":
            # verl's has a lower bound too, which MiniMax-M1 sets so low that it never acts: no ratio reaches it here.
            ours, theirs = (replace(b, proximal=b.proximal.minimum(b.logprobs.detach())) for b in (ours, theirs))
        learner = LearnerSettings(algorithm="grpo", clip_ratio=0.2, options=options[name], kl={"coefficient": 0.0})
        rows = of_responses.unsqueeze(1) * ours.mask
        loss = loss_of(learner, ours, {"advantages": rows})
        expected = policy_loss(name, theirs, rows, settings(mode))
        peer = f"core_algos.compute_policy_loss_{name}"
        same(loss, expected, what=f"grpo, {name.upper()}", peer=peer)
        loss.backward()
        expected.backward()
        same(ours.logprobs.grad, theirs.logprobs.grad, what=f"gradient of grpo, {name.upper()}", peer=peer)

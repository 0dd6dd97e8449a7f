"""Claims about RLOO, A2C, REINFORCE and REINFORCE++: their gradients are those of the formulas in padded rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.unit.learner.padded import GROUP, grouped_episodes, padded_rows
from tests.unit.learner.samples import make_trainer
from tests.unit.learner.test_learning import sample
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.learner.data.episode import Episode
from honed.learner.objectives.kl import FixedKL
from honed.learner.train.trainer import TrainSettings

BETA, LAMBDA = 0.1, 0.95

Rows = tuple[Tensor, Tensor, Tensor, Tensor]


def scores_of(batch: list[Episode]) -> Tensor:
    return torch.tensor([episode.reward for episode in batch])


def token_rewards(rows: Rows, batch: list[Episode]) -> Tensor:
    logp, ref, _, mask = rows
    rewards = -BETA * (logp.detach() - ref) * mask
    last = mask.sum(1).long() - 1
    return rewards.index_put((torch.arange(len(batch)), last), rewards[torch.arange(len(batch)), last] + scores_of(batch))


def returns_of(rewards: Tensor) -> Tensor:
    return rewards.flip(1).cumsum(1).flip(1)


def behaviour(rows: Rows) -> Tensor:
    logp, _, sampler, _ = rows
    return (logp.detach() - sampler).exp().clamp(max=2.0)


def rloo(rows: Rows, batch: list[Episode]) -> Tensor:
    """As TRL's RLOOTrainer: one action a response."""
    logp, ref, sampler, mask = rows
    old = logp.detach()
    rewards = (scores_of(batch) - BETA * ((old - ref) * mask).sum(1)).view(-1, GROUP)
    others = (rewards.sum(1, keepdim=True) - rewards) / (GROUP - 1)
    advantages = (rewards - others).flatten()
    ratio = ((logp - old) * mask).sum(1).exp()
    weights = ((old - sampler) * mask).sum(1).exp().clamp(max=2.0)
    return -(torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages) * weights).mean()


def reinforce(rows: Rows, batch: list[Episode]) -> Tensor:
    logp, _, _, mask = rows
    returns = returns_of(token_rewards(rows, batch)) * mask
    return -((returns - returns.sum() / mask.sum()) * logp * mask * behaviour(rows)).sum() / mask.sum()


def reinforce_plus_plus(rows: Rows, batch: list[Episode]) -> Tensor:
    logp, _, _, mask = rows
    returns = returns_of(token_rewards(rows, batch))[mask.bool()]
    advantages = (returns - returns.mean()) / (returns.var(correction=0) + 1e-8).sqrt()
    ratio = (logp - logp.detach())[mask.bool()].exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    return -(surrogate * behaviour(rows)[mask.bool()]).mean()


def a2c(rows: Rows, batch: list[Episode]) -> Tensor:
    """With values of zero, as a new value head gives; their loss moves nothing but that head."""
    logp, _, _, mask = rows
    rewards, running = token_rewards(rows, batch) * mask, torch.zeros(len(batch))
    advantages = torch.zeros_like(rewards)
    for t in reversed(range(rewards.shape[1])):
        running = rewards[:, t] + LAMBDA * running
        advantages[:, t] = running
    chosen = advantages[mask.bool()]
    whitened = (chosen - chosen.mean()) / (chosen.var(correction=0) + 1e-8).sqrt()
    return -(whitened * (logp * behaviour(rows))[mask.bool()]).mean()


FORMULAS: dict[str, tuple[str, dict[str, Any], Callable[[Rows, list[Episode]], Tensor]]] = {
    "rloo": ("rloo", {}, rloo),
    "a2c": ("a2c", {}, a2c),
    "reinforce": ("reinforce", {}, reinforce),
    "reinforce++": ("reinforce", {"baseline": "whiten", "clipped": True}, reinforce_plus_plus),
}


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("budget", [40, 100_000])
def test_the_gradient_is_that_of_the_formula_in_rows(name: str, budget: int) -> None:
    algorithm, options, formula = FORMULAS[name]
    batch = grouped_episodes()
    settings = TrainSettings(learning_rate=1e-3, epochs=1, microbatch_tokens=budget)
    trainer = make_trainer(settings, {"algorithm": algorithm, "options": options}, kl=FixedKL(BETA))
    model, reference = trainer.model.language_model, trainer.algorithm.reference.language_model
    formula(padded_rows(model, reference, batch), batch).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    trainer.update(batch)
    own = dict(model.named_parameters())
    for name, gradient in expected.items():
        torch.testing.assert_close(own[name].grad, gradient, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("name", FORMULAS)
def test_it_makes_a_wanted_token_frequent(name: str) -> None:
    algorithm, options, _ = FORMULAS[name]
    learner = {"algorithm": algorithm, "options": options}
    trainer = make_trainer(TrainSettings(learning_rate=3e-3, epochs=2), learner, kl=FixedKL(0.0))
    source, seen = torch.Generator().manual_seed(0), []
    for _ in range(20):
        batch = sample(trainer, 64, source, group=8)
        seen.append(trainer.update(batch, version=VersionId(1, trainer.step))["score_mean"])
    assert sum(seen[-3:]) / 3 > sum(seen[:3]) / 3 + 0.3, seen

"""Online DPO: pairs of the policy's own responses, of which the scores prefer one."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests.unit.learner.padded import GROUP, grouped_episodes, padded_rows
from tests.unit.learner.samples import tiny_llama

from honed.learner.build import updates_of
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.on_scored_pairs import best_and_worst
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import Trainer, TrainSettings


def trainer(lr: float = 1e-2, *, minibatches: int = 1, budget: int = 10_000, **options: Any) -> Trainer[Any, PolicyModel]:
    section = LearnerSettings(algorithm="online_dpo", options=options)
    policy, reference = PolicyModel(tiny_llama(seed=1)), ReferenceModel(tiny_llama(seed=2))
    return Trainer(
        policy,
        updates_of(section, policy, reference),
        build_optimizer("adamw", policy.trainable().values(), lr=lr),
        settings=TrainSettings(learning_rate=lr, epochs=1, minibatches=minibatches, microbatch_tokens=budget),
        generator=rng.generator(5),
    )


def test_a_pair_is_the_best_and_the_worst_response_to_a_prompt() -> None:
    batch = grouped_episodes(8)
    scored = [dataclasses.replace(e, reward=r) for e, r in zip(batch, [0, 3, 3, 1, 2, 2, 2, 2], strict=True)]
    [(better, worse)] = best_and_worst(scored)
    assert (better, worse) == (scored[1], scored[0])


@pytest.mark.parametrize(("budget", "loss"), [(10_000, "sigmoid"), (24, "sigmoid"), (10_000, "ipo")])
def test_the_gradient_is_that_of_dpo_on_those_pairs_at_the_temperature_they_were_sampled_at(budget: int, loss: str) -> None:
    learning = trainer(lr=0.0, beta=0.3, loss=loss, budget=budget)
    prompts = {e.group_id: e.prompt for e in grouped_episodes()}
    batch = [dataclasses.replace(e, prompt=prompts[e.group_id], temperature=0.7) for e in grouped_episodes()]
    policy, reference = learning.model.language_model, tiny_llama(seed=2).eval()
    logp, theirs, behaviour, mask = padded_rows(policy, reference, batch)
    of_response = ((logp - theirs) * mask).sum(1)
    if loss == "ipo":
        of_response = of_response / mask.sum(1)
    rewards = torch.tensor([e.reward for e in batch]).view(-1, GROUP)
    first = torch.arange(0, len(batch), GROUP)
    best, worst = first + rewards.argmax(1), first + rewards.argmin(1)
    margin = of_response[best] - of_response[worst]
    expected = (-torch.nn.functional.logsigmoid(0.3 * margin) if loss == "sigmoid" else (margin - 1 / 0.6) ** 2).mean()
    parameters = dict(policy.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))

    figures = learning.update(batch)

    assert figures["loss"] == pytest.approx(expected.item(), rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-4)
    both = torch.cat([best, worst])
    assert figures["kl"] == pytest.approx(((behaviour - theirs) * mask).sum(1)[both].mean().item(), rel=1e-4)
    assert (figures["pairs"], figures["episodes"], figures["constant_groups"]) == (6.0, 24.0, 0.0)


def test_scores_that_tell_nothing_apart_move_nothing_and_are_said() -> None:
    learning = trainer()
    before = {name: tensor.clone() for name, tensor in learning.model.tensors().items()}
    figures = learning.update([dataclasses.replace(e, reward=1.0) for e in grouped_episodes()])
    assert (figures["reward_constant"], figures["constant_groups"], figures["optimizer_steps"]) == (1.0, 1.0, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learning.model.tensors().items())
    assert learning.step == 1


def test_fewer_pairs_than_minibatches_are_a_step_each() -> None:
    batch = grouped_episodes()
    scored = [dataclasses.replace(e, reward=e.reward if n < 2 * GROUP else 1.0) for n, e in enumerate(batch)]
    figures = trainer(minibatches=4).update(scored)
    assert (figures["pairs"], figures["optimizer_steps"]) == (2.0, 2.0)


def test_the_better_responses_become_likelier() -> None:
    learning = trainer()
    figures = [learning.update(grouped_episodes()) for _ in range(8)]
    assert figures[-1]["loss"] < figures[0]["loss"]
    assert figures[-1]["accuracy"] == 1.0

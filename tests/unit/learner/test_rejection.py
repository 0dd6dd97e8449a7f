"""Rejection fine-tuning: the best responses to a prompt are learned as demonstrations are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.run import run_tree, settings_of
from tests.unit.learner.padded import GROUP, grouped_episodes, padded_rows
from tests.unit.learner.samples import make_trainer

from honed.config import RunSettings
from honed.learner.build import build_trainer
from honed.learner.objectives.group import best_of_groups
from honed.learner.objectives.kl import FixedKL
from honed.learner.train.trainer import TrainSettings


def rejection(**options: Any) -> dict[str, Any]:
    return {"algorithm": "rejection", "options": options}


@pytest.mark.parametrize(
    ("share", "expected"),
    [(None, [1, 0, 0, 0, 0, 1]), (0.5, [1, 0, 1, 0, 0, 1]), (0.1, [1, 0, 0, 0, 0, 1]), (0.99, [1, 0, 1, 1, 1, 1])],
)
def test_the_best_of_each_group_are_kept_and_of_equals_the_earlier(share: float | None, expected: list[int]) -> None:
    scores = torch.tensor([5.0, 9.0, 5.0, 1.0, 2.0, 3.0])
    groups = torch.tensor([0, 0, 0, 0, 1, 1])
    eligible = torch.tensor([True, False, True, True, True, True])
    assert best_of_groups(scores, groups, eligible, share).int().tolist() == expected


@pytest.mark.parametrize(("budget", "options"), [(10_000, {}), (24, {}), (10_000, {"keep": 0.5, "least_score": 0.4})])
def test_the_gradient_is_that_of_maximum_likelihood_of_what_is_kept(budget: int, options: dict[str, Any]) -> None:
    learning = make_trainer(TrainSettings(learning_rate=0.0, epochs=1, microbatch_tokens=budget), rejection(**options))
    batch = grouped_episodes()
    policy = learning.model.language_model
    logp, _, _, mask = padded_rows(policy, policy, batch)
    scores = torch.tensor([e.reward for e in batch]).view(-1, GROUP)
    ranks = scores.argsort(1, descending=True).argsort(1)
    kept = (ranks < (2 if "keep" in options else 1)) & (scores >= options.get("least_score", -1e9))
    counted = mask * kept.view(-1, 1)
    expected = -(logp * counted).sum() / counted.sum()
    parameters = dict(policy.named_parameters())
    gradients = dict(zip(parameters, torch.autograd.grad(expected, list(parameters.values())), strict=True))

    figures = learning.update(batch)

    for name, gradient in gradients.items():
        torch.testing.assert_close(parameters[name].grad, gradient, atol=1e-5, rtol=1e-4)
    assert figures["kept"] == pytest.approx(kept.float().mean().item())
    assert figures["kept_score"] == pytest.approx(scores[kept].mean().item(), rel=1e-5)


def test_a_response_that_was_given_twice_is_learned_once() -> None:
    batch = grouped_episodes(GROUP)
    twice = [dataclasses.replace(batch[0], reward=9.0), dataclasses.replace(batch[0], reward=9.0), *batch[2:]]
    figures = make_trainer(TrainSettings(epochs=1), rejection(keep=0.5)).update(twice)
    assert figures["kept"] == 0.5
    assert figures["kept_score"] < 9.0


def test_where_nothing_is_good_enough_nothing_moves() -> None:
    learning = make_trainer(TrainSettings(epochs=2), rejection(least_score=1e6), kl=FixedKL(0.1))
    before = {name: tensor.clone() for name, tensor in learning.model.tensors().items()}
    figures = learning.update(grouped_episodes())
    assert figures["kept"] == 0.0
    assert "kept_score" not in figures
    assert all(torch.equal(tensor, before[name]) for name, tensor in learning.model.tensors().items())


@pytest.mark.parametrize("name", ["rejection", "online_dpo"])
def test_one_response_to_a_prompt_is_refused_at_the_start(name: str) -> None:
    with pytest.raises(ValueError, match=r"conductor\.samples_per_prompt: 1, and .* compares responses"):
        RunSettings.model_validate({"learner": {"algorithm": name}})
    RunSettings.model_validate({"learner": {"algorithm": name}, "conductor": {"samples_per_prompt": 2}})


def test_it_loads_no_reference_and_tells_no_kl_and_no_price_on_it(tmp_path: Path) -> None:
    tree = run_tree(tmp_path, learner={"algorithm": "rejection"}, conductor={"samples_per_prompt": GROUP})
    learning = build_trainer(settings_of(tree), tmp_path / "model")
    assert learning.algorithm.reference is None
    figures = learning.update(grouped_episodes())
    assert "kl" not in figures
    assert figures["beta"] == figures["next_beta"] == 0.0

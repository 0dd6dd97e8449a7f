"""Settings of the optimizer's steps reach the trainer: warm-up, betas, epsilon, weight decay, and the gradient's norm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.run import run_tree, settings_of
from tests.unit.learner.samples import random_episodes

from honed.config import RunSettings
from honed.learner.build import build_trainer, config_hash, train_settings
from honed.learner.settings import LearnerSettings
from honed.learner.train.on_policy import PolicyTrainer

EPISODES = random_episodes(12, seed=3)
DECAYED: dict[str, Any] = {"optimizer": "adamw", "weight_decay": 0.1}


def trainer_of(root: Path, **learner: Any) -> PolicyTrainer:
    return build_trainer(settings_of(run_tree(root, learner=learner)), root / "model")


@pytest.mark.parametrize("optimizer", ["adam_tf", "adamw"])
def test_by_default_they_are_what_recorded_results_were_made_with(optimizer: str, tmp_path: Path) -> None:
    (group,) = trainer_of(tmp_path, optimizer=optimizer).optimizer.param_groups
    assert (group["betas"], group["eps"], group.get("weight_decay", 0.0)) == ((0.9, 0.999), 1e-5, 0.0)
    settings = train_settings(LearnerSettings(steps=10))
    assert (settings.max_grad_norm, settings.warmup_updates) == (None, 0)


@pytest.mark.parametrize("optimizer", ["adam_tf", "adamw"])
def test_betas_and_epsilon_are_the_optimizers(optimizer: str, tmp_path: Path) -> None:
    (group,) = trainer_of(tmp_path, optimizer=optimizer, betas=[0.9, 0.95], epsilon=1e-8).optimizer.param_groups
    assert (group["betas"], group["eps"]) == ((0.9, 0.95), 1e-8)


def test_gradients_are_scaled_down_to_the_norm_that_is_set(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, gradient_norm=0.01)
    assert trainer.update(EPISODES)["grad_norm"] > 0.01, "what is told is the norm before"
    applied = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.trainable().values() if p.grad is not None])
    assert float(applied) == pytest.approx(0.01, rel=1e-3)


def test_matrices_decay_and_nothing_else_does_and_a_critic_keeps_its_rate(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, critic="separate", critic_learning_rate=4e-3, **DECAYED)
    trainer.update(EPISODES)
    found = {id(p): (group["weight_decay"], group["lr"]) for group in trainer.optimizer.param_groups for p in group["params"]}
    named = trainer.model.trainable()
    assert len(found) == len(named)
    for name, parameter in named.items():
        rate = 4e-3 if name.startswith("critic.") else 1e-3
        assert found[id(parameter)] == pytest.approx((0.1 if parameter.ndim >= 2 else 0.0, rate)), name
    assert all(group["params"] for group in trainer.optimizer.param_groups)


def test_weight_decay_moves_the_weights(tmp_path: Path) -> None:
    plain, decayed = trainer_of(tmp_path, optimizer="adamw"), trainer_of(tmp_path, **DECAYED)
    for trainer in (plain, decayed):
        trainer.update(EPISODES)
    largest = max(plain.model.trainable(), key=lambda name: plain.model.trainable()[name].numel())
    one, other = (float(trainer.model.trainable()[largest].detach().norm()) for trainer in (plain, decayed))
    assert other < one


def test_a_checkpoint_from_before_weight_decay_was_set_goes_on_with_it(tmp_path: Path) -> None:
    plain, decayed = trainer_of(tmp_path, optimizer="adamw"), trainer_of(tmp_path, **DECAYED)
    plain.update(EPISODES)
    state = plain.state().cloned()
    decayed.load_state(state)
    assert decayed.state().optimizer.keys() == state.optimizer.keys()
    for name, value in decayed.state().optimizer.items():
        assert torch.equal(value, state.optimizer[name]), name
    decayed.update(EPISODES)


def test_the_rate_rises_in_the_warm_up_and_falls_after_it(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, warmup_steps=2, schedule="linear", steps=4)
    assert [trainer.update(EPISODES)["lr"] for _ in range(4)] == pytest.approx([0.5e-3, 1e-3, 1e-3, 0.5e-3])


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        ({"weight_decay": 0.1}, r"learner\.weight_decay: adam_tf has none: take learner\.optimizer: adamw"),
        ({"warmup_steps": 11, "steps": 10}, r"learner\.warmup_steps: 11, and learner\.steps: 10 would all be warm-up"),
        ({"warmup_steps": 10, "steps": 10}, r"learner\.warmup_steps: 10, and learner\.steps: 10 would all be warm-up"),
        ({"betas": [0.9, 1.0]}, r"learner\.betas\.1\n.* less than 1"),
        ({"betas": [-0.1, 0.9]}, r"learner\.betas\.0\n.* greater than or equal to 0"),
        ({"epsilon": 0.0}, r"learner\.epsilon\n.* greater than 0"),
        ({"gradient_norm": 0.0}, r"learner\.gradient_norm\n.* greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_at_the_start(learner: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        RunSettings.model_validate({"learner": learner})


def test_a_run_without_an_end_may_warm_up() -> None:
    RunSettings.model_validate({"learner": {"warmup_steps": 10}})


@pytest.mark.parametrize(
    "learner",
    [{"gradient_norm": 1.0}, {"betas": [0.9, 0.95]}, {"epsilon": 1e-8}, {"warmup_steps": 10}, DECAYED],
)
def test_each_is_part_of_what_a_versions_lineage_names(learner: dict[str, Any]) -> None:
    base = {"optimizer": learner.get("optimizer", "adam_tf")}
    one, other = (RunSettings.model_validate({"learner": tree}) for tree in (base, {**base, **learner}))
    assert config_hash(one) != config_hash(other)

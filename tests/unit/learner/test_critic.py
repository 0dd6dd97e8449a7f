"""Claims about a critic of its own: where it starts, what it learns at which rate, and what becomes of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.run import merged, run_tree, settings_of
from tests.support.tiny import make_tiny_model
from tests.unit.learner.samples import random_episodes

from honed.artifacts.manifest import Lineage
from honed.artifacts.reward_models import RewardModelStore
from honed.artifacts.version import VersionId
from honed.config import RunSettings
from honed.learner.build import build_trainer
from honed.learner.critic_start import choose_critic_start
from honed.learner.data.batches import micro_batches
from honed.learner.loop.checkpoint import CheckpointStore
from honed.learner.loop.checkpoint_files import Checkpoint, Progress
from honed.learner.loop.exporter import Exporter
from honed.learner.models.critic import ValueModel
from honed.learner.sources.trained import TrainedIds
from honed.learner.train import rng
from honed.models.loader import load_language_model
from honed.models.reward_model import RewardModel

EPISODES = random_episodes(12, seed=3)
TRAINED = [{"name": "people", "kind": "reward_model", "source": "trained"}]


def run_of(root: Path, *, scorers: list[dict[str, Any]] | None = None, **learner: Any) -> RunSettings:
    tree = run_tree(root, learner={"critic": "separate", "epochs": 2, "minibatches": 2, **learner})
    return settings_of(tree if scorers is None else merged(tree, {"reward": {"scorers": scorers}}))


def reward_model(root: Path, base: Path, *, layers: int | None = 1) -> Path:
    """A reward model that says something of each text, with a bias."""
    model = RewardModel.from_language_model(base, rng=rng.generator(4), layers=layers)
    model.normalise([[5, 6, 7], [8, 9], [200]], mean=0.25)
    model.save(root / "rm", base)
    return root / "rm"


def publish(settings: RunSettings, directory: Path) -> RewardModelStore:
    store = RewardModelStore(settings.policy_url, settings.run, "trained")
    store.publish_next(directory, Lineage())
    return store


def test_before_the_first_update_it_values_a_state_as_the_reward_model_scores_the_text_so_far(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "model", seed=1)
    directory = reward_model(tmp_path, base)
    critic, scorer = ValueModel.from_reward_model(directory, device=torch.device("cpu")), RewardModel.load(directory)
    (packed,) = micro_batches(EPISODES, range(len(EPISODES)), max_tokens=10_000, width=9)
    values = critic.values(packed).tolist()
    for index, episode in enumerate(EPISODES):
        texts = [[*episode.prompt, *episode.response[:length]] for length in range(len(episode.response))]
        said = [value for value, slot in zip(values, packed.slots, strict=True) if int(slot) // 9 == index]
        assert said == pytest.approx(scorer.rewards(texts), abs=1e-5)


def test_its_loss_trains_it_alone_and_the_policys_trains_the_policy_alone(tmp_path: Path) -> None:
    gradients = []
    for coefficient in (0.1, 5.0):
        trainer = build_trainer(run_of(tmp_path, epochs=1, minibatches=1, value_coefficient=coefficient), tmp_path / "model")
        trainer.update(EPISODES)
        gradients.append({name: parameter.grad for name, parameter in trainer.model.trainable().items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        if name.startswith("critic."):
            torch.testing.assert_close(gradients[1][name], gradient * 50, atol=1e-5, rtol=1e-4)
        else:
            assert torch.equal(gradients[1][name], gradient), name
    assert trainer.model.value_head is None


def test_it_has_a_learning_rate_of_its_own_under_the_same_schedule(tmp_path: Path) -> None:
    settings = run_of(tmp_path, critic_learning_rate=4e-3, schedule="linear", steps=4)
    trainer = build_trainer(settings, tmp_path / "model")
    for share in (1.0, 0.75):
        assert trainer.update(EPISODES)["lr"] == pytest.approx(1e-3 * share)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([1e-3 * share, 4e-3 * share])
    same = build_trainer(run_of(tmp_path), tmp_path / "model")
    same.update(EPISODES)
    assert [group["lr"] for group in same.optimizer.param_groups] == [1e-3, 1e-3]


def test_it_is_resumed_and_rolled_back_bit_for_bit_and_is_not_published(tmp_path: Path) -> None:
    settings, base = run_of(tmp_path), tmp_path / "model"
    trainer, store = build_trainer(settings, base), CheckpointStore(tmp_path / "checkpoints")
    trainer.update(EPISODES)
    store.save(Checkpoint(trainer.state(), Progress(TrainedIds("r"))), 1)
    expected = trainer.update(EPISODES)
    resumed, found = build_trainer(settings, base), store.latest()
    assert found is not None
    for again in (resumed, trainer):  # another process, and the same one gone back
        again.load_state(found.trainer)
        figures = again.update(EPISODES)
        assert {**figures, "seconds": 0.0} == {**expected, "seconds": 0.0}
    for (name, one), other in zip(trainer.model.tensors().items(), resumed.model.tensors().values(), strict=True):
        assert torch.equal(one, other), name
    assert any(name.startswith("critic.") for name in found.trainer.optimizer)
    exported, _ = Exporter(trainer.model, base, tmp_path / "export").export(VersionId(1, 2))
    assert load_language_model(exported).state_dict().keys() == load_language_model(base).state_dict().keys()


def test_it_starts_from_the_runs_reward_model_and_keeps_that_start_when_the_reward_model_is_gone(tmp_path: Path) -> None:
    settings, base, home = run_of(tmp_path, scorers=TRAINED), tmp_path / "model", tmp_path / "home"
    home.mkdir()
    store = publish(settings, reward_model(tmp_path, base))
    start = choose_critic_start(settings, base, home)
    assert start.is_reward_model
    assert json.loads((home / "critic.json").read_text())["from"] == "artifact:trained/0.1"
    critic = build_trainer(settings, base, start).model.critic
    assert critic is not None
    assert critic.language_model.config.num_hidden_layers == 1
    assert bool(critic.head.weight.any())

    publish(settings, reward_model(tmp_path / "later", base, layers=2))  # a refresh: another shape
    store.retire(1, [])
    again = choose_critic_start(settings, base, home)
    kept = build_trainer(settings, base, again).model.critic
    assert kept is not None
    assert {name: value.tolist() for name, value in kept.state_dict().items()} == {
        name: value.tolist() for name, value in critic.state_dict().items()
    }


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda rm: (rm / "tokenizer.json").write_text((rm / "tokenizer.json").read_text() + "\n"), "another tokenizer"),
        (lambda rm: (rm / "model.safetensors").unlink(), "no safetensors file"),
        (lambda rm: edit_config(rm, max_position_embeddings=64), "has positions for 64 tokens"),
        (lambda rm: edit_config(rm, vocab_size=200), "knows 200 token ids, and the policy 258"),
        (lambda rm: edit_config(rm, reward_read="mean"), "does not read the last state of the last layer"),
    ],
)
def test_a_reward_model_that_cannot_value_what_the_policy_samples_is_passed_over_with_the_reason(
    spoil: Any, reason: str, tmp_path: Path
) -> None:
    base, home = make_tiny_model(tmp_path / "model", seed=1), tmp_path / "home"
    home.mkdir()
    directory = reward_model(tmp_path, base)
    spoil(directory)
    settings = run_of(tmp_path, scorers=[{"name": "file", "kind": "reward_model", "source": str(directory)}, *TRAINED])
    for _ in range(2):
        start = choose_critic_start(settings, base, home)
        assert (start.directory, start.is_reward_model) == (base, False)
    first, second = json.loads((home / "critic.json").read_text())["passed_over"]
    assert reason in first
    assert "trained: the run has trained no reward model yet" in second
    critic = build_trainer(settings, base, start).model.critic
    assert critic is not None
    assert not bool(critic.head.weight.any())


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("learner", "samples", "reason"),
    [
        ({"critic": "separate", "algorithm": "grpo"}, 4, r"learner\.critic: grpo does not read it"),
        ({"critic": "separate", "algorithm": "dpo"}, 1, r"learner\.critic: dpo does not read it"),
        ({"critic": "separate", "value_coefficient": 0.0}, 1, r"value_coefficient: 0 a separate critic learns nothing"),
        ({"critic_learning_rate": 1e-5}, 1, r"learner\.critic_learning_rate: a value head .* take learner\.critic: separate"),
    ],
)
def test_a_critic_that_would_idle_and_a_rate_without_a_critic_are_refused(
    learner: dict[str, Any], samples: int, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        RunSettings.model_validate({"learner": learner, "conductor": {"samples_per_prompt": samples}})


@pytest.mark.parametrize("algorithm", ["ppo", "a2c"])
def test_algorithms_that_learn_values_may_have_one(algorithm: str) -> None:
    RunSettings.model_validate({"learner": {"algorithm": algorithm, "critic": "separate", "critic_learning_rate": 9e-6}})

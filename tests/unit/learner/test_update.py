"""Claims about one PPO update."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tests.unit.learner import reference
from tests.unit.learner.samples import make_trainer, random_episodes
from torch import Tensor

from honed.artifacts.version import VersionId
from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.learner.data.episode import Episode, TokenSpan
from honed.learner.loop.run_state import SAMPLER_GAP_ALARM
from honed.learner.objectives.kl import FixedKL
from honed.learner.objectives.normalise import FittedOnFirstBatch, GainBias, Running
from honed.learner.train.on_policy import OnPolicyUpdates
from honed.learner.train.trainer import Trainer, TrainSettings

EPISODES = random_episodes(24, seed=5)


def own_logprobs(trainer: Trainer, episodes: list[Episode]) -> list[Episode]:
    """The same episodes as if the trainer's own weights had sampled them."""
    result = []
    for episode in episodes:
        got = rows_of(trainer.model.language_model, episode)
        result.append(dataclasses.replace(episode, logprobs=tuple(got)))
    return result


@torch.no_grad()
def rows_of(language_model: torch.nn.Module, episode: Episode) -> list[float]:
    tokens = torch.tensor([[*episode.prompt, *episode.response]])
    logits: Tensor = language_model(input_ids=tokens).logits[0, len(episode.prompt) - 1 : -1] / episode.temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(episode.response).unsqueeze(1)).squeeze(1).tolist()


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.tensors().items()}


def test_the_gradient_does_not_depend_on_how_the_batch_is_cut_into_micro_batches() -> None:
    gradients = []
    for budget in (1, 30, 77, 100_000):
        trainer = make_trainer(TrainSettings(learning_rate=1e-3, epochs=1, microbatch_tokens=budget))
        stats = trainer.update(EPISODES)
        gradients.append({name: p.grad.clone() for name, p in trainer.model.trainable().items() if p.grad is not None})
        assert stats["grad_norm"] > 0
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(("budget", "minibatches", "spared"), [(100_000, 1, 1), (30, 1, 1), (100_000, 2, 0)])
def test_the_pass_that_read_the_batch_last_is_the_first_that_is_trained_on(
    budget: int, minibatches: int, spared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TrainSettings(learning_rate=1e-3, epochs=2, minibatches=minibatches, microbatch_tokens=budget)
    results, passes = [], []
    for whole in (True, False):
        trainer = make_trainer(settings)
        if not whole:
            read = OnPolicyUpdates._read
            monkeypatch.setattr(OnPolicyUpdates, "_read", lambda *args, read=read: (*read(*args)[:2], None))
        counted = []
        trainer.model.language_model.base_model.register_forward_hook(lambda *_, into=counted: into.append(1))
        trainer.update(EPISODES)
        results.append(weights(trainer))
        passes.append(len(counted))
    assert passes[1] - passes[0] == spared
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], atol=1e-6, rtol=1e-5)


def test_one_update_reports_what_the_loops_compute() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=0.0, epochs=1), kl=FixedKL(0.15))
    policy_rows = [rows_of(trainer.model.language_model, e) for e in EPISODES]
    reference_rows = [rows_of(trainer.algorithm.reference.language_model, e) for e in EPISODES]
    stats = trainer.update(EPISODES)

    scores = [e.reward for e in EPISODES]
    rewards = reference.token_rewards(policy_rows, reference_rows, scores, 0.15)
    zeros = [[0.0] * len(row) for row in rewards]
    advantages, returns = reference.estimate(rewards, zeros, 1.0, 0.95)

    def flat(rows: list[list[float]]) -> list[float]:
        return [x for row in rows for x in row]

    behaviour = [x for e in EPISODES for x in e.logprobs]
    losses = reference.losses(
        flat(policy_rows),
        flat(policy_rows),
        behaviour,
        flat(advantages),
        flat(zeros),
        flat(zeros),
        flat(returns),
        clip=0.2,
        clip_value=0.2,
        cap=2.0,
    )
    kl = sum(sum(a) - sum(b) for a, b in zip(policy_rows, reference_rows, strict=True)) / len(EPISODES)
    gap = sum(math.exp(abs(a - b)) for a, b in zip(flat(policy_rows), behaviour, strict=True)) / len(behaviour)
    assert stats["policy_loss"] == pytest.approx(losses["policy"], abs=1e-5)
    assert stats["value_loss"] == pytest.approx(losses["value"], rel=1e-5)
    assert stats["kl"] == pytest.approx(kl, rel=1e-5)  # detail 4: mean over episodes of the sum over tokens
    assert stats["reward_mean"] == pytest.approx(sum(map(sum, rewards)) / len(rewards), abs=1e-5)
    assert stats["score_mean"] == pytest.approx(sum(scores) / len(scores))
    assert stats["sampler_gap"] == pytest.approx(gap, rel=1e-5)
    assert (stats["approxkl"], stats["clip_fraction"], stats["ratio_max"]) == (0.0, 0.0, 1.0)
    assert stats["tokens"] == len(behaviour)
    longest = max(len(episode.response) for episode in EPISODES)
    assert stats["masked_share"] == pytest.approx(1 - len(behaviour) / (len(EPISODES) * longest)), "without a bound"


def test_detail_9_the_controller_moves_once_a_batch_by_the_batchs_kl() -> None:
    trainer = make_trainer(TrainSettings(epochs=4, minibatches=3))
    stats = trainer.update(EPISODES)
    error = max(-0.2, min(0.2, stats["kl"] / 6.0 - 1.0))
    assert stats["beta"] == 0.15
    assert stats["next_beta"] == trainer.algorithm.kl.value == pytest.approx(0.15 * (1 + error * len(EPISODES) / 10_000))


def test_epochs_times_minibatches_steps_are_taken_and_the_rate_falls_to_zero() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=1e-3, epochs=2, minibatches=3, total_updates=4))
    stats = [trainer.update(EPISODES) for _ in range(5)]
    assert [s["optimizer_steps"] for s in stats] == [6] * 5
    assert [s["lr"] for s in stats] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0.0])
    assert trainer.step == 5


def test_fresh_episodes_of_the_same_weights_train_as_plain_ppo_and_raise_no_alarm() -> None:
    trainer = make_trainer()
    fresh = own_logprobs(trainer, EPISODES)
    stats = trainer.update(fresh, version=VersionId(1, 0))
    assert stats["behaviour_weight"] == pytest.approx(1.0, abs=1e-5)
    assert stats["sampler_gap_same_weights"] == pytest.approx(1.0, abs=1e-5)
    assert stats["sampler_gap_same_weights"] < SAMPLER_GAP_ALARM


def test_a_sampler_that_disagrees_on_the_same_weights_raises_the_alarm() -> None:
    trainer = make_trainer()
    off = [dataclasses.replace(e, logprobs=tuple(p - 0.1 for p in e.logprobs)) for e in own_logprobs(trainer, EPISODES)]
    assert trainer.update(off, version=VersionId(1, 0))["sampler_gap_same_weights"] > SAMPLER_GAP_ALARM


def test_tokens_of_older_versions_do_not_count_for_the_alarm() -> None:
    trainer = make_trainer()
    halved = []
    for episode in own_logprobs(trainer, [e for e in EPISODES if len(e.response) > 1]):
        length = len(episode.response)
        spans = (TokenSpan(VersionId(1, 0), 0, 1), TokenSpan(VersionId(1, 1), 1, length))
        stale = (episode.logprobs[0] - 1.0, *episode.logprobs[1:])
        halved.append(dataclasses.replace(episode, spans=spans, logprobs=stale))
    stats = trainer.update(halved, version=VersionId(1, 1))
    assert stats["sampler_gap"] > 1.05
    assert stats["sampler_gap_same_weights"] == pytest.approx(1.0, abs=1e-5)
    assert "sampler_gap_same_weights" not in make_trainer().update(halved, version=VersionId(9, 9))


def test_the_same_seed_gives_the_same_weights_and_another_permutation_does_not() -> None:
    settings = TrainSettings(learning_rate=1e-3, minibatches=3)
    one, two, three = (make_trainer(settings) for _ in range(3))
    three._generator.manual_seed(99)
    for trainer in (one, two, three):
        trainer.update(EPISODES)
    assert all(torch.equal(a, b) for a, b in zip(weights(one).values(), weights(two).values(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(weights(one).values(), weights(three).values(), strict=True))


def test_an_infinite_gradient_is_not_applied() -> None:
    trainer = make_trainer(normaliser=GainBias(gain=1e30))
    before = weights(trainer)
    with pytest.raises(FailedPrecondition, match="was not applied"):
        trainer.update([dataclasses.replace(e, reward=e.reward * 1e10) for e in EPISODES])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights(trainer).values(), strict=True))


def test_gradient_clipping_is_off_as_in_the_recipe_and_bounds_the_step_when_on() -> None:
    trainer = make_trainer(TrainSettings(epochs=1, max_grad_norm=0.01))
    stats = trainer.update(EPISODES)
    applied = torch.nn.utils.get_total_norm([p.grad for p in trainer.model.parameters() if p.grad is not None])
    assert stats["grad_norm"] > 0.01
    assert float(applied) == pytest.approx(0.01, rel=1e-3)


def test_a_trainer_goes_on_from_its_state_bit_for_bit() -> None:
    settings = TrainSettings(learning_rate=1e-3, minibatches=3, total_updates=10)
    straight = make_trainer(settings, normaliser=Running(clip=10.0))
    batches = [random_episodes(24, seed=s) for s in range(4)]
    expected = [straight.update(batch) for batch in batches]

    first = make_trainer(settings, normaliser=Running(clip=10.0))
    for batch in batches[:2]:
        first.update(batch)
    state = first.state().cloned()
    first.update(batches[3])  # a copy is not touched by what comes after
    second = make_trainer(settings, normaliser=Running(clip=10.0), seed=0)
    second.load_state(state)
    assert [second.update(batch) for batch in batches[2:]] == expected[2:]
    assert all(torch.equal(a, b) for a, b in zip(weights(straight).values(), weights(second).values(), strict=True))


def test_settings_that_cannot_work_are_refused_by_name() -> None:
    for name in ("epochs", "minibatches", "microbatch_tokens"):
        with pytest.raises(InvalidArgument, match=name):
            TrainSettings(**{name: 0})


def test_fewer_examples_than_minibatches_are_a_step_each() -> None:
    """The first pairs that people judge may be fewer."""
    figures = make_trainer(TrainSettings(epochs=2, minibatches=4)).update(EPISODES[:3])
    assert figures["optimizer_steps"] == 2 * 3
    assert make_trainer(TrainSettings(epochs=1, minibatches=4)).update(EPISODES[:1])["optimizer_steps"] == 1


def test_scores_that_are_all_equal_train_on_the_penalty_alone_and_are_counted() -> None:
    equal = [dataclasses.replace(episode, reward=2.5) for episode in EPISODES]
    trainer = make_trainer(normaliser=FittedOnFirstBatch(GainBias()))
    stats = trainer.update(equal)
    assert stats["reward_constant"] == 1.0
    assert stats["reward_mean"] == pytest.approx(-stats["beta"] * stats["kl"], rel=1e-3)
    assert trainer.update(EPISODES)["reward_constant"] == 0.0
    assert trainer.algorithm.normaliser.state()["fitted"] == 1.0

"""The learner learns: PPO on a tiny random Llama, sampled on policy, makes a token frequent."""

from __future__ import annotations

import pytest
import torch
from tests.unit.learner.samples import VOCABULARY, make_trainer

from honed.artifacts.version import VersionId
from honed.learner.data.episode import Episode, TokenSpan
from honed.learner.objectives.kl import FixedKL
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.attention import Precision

WANTED = 7
LENGTH = 8


@torch.no_grad()
def sample(trainer: Trainer, count: int, source: torch.Generator, group: int = 1) -> list[Episode]:
    """`group` responses to each prompt, one after the other."""
    prompts = torch.randint(VOCABULARY, (count // group, 3), generator=source).repeat_interleave(group, dim=0)
    tokens, logprobs = prompts, []
    for _ in range(LENGTH):
        log_p = trainer.model.language_model(input_ids=tokens).logits[:, -1].log_softmax(-1)
        drawn = torch.multinomial(log_p.exp(), 1, generator=source)
        logprobs.append(log_p.gather(1, drawn))
        tokens = torch.cat([tokens, drawn], dim=1)
    spans = (TokenSpan(VersionId(1, trainer.step), 0, LENGTH),)
    return [
        Episode(
            rollout_id=f"{trainer.step}-{row}/0",
            entry_id=f"{trainer.step}-{row}",
            prompt=tuple(prompts[row].tolist()),
            response=tuple(tokens[row, 3:].tolist()),
            logprobs=tuple(torch.cat(logprobs, dim=1)[row].tolist()),
            spans=spans,
            reward=float(WANTED in tokens[row, 3:].tolist()),
            group_id=f"{trainer.step}-{row // group}",
        )
        for row in range(count)
    ]


@pytest.mark.parametrize(("precision", "gap"), [("float32", 1.001), ("bfloat16", 1.05)])
def test_ppo_raises_the_reward_in_a_few_updates(precision: Precision, gap: float) -> None:
    trainer = make_trainer(TrainSettings(learning_rate=3e-3), kl=FixedKL(0.0), precision=precision)
    source = torch.Generator().manual_seed(0)
    rewards = []
    for _ in range(15):
        stats = trainer.update(sample(trainer, 64, source), version=VersionId(1, trainer.step))
        rewards.append(stats["score_mean"])
        assert stats["sampler_gap_same_weights"] < gap, "the sampler computes in float32"
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.3, rewards


def test_a_large_kl_coefficient_draws_the_policy_to_the_reference() -> None:
    trainer = make_trainer(TrainSettings(learning_rate=1e-2), kl=FixedKL(1.0))
    source = torch.Generator().manual_seed(1)
    kls = [trainer.update(sample(trainer, 64, source))["kl"] for _ in range(16)]
    assert sum(kls[-3:]) < 0.75 * sum(kls[:3]), kls

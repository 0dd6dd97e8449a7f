"""Random episodes and a tiny policy for tests of the learner."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from honed.artifacts.version import VersionId
from honed.learner.algorithms.base import make_algorithm
from honed.learner.data.episode import Episode, TokenSpan
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.objectives.kl import AdaptiveKL, KLController
from honed.learner.objectives.normalise import GainBias, RewardNormaliser
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.average import WeightAverage
from honed.learner.train.on_policy import OnPolicyUpdates, PolicyTrainer
from honed.learner.train.optimizer import OptimizerKind, build_optimizer
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.attention import Precision

VOCABULARY = 48


def tiny_llama(seed: int = 0, *, tied: bool = True, spread: float = 0.2) -> LlamaForCausalLM:
    """Two layers, width 32, float32."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        tie_word_embeddings=tied,
        attention_dropout=0.5,  # must have no effect: the learner runs without dropout
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def random_episodes(count: int, seed: int = 0, *, longest: int = 9, temperature: float = 1.0) -> list[Episode]:
    """Ragged prompts and responses with plausible log-probabilities."""
    source = random.Random(seed)
    episodes = []
    for index in range(count):
        length = source.randint(1, longest)
        episodes.append(
            Episode(
                rollout_id=f"g{index}/0",
                entry_id=f"{index}-0",
                prompt=tuple(source.randrange(VOCABULARY) for _ in range(source.randint(1, 6))),
                response=tuple(source.randrange(VOCABULARY) for _ in range(length)),
                logprobs=tuple(source.uniform(-6.0, -2.0) for _ in range(length)),
                spans=(TokenSpan(VersionId(1, 0), 0, length),),
                reward=source.gauss(0.5, 2.0),
                temperature=temperature,
            )
        )
    return episodes


def make_trainer(
    settings: TrainSettings | None = None,
    learner: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    kl: KLController | None = None,
    normaliser: RewardNormaliser | None = None,
    optimizer: OptimizerKind = "adam_tf",
    ema_decay: float | None = None,
    precision: Precision = "float32",
) -> PolicyTrainer:
    """A trainer on a tiny model whose reference differs from the policy, so that the KL is not zero."""
    policy = PolicyModel(tiny_llama(seed), precision=precision)
    reference = ReferenceModel(copy.deepcopy(tiny_llama(seed + 1)), precision=precision)
    settings = settings or TrainSettings(learning_rate=1e-3)
    section = LearnerSettings.model_validate(learner or {})
    algorithm = make_algorithm(section)
    updates = OnPolicyUpdates(
        algorithm,
        policy,
        reference if algorithm.needs.reference else None,
        section,
        kl=kl or AdaptiveKL(0.15, target=6.0, horizon=10_000),
        normaliser=normaliser or GainBias(),
    )
    return Trainer(
        policy,
        updates,
        build_optimizer(optimizer, policy.trainable().values(), lr=settings.learning_rate),
        settings=settings,
        generator=rng.generator(seed),
        average=None if ema_decay is None else WeightAverage(policy.published, ema_decay),
        clock=lambda: 0.0,
    )

"""A tiny language model directory, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from honed.learner.settings import PretrainSettings, RewardTrainingSettings
from honed.learner.supervised.language_model import ModelShape, new_language_model, save_language_model
from honed.models.new_tokenizer import train_tokenizer

TEXTS = [f"{a} {b} film about {c}." for a in ("A lovely", "The dull") for b in ("quiet", "long") for c in ("love", "war", "it")]
PRETRAINING = PretrainSettings(tokens=2_000, learning_rate=1e-2, warmup_steps=2)
REWARD_TRAINING = RewardTrainingSettings(learning_rate=1e-3, embedding_dropout=0.15)


class Killed(Exception):
    """What a test ends a training with."""


SHAPE = ModelShape(hidden_size=32, layers=1, head_size=32, max_length=64)


@pytest.fixture(scope="session")
def tokenizer():
    return train_tokenizer(TEXTS, vocabulary_size=300, max_length=64)


@pytest.fixture(scope="session")
def language_model(tmp_path_factory, tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("lm")
    rng = torch.Generator().manual_seed(0)
    save_language_model(new_language_model(SHAPE, vocabulary_size=len(tokenizer), rng=rng), tokenizer, directory)
    return directory

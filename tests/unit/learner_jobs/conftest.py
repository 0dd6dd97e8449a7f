"""A tiny language model directory, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from honed.learner.supervised.language_model import ModelShape, PretrainSettings, new_language_model, save_language_model
from honed.learner.supervised.reward_model import RewardTrainingSettings
from honed.models.new_tokenizer import train_tokenizer

TEXTS = [f"{a} {b} film about {c}." for a in ("A lovely", "The dull") for b in ("quiet", "long") for c in ("love", "war", "it")]
PRETRAINING = PretrainSettings(
    tokens=2_000,
    learning_rate=1e-2,
    max_seconds=None,
    warmup_steps=2,
    final_rate=0.05,
    weight_decay=0.1,
    gradient_norm=1.0,
)
REWARD_TRAINING = RewardTrainingSettings(
    objective="ranked_pairs",
    batch_texts=32,
    microbatch_tokens=2048,
    learning_rate=1e-3,
    warmup=0.05,
    embedding_dropout=0.15,
    weight_decay=0.01,
    gradient_norm=1.0,
    max_seconds=None,
)
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

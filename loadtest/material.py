"""A tiny language model with random weights, and versions of it in a policy store: what the benchmarks serve and push.

Its speed is that of the demo's model, whatever its weights say. A directory with a real model takes its place by `--model`.
"""

from __future__ import annotations

import random
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from honed.artifacts.draft import VersionDraft
from honed.artifacts.manifest import Lineage, Manifest
from honed.artifacts.store import PolicyStore
from honed.artifacts.version import VersionId
from honed.learner.loop.exporter import Exporter
from honed.learner.models.policy import PolicyModel
from honed.learner.supervised.language_model import ModelShape, new_language_model
from honed.learner.train import rng
from honed.models.loader import load_language_model
from honed.models.new_tokenizer import train_tokenizer
from loadtest.work import random_text

transformers_logging.disable_progress_bar()

LAYERS, WIDTH, VOCABULARY, LONGEST = 4, 128, 2048, 512


@dataclass(frozen=True)
class Published:
    """What stands in the store.

    Attributes:
        manifests: Of the versions, oldest first.
        vocabulary: How many token ids they know.
    """

    manifests: tuple[Manifest, ...]
    vocabulary: int


def make_model(
    directory: Path, seed: int = 1, *, width: int = WIDTH, layers: int = LAYERS, vocabulary: int | None = None
) -> None:
    """Writes a random Llama of the demo's shape with a byte-level BPE tokenizer; `vocabulary` may be more than that has."""
    words = random.Random(seed)
    # Made-up words by the thousand, so that the tokenizer finds enough merges to fill its vocabulary.
    letters = "etaoinshrdlucmfwypvbgk"
    made = ["".join(words.choices(letters, k=words.randint(2, 9))) for _ in range(4000)]
    texts = [" ".join(words.choices(made, k=40)) + " " + random_text(words, 40) for _ in range(400)]
    tokenizer = train_tokenizer(texts, vocabulary_size=VOCABULARY, max_length=LONGEST)
    shape = ModelShape(hidden_size=width, layers=layers, head_size=32 if width < 512 else 64, max_length=LONGEST)
    model = new_language_model(shape, vocabulary_size=vocabulary or len(tokenizer), rng=rng.generator(seed))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_large_model(directory: Path, gigabytes: float) -> None:
    """Writes a random Llama of about that size in float32, in the proportions of real ones: a head of 32,000 tokens."""
    width, vocabulary = 1024, 32_000
    a_layer = 4 * width**2 + 3 * width * (-(-width * 8 // 3 // 32) * 32)
    layers = round((gigabytes * 1e9 / 4 - vocabulary * width) / a_layer)
    if layers < 1:
        raise ValueError(f"--make {gigabytes:g} is too small; {(vocabulary * width + a_layer) * 4e-9:.2f} is the least")
    make_model(directory, width=width, layers=layers, vocabulary=vocabulary)


def publish(store: PolicyStore, model: Path, scratch: Path, count: int) -> Published:
    """Publishes `count` versions of the model, each a little off the one before, with true canaries."""
    policy = PolicyModel(load_language_model(model))
    exporter = Exporter(policy, model, scratch)
    chance = rng.generator(2)
    manifests = []
    lineage = Lineage(created_at=datetime.now(UTC).isoformat())
    for version in (VersionId(1, step) for step in range(count)):
        directory, canaries = exporter.export(version)
        manifests.append(store.publish(directory, VersionDraft(version, canaries, lineage)))
        shutil.rmtree(directory)
        with torch.no_grad():
            for parameter in policy.language_model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=chance), alpha=1e-3)
    return Published(tuple(manifests), policy.vocabulary_size)

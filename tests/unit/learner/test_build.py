"""From the settings to the trainer's surroundings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.support.run import run_tree, settings_of

from honed.kit.errors import InvalidArgument
from honed.learner.build import build_trainer, make_deterministic, vocabulary_of
from honed.learner.objectives.normalise import FittedOnFirstBatch


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("device", "asked", "wanted"),
    [("cpu", None, True), ("cpu", False, False), ("cuda", None, False), ("cuda", True, True), ("cpu", True, True)],
)
def test_the_same_bits_are_promised_on_a_cpu_and_elsewhere_on_request(device: str, asked: bool | None, wanted: bool) -> None:
    make_deterministic(torch.device(device), asked)
    assert torch.are_deterministic_algorithms_enabled() is wanted


def test_a_gpu_gets_the_workspace_that_deterministic_products_need(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    make_deterministic(torch.device("cpu"), True)
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    make_deterministic(torch.device("cuda"), True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_a_base_that_cannot_read_what_the_generator_may_sample_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = settings_of(run_tree(tmp_path, generation={"max_model_tokens": 600}))
    with pytest.raises(InvalidArgument, match=r"generation\.max_model_tokens: is 600, .* positions for 512 tokens"):
        build_trainer(settings, tmp_path / "model")


def test_the_trainer_waits_for_scores_that_differ_and_knows_the_models_ends(tmp_path: Path) -> None:
    settings = settings_of(run_tree(tmp_path))
    trainer = build_trainer(settings, tmp_path / "model")
    assert isinstance(trainer.algorithm.normaliser, FittedOnFirstBatch)
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [0, 7], "pad_token_id": 0}))
    vocabulary = vocabulary_of(tmp_path / "model", trainer.model.vocabulary_size)
    assert (vocabulary.size, vocabulary.pad_token_id, vocabulary.end_token_ids) == (258, None, {0, 7})

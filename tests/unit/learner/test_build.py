"""From the settings to the trainer's surroundings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.support.run import run_tree, settings_of
from tests.unit.learner.samples import random_episodes

from honed.config import RunSettings
from honed.kit.errors import InvalidArgument
from honed.learner.build import build_trainer, make_deterministic, train_settings, vocabulary_of
from honed.learner.models.upper_layers import UpperReference
from honed.learner.objectives.normalise import FittedOnFirstBatch
from honed.learner.settings import LearnerSettings


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


def test_the_upper_layers_train_alone_where_the_run_says_so(tmp_path: Path) -> None:
    trainer = build_trainer(settings_of(run_tree(tmp_path, learner={"unfrozen_layers": 1})), tmp_path / "model")
    assert isinstance(trainer.algorithm.reference, UpperReference)
    frozen = {name for name, p in trainer.model.named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"embed_tokens", "layers"}
    with pytest.raises(InvalidArgument, match=r"learner\.unfrozen_layers: is 3, and the model in .* \(llama\) has 2 layers"):
        build_trainer(settings_of(run_tree(tmp_path, learner={"unfrozen_layers": 3})), tmp_path / "model")
    with pytest.raises(ValueError, match=r"learner\.unfrozen_layers: 7, and pretrain\.layers makes 6"):
        settings_of(run_tree(tmp_path, learner={"unfrozen_layers": 7}, conductor={"start_from": None}))


def test_the_trainer_waits_for_scores_that_differ_and_knows_the_models_ends(tmp_path: Path) -> None:
    settings = settings_of(run_tree(tmp_path))
    trainer = build_trainer(settings, tmp_path / "model")
    assert isinstance(trainer.algorithm.normaliser, FittedOnFirstBatch)
    generation = tmp_path / "model" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": [0, 7], "pad_token_id": 0}))
    vocabulary = vocabulary_of(tmp_path / "model", trainer.model.vocabulary_size)
    assert (vocabulary.size, vocabulary.pad_token_id, vocabulary.end_token_ids) == (258, None, {0, 7})


def test_an_update_is_told_how_long_responses_may_be_so_that_their_collapse_shows(tmp_path: Path) -> None:
    settings = settings_of(run_tree(tmp_path, conductor={"response_tokens": 20}))
    trainer = build_trainer(settings, tmp_path / "model")
    collapsed = [replace(each, response=each.response[:1], logprobs=each.logprobs[:1]) for each in random_episodes(4)]
    assert trainer.update(collapsed)["masked_share"] == pytest.approx(0.95)


@pytest.mark.parametrize(
    ("algorithm", "setting", "value"),
    [
        ("grpo", "lam", 0.9),
        ("dpo", "kl", {"target": 3.0}),
        ("ppo", "preferences", {"refresh": False}),
        ("a2c", "clip_ratio", 0.1),
        ("dpo", "max_staleness", 4),
        ("online_dpo", "reward_normalisation", "none"),
        ("rejection", "gamma", 0.5),
        ("rejection", "kl", {"coefficient": 0.5}),
        ("rejection", "importance_cap", 3.0),
        ("rejection", "reward_clip", 1.0),
        ("rejection", "reward_normalisation", "none"),
    ],
)
def test_a_number_that_the_algorithm_does_not_read_is_refused(algorithm: str, setting: str, value: object) -> None:
    tree = {"learner": {"algorithm": algorithm, setting: value}, "conductor": {"samples_per_prompt": 4}}
    with pytest.raises(ValueError, match=rf"learner\.{setting}: {algorithm} does not read it"):
        RunSettings.model_validate(tree)
    ours = RunSettings.model_validate({"conductor": {"samples_per_prompt": 4}, "learner": {"algorithm": algorithm}})
    assert RunSettings.model_validate(ours.model_dump()) == ours, "what is written down with all defaults is read again"


def test_passes_over_a_batch_are_the_algorithms_where_the_run_file_names_none() -> None:
    assert train_settings(LearnerSettings()).epochs == 4
    assert train_settings(LearnerSettings(algorithm="a2c")).epochs == 1
    assert train_settings(LearnerSettings(algorithm="a2c", epochs=3)).epochs == 3


def test_settings_that_are_not_read_are_not_held_against_a_run_either() -> None:
    RunSettings.model_validate({"learner": {"algorithm": "dpo", "batch": 1}})
    tree = {"learner": {"algorithm": "rejection", "batch": 100_000}, "conductor": {"samples_per_prompt": 4}}
    RunSettings.model_validate(tree)
    with pytest.raises(ValueError, match=r"learner\.kl\.horizon"):
        RunSettings.model_validate({"learner": {"batch": 100_000}})

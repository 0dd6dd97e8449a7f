"""Claims about the reference: where leaving it costs nothing there is none, and no figure speaks of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support.run import run_tree, settings_of
from tests.unit.learner.padded import grouped_episodes
from tests.unit.learner.samples import make_trainer

import honed.learner.build as build
from honed.learner.algorithms.base import make_algorithm
from honed.learner.objectives.kl import FixedKL
from honed.learner.settings import LearnerSettings
from honed.learner.train.trainer import TrainSettings

WITH_A_PRICE = ["a2c", "grpo", "ppo", "reinforce", "rloo"]
FREE = {"kl": {"controller": "fixed", "coefficient": 0.0}}
ONE_STEP = TrainSettings(learning_rate=1e-3, epochs=1)


@pytest.mark.parametrize("name", WITH_A_PRICE)
def test_without_a_price_no_reference_is_loaded_and_no_kl_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = [], build.load_language_model

    def counted(directory: Path, **options: Any) -> Any:
        loaded.append(directory)
        return load(directory, **options)

    monkeypatch.setattr(build, "load_language_model", counted)
    for section, models in ((FREE, 1), ({"kl": {"controller": "fixed", "coefficient": 0.1}}, 2)):
        loaded.clear()
        tree = run_tree(tmp_path, learner={"algorithm": name, **section}, conductor={"samples_per_prompt": 4})
        trainer = build.build_trainer(settings_of(tree), tmp_path / "model")
        assert len(loaded) == models
        assert (trainer.algorithm.reference is None) is (models == 1)
        figures = trainer.update(grouped_episodes(8))
        assert ("kl" in figures) is (models == 2)
        assert figures["beta"] == figures["next_beta"] == section["kl"]["coefficient"]


@pytest.mark.parametrize("name", WITH_A_PRICE)
def test_what_is_learned_without_one_is_what_a_price_of_nothing_teaches(name: str) -> None:
    free = make_trainer(ONE_STEP, {"algorithm": name, **FREE}, kl=FixedKL(0.0))
    priced = make_trainer(ONE_STEP, {"algorithm": name}, kl=FixedKL(0.0))
    assert free.algorithm.reference is None
    assert priced.algorithm.reference is not None
    for trainer in (free, priced):
        trainer.update(grouped_episodes())
    for (each, one), other in zip(free.model.named_parameters(), priced.model.parameters(), strict=True):
        assert torch.equal(one, other), each


def test_a_coefficient_of_nothing_stays_nothing_under_every_controller() -> None:
    for controller in ("adaptive", "rl4lms", "fixed"):
        section = LearnerSettings.model_validate({"kl": {"controller": controller, "coefficient": 0.0}})
        kl = build.kl_controller(section.kl)
        kl.update(100.0, 512)
        assert kl.value == 0.0, "so a reference would never be needed"
        assert not make_algorithm(section).needs.reference

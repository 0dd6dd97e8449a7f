"""Claims about what Prometheus reads of training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY
from tests.unit.learner.padded import grouped_episodes
from tests.unit.learner.samples import make_trainer, random_episodes
from tests.unit.learner.test_dpo import PAIRS
from tests.unit.learner.test_dpo import trainer as pair_trainer
from tests.unit.learner.test_kto import BATCH as LABELLED
from tests.unit.learner.test_kto import trainer as labelled_trainer
from tests.unit.learner.test_mixture import trainer as mixture_trainer
from tests.unit.learner.test_online_dpo import trainer as scored_pair_trainer

from honed.learner import metrics
from honed.learner.algorithms.base import algorithm_names, find_algorithm
from honed.learner.loop.records import PushRecord
from honed.learner.train.trainer import TrainSettings

DOCUMENT = Path(__file__).parents[3] / "docs" / "metrics.md"


def figure(name: str) -> float | None:
    return REGISTRY.get_sample_value("honed_learner_update", {"figure": name})


def test_the_figures_of_the_last_update_are_shown_and_no_older_one() -> None:
    metrics.updated({"kl": 8.0, "sampler_gap_same_weights": 1.01})
    metrics.updated({"kl": -0.5})
    assert (figure("kl"), figure("sampler_gap_same_weights")) == (-0.5, None)
    metrics.updated({"kl": 1.0, "sampler_gap_same_weights": 1.02})
    assert figure("sampler_gap_same_weights") == 1.02


@pytest.mark.parametrize("algorithm", algorithm_names())
def test_every_figure_of_an_update_is_documented(algorithm: str) -> None:
    learns_from = find_algorithm(algorithm).learns_from
    if algorithm == "online_dpo":
        stats = scored_pair_trainer().update(grouped_episodes())
    elif learns_from == "rollouts":
        stats = make_trainer(TrainSettings(epochs=1), {"algorithm": algorithm}).update(random_episodes(4, seed=3))
    elif learns_from == "labels":
        stats = labelled_trainer().update(LABELLED)
    else:
        stats = pair_trainer().update(PAIRS)
    stats = {**stats, **mixture_trainer(1.0).update(grouped_episodes())}
    documented = set(re.findall(r"`(\w+)`", DOCUMENT.read_text().partition("`LearnerService.WatchPushes`")[0]))
    assert set(stats) <= documented


def test_pushes_are_counted_by_how_they_ended_with_their_pauses() -> None:
    def count(outcome: str) -> float:
        return REGISTRY.get_sample_value("honed_learner_pushes_total", {"outcome": outcome}) or 0.0

    def push(committed: int, *pauses_s: float, refused: bool = False) -> None:
        metrics.pushed(PushRecord("1.1", 0.0, committed, (), pauses_s, 0.0, 0, refused))

    before = {name: count(name) for name in ("committed", "refused", "unreached")}
    paused = REGISTRY.get_sample_value("honed_learner_push_pause_seconds_sum") or 0.0
    push(2, 0.02, 0.03)
    push(0, refused=True)
    push(0)
    assert {name: count(name) - before[name] for name in before} == {"committed": 1, "refused": 1, "unreached": 1}
    assert round((REGISTRY.get_sample_value("honed_learner_push_pause_seconds_sum") or 0.0) - paused, 6) == 0.05

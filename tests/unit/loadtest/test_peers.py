"""The arithmetic of the comparison with the peers, and that both sides have one task."""

import math
from pathlib import Path

import pytest
from loadtest.peers.compare import Side, Training, Update, measure, medians
from loadtest.peers.ours import run_tree
from loadtest.peers.task import END, VOCABULARY, Task, score, words

from honed.config import RunSettings


def training(*scores: float, gap: float = 1.0, cpu: float = 4.0) -> Training:
    """An update each `gap` seconds from 100 on, and processor time from the first to the last."""
    updates = [Update(100 + gap * number, value) for number, value in enumerate(scores)]
    return Training(updates, ((100.0, 2.0), (updates[-1].at if updates else 100.0, 2.0 + cpu)))


def test_the_rate_leaves_the_warm_up_out_and_counts_from_end_to_end():
    slow_start = [Update(at, 0.5) for at in (0, 10, 20, 21, 22, 23, 24)]
    side = measure(Training(slow_start, ((0, 0), (24, 12))), batch=8, seconds=100)
    assert side.episodes_per_second == 8 * 4 / 4
    assert side.updates == 7


def test_an_episode_costs_the_processor_time_between_the_looks_over_the_updates_between_them():
    side = measure(training(*[0.1] * 11, cpu=4.0), batch=10, seconds=100)
    assert side.cpu_ms_per_episode == pytest.approx(4000 / (10 * 10))
    unseen = Training(training(*[0.1] * 11).updates, ((0.0, 0.0), (1.0, 1.0)))
    assert math.isnan(measure(unseen, batch=10, seconds=100).cpu_ms_per_episode)


def test_the_score_is_that_of_the_last_tenth_of_the_common_time():
    scores = [number / 100 for number in range(50)]
    side = measure(training(*scores), batch=8, seconds=20)
    assert side.updates == 21, "what came later does not count"
    assert side.score == pytest.approx((0.18 + 0.19 + 0.20) / 3)


@pytest.mark.parametrize(("end", "collapsed"), [(0.5, False), (0.46, False), (0.4, True), (math.nan, True)])
def test_a_score_that_falls_again_is_a_collapse(end: float, collapsed: bool):
    assert measure(training(*[0.5] * 15, *[end] * 5), batch=8, seconds=20).collapsed is collapsed


@pytest.mark.parametrize("updates", [0, 1, 4])
def test_too_few_updates_are_refused(updates: int):
    with pytest.raises(ValueError, match="too few"):
        measure(training(*[0.1] * updates), batch=8, seconds=20)


def test_medians_are_over_the_seeds_and_collapses_are_counted():
    sides = [Side(rate, 2.0, value, 0.5, 9) for rate, value in ((10, 0.5), (30, 0.2), (20, 0.45))]
    assert medians(sides) == {"episodes_per_second": 20, "cpu_ms_per_episode": 2.0, "score": 0.45, "collapsed": 1.0}


def test_the_reward_is_learnable_and_a_random_policy_has_some_of_it():
    known = words()
    assert len(set(known)) == VOCABULARY
    assert known[0] == END
    assert 0.1 < score(" ".join(known[1:])) < 0.3
    assert (score("abc eve"), score("abc bcd"), score("bcd"), score("")) == (1.0, 0.5, 0.0, 0.0)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_our_side_runs_the_task_that_the_peer_reads(algorithm: str, tmp_path: Path):
    task = Task("model", "prompts", algorithm, 24, 64, 8, 4, 1e-3, 0.05, 30.0, 2, 1, False, "bfloat16", 3)  # type: ignore[arg-type]
    task.write(tmp_path / "task.json")
    assert Task.read(tmp_path / "task.json") == task
    settings = RunSettings.model_validate(run_tree(tmp_path, task, "auto"))
    assert (settings.seed, settings.learner.algorithm, settings.learner.batch, settings.learner.epochs) == (3, algorithm, 64, 4)
    assert (settings.learner.kl.controller, settings.learner.kl.coefficient) == ("fixed", 0.05)
    assert (settings.conductor.samples_per_prompt, settings.conductor.response_tokens) == (8, 24)
    assert (settings.learner.optimizer, settings.learner.precision) == ("adamw", "bfloat16")
    assert settings.conductor.fixed_length

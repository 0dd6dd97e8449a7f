"""Every algorithm over two families that differ in all that an update touches: one update on real tensors each.

GPT-2 has learned positions, fused projections and tied embeddings; Gemma 2 rotary positions, a sliding window, soft caps of
attention and logits, and attends by the reference implementation. What all families share is `test_families`.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import pytest
import torch
from tests.contract.models.test_families import episodes
from tests.support.families import make_family_model
from torch import Tensor

from honed.learner.algorithms.base import LearnsFrom, algorithm_names, find_algorithm, make_algorithm
from honed.learner.build import updates_of
from honed.learner.data.labelled import Labelled
from honed.learner.data.pair import Pair
from honed.learner.models.policy import PolicyModel, ReferenceModel
from honed.learner.settings import LearnerSettings
from honed.learner.train import rng
from honed.learner.train.optimizer import build_optimizer
from honed.learner.train.trainer import Trainer, TrainSettings
from honed.models.loader import load_language_model

ONE_PASS: Final = 100_000
VALUE_HEAD: Final = "value_head."


def groups() -> list[Any]:
    """Three responses to each of four prompts; two of them are long enough to be read once for all three."""
    made = episodes(12)
    prompts = [made[3 * n].prompt * (8 if n % 2 else 1) for n in range(4)]
    return [dataclasses.replace(episode, group_id=f"g{n // 3}", prompt=prompts[n // 3][:40]) for n, episode in enumerate(made)]


def pairs() -> list[Any]:
    """Ragged pairs, the better response not always the longer one."""
    source = random.Random(7)

    def tokens(longest: int) -> tuple[int, ...]:
        return tuple(source.randrange(2, 258) for _ in range(source.randint(1, longest)))

    return [Pair(f"p{n}", tokens(12) * (1 if n % 2 else 12), tokens(30), tokens(30)) for n in range(6)]


def labelled() -> list[Any]:
    """Both responses of each pair by themselves, one called good and one bad."""
    return [
        Labelled(f"{pair.rollout_id}-{place}", pair.prompt, response, desirable=not place)
        for pair in pairs()
        for place, response in enumerate((pair.chosen, pair.rejected))
    ]


BATCHES: Final[Mapping[LearnsFrom, Callable[[], Sequence[Any]]]] = {
    "rollouts": groups,
    "preferences": pairs,
    "labels": labelled,
}


@pytest.fixture(scope="module", params=["gpt2", "gemma2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A policy and a reference that differs from it, so that the price of leaving it is one."""
    root = tmp_path_factory.mktemp(request.param)
    policy, reference = (make_family_model(root / str(seed), request.param, seed, spread=0.1) for seed in (0, 1))
    return policy, reference


def updated(name: str, models: tuple[Path, Path], budget: int) -> tuple[dict[str, Tensor], Trainer[Any, PolicyModel], Any]:
    """The weights before one update of one step, the trainer behind it, and what it told."""
    learner = LearnerSettings(algorithm=name)
    policy = PolicyModel(load_language_model(models[0]))
    reference = ReferenceModel(load_language_model(models[1])) if make_algorithm(learner).needs.reference else None
    trainer: Trainer[Any, PolicyModel] = Trainer(
        policy,
        updates_of(learner, policy, reference),
        build_optimizer("adam_tf", policy.trainable().values(), lr=1e-3),
        settings=TrainSettings(learning_rate=1e-3, epochs=1, microbatch_tokens=budget),
        generator=rng.generator(0),
    )
    before = {name: value.clone() for name, value in policy.tensors().items()}
    return before, trainer, trainer.update(BATCHES[find_algorithm(name).learns_from]())


@pytest.mark.parametrize("name", algorithm_names())
def test_an_update_is_finite_moves_the_policy_and_does_not_depend_on_how_the_batch_is_cut(
    name: str, models: tuple[Path, Path]
) -> None:
    before, whole, figures = updated(name, models, ONE_PASS)
    losses = {figure: value for figure, value in figures.items() if figure.endswith("loss")}
    assert losses, f"{name} tells no loss"
    assert all(math.isfinite(value) for value in figures.values()), figures
    assert figures["grad_norm"] > 0
    still = [each for each, value in whole.model.tensors().items() if torch.equal(value, before[each])]
    learns_values = "value_loss" in figures
    assert any(each.startswith(VALUE_HEAD) for each in still) is not learns_values, (
        "a value head moves where values are learned"
    )
    assert not [each for each in still if not each.startswith(VALUE_HEAD)]

    _, cut, again = updated(name, models, 60)
    assert {figure: again[figure] for figure in losses} == pytest.approx(losses, rel=1e-3, abs=1e-5)
    for (each, parameter), other in zip(whole.model.named_parameters(), cut.model.parameters(), strict=True):
        assert (parameter.grad is None) is (other.grad is None), each
        if parameter.grad is not None:
            torch.testing.assert_close(other.grad, parameter.grad, atol=1e-5, rtol=1e-3)


def test_there_is_a_batch_of_each_kind_that_algorithms_learn_from() -> None:
    assert BATCHES.keys() == set(get_args(LearnsFrom)), (
        "give the new kind a batch, and its algorithms are tested with the others"
    )

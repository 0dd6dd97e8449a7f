"""Compute threads where nobody has said how many."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from honed.config import RunSettings
from honed.learner.models.threads import SMALL, beside_generation, choose_threads, use_threads


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weights", "cores", "beside", "threads"),
    [
        (SMALL - 1, 1, 1, 1),
        (SMALL - 1, 2, 1, 1),
        (SMALL - 1, 2, 0, 2),
        (SMALL - 1, 3, 1, 2),
        (SMALL - 1, 64, 1, 4),
        (SMALL, 1, 1, 1),
        (SMALL, 2, 1, 2),
        (SMALL, 2, 0, 2),
        (SMALL, 3, 1, 2),
        (SMALL, 16, 3, 13),
        (SMALL, 2, 8, 2),
    ],
)
def test_the_cores_that_are_left_over_compute(weights: int, cores: int, beside: int, threads: int) -> None:
    assert choose_threads(weights, cores, beside) == threads


def test_what_a_setting_says_is_done_and_else_the_model_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("honed.learner.models.threads.available_cores", lambda: 2)
    small = nn.Sequential(nn.Embedding(5000, 1000), nn.Linear(1000, 1000))
    large = nn.Sequential(nn.Linear(1000, 1000), nn.Linear(1000, 1000))

    assert (use_threads(3, small, beside=1), torch.get_num_threads()) == (3, 3)
    assert (use_threads(None, small, beside=1), torch.get_num_threads()) == (1, 1), "a table costs no time"
    assert (use_threads(None, large, beside=1), torch.get_num_threads()) == (2, 2)


def test_generators_of_this_machine_take_their_cores_and_those_of_a_cluster_none() -> None:
    here = RunSettings.model_validate({"run": "r", "directory": "d", "generation": {"threads": 2, "replicas": 3}})
    there = here.model_copy(update={"conductor": here.conductor.model_copy(update={"launcher": "none"})})

    assert (beside_generation(here), beside_generation(there)) == (6, 0)

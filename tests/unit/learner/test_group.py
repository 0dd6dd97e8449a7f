"""Advantages within groups, against their definitions."""

from __future__ import annotations

import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from honed.learner.objectives import group

SCORES = st.lists(st.lists(st.floats(-5, 5), min_size=2, max_size=5), min_size=1, max_size=4)


def laid_out(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Members of different groups in turns, as a stream may bring them."""
    rows = sorted((place, number, score) for number, members in enumerate(groups) for place, score in enumerate(members))
    return torch.tensor([row[2] for row in rows], dtype=torch.float64), torch.tensor([row[1] for row in rows])


@given(SCORES)
def test_advantages_are_scores_above_the_groups_mean_in_its_deviations(groups: list[list[float]]) -> None:
    scores, numbers = laid_out(groups)
    expected = {
        "none": lambda members, one: one - statistics.fmean(members),
        "group": lambda members, one: (one - statistics.fmean(members)) / (statistics.stdev(members) + 1e-4),
    }
    for scale, formula in expected.items():
        got = group.relative_advantages(scores, numbers, scale)
        for at, number in enumerate(numbers.tolist()):
            assert float(got[at]) == pytest.approx(formula(groups[number], float(scores[at])), abs=1e-6, rel=1e-6)


@given(SCORES)
def test_leaving_one_out_compares_with_the_others_alone(groups: list[list[float]]) -> None:
    scores, numbers = laid_out(groups)
    got = group.leave_one_out_advantages(scores, numbers)
    seen = [0] * len(groups)
    for at, number in enumerate(numbers.tolist()):
        others = [*groups[number][: seen[number]], *groups[number][seen[number] + 1 :]]
        seen[number] += 1
        assert float(got[at]) == pytest.approx(float(scores[at]) - statistics.fmean(others), abs=1e-9)


def test_the_batchs_deviation_serves_all_groups() -> None:
    scores, numbers = torch.tensor([0.0, 1.0, 4.0, 8.0]), torch.tensor([0, 0, 1, 1])
    spread = statistics.stdev([0.0, 1.0, 4.0, 8.0]) + 1e-4
    got = group.relative_advantages(scores, numbers, "batch")
    assert got.tolist() == pytest.approx([-0.5 / spread, 0.5 / spread, -2 / spread, 2 / spread])


def test_groups_whose_scores_are_the_same_are_counted() -> None:
    assert group.constant_share(torch.tensor([1.0, 2.0, 1.0, 3.0]), torch.tensor([0, 1, 0, 1])) == 0.5

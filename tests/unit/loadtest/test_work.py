"""The requests of a benchmark, and its ratios."""

import pytest
from loadtest.report import median_ratio, rounded
from loadtest.work import Plan, parse_range


def test_both_sides_get_the_same_work():
    plan = Plan(seed=3, requests=50, shortest=4, longest=9, vocabulary=100)
    assert plan.work() == Plan(**plan.to_json()).work()
    assert plan.work() != Plan(4, 50, 4, 9, 100).work()


def test_work_keeps_to_its_bounds():
    work = Plan(seed=3, requests=200, shortest=4, longest=9, vocabulary=100).work()
    assert {each.tokens for each in work} == set(range(4, 10))
    assert all(1 <= token < 100 for each in work for token in each.prompt)
    assert len({each.prompt for each in work}) == 200


@pytest.mark.parametrize(("text", "ends"), [("64-128", (64, 128)), ("64", (64, 64))])
def test_a_range_is_read(text: str, ends: tuple[int, int]):
    assert parse_range(text) == ends


@pytest.mark.parametrize("text", ["", "a", "9-4", "0-3", "4-x"])
def test_a_wrong_range_is_refused(text: str):
    with pytest.raises(ValueError, match=r"range|rise"):
        parse_range(text)


def test_the_ratio_is_the_median_over_pairs():
    """One slow pair moves nothing; nor does a drift that both sides of a pair share."""
    assert median_ratio([(100, 95), (200, 190), (100, 10)]) == 0.95


def test_figures_keep_four_digits():
    assert rounded(0.123456) == 0.1235
    assert rounded(45678.9) == 45680.0

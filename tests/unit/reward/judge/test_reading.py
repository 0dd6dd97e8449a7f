"""How ratings are found in answers."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from honed.reward.judge.reading import Unparsable, json_field, last_number


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("7", 7),
        ("**8**", 8),
        ("Rating: 8/10", 8),
        ("I give 6 out of 10.", 6),
        ("first 3, then 4.5", 4.5),
        ("5 of the 120 words are wrong", 5),
        ("−2, no: 2", 2),
        ("10", 10),
        ("11", None),
        ("version v2 or 3rd", None),
        ("none", None),
    ],
)
def test_the_last_number_in_the_range_is_the_rating(text: str, rating: float | None) -> None:
    if rating is None:
        with pytest.raises(Unparsable, match="no number from 1 to 10"):
            last_number(text, 1, 10)
    else:
        assert last_number(text, 1, 10) == rating


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ('{"score": 4}', 4),
        ('```json\n{"why": "x", "score": "7.5"}\n```', 7.5),
        ('{"score": 2} no, {"score": 3, "why": {"a": 1}}', 3),
        ('{"score": {"score": 3}}', 3),
        ('{"score": 11}', "score is 11"),
        ('{"score": true}', "score is True"),
        ('{"score": NaN}', "score is nan"),
        ('{"rating": 4}', "no JSON object with the field 'score'"),
        ('{"score": 4', "no JSON object"),
    ],
)
def test_a_field_of_the_last_object_that_has_it_is_the_rating(text: str, rating: float | str) -> None:
    if isinstance(rating, str):
        with pytest.raises(Unparsable, match=rating):
            json_field(text, "score", 1, 10)
    else:
        assert json_field(text, "score", 1, 10) == rating


@given(st.text())
def test_whatever_a_judge_says_is_a_rating_in_the_range_or_none(text: str) -> None:
    for read in (lambda: last_number(text, 0, 9), lambda: json_field(text, "score", 0, 9)):
        with contextlib.suppress(Unparsable):
            assert 0 <= read() <= 9

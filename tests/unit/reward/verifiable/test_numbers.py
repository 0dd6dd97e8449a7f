"""`number_match`, and how numbers are read."""

from __future__ import annotations

import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample, find_function
from honed.reward.verifiable.number_match import NumberMatch
from honed.reward.verifiable.numbers import boxed, numbers_in


def read(text: str) -> list[Fraction]:
    return [number.value for number in numbers_in(text, 1.0)]


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("", []),
        ("none", []),
        ("It is 42.", [42]),
        ("1,234,567.5 apples", [Fraction("1234567.5")]),
        ("1,2,3", [1, 2, 3]),
        ("3,14", [3, 14]),
        ("1,2345", [1, 2345]),
        ("-5 −6 +7", [-5, -6, 7]),
        ("10-5", [10, 5]),
        ("x = -3.50", [Fraction("-3.5")]),
        (".5 and 5.", [Fraction(1, 2), 5]),
        ("$1,200 and -$3 and \\$7", [1200, -3, 7]),
        ("3/4 of it", [Fraction(3, 4)]),
        ("1/0", []),
        (r"\frac{3}{4} or -\dfrac{1}{2}", [Fraction(3, 4), Fraction(-1, 2)]),
        ("1e-3 and 2E5", [Fraction(1, 1000), 200_000]),
        ("12% of 50 \\%", [12, 50]),
        ("x2 v1.5", []),
        ("7km", [7]),
        ("9" * 41, []),
        ("1e9999999999", []),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, numbers: list[Fraction]) -> None:
    assert read(text) == numbers


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{4", None),
        ("42", None),
    ],
)
def test_the_last_box_is_read_with_its_braces(text: str, inside: str | None) -> None:
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("options", "response", "reference", "score"),
    [
        ({}, "First 3, then 1,042.00.", "1042", 1),
        ({}, "It is 1042 or 7", "1042", 0),
        ({}, "no idea", "1", 0),
        ({}, "0.1 + 0.2 = 0.3", "0.30000000000000004", 1),
        ({}, "0.33", "1/3", 0),
        ({"tolerance": 0.01}, "0.33", "1/3", 1),
        ({"relative": 0.02}, "98", "100", 1),
        ({"relative": 0.02}, "97", "100", 0),
        ({}, "50%", "0.5", 1),
        ({}, "50%", "50", 1),
        ({}, "0.5", "50%", 1),
        ({}, "50%", "0.5%", 0),
        ({}, "50", "50 %", 1),
        ({}, "2", '["1", "2"]', 1),
        ({"marker": "####"}, "7 #### 42 (not 9)", "6 * 7 = 42\n#### 42", 1),
        ({"marker": "####"}, "42", "#### 42", 0),
        ({"marker": "####"}, "#### 42", "42", 1),
        ({"boxed": True}, r"3 \boxed{x = 42} 7", "42", 1),
        ({"boxed": True}, "42", "42", 0),
        ({"boxed": True}, r"\boxed{\frac{84}{2}}", r"We get \boxed{42}. (see page 3)", 1),
    ],
)
def test_a_number_that_matches(options: dict[str, object], response: str, reference: str, score: float) -> None:
    assert NumberMatch(**options)([Sample("", response, reference)]) == [score]  # type: ignore[arg-type]


def test_a_reference_without_a_number_is_the_samples_fault() -> None:
    with pytest.raises(InvalidArgument, match="reference: holds no number: 'none'"):
        NumberMatch()([Sample("", "1", "none")])


@pytest.mark.parametrize("options", [{"marker": "#", "boxed": True}, {"tolerance": -1}, {"marker": ""}, {"digits": 3}])
def test_options_that_cannot_be_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(InvalidArgument, match=r"reward\.scorers\.s\.options"):
        find_function("s", "number_match", options)


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet="0123456789,./%-+eE$ \\{}fracboxd−", max_size=200))
def test_any_text_has_numbers_or_none(text: str) -> None:
    numbers_in(text, 1.0)
    boxed(text)
    for function in (NumberMatch(), NumberMatch(boxed=True), NumberMatch(marker="a")):
        assert function([Sample("", text, "42")])[0] in (0.0, 1.0)


@settings(deadline=None)
@given(st.integers(-(10**30), 10**30), st.integers(1, 10**9))
def test_a_number_is_found_however_it_is_written(value: int, under: int) -> None:
    for text, number in ((f"{value}", value), (f"{value:,}", value), (f"{value}/{under}", Fraction(value, under))):
        assert read(f"So the answer is {text}.") == [number]
    assert read(f"\\frac{{{value}}}{{{under}}}") == [Fraction(value, under)]


@pytest.mark.parametrize(
    "text", ["9" * 500_000, "1," * 250_000, "1,111" * 100_000, "-" * 500_000, "\\frac{" * 80_000, "1/" * 250_000]
)
def test_long_texts_take_a_bounded_time(text: str) -> None:
    start = time.monotonic()
    NumberMatch()([Sample("", text, "42")])
    assert time.monotonic() - start < 5

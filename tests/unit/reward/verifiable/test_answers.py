"""`exact_match`, `matches`, and what all scorers with a reference have in common."""

from __future__ import annotations

import threading
import time
from importlib.metadata import entry_points

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import GROUP, Sample, find_function
from honed.reward.verifiable.base import references_of
from honed.reward.verifiable.exact_match import ExactMatch
from honed.reward.verifiable.fences import fenced_blocks
from honed.reward.verifiable.matches import Matches

CATASTROPHE = r"(a|a|b?a)+$"
"""Takes a time that doubles with each letter of a text that does not match."""
LONG = "a" * 5000 + "!"


def sample(response: str, reference: str = "") -> Sample:
    return Sample("", response, reference)


@pytest.mark.parametrize(
    ("options", "response", "reference", "score"),
    [
        ({}, " Paris\n", "Paris", 1),
        ({"strip": False}, " Paris", "Paris", 0),
        ({}, "paris", "Paris", 0),
        ({"casefold": True}, "STRASSE", "straße", 1),
        ({}, "Rome", '["Paris","Rome"]', 1),
        ({}, "[1, 2]", "[1, 2]", 1),
        ({"pattern": r"answer: (\w+)"}, "answer: no, answer: yes", "yes", 1),
        ({"pattern": r"answer: (\w+)"}, "answer: yes, answer: no", "yes", 0),
        ({"pattern": r"\d+"}, "1, 2 and 3", "3", 1),
        ({"pattern": r"#### (.*)"}, "so\n#### 42", "40 + 2\n#### 42", 1),
        ({"pattern": r"answer: (\w+)"}, "yes", "yes", 0),
        ({"pattern": r"a|(b)"}, "ba", "a", 0),
        ({"pattern": CATASTROPHE}, LONG, "a", 0),
    ],
)
def test_an_exact_match(options: dict[str, object], response: str, reference: str, score: float) -> None:
    assert ExactMatch(**options)([sample(response, reference)]) == [score]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "response", "reference", "score"),
    [
        ({"pattern": "(?i)yes"}, "oh YES", "", 1),
        ({"pattern": "yes", "whole": True}, "oh yes", "", 0),
        ({}, "abc", "b.", 1),
        ({"pattern": "x"}, "abc", "b.", 0),
        ({"pattern": CATASTROPHE}, LONG, "", 0),
    ],
)
def test_a_pattern_that_matches(options: dict[str, object], response: str, reference: str, score: float) -> None:
    assert Matches(**options)([sample(response, reference)]) == [score]  # type: ignore[arg-type]


def test_a_batch_of_catastrophic_searches_ends_and_lets_other_threads_run() -> None:
    longest = last = 0.0
    stop = threading.Event()

    def beat() -> None:
        nonlocal longest, last
        last = time.monotonic()
        while not stop.wait(0.01):
            longest, last = max(longest, time.monotonic() - last), time.monotonic()

    thread = threading.Thread(target=beat)
    thread.start()
    start = time.monotonic()
    assert Matches(pattern=CATASTROPHE, timeout_s=0.1)([sample(LONG)] * 20) == [0.0] * 20
    took = time.monotonic() - start
    stop.set()
    thread.join()
    assert took < 10, "20 searches of 0.1 s"
    assert longest < 1, "the event loop is another thread"


def test_a_reference_that_is_no_pattern_is_the_samples_fault() -> None:
    with pytest.raises(InvalidArgument, match=r"reference: '\(' is no regular expression"):
        Matches()([sample("a", "(")])


@pytest.mark.parametrize("source", ["exact_match", "matches"])
def test_a_pattern_that_is_none_is_refused_at_the_start(source: str) -> None:
    with pytest.raises(InvalidArgument, match=r"reward\.scorers\.s\.options\.pattern: .*'\(' is no regular expression"):
        find_function("s", source, {"pattern": "("})


def test_a_sample_without_a_reference_is_refused_unless_a_score_is_given_for_it() -> None:
    batch = [sample("a", "a"), sample("b")]
    with pytest.raises(InvalidArgument, match="give the prompt a `reference`"):
        ExactMatch()(batch)
    assert ExactMatch(missing=-0.5)(batch) == [1.0, -0.5]
    assert ExactMatch(missing=0.0)(batch) == [1.0, 0.0]


@pytest.mark.parametrize(
    ("text", "references"),
    [
        ("a", ["a"]),
        ('["a", "b"]', ["a", "b"]),
        ('["a", 1]', ['["a", 1]']),
        ("[]", ["[]"]),
        ("[", ["["]),
        ("[" * 100_000, ["[" * 100_000]),
    ],
)
def test_several_references_are_a_json_list_of_strings(text: str, references: list[str]) -> None:
    assert references_of(text) == references


@pytest.mark.parametrize(
    ("text", "blocks"),
    [
        ("no code", []),
        ("a\n```python\nx = 1\n```\nb", ["x = 1"]),
        ("```\nplain\n```", ["plain"]),
        ("```\nplain\n```\n```py\nx\n```\n```python\ny\n```", ["x", "y"]),
        ("```text\nout\n```", []),
        ("```Python title=a\nx\n\n```", ["x\n"]),
        ("````python\n```\nx\n````", ["```\nx"]),
        ("~~~python\nx\n~~~", ["x"]),
        ("```python\nx = 1", ["x = 1"]),
        ("```", [""]),
    ],
)
def test_code_is_taken_out_of_its_fence(text: str, blocks: list[str]) -> None:
    assert fenced_blocks(text, ("python", "py")) == blocks


@settings(max_examples=200, deadline=None)
@given(st.text() | st.text(alphabet="`~python \n[]\"'(){}\\", max_size=200), st.text(min_size=1))
def test_any_text_can_be_scored(response: str, reference: str) -> None:
    for function in (ExactMatch(), ExactMatch(pattern=r"(\w+)\W*$", casefold=True), Matches(pattern=r"^\s*\S+")):
        [score] = function([sample(response, reference)])
        assert score in (0.0, 1.0)
    assert (
        ExactMatch()([sample(reference, reference)]) == [1.0]
        or len(references_of(reference)) != 1
        or reference != references_of(reference)[0]
    )
    fenced_blocks(response, ("python",))


def test_what_honed_offers_is_made_without_options() -> None:
    names = {point.name for point in entry_points(group=GROUP) if point.value.startswith("honed.reward.verifiable")}
    assert names == {"exact_match", "json_schema", "matches", "number_match", "unit_tests"}
    for name in names:
        assert find_function("s", name).version.startswith("honed ")

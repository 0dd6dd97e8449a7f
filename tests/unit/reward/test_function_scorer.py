"""Python functions as scorers."""

from collections.abc import Sequence
from importlib.metadata import EntryPoint

import pytest
from tests.unit.reward.support import item

from honed.kit.errors import FailedPrecondition, NotFound
from honed.reward.builtin import length, repetition
from honed.reward.function_scorer import GROUP, FunctionScorer, Sample, ScoreFunction, find_function
from honed.reward.scorer import ScorerFailed

BATCH = [item("one"), item("two")]


def scorer(function: ScoreFunction, *, sees_prompt: bool = True) -> FunctionScorer:
    return FunctionScorer("f", function, "pkg 1.2", sees_prompt=sees_prompt)


def offered(value: str, name: str = "wanted") -> list[EntryPoint]:
    return [EntryPoint(name, value, GROUP)]


def test_a_function_gets_texts_and_its_values_come_back_in_order() -> None:
    seen: list[Sample] = []

    def count(samples: Sequence[Sample]) -> list[float]:
        seen.extend(samples)
        return [float(len(sample.response)) for sample in samples]

    outputs = scorer(count).score([item(list(b"abc"), list(b"p")), item("ab", "q")])
    assert [output.value for output in outputs] == [3.0, 2.0]
    assert seen == [Sample("p", "abc"), Sample("q", "ab")]


def test_a_function_that_does_not_see_the_prompt_gets_none() -> None:
    outputs = scorer(lambda samples: [float(len(s.prompt)) for s in samples], sees_prompt=False).score([item("a", "prompt")])
    assert outputs[0].value == 0.0


def test_what_a_function_raises_names_the_scorer() -> None:
    def broken(samples: Sequence[Sample]) -> list[float]:
        raise KeyError("lexicon")

    with pytest.raises(ScorerFailed, match=r"scorer 'f' \(pkg 1\.2\) failed: KeyError: 'lexicon'"):
        scorer(broken).score(BATCH)


@pytest.mark.parametrize(
    ("values", "reason", "sample"),
    [
        ([1.0], "returned 1 values for 2 samples", None),
        ([1.0, float("nan")], "returned nan, which is not finite", 1),
        ([float("inf"), 1.0], "returned inf, which is not finite", 0),
        ([1.0, "high"], "returned 'high', which is no number", 1),
        ([1.0, None], "returned None, which is no number", 1),
    ],
)
def test_a_wrong_answer_names_the_scorer_and_the_sample(values: list[float], reason: str, sample: int | None) -> None:
    with pytest.raises(ScorerFailed, match=reason) as caught:
        scorer(lambda samples: values).score(BATCH)
    assert caught.value.sample == sample


def test_an_entry_point_is_found_by_its_name() -> None:
    found = find_function("n", "wanted", find=lambda: offered("honed.reward.builtin:length"))
    assert found.score([item("a b c")])[0].value == pytest.approx(0.03)


def test_an_unknown_function_is_told_what_is_installed() -> None:
    with pytest.raises(NotFound, match=r"no entry point 'other' in the group honed\.scorers; installed: wanted"):
        find_function("n", "other", find=lambda: offered("honed.reward.builtin:length"))


def test_a_function_that_cannot_be_imported_or_called_is_refused() -> None:
    for value in ("honed.reward.nowhere:f", "honed.reward.builtin:nothing", "honed.reward.function_scorer:GROUP"):
        with pytest.raises(FailedPrecondition, match="scorer 'n'"):
            find_function("n", "wanted", find=lambda value=value: offered(value))


def test_two_distributions_with_one_name_are_refused() -> None:
    both = offered("honed.reward.builtin:length") + offered("honed.reward.builtin:repetition")
    with pytest.raises(FailedPrecondition, match="uninstall all but one"):
        find_function("n", "wanted", find=lambda: both)


def test_length_counts_words_and_repetition_counts_repeated_pairs() -> None:
    samples = [Sample("", "a b a b a"), Sample("", "a b c"), Sample("", "")]
    assert list(length(samples)) == [0.05, 0.03, 0.0]
    assert list(repetition(samples)) == [0.5, 0.0, 0.0]

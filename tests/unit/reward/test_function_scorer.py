"""Python functions as scorers."""

from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint
from typing import Any

import pytest
from pydantic import Field
from tests.unit.reward.support import item

from honed.kit.errors import FailedPrecondition, InvalidArgument, NotFound
from honed.reward.builtin import length, repetition
from honed.reward.function_scorer import GROUP, FunctionScorer, Sample, ScoreFunction, find_function
from honed.reward.scorer import BadSample, NotAScore, ScorerFailed
from honed.settings import Section

BATCH = [item("one"), item("two")]


def times(samples: Sequence[Sample], factor: float = 1.0, *, offset: float = 0.0) -> list[float]:
    """A function with options."""
    return [factor * len(sample.response) + offset for sample in samples]


class Checked(Section):
    """A class that checks its options."""

    least: int = Field(1, ge=0)

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        return [float(len(sample.response) >= self.least) for sample in samples]


class Broken:
    """A class that cannot be made here."""

    def __init__(self, kind: str = "package") -> None:
        if kind == "package":
            raise ImportError("pip install 'thing'")
        raise ValueError("kind is not known")


class NotCallable:
    """A class whose instances score nothing."""


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


def test_a_function_may_say_that_the_sample_is_at_fault() -> None:
    def needs(samples: Sequence[Sample]) -> list[float]:
        if not all(sample.reference for sample in samples):
            raise InvalidArgument("reference", "is empty")
        return [float(len(sample.reference)) for sample in samples]

    with pytest.raises(BadSample, match="reference: is empty"):
        scorer(needs).score(BATCH[:1])
    with pytest.raises(ScorerFailed) as caught:
        scorer(needs).score(BATCH)
    assert not isinstance(caught.value, BadSample), "in a batch nobody knows which of them it is"
    assert scorer(needs).score([replace(BATCH[0], reference="abc")])[0].value == 3.0


def per_letter(samples: Sequence[Sample], worth: float = 1.0) -> list[list[float]]:
    """A dense function with an option."""
    return [[worth * token.isupper() for token in sample.tokens] for sample in samples]


per_letter.dense = True  # type: ignore[attr-defined]


class Late:
    """A dense class."""

    dense = True

    def __call__(self, samples: Sequence[Sample]) -> list[range]:
        return [range(len(sample.token_ids)) for sample in samples]


def test_a_dense_function_sees_the_tokens_and_rewards_each() -> None:
    scorer = made("per_letter", worth=0.5)
    outputs = scorer.score([item(list(b"aBC")), item("x")])
    assert [(output.value, output.token_values) for output in outputs] == [(1.0, (0.0, 0.5, 0.5)), (0.0, (0.0,))]
    [output] = made("Late").score([item(list(b"abc"), list(b"p"))])
    assert (output.value, output.token_values) == (3.0, (0.0, 1.0, 2.0))


def test_tokens_are_pieces_of_the_response_and_no_half_characters() -> None:
    seen: list[Sample] = []

    def note(samples: Sequence[Sample]) -> list[list[float]]:
        seen.extend(samples)
        return [[0.0] * len(sample.tokens) for sample in samples]

    FunctionScorer("f", note, "1", dense=True).score([item(list("né €".encode()), list(b"ask")), item([*b"a", 256, 0xE2])])
    assert seen[0].tokens == ("n", "", "é", " ", "", "", "€")
    assert "".join(seen[0].tokens) == seen[0].response
    assert seen[0].token_ids == tuple("né €".encode())
    assert seen[1].tokens == ("a", "", "\ufffd"), "what is cut inside of a character stands at the last token"
    scorer(lambda samples: [0.0 for _ in samples if seen.extend(samples) is None]).score([item(list(b"ab"))])
    assert seen[-1].tokens == (), "who rewards whole responses needs no tokens, and they cost a pass of decoding"


@pytest.mark.parametrize(
    ("values", "dense", "reason"),
    [
        ([[1.0], [float("nan")] * 3], True, "returned nan, which is not finite"),
        ([[1.0] * 3, ["high"] * 3], True, "returned 'high', which is no number"),
        ([[1.0] * 3, 1.0], True, r"returned 1\.0 where one reward for each token is wanted"),
        (
            [1.0, [1.0] * 3],
            False,
            r"returned \[.*\], which is no number; a function that rewards each token says so by .*dense",
        ),
    ],
)
def test_dense_rewards_of_a_wrong_shape_name_the_scorer(values: list[object], dense: bool, reason: str) -> None:
    with pytest.raises(NotAScore, match=f"scorer 'f' .*{reason}"):
        FunctionScorer("f", lambda samples: values, "1", dense=dense).score(BATCH)  # type: ignore[arg-type, return-value]


def test_what_a_function_raises_names_the_scorer() -> None:
    def broken(samples: Sequence[Sample]) -> list[float]:
        raise KeyError("lexicon")

    with pytest.raises(ScorerFailed, match=r"scorer 'f' \(pkg 1\.2\) failed: KeyError: 'lexicon'") as caught:
        scorer(broken).score(BATCH)
    assert not isinstance(caught.value, NotAScore), "it may be an outage: only answers tell that the code is wrong"


@pytest.mark.parametrize(
    ("values", "reason", "sample"),
    [
        ([1.0], "returned 1 values for 2 samples", None),
        ([1.0, float("nan")], "returned nan, which is not finite", 1),
        ([float("inf"), 1.0], "returned inf, which is not finite", 0),
        ([1.0, "high"], "returned 'high', which is no number", 1),
        ([1.0, None], "returned None, which is no number", 1),
        (1.0, "returned one float where a list of 2, one for each sample, is wanted", None),
        (None, "returned one NoneType where a list of 2, one for each sample, is wanted", None),
    ],
)
def test_a_wrong_answer_names_the_scorer_and_the_sample(values: Any, reason: str, sample: int | None) -> None:
    with pytest.raises(NotAScore, match=reason) as caught:
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


def made(attribute: str, **options: object) -> FunctionScorer:
    return find_function("n", "wanted", options, find=lambda: offered(f"{__name__}:{attribute}"))


def test_options_are_keyword_arguments_of_a_function() -> None:
    assert [o.value for o in made("times", factor=2, offset=1).score([item("ab")])] == [5.0]
    assert [o.value for o in made("times").score([item("ab")])] == [2.0]


def test_a_class_is_made_once_with_its_options() -> None:
    scorer = made("Checked", least=2)
    assert [o.value for o in scorer.score([item("ab"), item("a")])] == [1.0, 0.0]
    assert [o.value for o in made("Checked").score([item("")])] == [0.0]


@pytest.mark.parametrize(
    ("attribute", "options", "message"),
    [
        ("times", {"facto": 2}, r"scorers\.n\.options: .*'facto'; wanted has the options: factor, offset"),
        ("times", {"samples": []}, r"scorers\.n\.options: .*'samples'"),
        ("Checked", {"most": 2}, r"scorers\.n\.options: .*'most'; wanted has the options: least"),
        ("Checked", {"least": -1}, r"scorers\.n\.options\.least: .*greater than or equal to 0; wanted has the options: least"),
        ("Checked", {"least": "many"}, r"scorers\.n\.options\.least: "),
        ("Broken", {"kind": "x"}, r"scorers\.n\.options: wanted refuses .*kind is not known"),
    ],
)
def test_an_option_that_cannot_be_is_refused_at_the_start(attribute: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        made(attribute, **options)


def test_a_class_that_cannot_be_made_says_why() -> None:
    with pytest.raises(FailedPrecondition, match=r"scorer 'n': wanted cannot be made: pip install 'thing'"):
        made("Broken")
    with pytest.raises(FailedPrecondition, match="needs `__call__`"):
        made("NotCallable")


def test_the_version_tells_options_apart_and_not_the_order_they_stand_in() -> None:
    plain, one = made("times").version, made("times", factor=2, offset=1).version
    assert one == made("times", offset=1, factor=2).version
    assert len({plain, one, made("times", factor=2).version}) == 3
    assert plain == "unknown distribution", "a function without options keeps the version that it has always had"
    assert len(one) <= 128, "the contract's bound"

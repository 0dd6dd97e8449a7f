"""Metrics of texts: the values that each library's documentation gives, and what is ours around them."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honed.kit.errors import FailedPrecondition, InvalidArgument
from honed.reward.function_scorer import Sample, find_function
from honed.reward.text_metrics import Bleu, Chrf, Meteor, Rouge, Sentiment

GUIDE = (
    "It is a guide to action which ensures that the military always obeys the commands of the party",
    "It is a guide to action that ensures that the military will forever heed Party commands",
    "It is the guiding principle which guarantees the military forces always being under the command of the Party",
    "It is the practical guide for the army always to heed the directions of the party",
)
"""The example of nltk's documentation, after Papineni et al.: a response and three references."""


def score(metric: Any, response: str, *references: str) -> float:
    reference = references[0] if len(references) == 1 else json.dumps(references)
    value: float = metric([Sample("", response, reference)])[0]
    return value


def test_rouge_is_that_of_its_readme() -> None:
    fox, dog = "The quick brown fox jumps over the lazy dog", "The quick brown dog jumps on the log."
    assert score(Rouge(variant="rouge1", stemmer=True), dog, fox) == pytest.approx(0.70588235)
    assert score(Rouge(variant="rougeL", stemmer=True), dog, fox) == pytest.approx(0.58823529)
    assert score(Rouge(variant="rouge1", value="precision"), dog, fox) == pytest.approx(0.75)
    assert score(Rouge(variant="rouge1", value="recall"), dog, fox) == pytest.approx(0.66666667)
    assert score(Rouge(), dog, "nothing at all", dog) == 1.0, "the best of several"


def test_bleu_and_chrf_are_sacrebleus() -> None:
    response, *references = "The dog bit the man.", "The dog bit the man.", "The dog had bit the man."
    assert score(Bleu(), response, *references) == pytest.approx(1.0)
    # Papineni's clipping: 2 of 7 words, and no pair; sacrebleu smooths the rest exponentially.
    assert score(Bleu(), "the the the the the the the", "The cat is on the mat.", "There is a cat on the mat.") < 0.1
    assert score(Bleu(), "The dog bit the man.", "The dog had bit the man.") == pytest.approx(0.51150, abs=1e-4)
    assert score(Bleu(), "THE DOG BIT THE MAN.", "The dog bit the man.") < 0.1
    assert score(Bleu(lowercase=True), "THE DOG BIT THE MAN.", "The dog bit the man.") == pytest.approx(1.0)
    assert score(Chrf(), response, *references) == pytest.approx(1.0)
    assert score(Chrf(), "no word", "The dog") < score(Chrf(), "The cat", "The dog") < 1
    assert score(Chrf(word_order=2), "The cat", "The dog") != score(Chrf(), "The cat", "The dog")


def test_meteor_is_nltks_without_its_stage_of_synonyms() -> None:
    response, *references = GUIDE
    assert score(Meteor(), response, references[0]) == pytest.approx(0.6944, abs=5e-5), "no synonym is in this pair"
    assert score(Meteor(), response, *references) == pytest.approx(0.6944, abs=5e-5)
    assert score(Meteor(), "this is a cat", "non matching hypothesis") == 0.0
    assert score(Meteor(), "cats", "cat") == score(Meteor(), "cat", "cat"), "of one stem"


def test_sentiment_is_that_of_vaders_readme() -> None:
    given = {
        "VADER is smart, handsome, and funny.": 0.8316,
        "VADER is VERY SMART, handsome, and FUNNY!!!": 0.9342,
        "The book was good.": 0.4404,
        "At least it isn't a horrible book.": 0.431,
        "Today SUX!": -0.5461,
        "": 0.0,
    }
    assert Sentiment()([Sample("", text) for text in given]) == pytest.approx(list(given.values()), abs=1e-3)


METRICS = {"rouge": "rouge_score", "bleu": "sacrebleu", "chrf": "sacrebleu", "meteor": "nltk.translate.meteor_score"}


@pytest.mark.parametrize(("source", "module"), [*METRICS.items(), ("sentiment", "vaderSentiment.vaderSentiment")])
def test_a_library_that_is_missing_is_named_with_what_to_install(
    source: str, module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer" if source == "rouge" else module, None)
    with pytest.raises(FailedPrecondition, match=rf"scorer 's': {source} cannot be made: .*pip install 'honed\[metrics\]'"):
        find_function("s", source)


def test_synonyms_without_wordnet_say_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nltk.data.path", [])
    with pytest.raises(FailedPrecondition, match=r"nltk\.downloader wordnet"):
        find_function("s", "meteor", {"synonyms": True})


@pytest.mark.parametrize("source", METRICS)
def test_a_prompt_without_a_reference_is_refused(source: str) -> None:
    from tests.unit.reward.support import item

    from honed.reward.scorer import BadSample

    with pytest.raises(BadSample, match="give the prompt a `reference`"):
        find_function("s", source).score([item("a")])
    assert find_function("s", source, {"missing": 0.25}).score([item("a")])[0].value == 0.25
    with pytest.raises(InvalidArgument, match=r"options\.missing"):
        find_function("s", source, {"missing": "none"})


@pytest.mark.parametrize("metric", [Rouge(), Bleu(), Chrf(word_order=2), Meteor()])
def test_a_long_text_takes_a_bounded_time(metric: Any) -> None:
    start = time.monotonic()
    score(metric, "a b " * 500_000, "b a " * 16_000)
    assert time.monotonic() - start < 20


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.text(min_size=1, max_size=200))
def test_any_text_has_a_score_between_0_and_1(response: str, reference: str) -> None:
    for metric in (ROUGE, BLEU, CHRF, METEOR):
        assert 0.0 <= score(metric, response, reference) <= 1.0 + 1e-9
    assert -1.0 <= SENTIMENT([Sample("", response)])[0] <= 1.0


ROUGE, BLEU, CHRF, METEOR, SENTIMENT = Rouge(), Bleu(), Chrf(), Meteor(), Sentiment()

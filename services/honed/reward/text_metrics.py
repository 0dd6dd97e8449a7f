"""Metrics of a text against one or several references, and sentiment: each by the library that others compare with.

`pip install 'honed[metrics]'` brings the libraries. A reference that is a JSON list of strings is
several; the best one counts, as each library defines it. All scores but the sentiment run from 0 to
1 (where a library says 0 to 100, it is divided). Only the first 2000 words of a text are read,
since the cost of some metrics grows with the product of both lengths.
"""

from __future__ import annotations

import importlib
import re
from abc import abstractmethod
from collections.abc import Sequence
from itertools import islice
from typing import Any, Final, Literal

from pydantic import Field, PrivateAttr

from honed.kit.errors import FailedPrecondition
from honed.reward.function_scorer import Sample
from honed.reward.verifiable.base import AgainstReference, references_of
from honed.settings import Section

_MOST_WORDS: Final = 2000
_WORD: Final = re.compile(r"\w+|[^\w\s]")


class _TextMetric(AgainstReference):
    _metric: Any = PrivateAttr(None)

    def model_post_init(self, context: Any, /) -> None:
        """Loads the library.

        Raises:
            FailedPrecondition: It is not installed.
        """
        self._metric = self._load()

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self._value(_start(response), [_start(each) for each in references_of(reference)])

    @abstractmethod
    def _load(self) -> Any: ...

    @abstractmethod
    def _value(self, response: str, references: list[str]) -> float: ...


class Rouge(_TextMetric):
    """ROUGE by `rouge-score`: shared word pairs, or the longest common subsequence of words."""

    variant: Literal["rouge1", "rouge2", "rougeL", "rougeLsum"] = "rougeL"
    value: Literal["precision", "recall", "fmeasure"] = "fmeasure"
    stemmer: bool = Field(False, description="Compare English words by Porter's stems.")

    def _load(self) -> Any:
        return _library("rouge_score.rouge_scorer").RougeScorer([self.variant], use_stemmer=self.stemmer)

    def _value(self, response: str, references: list[str]) -> float:
        return float(getattr(self._metric.score_multi(references, response)[self.variant], self.value))


class Bleu(_TextMetric):
    """BLEU of a sentence by `sacrebleu`, over no longer word sequences than the response has (its effective order)."""

    lowercase: bool = False
    tokenize: Literal["13a", "intl", "char", "zh", "none"] = "13a"

    def _load(self) -> Any:
        return _library("sacrebleu").BLEU(effective_order=True, lowercase=self.lowercase, tokenize=self.tokenize)

    def _value(self, response: str, references: list[str]) -> float:
        return float(self._metric.sentence_score(response, references).score) / 100


class Chrf(_TextMetric):
    """The chrF of a sentence by `sacrebleu`: shared sequences of characters, and of words (chrF++) where that is wanted."""

    word_order: int = Field(0, ge=0, le=4, description="Longest sequence of words; 2 is chrF++.")
    lowercase: bool = False

    def _load(self) -> Any:
        return _library("sacrebleu").CHRF(word_order=self.word_order, lowercase=self.lowercase)

    def _value(self, response: str, references: list[str]) -> float:
        return float(self._metric.sentence_score(response, references).score) / 100


class Meteor(_TextMetric):
    """METEOR by `nltk`, over words and signs.

    Its third stage matches synonyms of WordNet, which nltk downloads and no package brings; so it
    is off. The first two match words that are equal and words of one stem (Porter's, for English).
    """

    synonyms: bool = Field(False, description="Match synonyms too; needs WordNet: `python -m nltk.downloader wordnet`.")

    def _load(self) -> Any:
        wordnet = self._wordnet() if self.synonyms else _NoSynonyms()
        score = _library("nltk.translate.meteor_score").meteor_score
        return lambda references, response: score(references, response, wordnet=wordnet)

    def _wordnet(self) -> Any:
        wordnet = _library("nltk.corpus").wordnet
        try:
            wordnet.ensure_loaded()
        except LookupError as error:
            raise FailedPrecondition(
                "synonyms need WordNet, which is not here: run `python -m nltk.downloader wordnet`, or leave `synonyms` off"
            ) from error
        return wordnet

    def _value(self, response: str, references: list[str]) -> float:
        return float(self._metric([_WORD.findall(each) for each in references], _WORD.findall(response)))


class _NoSynonyms:
    def synsets(self, word: str) -> list[Any]:
        """The meanings of a word: none are known."""
        return []


class Sentiment(Section):
    """How positive an English text is, from -1 to 1, by the lexicon and rules of VADER (its `compound`)."""

    _analyzer: Any = PrivateAttr(None)

    def model_post_init(self, context: Any, /) -> None:
        """Loads the lexicon.

        Raises:
            FailedPrecondition: It is not installed.
        """
        self._analyzer = _library("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores the responses alone."""
        return [float(self._analyzer.polarity_scores(_start(sample.response))["compound"]) for sample in samples]


def _start(text: str) -> str:
    """The first words of a text."""
    beyond = next(islice(_WORD.finditer(text), _MOST_WORDS, None), None)
    return text if beyond is None else text[: beyond.start()]


def _library(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FailedPrecondition(f"{error}: run `pip install 'honed[metrics]'`") from error

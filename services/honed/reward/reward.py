"""The reward: a weighted sum of scorers, over the response as truncation leaves it.

Source of the truncation rule: lm-human-preferences. The text is cut behind the first occurrence of a token at or after a
position; a response without one there gets a fixed reward. Truncation concerns the score only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from honed.kit.errors import HonedError, InvalidArgument
from honed.reward import metrics
from honed.reward.scorer import NotAScore, Scorer, ScorerFailed, ScorerInput, ScorerOutput, ScoringTokenizer, check_longest

LARGEST: Final = 3.4e38
"""The largest reward of a token: they travel as float32."""


@dataclass(frozen=True, slots=True)
class Term:
    """One scorer of the sum."""

    scorer: Scorer
    weight: float


@dataclass(frozen=True, slots=True)
class ScoreValue:
    """What one scorer said of one response; the fields of honed.v1.Score."""

    scorer: str
    version: str
    value: float
    weight: float
    truncated_tokens: int
    members: tuple[float, ...] = ()
    deviation: float = 0.0
    token_values: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reward:
    """What a response is worth.

    Attributes:
        value: The weighted sum, or the fixed reward of a response that lacks the truncation token.
        scores: What it is the sum of. Scorers speak of every response, so that each reward names its scorers' versions.
        missing: The response lacks the truncation token; the value is not one to be normalised with the others.
    """

    value: float
    scores: tuple[ScoreValue, ...]
    missing: bool = False


@dataclass(frozen=True, slots=True)
class Truncation:
    """Where the scored text ends.

    Attributes:
        token: Id of the token to cut behind.
        not_before: Position in the response, from 0, from which on the token counts.
        missing_score: The reward when the token does not come there.
    """

    token: int
    not_before: int
    missing_score: float

    @classmethod
    def of_text(cls, text: str, not_before: int, missing_score: float, tokenizer: ScoringTokenizer) -> Truncation:
        """Finds the single token that `text` is.

        Raises:
            InvalidArgument: The policy's tokenizer makes more or less than one token of it.
        """
        ids = tokenizer.encode(text, special_tokens=False)
        if len(ids) != 1:
            raise InvalidArgument(
                "reward.truncate.token_text", f"{text!r} is {len(ids)} tokens of the policy's vocabulary; it must be one"
            )
        return cls(ids[0], not_before, missing_score)

    def apply(self, item: ScorerInput) -> tuple[ScorerInput, bool]:
        """The input as it is scored, and whether the token was there. Without it the response stays whole."""
        ids = item.response_ids
        try:
            end = ids.index(self.token, self.not_before)
        except ValueError:
            return item, False
        return item.cut(end + 1), True


class WeightedSum:
    """One immutable reward: which scorers, in which versions, with which weights."""

    def __init__(self, terms: Sequence[Term], truncation: Truncation | None = None) -> None:
        """Adds up `terms`.

        Raises:
            InvalidArgument: There are none, two have one name, a weight is not finite, or they may take too long together.
        """
        names = [term.scorer.name for term in terms]
        if not names:
            raise InvalidArgument("reward.scorers", "empty; name at least one scorer")
        if len(set(names)) < len(names):
            raise InvalidArgument("reward.scorers", f"two scorers have the same name: {', '.join(names)}")
        if not all(math.isfinite(term.weight) for term in terms):
            raise InvalidArgument("reward.scorers", "every weight must be finite")
        check_longest((term.scorer.name, term.scorer.longest_s) for term in terms)
        self.terms = tuple(terms)
        self._truncation = truncation

    def score(self, batch: Sequence[ScorerInput]) -> list[Reward]:
        """Scores a batch, in its order.

        Raises:
            ScorerFailed: A scorer raised; as `NotAScore`, it gave the wrong number of values, or one that is not finite.
        """
        inputs, complete = list(batch), [True] * len(batch)
        if self._truncation is not None:
            for index, item in enumerate(batch):
                inputs[index], complete[index] = self._truncation.apply(item)
            metrics.MISSING_TOKEN.inc(complete.count(False))
        columns = [self._column(term, inputs, batch) for term in self.terms]
        return [self._reward(index, row, complete[index]) for index, row in enumerate(zip(*columns, strict=True))]

    def _column(self, term: Term, inputs: Sequence[ScorerInput], whole: Sequence[ScorerInput]) -> list[ScoreValue]:
        scorer = term.scorer
        try:
            outputs = scorer.score(inputs)
        except HonedError:
            raise
        except Exception as error:  # a scorer's bug concerns its batch, never the service
            raise ScorerFailed(scorer.name, scorer.version, f"{type(error).__name__}: {error}") from error
        if len(outputs) != len(inputs):
            raise NotAScore(scorer.name, scorer.version, f"it returned {len(outputs)} values for {len(inputs)} samples")
        for index, output in enumerate(outputs):
            if not math.isfinite(output.value):
                raise NotAScore(scorer.name, scorer.version, f"its value is {output.value}, which is not finite", index)
        return [
            ScoreValue(
                scorer.name,
                output.version or scorer.version,
                output.value,
                term.weight,
                output.truncated_tokens,
                output.members,
                output.deviation,
                self._of_tokens(term.scorer, output, index, inputs[index], whole[index]),
            )
            for index, output in enumerate(outputs)
        ]

    def _of_tokens(
        self, scorer: Scorer, output: ScorerOutput, index: int, scored: ScorerInput, whole: ScorerInput
    ) -> tuple[float, ...] | None:
        """Rewards of all tokens of the response, where the scorer saw those up to the truncation token."""
        values = output.token_values
        if values is None:
            return None
        given, wanted = len(values), len(scored.response_ids)
        if given != wanted:
            reason = f"it returned {given} rewards for a response of {wanted} tokens: one a token is wanted"
            raise NotAScore(scorer.name, scorer.version, reason, index)
        for at, value in enumerate(values):
            if not abs(value) <= LARGEST:
                reason = f"its reward of token {at} is {value}, which is not finite in float32"
                raise NotAScore(scorer.name, scorer.version, reason, index)
        return (*values, *(0.0,) * (len(whole.response_ids) - wanted))

    def _reward(self, index: int, scores: tuple[ScoreValue, ...], complete: bool) -> Reward:
        if not complete:
            assert self._truncation is not None
            return Reward(self._truncation.missing_score, scores, missing=True)
        value = sum(score.weight * score.value for score in scores)
        if not math.isfinite(value):
            last = scores[-1]
            raise NotAScore(last.scorer, last.version, "the weighted sum overflows", index)
        return Reward(value, scores)

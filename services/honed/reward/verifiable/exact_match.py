"""`exact_match`: 1 where the answer is the reference, otherwise 0."""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from honed.reward.verifiable.base import AgainstReference, references_of
from honed.reward.verifiable.patterns import Pattern, compiled, last_answer, time_limit


class ExactMatch(AgainstReference):
    """Compares the answer with the reference, or with each of a JSON list of them.

    With a pattern the answer is its first group, or all of it, where it matches last; no match
    scores 0, and so does a search that takes longer than `timeout_s`. The reference is read the
    same way where the pattern matches it, and as a whole otherwise.
    """

    strip: bool = Field(True, description="Leave out white space around both.")
    casefold: bool = Field(False, description="Take upper and lower case for the same.")
    pattern: Pattern | None = Field(None, description="Regular expression that finds the answer. Unset: the whole response.")
    timeout_s: float = Field(0.1, gt=0, le=1, description="Seconds to search one response.")

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See `AgainstReference`."""
        limit_s = time_limit(self.timeout_s, pairs)
        return [self._equal(response, reference, limit_s) for response, reference in pairs]

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self._equal(response, reference, self.timeout_s)

    def _equal(self, response: str, reference: str, limit_s: float) -> float:
        pattern = None if self.pattern is None else compiled(self.pattern)
        answer = response if pattern is None else last_answer(pattern, response, limit_s)
        if answer is None:
            return 0.0
        wanted = references_of(reference)
        if pattern is not None:
            wanted = [found if (found := last_answer(pattern, each, limit_s)) is not None else each for each in wanted]
        return float(self._plain(answer) in {self._plain(each) for each in wanted})

    def _plain(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text.casefold() if self.casefold else text

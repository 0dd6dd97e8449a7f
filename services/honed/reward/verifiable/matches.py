"""`matches`: 1 where a regular expression matches the response, otherwise 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample
from honed.reward.verifiable.base import AgainstReference
from honed.reward.verifiable.patterns import Pattern, compiled, found, time_limit


class Matches(AgainstReference):
    """Searches by the option's pattern, or else by the reference. A search that takes longer than `timeout_s` scores 0."""

    pattern: Pattern | None = Field(None, description="Regular expression, with its flags as `(?i)`. Unset: the reference.")
    whole: bool = Field(False, description="It must match the whole response, not a part.")
    timeout_s: float = Field(0.1, gt=0, le=1, description="Seconds to search one response.")

    @property
    def needs_reference(self) -> bool:
        """Whether a sample without a reference is refused: not by a pattern of the options."""
        return self.pattern is None and super().needs_reference

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores a batch; needs references only without a pattern of its own."""
        if self.pattern is None:
            return super().__call__(samples)
        pattern, limit_s = compiled(self.pattern), time_limit(self.timeout_s, samples)
        return [float(found(pattern, sample.response, limit_s, whole=self.whole)) for sample in samples]

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See `AgainstReference`."""
        limit_s = time_limit(self.timeout_s, pairs)
        return [float(found(_of(reference), response, limit_s, whole=self.whole)) for response, reference in pairs]

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self.score_all([(response, reference)])[0]


def _of(reference: str) -> Any:
    try:
        return compiled(reference)
    except ValueError as error:
        raise InvalidArgument("reference", str(error)) from error

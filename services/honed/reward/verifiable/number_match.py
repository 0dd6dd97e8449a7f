r"""`number_match`: 1 where the response's number is the reference's, otherwise 0."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Self

from pydantic import Field, model_validator

from honed.kit.errors import InvalidArgument
from honed.reward.verifiable.base import AgainstReference, references_of
from honed.reward.verifiable.numbers import Number, boxed, numbers_in, same_number
from honed.reward.verifiable.patterns import time_limit

_SEARCH_S: Final = 0.5


class NumberMatch(AgainstReference):
    r"""Compares the last number of the response with that of the reference; see `numbers` for how numbers are read.

    With `marker` it is the first number behind the marker's last place; with `boxed` the last one
    inside of the last `\boxed{...}`. A response without a number there scores 0. A reference is
    read the same way if it has the marker or the box, otherwise its last number counts; of a JSON
    list of strings each one may be met.
    """

    marker: str | None = Field(None, min_length=1, description="Text in front of the answer, such as `####`.")
    boxed: bool = Field(False, description=r"The answer stands in \boxed{}.")
    tolerance: float = Field(0.0, ge=0, description="Difference that is allowed.")
    relative: float = Field(1e-9, ge=0, description="The same as a share of the reference's number; the larger one counts.")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.marker is not None and self.boxed:
            raise ValueError("the answer stands behind `marker` or in `boxed`: give one of them")
        return self

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See `AgainstReference`."""
        limit_s = time_limit(_SEARCH_S, pairs)
        return [self._same(response, reference, limit_s) for response, reference in pairs]

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self._same(response, reference, _SEARCH_S)

    def _same(self, response: str, reference: str, limit_s: float) -> float:
        wanted = [self._wanted(each, limit_s) for each in references_of(reference)]
        try:
            said = self._answer(response, limit_s)
        except TimeoutError:
            return 0.0
        return float(said is not None and any(same_number(said, each, self.tolerance, self.relative) for each in wanted))

    def _wanted(self, reference: str, limit_s: float) -> Number:
        found = self._answer(reference, limit_s)
        if found is None:
            numbers = numbers_in(reference, limit_s)
            if not numbers:
                raise InvalidArgument("reference", f"holds no number: {reference[:80]!r}")
            found = numbers[-1]
        return found

    def _answer(self, text: str, limit_s: float) -> Number | None:
        if self.marker is not None:
            _, marker, rest = text.rpartition(self.marker)
            numbers = numbers_in(rest, limit_s) if marker else []
            return numbers[0] if numbers else None
        inside = boxed(text) if self.boxed else text
        numbers = [] if inside is None else numbers_in(inside, limit_s)
        return numbers[-1] if numbers else None

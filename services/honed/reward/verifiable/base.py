"""What scorers that compare a response with its prompt's reference have in common."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence

from pydantic import Field

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample
from honed.settings import Section


class AgainstReference(Section):
    """A scorer that needs a reference; its fields are the scorer's options."""

    missing: float | None = Field(None, description="Score where the prompt has no reference. Unset: such a sample is refused.")

    @property
    def needs_reference(self) -> bool:
        """Whether a sample without a reference is refused."""
        return self.missing is None

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores a batch.

        Raises:
            InvalidArgument: A sample has no reference, or one that cannot be used.
        """
        if self.needs_reference and not all(sample.reference for sample in samples):
            raise InvalidArgument(
                "reference", "is empty: give the prompt a `reference`, or say by the scorer's option `missing` what it scores"
            )
        scores = iter(self.score_all([(sample.response, sample.reference) for sample in samples if sample.reference]))
        return [next(scores) if sample.reference else self.missing or 0.0 for sample in samples]

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Scores responses, each with its reference."""
        return [self.score(response, reference) for response, reference in pairs]

    @abstractmethod
    def score(self, response: str, reference: str) -> float:
        """Scores one response.

        Raises:
            InvalidArgument: The reference cannot be used; names the field `reference`.
        """


def references_of(reference: str) -> list[str]:
    """The references that a text holds: a JSON list of strings is several, anything else is one."""
    if reference.lstrip().startswith("["):
        try:
            found = json.loads(reference)
        except (ValueError, RecursionError):
            return [reference]
        if isinstance(found, list) and found and all(isinstance(each, str) for each in found):
            return found
    return [reference]

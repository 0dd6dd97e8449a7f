"""`json_schema`: 1 where the response is JSON that a schema allows, otherwise 0."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Final

from pydantic import Field, PrivateAttr, field_validator

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample
from honed.reward.verifiable.base import AgainstReference
from honed.reward.verifiable.fences import fenced_blocks
from honed.reward.verifiable.patterns import time_limit
from honed.reward.verifiable.schemas import make_validator, within

_NOT_JSON: Final = object()


class JsonSchema(AgainstReference):
    """Checks the response, or the last block of JSON in it, by the option's schema or else by the reference.

    See `schemas` for what is checked and how. A check that takes longer than `timeout_s` scores 0.

    With `partial` JSON that is not allowed scores the share of the properties that the schema's
    root names (`properties` and `required`) that are there if they are required, and are right if
    they are there: below 1, and 0 where the root names none.
    """

    document: dict[str, Any] | bool | None = Field(None, alias="schema", description="JSON schema. Unset: the reference.")
    fenced: bool = Field(True, description="Take the last fenced block of JSON, if there is one, for the response.")
    partial: bool = Field(False, description="Score a part of what is asked.")
    timeout_s: float = Field(0.5, gt=0, le=5, description="Seconds to check one response.")

    _validator: Any = PrivateAttr(None)

    @field_validator("document")
    @classmethod
    def _is_schema(cls, document: dict[str, Any] | bool | None) -> dict[str, Any] | bool | None:
        if document is not None:
            make_validator(document)
        return document

    def model_post_init(self, context: Any, /) -> None:
        """Prepares the check."""
        self._validator = None if self.document is None else make_validator(self.document)

    @property
    def needs_reference(self) -> bool:
        """Whether a sample without a reference is refused: not by a schema of the options."""
        return self.document is None and super().needs_reference

    def __call__(self, samples: Sequence[Sample]) -> list[float]:
        """Scores a batch; needs references only without a schema of its own."""
        if self._validator is None:
            return super().__call__(samples)
        limit_s = time_limit(self.timeout_s, samples)
        return [self._checked(self._validator, sample.response, limit_s) for sample in samples]

    def score_all(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See `AgainstReference`."""
        limit_s = time_limit(self.timeout_s, pairs)
        return [self._checked(_of(reference), response, limit_s) for response, reference in pairs]

    def score(self, response: str, reference: str) -> float:
        """See `AgainstReference`."""
        return self.score_all([(response, reference)])[0]

    def _checked(self, validator: Any, response: str, limit_s: float) -> float:
        value = self._read(response)
        if value is _NOT_JSON:
            return 0.0
        try:
            with within(limit_s):
                if validator.is_valid(value):
                    return 1.0
                return _share(validator, value) if self.partial else 0.0
        except (TimeoutError, RecursionError):
            return 0.0
        except ValueError as error:
            raise InvalidArgument("reference" if self._validator is None else "schema", str(error)) from error

    def _read(self, response: str) -> Any:
        blocks = fenced_blocks(response, ("json",)) if self.fenced else []
        try:
            return json.loads(blocks[-1] if blocks else response, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return _NOT_JSON


def _share(validator: Any, value: Any) -> float:
    schema = validator.schema
    names = {*schema.get("properties", ()), *schema.get("required", ())} if isinstance(schema, Mapping) else set()
    if not names or not isinstance(value, dict):
        return 0.0
    wrong = {error.absolute_path[0] for error in validator.iter_errors(value) if error.absolute_path}
    wrong |= set(schema.get("required", ())) - value.keys()
    right = len(names - wrong)
    return min(right, len(names) - 0.5) / len(names)  # all may be right beside a property that may not be there


@lru_cache(256)
def _of(reference: str) -> Any:
    try:
        return make_validator(json.loads(reference))
    except (ValueError, RecursionError) as error:
        raise InvalidArgument("reference", f"cannot be checked by: {error}") from error


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")

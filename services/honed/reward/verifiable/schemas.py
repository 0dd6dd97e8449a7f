"""JSON schemas whose check ends: jsonschema's validators with a time limit.

- The time is asked wherever a validator asks for a type, which nearly every keyword does. So a
  schema that refers to itself in several branches, whose cost doubles with each level of the
  document, is given up too.
- `pattern`, `patternProperties` and `additionalProperties` search by `patterns`, which gives up as
  well; jsonschema's own search by `re` and would not.
- `uniqueItems` takes a time that grows with the list; jsonschema's own compares each pair where
  items cannot be sorted.
- References (`$ref`) lead into the schema itself; nothing is fetched.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import Any, Final

from jsonschema import Draft202012Validator, ValidationError
from jsonschema.exceptions import SchemaError
from jsonschema.validators import extend, validator_for
from referencing import Registry
from referencing.exceptions import Unresolvable

from honed.reward.verifiable.patterns import compiled, found

_END: Final[ContextVar[float]] = ContextVar("end_of_check", default=float("inf"))  # seconds, monotonic
_LONGEST_S: Final = 60.0
_LONGEST_LIST: Final = 2000


def make_validator(schema: Any) -> Any:
    """A validator of a schema, in the draft that its `$schema` names (2020-12 by default); for use inside `within`.

    Raises:
        ValueError: It is no schema, or one that cannot be checked here; says why.
    """
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"a JSON schema is an object, not {type(schema).__name__}")
    try:
        kind = validator_for(schema, default=Draft202012Validator)
        # Without the draft's name: jsonschema goes on with its own class wherever it meets one.
        schema = {key: part for key, part in schema.items() if key != "$schema"} if isinstance(schema, Mapping) else schema
        parts = list(_objects(schema))
        for part in parts:
            _check(part)
        kind.check_schema(schema)
    except SchemaError as error:
        raise ValueError(f"no JSON schema: {error.json_path}: {error.message}") from error
    except RecursionError as error:
        raise ValueError("no JSON schema: nested too deeply") from error
    if {"unevaluatedProperties", "patternProperties"} <= {key for part in parts for key in part}:
        raise ValueError("unevaluatedProperties beside patternProperties is not supported: its search could not be given up")
    return _bounded(kind)(schema, registry=Registry())


@contextmanager
def within(limit_s: float) -> Iterator[None]:
    """Checks inside of the block take `limit_s` seconds at most.

    Raises:
        TimeoutError: The time was over before the check.
        ValueError: The schema refers to a part of it that is not there.
    """
    token = _END.set(time.monotonic() + limit_s)
    try:
        yield
    except Unresolvable as error:
        raise ValueError(f"the schema refers to what is not in it: {error}") from error
    finally:
        _END.reset(token)


@lru_cache(16)
def _bounded(kind: Any) -> Any:
    checker = kind.TYPE_CHECKER
    names = ("array", "boolean", "integer", "null", "number", "object", "string")
    keywords = {
        "pattern": _pattern,
        "patternProperties": _pattern_properties,
        "additionalProperties": _additional_properties,
        "uniqueItems": _unique_items,
    }
    return extend(
        kind, keywords, type_checker=checker.redefine_many({name: partial(_is_type, checker, name) for name in names})
    )


def _is_type(checker: Any, name: str, _: Any, instance: Any) -> bool:
    _left_s()
    return bool(checker.is_type(instance, name))


def _left_s() -> float:
    left = _END.get() - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _matches(pattern: str, text: str) -> bool:
    """Whether the pattern matches; TimeoutError, and not False, when the time is over: `not` may stand around it."""
    answer = found(_compiled(pattern), text, min(_left_s(), _LONGEST_S))
    _left_s()
    return answer


@lru_cache(256)
def _compiled(pattern: str) -> Any:
    return compiled(pattern)


def _pattern(validator: Any, pattern: str, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "string") and not _matches(pattern, instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


def _pattern_properties(validator: Any, patterns: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        for pattern, subschema in patterns.items():
            for key, value in instance.items():
                if _matches(pattern, key):
                    yield from validator.descend(value, subschema, path=key, schema_path=pattern)


def _additional_properties(validator: Any, allowed: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if validator.is_type(instance, "object"):
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for key, value in instance.items():
            if key not in named and not any(_matches(pattern, key) for pattern in patterns):
                if allowed is False:
                    yield ValidationError(f"the property {key!r} is not allowed")
                else:
                    yield from validator.descend(value, allowed, path=key)


def _unique_items(validator: Any, wanted: Any, instance: Any, schema: Any) -> Iterator[ValidationError]:
    if wanted and validator.is_type(instance, "array"):
        written = {json.dumps(_canonical(item), sort_keys=True) for item in instance}
        if len(written) < len(instance):
            yield ValidationError("items are not unique")


def _canonical(value: Any) -> Any:
    """The value so that equal JSON values are written the same: 1.0 is 1, and true is neither."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _canonical(part) for key, part in value.items()}
    return [_canonical(part) for part in value] if isinstance(value, list) else value


def _objects(schema: Any) -> Iterator[Mapping[str, Any]]:
    if isinstance(schema, Mapping):
        yield schema
        for part in schema.values():
            yield from _objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _objects(part)


def _check(part: Mapping[str, Any]) -> None:
    """Checks what `check_schema` leaves alone: patterns, where references lead, and what would escape the time limit."""
    if isinstance(part.get("$schema"), str):
        raise ValueError("$schema may only stand at the root")
    if any(isinstance(each, list) and len(each) > _LONGEST_LIST for each in part.values()):
        raise ValueError(f"a list of more than {_LONGEST_LIST} items, which older drafts compare in pairs")
    if isinstance(pattern := part.get("pattern"), str):
        compiled(pattern)
    if isinstance(patterns := part.get("patternProperties"), Mapping):
        for each in patterns:
            compiled(each)
    if isinstance(target := part.get("$ref"), str) and not target.startswith("#"):
        raise ValueError(f"$ref {target!r} leads out of the schema, and nothing is fetched: put it under $defs")

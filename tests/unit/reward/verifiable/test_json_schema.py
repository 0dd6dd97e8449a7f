"""`json_schema`, and checks that end."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from honed.kit.errors import InvalidArgument
from honed.reward.function_scorer import Sample, find_function
from honed.reward.verifiable.json_schema import JsonSchema
from honed.reward.verifiable.schemas import make_validator, within

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def score(response: str, schema: Any = PERSON, **options: Any) -> float:
    return JsonSchema(schema=schema, **options)([Sample("", response)])[0]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"name": "Ada", "age": 36}', 1),
        ('  {"name": "Ada", "age": 36}\n', 1),
        ('Here:\n```json\n{"name": "Ada", "age": 36}\n```\nDone.', 1),
        ('```json\n{}\n```\n```json\n{"name": "Ada", "age": 36}\n```', 1),
        ('Here: {"name": "Ada", "age": 36}', 0),
        ('{"name": "Ada"}', 0),
        ('{"name": "Ada", "age": -1}', 0),
        ('{"name": "Ada", "age": 36, "more": 1}', 0),
        ('{"name": "Ada", "age": NaN}', 0),
        ("[" * 100_000, 0),
        ('{"name": "Ada", "age": ' + "9" * 10_000 + "}", 0),
        ("", 0),
    ],
)
def test_a_response_is_json_that_the_schema_allows(response: str, expected: float) -> None:
    assert score(response) == expected


def test_the_schema_may_be_the_prompts_reference() -> None:
    assert JsonSchema()([Sample("", "3", '{"type":"integer"}'), Sample("", '"3"', '{"type":"integer"}')]) == [1.0, 0.0]
    for reference in ("{", '{"type": "nothing"}', "3", '{"$ref": "https://example.com/s.json"}', '{"pattern": "("}'):
        with pytest.raises(InvalidArgument, match="reference: cannot be checked by"):
            JsonSchema()([Sample("", "3", reference)])
    with pytest.raises(InvalidArgument, match="reference: the schema refers to what is not in it"):
        JsonSchema()([Sample("", "3", '{"$ref": "#/$defs/nowhere"}')])


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ('{"name": "Ada", "age": 36}', 1.0),
        ('{"name": "Ada"}', 0.5),
        ('{"name": "Ada", "age": "36"}', 0.5),
        ('{"name": "Ada", "age": 36, "more": 1}', 0.75),
        ("{}", 0.0),
        ("[]", 0.0),
        ("nothing", 0.0),
    ],
)
def test_a_part_of_what_is_asked_scores_a_part_where_that_is_wanted(response: str, expected: float) -> None:
    assert score(response, partial=True) == expected


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nothing"}, r"options\.schema: .*\$\.type"),
        ({"properties": {"a": {"pattern": "("}}}, r"options\.schema: .*no regular expression"),
        ({"$ref": "other.json"}, r"options\.schema: .*leads out of the schema"),
        ({"unevaluatedProperties": False, "patternProperties": {"a": True}}, r"options\.schema: .*not supported"),
        (
            {"$defs": {"a": {"$schema": "http://json-schema.org/draft-07/schema#"}}},
            r"options\.schema: .*only stand at the root",
        ),
        ({"enum": list(range(2001))}, r"options\.schema: .*more than 2000 items"),
        ("text", r"options\.schema"),
    ],
)
def test_a_schema_that_cannot_be_checked_is_refused_at_the_start(schema: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        find_function("s", "json_schema", {"schema": schema})


TREE = {"$defs": {"t": {"anyOf": [{"type": "array", "items": {"$ref": "#/$defs/t"}, "minItems": 2}] * 2}}, "$ref": "#/$defs/t"}


@pytest.mark.parametrize(
    ("schema", "response"),
    [
        ({"pattern": "(a|a|b?a)+$"}, json.dumps("a" * 5000 + "!")),
        ({"not": {"pattern": "(a|a|b?a)+$"}}, json.dumps("a" * 5000 + "!")),
        ({"patternProperties": {"(a|a|b?a)+$": False}, "additionalProperties": False}, json.dumps({"a" * 5000 + "!": 1})),
        (TREE, "[" * 200 + "]" * 200),
        (
            {"$schema": "http://json-schema.org/draft-07/schema#", "items": {"$ref": "#"}, "pattern": "(a|a|b?a)+$"},
            json.dumps(["a" * 5000 + "!"]),
        ),
        ({"type": "array", "uniqueItems": True}, json.dumps([{"n": n} for n in range(20_000)] * 2)),
    ],
)
def test_no_response_makes_a_check_take_long(schema: Any, response: str) -> None:
    start = time.monotonic()
    assert score(response, schema, timeout_s=0.2) == 0
    assert time.monotonic() - start < 3


@pytest.mark.parametrize(
    ("response", "unique"), [("[1, 1.0]", 0), ("[1, true]", 1), ('[{"a": 1, "b": 2}, {"b": 2, "a": 1.0}]', 0), ('["1", 1]', 1)]
)
def test_items_are_unique_as_the_standard_says(response: str, unique: float) -> None:
    assert score(response, {"uniqueItems": True}) == unique


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(-2, 2) | st.text(alphabet="ab", max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(alphabet="ab", max_size=2), inner, max_size=3),
    max_leaves=10,
)
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    {"uniqueItems": True},
    {"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": {"type": "string", "pattern": "^b*$"}},
    {"properties": {"a": True}, "patternProperties": {"b": True}, "additionalProperties": False},
]


@settings(max_examples=300, deadline=None)
@given(JSON, st.sampled_from(SCHEMAS))
def test_our_keywords_say_what_jsonschemas_say(value: Any, schema: dict[str, Any]) -> None:
    import jsonschema

    with within(5.0):
        assert make_validator(schema).is_valid(value) == jsonschema.Draft202012Validator(schema).is_valid(value)


@settings(max_examples=200, deadline=None)
@given(st.text() | JSON.map(json.dumps) | st.text(alphabet='{}[]",:1a`json\n', max_size=60), st.booleans())
def test_any_text_can_be_scored(response: str, partial: bool) -> None:
    assert 0.0 <= score(response, partial=partial) <= 1.0

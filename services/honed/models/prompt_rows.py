"""A prompt as JSON lines write it: `text`, `token_ids` or `messages`, and a `reference` for scorers where there is one."""

from __future__ import annotations

import json
from typing import Any, Final

from honed.kit.errors import InvalidArgument
from honed.v1 import generation_pb2

ROW = "prompt"
"""The field of an error that concerns no single field of a row."""
REFERENCE_BYTES: Final = 65_536
"""Of a reference as UTF-8, at most: it is copied into each rollout of its prompt, and those wait in Redis."""
_MOST_ID = (1 << 32) - 1


def check_row(row: dict[str, Any]) -> str:
    """Which of `text`, `token_ids` and `messages` a row has; a key that is null is not there.

    Raises:
        InvalidArgument: none, several, or one of the wrong shape; or a reference that cannot be.
    """
    row_reference(row)
    given = [name for name in ("text", "token_ids", "messages") if row.get(name) is not None]
    if len(given) != 1:
        raise InvalidArgument(ROW, "needs `text`, `token_ids` or `messages`" + (", one of them" if given else ""))
    kind, value = given[0], row[given[0]]
    if kind == "text" and not isinstance(value, str):
        raise InvalidArgument(kind, "must be a string")
    if kind == "token_ids" and not isinstance(value, list):
        raise InvalidArgument(kind, "must be a list of token ids")
    if kind == "messages" and not (isinstance(value, list) and value and all(_is_message(each) for each in value)):
        raise InvalidArgument(kind, "must be a list of objects with the strings `role` and `content`")
    texts = [value] if kind == "text" else [each["content"] for each in value] if kind == "messages" else []
    if any(not _is_unicode(text) for text in texts):
        raise InvalidArgument(kind, "holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return kind


def row_reference(row: dict[str, Any]) -> str:
    """What scorers compare responses with: `reference` as it stands if it is a string, otherwise as compact JSON; or empty.

    Raises:
        InvalidArgument: it is longer than `REFERENCE_BYTES`, or is no text.
    """
    value = row.get("reference")
    if value is None:
        return ""
    try:
        text = (
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        )
    except ValueError as error:
        raise InvalidArgument("reference", "holds NaN or Infinity, which are no JSON") from error
    if not _is_unicode(text):
        raise InvalidArgument("reference", "holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    if (size := len(text.encode())) > REFERENCE_BYTES:
        raise InvalidArgument("reference", f"has {size} bytes, and {REFERENCE_BYTES} are the most: shorten it")
    return text


def row_response(row: dict[str, Any]) -> str:
    """The response of a row that demonstrates one, beside its prompt.

    Raises:
        InvalidArgument: there is none, or it is no text.
    """
    response = row.get("response")
    if not isinstance(response, str) or not response:
        raise InvalidArgument("response", "must be a string that is not empty: what the model should answer")
    if not _is_unicode(response):
        raise InvalidArgument("response", "holds half a surrogate pair (\\ud800 to \\udfff), which is no text")
    return response


def row_prompt(row: dict[str, Any]) -> generation_pb2.Prompt:
    """The prompt of a row, for an RPC; raises as `check_row` does."""
    prompt = _content(row)
    prompt.reference = row_reference(row)
    return prompt


def _content(row: dict[str, Any]) -> generation_pb2.Prompt:
    kind = check_row(row)
    if kind == "text":
        return generation_pb2.Prompt(text=row["text"])
    if kind == "messages":
        messages = [generation_pb2.ChatMessage(role=each["role"], content=each["content"]) for each in row["messages"]]
        return generation_pb2.Prompt(messages=generation_pb2.ChatMessages(messages=messages))
    ids = row["token_ids"]
    if not all(type(token) is int and 0 <= token <= _MOST_ID for token in ids):
        raise InvalidArgument(kind, "must hold token ids, which are whole numbers from 0 on")
    return generation_pb2.Prompt(token_ids=generation_pb2.TokenIds(ids=ids))


def at_line(path: object, number: int, error: InvalidArgument) -> ValueError:
    """The error of a row, with where it stands."""
    return ValueError(f"{path}, line {number}: {error.reason if error.field == ROW else error}")


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

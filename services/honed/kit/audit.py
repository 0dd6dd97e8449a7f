"""Who changed how the system runs: one log line for each call of a control scope, refused ones included.

The lines are records of the logger `honed.audit`, JSON like all others: `caller` is the name of the
token, `code` the status that the call ended with, `request` what was asked. A pseudonym that is to
be forgotten is left out, and so are idempotency keys, which may hold one.
"""

from __future__ import annotations

import logging
from typing import Any

from google.protobuf import json_format
from google.protobuf.message import Message

from honed.kit.scopes import SCOPES, is_control

LOGGER = "honed.audit"

_LEFT_OUT = frozenset({"annotator", "idempotency_key"})
_LONGEST = 200

_logger = logging.getLogger(LOGGER)


def is_audited(method: str) -> bool:
    """Tells whether calls of the method are in the audit log."""
    return is_control(SCOPES.get(method) or "")


def record(method: str, caller: str, code: str, request: Message | None) -> None:
    """Logs one call.

    Args:
        method: its full name.
        caller: the name of its token.
        code: the name of the status that it ended with.
        request: what was asked; None when it was refused unread.
    """
    asked = {} if request is None else _fields(request)
    _logger.info("control call", extra={"caller": caller, "method": method, "code": code, "request": asked})


def _fields(request: Message) -> dict[str, Any]:
    return _shortened(json_format.MessageToDict(request, preserving_proto_field_name=True))  # type: ignore[no-any-return]


def _shortened(value: Any) -> Any:
    """Names and numbers as they are. Of lists, such as submitted prompts, the length: their texts have no business here."""
    match value:
        case dict():
            return {name: _shortened(part) for name, part in value.items() if name not in _LEFT_OUT}
        case list():
            return f"{len(value)} items"
        case str() if len(value) > _LONGEST:
            return value[:_LONGEST] + "…"
        case _:
            return value

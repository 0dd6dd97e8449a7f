"""The details of a failed call (google.rpc.Status), read with protobuf alone.

The few messages are declared here, in a descriptor pool of their own, so that a client needs no package with google's stubs and
clashes with none that is there. Field numbers are those of google/rpc/status.proto and google/rpc/error_details.proto; on the
wire Any and Duration are messages like others.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

_TRAILER: Final = "grpc-status-details-bin"
_Field = descriptor_pb2.FieldDescriptorProto
_SCHEMA: Final[dict[str, tuple[tuple[str, int, int | str], ...]]] = {
    "Any": (("type_url", 1, _Field.TYPE_STRING), ("value", 2, _Field.TYPE_BYTES)),
    "Duration": (("seconds", 1, _Field.TYPE_INT64), ("nanos", 2, _Field.TYPE_INT32)),
    "Status": (("code", 1, _Field.TYPE_INT32), ("message", 2, _Field.TYPE_STRING), ("details", 3, "Any*")),
    "RetryInfo": (("retry_delay", 1, "Duration"),),
    "FieldViolation": (("field", 1, _Field.TYPE_STRING), ("description", 2, _Field.TYPE_STRING)),
    "BadRequest": (("field_violations", 1, "FieldViolation*"),),
    "RequestInfo": (("request_id", 1, _Field.TYPE_STRING),),
    "ErrorInfo": (("reason", 1, _Field.TYPE_STRING), ("domain", 2, _Field.TYPE_STRING)),
}
"""Fields as (name, number, type); a type in words is another message, with a star for many."""


@dataclass(frozen=True)
class Details:
    """What a service says of a failed call beside its code and message.

    Attributes:
        field: path of the wrong field in the request; empty if no field is to blame.
        retry_after_s: when to come back, seconds; None if the service did not say.
        request_id: under which the service's log has the call.
        reason: class of the error in honed; empty if the error came from elsewhere, such as a broken connection.
    """

    field: str = ""
    retry_after_s: float | None = None
    request_id: str = ""
    reason: str = ""


def read_details(trailing_metadata: Iterable[Any] | None) -> Details:
    """Reads the details from a call's trailing metadata, pairs of name and value; what is missing keeps its default."""
    raw = next((value for name, value in trailing_metadata or () if name == _TRAILER), b"")
    found: dict[str, Any] = {}
    try:
        status = _MESSAGES["Status"].FromString(raw if isinstance(raw, bytes) else raw.encode())
        for detail in status.details:
            kind = detail.type_url.rpartition(".")[2]
            if kind in _MESSAGES:
                found[kind] = _MESSAGES[kind].FromString(detail.value)
    except DecodeError:
        return Details()
    retry, bad, info = found.get("RetryInfo"), found.get("BadRequest"), found.get("ErrorInfo")
    return Details(
        field=bad.field_violations[0].field if bad is not None and bad.field_violations else "",
        retry_after_s=retry.retry_delay.seconds + retry.retry_delay.nanos / 1e9 if retry is not None else None,
        request_id=found["RequestInfo"].request_id if "RequestInfo" in found else "",
        reason=info.reason if info is not None and info.domain == "honed.v1" else "",
    )


def _declare() -> dict[str, Any]:
    package = "honed.details"
    file = descriptor_pb2.FileDescriptorProto(name="honed/details.proto", package=package, syntax="proto3")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field_name, number, kind in fields:
            field = message.field.add(name=field_name, number=number, label=_Field.LABEL_OPTIONAL)
            if isinstance(kind, str):
                field.type, field.type_name = _Field.TYPE_MESSAGE, f".{package}.{kind.rstrip('*')}"
                field.label = _Field.LABEL_REPEATED if kind.endswith("*") else _Field.LABEL_OPTIONAL
            else:
                field.type = _Field.Type.ValueType(kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.{name}")) for name in _SCHEMA}


_MESSAGES: Final = _declare()

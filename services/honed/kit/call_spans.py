"""The spans of gRPC calls, with the names and attributes of OpenTelemetry's semantic conventions for RPC."""

from __future__ import annotations

from typing import Final, Literal

import grpc

from honed.kit import trace_context, tracing
from honed.kit.tracing import Span

_SERVERS_FAULT: Final = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Codes that say that a server failed; the others say that its caller did, and are errors of the caller's span alone."""
_LOOKS: Final = ("Get", "List")
"""What people's terminals and dashboards ask every second would be most of the traces."""
_NUMBERS: Final = {code.name: int(code.value[0]) for code in grpc.StatusCode}


def begin_call(method: str, kind: Literal["server", "client"]) -> Span:
    """The span of a call. A server's begins a trace where its caller had none, unless it only looks; a client's never does.

    Args:
        method: Full name, `/package.Service/Method`.
        kind: Which side this is.
    """
    parent = trace_context.current.get()
    service, _, name = method.lstrip("/").rpartition("/")
    if not tracing.is_on() or (parent is None and (kind == "client" or name.startswith(_LOOKS))):
        return tracing.NOTHING if parent is None else Span(parent)
    attributes = {"rpc.system": "grpc", "rpc.service": service, "rpc.method": name}
    return tracing.begin(f"{service}/{name}", parent, head=True, kind=kind, attributes=attributes)


def end_call(span: Span, kind: Literal["server", "client"], code: str) -> None:
    """Ends the span of a call under its status code's name."""
    if not span.recorded:
        return
    span.set({"rpc.grpc.status_code": _NUMBERS.get(code, _NUMBERS["UNKNOWN"])})
    if code != "OK" and (kind == "client" or code in _SERVERS_FAULT):
        span.fail(code)
    span.end()

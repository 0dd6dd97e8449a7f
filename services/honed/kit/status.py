"""From an exception to the rich gRPC status that the caller gets, and back."""

from __future__ import annotations

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from honed.kit.errors import HonedError, InvalidArgument, Overloaded

DOMAIN = "honed.v1"


def rich_status(error: Exception, request_id: str) -> grpc.Status:
    """Builds the status of a failed call.

    Every status carries ErrorInfo (the error's class as the reason) and RequestInfo; a wrong field adds BadRequest, overload
    adds RetryInfo. What is not ours becomes INTERNAL without its text: that is in the log, under the same request id.
    """
    details = [_packed(error_details_pb2.RequestInfo(request_id=request_id))]
    if isinstance(error, TimeoutError):
        code, message, reason = (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "the call did not end before its deadline",
            "DeadlineExceeded",
        )
    elif isinstance(error, HonedError):
        code, message, reason = error.code, str(error), type(error).__name__
    else:
        code, reason = grpc.StatusCode.INTERNAL, "Internal"
        message = f"internal error; the service's log has it under request id {request_id}"
    details.append(_packed(error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)))
    if isinstance(error, InvalidArgument):
        violation = error_details_pb2.BadRequest.FieldViolation(field=error.field, description=error.reason)
        details.append(_packed(error_details_pb2.BadRequest(field_violations=[violation])))
    if isinstance(error, Overloaded):
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(_packed(error_details_pb2.RetryInfo(retry_delay=delay)))
    status: grpc.Status = rpc_status.to_status(status_pb2.Status(code=code.value[0], message=message, details=details))
    return status


def error_info_reason(error: grpc.RpcError) -> str:
    """The class name of the honed error behind a failed call, empty if it came from elsewhere."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info) and info.domain == DOMAIN:
            return str(info.reason)
    return ""


def retry_after_s(error: grpc.RpcError) -> float | None:
    """When a service that is full asks to come back, seconds; None if it does not say."""
    status = rpc_status.from_call(error)
    for detail in status.details if status is not None else ():
        info = error_details_pb2.RetryInfo()
        if detail.Is(info.DESCRIPTOR) and detail.Unpack(info):
            return float(info.retry_delay.ToTimedelta().total_seconds())
    return None


def _packed(detail: Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed

"""Errors that a caller can act on, one class for each gRPC status that honed answers with.

Domain code raises these; the server's interceptor turns them into rich statuses (google.rpc error details). Each message says
what was wrong, where, and what to do about it.
"""

from __future__ import annotations

import errno
from typing import ClassVar, Final

import grpc

_PASSING_CODES: Final = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.ABORTED,
        grpc.StatusCode.CANCELLED,
    }
)
# What a call ends with whose server is killed under it, now and then.
_BROKEN_CALL: Final = frozenset({grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL})
_PASSING_ERRNO: Final = frozenset(
    {errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN, errno.EIO, errno.ESTALE}
)


class HonedError(Exception):
    """An error with a gRPC status. The message is for the caller: no secrets, no stack."""

    code: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL


class InvalidArgument(HonedError):
    """A field of the request is wrong."""

    code = grpc.StatusCode.INVALID_ARGUMENT

    def __init__(self, field: str, reason: str) -> None:
        """`field` is the path in the request, for example `sampling.max_tokens`."""
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class Unauthenticated(HonedError):
    """No token, or one that nobody issued."""

    code = grpc.StatusCode.UNAUTHENTICATED


class PermissionDenied(HonedError):
    """A valid token without the scope that the call needs."""

    code = grpc.StatusCode.PERMISSION_DENIED

    def __init__(self, reason: str, caller: str = "") -> None:
        """`caller` is the name of the token, for the audit log."""
        super().__init__(reason)
        self.caller = caller


class NotFound(HonedError):
    """The named thing does not exist."""

    code = grpc.StatusCode.NOT_FOUND


class Conflict(HonedError):
    """The named thing exists already, with other content."""

    code = grpc.StatusCode.ALREADY_EXISTS


class FailedPrecondition(HonedError):
    """The system is not in the state that the call needs; retrying alone does not help."""

    code = grpc.StatusCode.FAILED_PRECONDITION


class Aborted(HonedError):
    """The operation was undone; the state before it holds."""

    code = grpc.StatusCode.ABORTED


class Overloaded(HonedError):
    """No room now; try again after `retry_after_s` seconds."""

    code = grpc.StatusCode.RESOURCE_EXHAUSTED

    def __init__(self, reason: str, retry_after_s: float = 1.0) -> None:
        """`retry_after_s` goes out as google.rpc.RetryInfo."""
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Unavailable(HonedError):
    """A part is not reachable or not ready; a retry is safe."""

    code = grpc.StatusCode.UNAVAILABLE


class DeadlineExceeded(HonedError):
    """The work did not end in time."""

    code = grpc.StatusCode.DEADLINE_EXCEEDED


class DataLoss(HonedError):
    """Stored bytes are missing or are not what their digest says."""

    code = grpc.StatusCode.DATA_LOSS


class Unimplemented(HonedError):
    """The contract has this call; this build does not serve it yet."""

    code = grpc.StatusCode.UNIMPLEMENTED


def may_pass(error: BaseException) -> bool:
    """Whether what failed may succeed later without anybody's changing it: a part does not answer, or a resource is short.

    What the data or the settings are to blame for does not pass. A group passes if all of its errors do.
    """
    if isinstance(error, BaseExceptionGroup):
        return all(may_pass(part) for part in error.exceptions)
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in _PASSING_CODES | _BROKEN_CALL
    if isinstance(error, HonedError):
        return error.code in _PASSING_CODES
    if isinstance(error, (TimeoutError, ConnectionError)):
        return True
    return isinstance(error, OSError) and error.errno in _PASSING_ERRNO


def root_cause(error: BaseException) -> BaseException:
    """The first error inside groups of errors: what a person wants to read."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
